"""How long the command line takes before any SAE is trained: help, planning 100,000 points, a rerun of what is done.

    python scripts/bench_commands.py

Also rows of scripts/bench_peers.py.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

from sae_sweep.cli import run as commands
from sae_sweep.config import overrides as config
from sae_sweep.config.settings import canonical
from sae_sweep.store.store import Store

PLANNED, FINISHED, REPEATS = 100_000, 10_000, 3
# The smallest points there are: what is timed is everything else.
TINY = ("toy=small", "toy.steps=1", "training.steps=1", "sae.width=2", "sae.init=random", "device=cpu", "logger=none")
GRID = ("penalty=l1", "penalty.coefficient=1")


def finished_store(root: Path, points: int) -> list[str]:
    """A store that holds a grid of so many points: one trained, the others its copies. Returns the overrides."""
    overrides = [*TINY, *GRID, f"output_dir={root}"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        commands.run(overrides, None, False, True, commands.Output(json=True))
    store = Store(root)
    (trained,) = store.ids("points")
    record = store.read_record("points", trained)
    files = {name: store.read("points", trained, name) for name in record["checksums"]}
    overrides.append(f"seed=range(0,{points})")
    with patch("os.fsync"):  # ten thousand flushes would take longer than everything that is timed
        for point in config.load(overrides, yes=True).points:
            own = {"id": point.id, "settings": canonical(point).to_dict()}
            store.commit("points", point.id, record | own, files)
    return overrides


def seconds(arguments: Sequence[str]) -> float:
    """Median time of a `sae-sweep` command, Python's start included; after one that fills the caches.

    One that takes seconds is timed but once more.
    """

    def once() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sae_sweep", *arguments], check=True, capture_output=True)
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(REPEATS if once() < 1 else 1))


def measure(say: Callable[[str], None]) -> dict[str, float]:
    """Seconds of each command."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        say("help")
        results["sae-sweep --help"] = seconds(["--help"])
        say(f"a plan of {PLANNED:,} points")
        grid = [*TINY, *GRID, f"seed=range(0,{PLANNED})", f"output_dir={root / 'empty'}"]
        results[f"plan of {PLANNED:,} points"] = seconds(["plan", "--yes", *grid])
        say(f"a rerun of {FINISHED:,} finished points")
        results[f"rerun, {FINISHED:,} points finished"] = seconds(
            ["run", "--yes", "--json", *finished_store(root / "full", FINISHED)]
        )
    return results


if __name__ == "__main__":
    for name, value in measure(lambda text: print(text, file=sys.stderr)).items():
        print(f"{name}: {value:.2f} s")
