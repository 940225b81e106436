"""What happens to a run on somebody else's machine, one trial at a time: `scripts/torture.py` runs them by the hundred.

A trial takes a Bench, an empty folder, its number and a random generator, and asserts what must hold whatever happened:
nothing finished is lost or made again, and the table of a rerun is that of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from commandline import SEVERAL, Forked, Result, assert_same_tables

from sae_sweep.store.store import Store

POINTS = 16
WORDS = ["run", "--json", *SEVERAL]
# The same, each SAE trained until it has settled: SAEs of one pack stop at steps of their own.
SETTLING = [word for word in WORDS if not word.startswith("training.steps=")]
SETTLING += ["training.until=plateau", "training.steps=1600", "training.schedule=constant", "training.lr=1e-2"]
RESUME = "interrupted: finished points are kept; resume with: sae-sweep "
STOPPED = {signal.SIGKILL: -9, signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGUSR2: 75}
# Every so many trials the command starts as a user starts it: a fresh interpreter, stopped also while it loads.
FRESH_EVERY = 10


class Unavailable(Exception):
    """The trial needs what this machine does not offer; why."""


class Bench:
    """What the trials of one sweep compare with, made once."""

    def __init__(self, place: Path, words: Sequence[str] = WORDS) -> None:
        self.place, self.words = place, list(words)

    @cached_property
    def settling(self) -> Bench:
        """The bench of SETTLING."""
        return Bench(self.place, SETTLING)

    @cached_property
    def undisturbed(self) -> Path:
        """The output directory of the sweep, run in one go."""
        folder = Path(tempfile.mkdtemp(dir=self.place))
        end = Forked(self.words, folder).wait(600)  # the first may compile what it trains with
        assert end.code == 0, end.err
        return folder / "outputs"

    @cached_property
    def pace(self) -> float:
        """Seconds that the sweep takes in a forked process."""
        assert self.undisturbed  # starts the server that forks
        begin = time.monotonic()
        assert Forked(self.words, Path(tempfile.mkdtemp(dir=self.place))).wait().code == 0
        return time.monotonic() - begin

    @cached_property
    def fresh_pace(self) -> float:
        """The same, loading included."""
        folder, begin = Path(tempfile.mkdtemp(dir=self.place)), time.monotonic()
        assert Fresh(self.words, folder).wait().code == 0
        return time.monotonic() - begin


class Fresh:
    """The command in an interpreter of its own; returns once it listens to signals, long before it has loaded."""

    def __init__(self, words: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sae_sweep", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        status = Path(f"/proc/{self.process.pid}/status")
        while not _catches(status, signal.SIGTERM):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.001)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 180) -> Result:
        out, err = self.process.communicate(timeout=timeout)
        return Result(self.process.returncode, out, err.decode())


def _catches(status: Path, number: signal.Signals) -> bool:
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def identities(root: Path, kind: str = "points") -> dict[str, int]:
    """Finished id → its folder's inode: another one means that it was made again."""
    return {id: (root / kind / id).stat().st_ino for id in Store(root).ids(kind)}


def intact(root: Path) -> None:
    """Every byte of what is finished is what was written."""
    store = Store(root)
    for kind in ("toys", "points"):
        ids = store.ids(kind)
        assert set(store.records(kind, ids, "everything")) == ids
    assert store.damaged == []


def resumes(folder: Path, bench: Bench, root: Path | None = None) -> Result:
    """Run the sweep to its end in `folder`; nothing finished is made again, and the table is the undisturbed one."""
    root = root or folder / "outputs"
    before = identities(root)
    intact(root)
    end = Forked([*bench.words, f"output_dir={root}"], folder / "rerun").wait()
    assert end.code == 0, end.err
    found = json.loads(end.out)
    assert (found["ran"], found["skipped"], found["failed"]) == (POINTS - len(before), len(before), 0), found
    assert before.items() <= identities(root).items(), "a finished point was made again"
    assert list(root.rglob(".tmp-*")) == []
    assert_same_tables(root, bench.undisturbed, "several")
    return end


def one_line(end: Result, *codes: int) -> str:
    """The line that says why it ended, with one of these exit codes."""
    assert end.code in codes, (end.code, end.err)
    assert "Traceback" not in end.err, end.err
    assert end.out == ""
    last = end.err.splitlines()[-1]
    assert last.startswith("error: "), end.err
    return last


# Stopped


def stopped(number: signal.Signals, bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """A signal at a random moment."""
    fresh = trial % FRESH_EVERY == FRESH_EVERY - 1
    process = (Fresh if fresh else Forked)(bench.words, folder)
    time.sleep(chance.uniform(0, bench.fresh_pace if fresh else bench.pace))
    process.send(number)
    end = process.wait()
    assert end.code in (STOPPED[number], 0), (end.code, end.err)
    assert "Traceback" not in end.err, end.err
    if end.code > 0:
        assert end.err.splitlines()[-1] == RESUME + " ".join(bench.words), end.err
        assert end.out == ""
    resumes(folder, bench)


def stopped_while_settling(
    number: signal.Signals, bench: Bench, folder: Path, trial: int, chance: random.Random
) -> None:
    """The same, where each SAE is trained until it has settled."""
    stopped(number, bench.settling, folder, trial, chance)


def in_company(processes: int, bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """Several processes run the same sweep on one store, beginning at random moments."""
    words = [*WORDS, f"output_dir={folder / 'outputs'}"]
    company = []
    for i in range(processes):
        company.append(Forked(words, folder / str(i)))
        time.sleep(chance.uniform(0, bench.pace / processes))
    for process in company:
        end = process.wait(120)
        assert end.code == 0, end.err
        found = json.loads(end.out)
        assert (found["points"], found["ran"] + found["skipped"], found["failed"]) == (POINTS, POINTS, 0)
    intact(folder / "outputs")
    assert list((folder / "outputs").rglob(".*")) == []
    assert_same_tables(folder / "outputs", bench.undisturbed, "several")


# The disk


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of that size; Unavailable where one may not be mounted."""
    place.mkdir(parents=True)
    mount(["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)])
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def mount(words: list[str]) -> None:
    end = subprocess.run(["mount", *words], capture_output=True, text=True)
    if end.returncode:
        raise Unavailable(f"may not mount a disk here: {end.stderr.strip()}")


def full_disk(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """The disk fills up at a random point, and later there is more room."""
    with small_disk(folder / "disk", chance.randint(24, 360)) as disk:
        end = Forked([*WORDS, f"output_dir={disk}"], folder).wait()
        assert one_line(end, 4).endswith(": No space left on device")
        finished = identities(disk)
        assert len(finished) < POINTS
        intact(disk)
        mount(["-o", "remount,size=64m", str(disk)])
        resumes(folder, bench, disk)


def read_only(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """The disk may be read only: from the beginning, or from a random moment on."""
    with small_disk(folder / "disk", 65536) as disk:
        if trial % 2:
            part = Forked([*WORDS, "--shard", "0/2", f"output_dir={disk}"], folder).wait()
            assert part.code == 0
            mount(["-o", "remount,ro", str(disk)])
            assert "Read-only file system" in one_line(Forked([*WORDS, f"output_dir={disk}"], folder).wait(), 2, 4)
        else:
            process = Forked([*WORDS, f"output_dir={disk}"], folder)
            time.sleep(chance.uniform(0, bench.pace))
            with suppress(Unavailable):  # a file is open for writing at this very moment
                while True:
                    busy = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
                    if not busy.returncode:
                        break
            end = process.wait()
            if end.code:
                assert "Read-only file system" in one_line(end, 2, 4)
        mount(["-o", "remount,rw", str(disk)])
        resumes(folder, bench, disk)


def deleted(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """The whole store is removed, or moved away, at a random moment of a run."""
    root = folder / "outputs"
    process = Forked(WORDS, folder)
    time.sleep(chance.uniform(0, bench.pace))
    with suppress(FileNotFoundError):  # nothing was written yet
        if trial % 2:
            root.rename(folder / "elsewhere")
        else:
            shutil.rmtree(root, ignore_errors=True)
    end = process.wait()
    if end.code:
        one_line(end, 4)
    if (folder / "elsewhere").exists():
        intact(folder / "elsewhere")
    resumes(folder, bench)


def environment_of(server: str) -> dict[str, str]:
    """Variables that send W&B to a server of ours, with a key of the right form."""
    keep: dict[str, Any] = {"WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40, "WANDB_HTTP_TIMEOUT": "2"}
    return keep
