"""Does a sweep survive what clusters do? Every fault of the table, many times, on a sweep of 16 SAEs and one second.

    python scripts/torture.py                                 # the full table: about an hour of one core
    python scripts/torture.py --quick                         # a few trials of each, as the test suite runs it
    python scripts/torture.py --json FILE --minutes 10        # a part of it; called again, it goes on from FILE
    python scripts/torture.py --only SIGKILL                  # one row
    python scripts/torture.py --document FILE                 # the rows of FILE as the table of docs/trust.md

Linux. Small disks are mounted, which takes root: without it those rows say that they were not run. The command itself
and the W&B it talks to are real processes; the trials are in tests/faults.py and tests/faults_inside.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests")]

import faults  # noqa: E402
import faults_inside as inside  # noqa: E402

from sae_sweep.registry import kinds  # noqa: E402

PENALTIES = tuple(kinds("penalty"))
PAGE = ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- made by scripts/torture.py -->", "<!-- until here -->"

Trial = Callable[[faults.Bench, Path, int, random.Random], None]


@dataclass(frozen=True)
class Fault:
    """A row of the table: so many trials of it, `quick` of them in the test suite."""

    name: str
    holds: str
    trials: int
    quick: int
    trial: Trial | None = None
    # In place of single trials: all of them at once.
    together: Callable[[faults.Bench, Path, int], None] | None = None


SAME = "no finished point lost or retrained; the rerun's table equal to an undisturbed one, bit for bit"
STOPS = f"exit 75 (SIGINT 130), the line that resumes; {SAME}"
EARLIER = "read, nothing of it trained again; one of another training refused under its name, with what to do"
FAULTS = [
    Fault("SIGKILL", SAME, 200, 4, partial(faults.stopped, signal.SIGKILL)),
    Fault("SIGTERM", STOPS, 50, 2, partial(faults.stopped, signal.SIGTERM)),
    Fault("SIGINT", STOPS, 50, 2, partial(faults.stopped, signal.SIGINT)),
    Fault("SIGUSR2", STOPS, 50, 2, partial(faults.stopped, signal.SIGUSR2)),
    Fault("training until a plateau, SIGKILL", SAME, 10, 1, partial(faults.stopped_while_settling, signal.SIGKILL)),
    Fault("training until a plateau, SIGTERM", STOPS, 10, 1, partial(faults.stopped_while_settling, signal.SIGTERM)),
    Fault(
        "two processes on one store", "no error, no damaged file, the same table", 50, 2, partial(faults.in_company, 2)
    ),
    Fault(
        "eight processes on one store",
        "no error, no damaged file, the same table",
        50,
        1,
        partial(faults.in_company, 8),
    ),
    Fault("disk full", f"exit 4, one line; {SAME} once there is room", 30, 1, faults.full_disk),
    Fault("store read-only", f"exit 2 or 4, one line; {SAME} once it may be written", 30, 1, faults.read_only),
    Fault("store deleted or moved away", f"exit 4, one line; {SAME}", 30, 1, faults.deleted),
    Fault(
        f"damaged file, each of {len(inside.KINDS)} kinds",
        "named, set aside, recomputed (the tables written for people: written anew); the same table and weights",
        20 * len(inside.KINDS),
        len(inside.KINDS),
        inside.damaged,
    ),
    Fault(
        "NaN or infinity in training, every penalty",
        "the point is marked failed with step and reason; its pack-mate's bits are those it has alone",
        2 * len(inside.CAUSES),
        len(PENALTIES),
        inside.overflow,
    ),
    Fault("out of memory, pretended", "packs are halved, the same table", 20, 2, inside.pretended),
    Fault(
        "out of memory, real (RLIMIT_AS)",
        "packs are halved down to single points, which fail with that reason; what is finished has the same weights",
        30,
        1,
        inside.ulimit,
    ),
    Fault(
        "hostile or silly overrides", "valid, or exit 2 and one line; nothing written", 2000, 150, None, inside.silly
    ),
    Fault("store of an earlier version", EARLIER, 10, 2, inside.older),
    Fault("store of a later version", "exit 4, one line with what to do; nothing is touched", 20, 2, inside.newer),
    Fault("W&B " + ", ".join(inside.LETDOWNS), "exit 0, the same table", 4 * len(inside.LETDOWNS), 2, inside.wandb),
]


def run(fault: Fault, row: dict[str, Any], trials: int, bench: faults.Bench, seed: int, until: float) -> dict[str, Any]:
    """A row with more trials, up to so many, one after the other, none begun after `until`.

    A trial that fails is said with its traceback, and the rest go on.
    """
    begin, done, failures, note = time.monotonic(), row["trials"], row["failures"], ""
    while done < trials and time.monotonic() < until and not note:
        folder = Path(tempfile.mkdtemp(dir=bench.place))
        chance = random.Random(f"{seed} {fault.name} {done}")
        try:
            if fault.trial:
                fault.trial(bench, folder, done, chance)
            elif fault.together:
                fault.together(bench, folder, trials)
        except faults.Unavailable as reason:
            note = str(reason)
        except Exception:
            failures += 1
            print(f"{fault.name}, trial {done}, seed {seed}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        done += 0 if note else trials if fault.together else 1
    seconds = round(row["seconds"] + time.monotonic() - begin, 1)
    return row | {"trials": done, "failures": failures, "seconds": seconds, "not_run": note}


def machine() -> str:
    """The hardware in words."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    usable = len(os.sched_getaffinity(0))
    return f"{usable} of {os.cpu_count()} cores, {(names or [platform.machine()])[0]}, no GPU used"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as markdown, in the order of FAULTS."""
    lines = ["| fault | must hold | trials | failures |", "|---|---|---|---|"]
    places = {fault.name: i for i, fault in enumerate(FAULTS)}
    for row in sorted(rows, key=lambda row: places.get(row["fault"], len(places))):
        trials = row["trials"] if not row["not_run"] else f"not run: {row['not_run']}"
        lines.append(f"| {row['fault']} | {row['must_hold']} | {trials} | {row['failures']} |")
    hardware = " and ".join(dict.fromkeys(row["machine"] for row in rows))
    minutes = sum(row["seconds"] for row in rows) / 60
    return "\n".join([*lines, "", f"({hardware}; {minutes:.0f} minutes in all, other work running beside it.)"])


def document(rows: Sequence[dict[str, Any]]) -> None:
    """Put the table into its page."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> int:
    """Exit code 1 if any trial failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few trials of each fault")
    parser.add_argument("--only", action="append", metavar="FAULT", help="rows whose name begins so")
    parser.add_argument("--trials", type=int, help="so many of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows there, and go on from those it holds")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no trial after so many")
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="write the rows of FILE into docs/trust.md, no more"
    )
    words = parser.parse_args()
    if words.document:
        document(json.loads(words.document.read_text()))
        return 0
    chosen = [fault for fault in FAULTS if not words.only or fault.name.startswith(tuple(words.only))]
    if not chosen:
        parser.error(f"no such fault; there are: {', '.join(fault.name for fault in FAULTS)}")
    known = json.loads(words.json.read_text()) if words.json and words.json.exists() else []
    rows = {row["fault"]: row for row in known}
    until = time.monotonic() + 60 * words.minutes
    with tempfile.TemporaryDirectory() as place:
        bench = faults.Bench(Path(place))
        for fault in chosen:
            fresh = {"fault": fault.name, "trials": 0, "failures": 0, "must_hold": fault.holds, "seconds": 0.0}
            fresh |= {"machine": machine(), "seed": words.seed}
            trials = words.trials or (fault.quick if words.quick else fault.trials)
            rows[fault.name] = run(fault, rows.get(fault.name, fresh), trials, bench, words.seed, until)
            said = "{fault}: {trials} trials, {failures} failures, {seconds} s".format(**rows[fault.name])
            print(said, file=sys.stderr, flush=True)
            if words.json:
                words.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    print(table([rows[fault.name] for fault in chosen]))
    return int(any(rows[fault.name]["failures"] for fault in chosen))


if __name__ == "__main__":
    sys.exit(main())
