"""What the command line takes before and around training: help, plans, reruns, one short SAE, the quickstart.

    python scripts/bench_commands.py [--only TEXT] [--old DIR --turns 2]

Processor seconds, of Python's start on, after a run that fills the caches and compiles the kernels; help over a bare
`import typer`. Also rows of scripts/bench_peers.py. With --old, the code in DIR, another checkout, takes turns with
this one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

from sae_sweep.cli import run as commands
from sae_sweep.config import overrides as config
from sae_sweep.config.settings import canonical
from sae_sweep.store.store import Store

HERE = Path(__file__).resolve().parents[1]
PLANNED, FINISHED, REPEATS = 100_000, 10_000, 5
# The smallest points there are: what is timed is everything else.
TINY = ("toy=small", "toy.steps=1", "training.steps=1", "sae.width=2", "sae.init=random", "device=cpu", "logger=none")
GRID = ("penalty=l1", "penalty.coefficient=1")
# One SAE on a toy that is there: what any run takes.
ONE = ("toy=small", "training.steps=200", "sae.width=136", "penalty.coefficient=0.3", "device=cpu", "logger=none")


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


def seconds(arguments: Sequence[str], tree: Path = HERE) -> float:
    """Processor seconds of Python with these arguments and the package of a tree, which others lengthen little."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], cwd=tree, **silent)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"`python {' '.join(arguments)}` failed")
    return used.ru_utime + used.ru_stime


def median_seconds(tree: Path, *words: str) -> float:
    """Of a `sae-sweep` command, over several runs after a first one; one that takes seconds runs but once more."""

    def once() -> float:
        return seconds(["-m", "sae_sweep", *words], tree)

    return statistics.median(once() for _ in range(REPEATS if once() < 1 else 1))


def help_over_typer(tree: Path) -> float:
    """`sae-sweep --help` over `import typer`, in turns."""
    words = ["-m", "sae_sweep", "--help"], ["-c", "import typer"]
    turns = [[seconds(each, tree) for each in words] for _ in range(REPEATS + 1)]
    return statistics.median(ours / typer for ours, typer in turns[1:])


def one_sae(tree: Path, root: Path) -> float:
    """`sae-sweep run` of an SAE of 200 steps on a toy that is there."""
    where = (*ONE, f"output_dir={root}")
    seconds(["-m", "sae_sweep", "run", *where, "name=first"], tree)
    runs = (["-m", "sae_sweep", "run", *where, f"seed={seed}", f"name=run{seed}"] for seed in (1, 2, 3))
    return statistics.median(seconds(words, tree) for words in runs)


def quickstart(tree: Path, root: Path) -> float:
    """The quickstart from its toy on, kernels compiled."""
    return seconds(["-m", "sae_sweep", "run", "logger=none", "device=cpu", f"output_dir={root}"], tree)


def planned(tree: Path, root: Path) -> float:
    """A plan of 100,000 points."""
    return median_seconds(tree, "plan", "--yes", *TINY, *GRID, f"seed=range(0,{PLANNED})", f"output_dir={root}")


def rerun(tree: Path, root: Path) -> float:
    """A run in which nothing is left to do."""
    return median_seconds(tree, "run", "--yes", "--json", *finished_store(root, FINISHED))


ROWS: dict[str, Callable[[Path, Path], float]] = {
    "sae-sweep --help over import typer": lambda tree, root: help_over_typer(tree),
    "sae-sweep --help": lambda tree, root: median_seconds(tree, "--help"),
    f"plan of {PLANNED:,} points": planned,
    f"rerun, {FINISHED:,} points finished": rerun,
    "run of one SAE, 200 steps, toy finished": one_sae,
    "quickstart": quickstart,
}


def measure(
    say: Callable[[str], None], only: str = "", trees: Sequence[Path] = (HERE,), turns: int = 1
) -> Iterator[tuple[str, list[float]]]:
    """Each row as it is known: its name, and of each tree processor seconds or, of help over typer, their ratio."""
    for name, row in ROWS.items():
        if only in name:
            say(name)
            found: list[list[float]] = [[] for _ in trees]
            for turn in range(turns * len(trees)):
                with tempfile.TemporaryDirectory() as folder:
                    found[turn % len(trees)].append(row(trees[turn % len(trees)], Path(folder) / "outputs"))
            yield name, list(map(statistics.median, found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose name contains this")
    parser.add_argument("--old", type=Path, metavar="DIR", help="another checkout, whose code takes turns with this")
    parser.add_argument("--turns", type=int, default=1, help="how often each row is measured")
    asked = parser.parse_args()
    trees = [HERE] if asked.old is None else [asked.old.absolute(), HERE]
    for name, values in measure(lambda text: print(text, file=sys.stderr), asked.only, trees, asked.turns):
        print(f"{name}: {' → '.join(f'{value:.2f}' for value in values)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
