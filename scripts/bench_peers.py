"""Compare sae-sweep with SAELens and dictionary_learning on this machine's CPU, and with the encoder product alone.

    python scripts/bench_peers.py [--quick] [--only TEXT] [--json FILE] [--threads N] [--peers-env DIR]

Every row: the same activations, batches, starts, learning rate and penalty convention, in processes of their own that
take turns (bench_worker.py), with the same version of PyTorch and as many threads. A start is trained first, untimed,
so that what is timed is the steady state; after the timed steps quality is measured alike for all. The grid starts
from exemplars instead, and its rows time the whole training; the peers, which have L1 alone, train as many L1 points.
The floor is torch.addmm of the encoders and nothing else. Peers are installed once into an environment of their own.

Columns: median seconds of a step (grid: of all steps), the best peer's time over it and it over the floor's (medians
over turns), memory above what the process held before, and quality on a batch held out (grid: means over its L1
points). With one thread seconds are the processor's, which others on the machine lengthen little.

The row `12 SAEs` is a whole `sae-sweep run` on a toy, which it trains, measures and reports on, in processor seconds;
SAELens' SAETrainer trains as many SAEs of the same shapes on activations that it is given, and does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_commands
import torch
from bench_worker import Work

HERE = Path(__file__).resolve().parent
COMMANDS, AS_A_USER = "commands", "12 SAEs"
OURS, FLOOR, PEERS = "sae-sweep", "floor", ("sae-lens", "dictionary-learning")
# dictionary_learning pins what would replace PyTorch; this is what it really needs.
NEEDED = ("sae-lens", "python-socketio[client]", "pillow", "pydantic", "einops")
WITHOUT_THEIR_NEEDS = ("dictionary-learning", "nnsight==0.3.7")

D, BATCH, K, COEFFICIENT = 64, 4096, 8, 1.5
# The start, and the grid from its first step, are trained faster than the steady state, where moments begin empty.
WARM_LR, LR = 3e-3, 1e-3
PENALTIES = {"l1": 1.5, "sqrt": 1.5, "log1p": 2.0, "tanh": 2.0}
LADDER, GRID_WIDTHS = (1.0, 1.5, 2.0, 3.0), (64, 256, 1024)
# SAEs as a user runs them: those widths at these coefficients.
USER_COEFFICIENTS, USER_STEPS, USER_BATCH = (0.1, 0.3, 1.0, 3.0), 600, 1024


@dataclass(frozen=True)
class Task:
    """A work, how many steps a turn has, how many turns are timed, and the steps of the start."""

    work: Work
    steps: int
    turns: int
    warm: int
    backends: tuple[str, ...] = (FLOOR, OURS, *PEERS)
    whole: bool = False  # time the sum of the turns rather than a step


def tasks(quick: bool) -> Iterator[Task]:
    """What is compared."""
    wide = (65536,) if quick else (65536, 1048576)
    counted = (1024, 4096) if quick else (64, 256, 1024, 4096, 16384)
    turns, factor = (3, 1) if quick else (5, 5)
    widths = (64, 256, 1024, 4096) if quick else (64, 256, 1024, 4096, 16384)
    for architecture, chosen in (("relu", widths), ("topk", counted), ("batchtopk", counted)):
        for width in chosen:
            steps = max(1, min(20, 4096 // width)) * factor
            yield Task(_work(f"{architecture} {width:,}", architecture, (width,)), steps, turns, _warm(width))
    for width in wide:
        work = _work(f"relu {width:,}", "relu", (width,))
        yield Task(work, 1, turns if width < 1 << 20 else 2, _warm(width), (FLOOR, OURS))
    grid = tuple((name, unit * step) for name, unit in PENALTIES.items() for step in LADDER)
    count = len(grid) * len(GRID_WIDTHS)
    work = dataclasses.replace(_work(f"grid of {count}", "relu", GRID_WIDTHS, grid), lr=WARM_LR)
    steps, turns = (8, 3) if quick else (600, 1)
    yield Task(work, steps, turns, 0, whole=True)


def _warm(width: int) -> int:
    """Steps of a start: fewer for the widest, whose steps take seconds."""
    return max(3, min(200, (1 << 20) // width))


def _work(name: str, architecture: str, widths: tuple[int, ...], sparsities: Any = (("l1", COEFFICIENT),)) -> Work:
    return Work(name, architecture, widths, sparsities, K, D, BATCH, LR)


class Worker:
    """bench_worker.py in a process, one request at a time."""

    def __init__(self, python: str, backend: str, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [python, str(HERE / "bench_worker.py"), backend, "--threads", str(threads)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.backend, self.torch = backend, self._answer()["torch"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.backend} has ended (exit status {self.process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer


def peers_python(place: Path) -> str:
    """Python of an environment with the peers and this PyTorch, made if it is not there."""
    python, done = place / "bin" / "python", place / "complete"
    version = torch.__version__
    if not done.exists() or done.read_text() != version:
        say(f"installing the peers into {place}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"torch=={version.split('+')[0]}", *NEEDED], check=True)
        subprocess.run([*install, "--no-deps", *WITHOUT_THEIR_NEEDS], check=True)
        done.write_text(version)
    return str(python)


def compare(task: Task, workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """The rows of a task: its backends from one start, taking turns."""
    workers = [worker for worker in workers if worker.backend in task.backends]
    with tempfile.TemporaryDirectory() as folder:
        start = str(Path(folder) / "start.pt") if task.warm else ""
        if start:
            say(f"{task.work.name}: start")
            (trainer,) = (worker for worker in workers if worker.backend == OURS)
            trainer.ask(load=dataclasses.asdict(dataclasses.replace(task.work, lr=WARM_LR)), start="")
            trainer.ask(train=task.warm)
            trainer.ask(save=start)
            trainer.ask(end=True)
        for worker in workers:
            worker.ask(load=dataclasses.asdict(task.work), start=start)
    times: dict[str, list[float]] = {worker.backend: [] for worker in workers}
    for turn in range(task.turns + (not task.whole)):
        say(f"{task.work.name}: turn {turn}")
        for worker in workers:
            seconds = worker.ask(train=task.steps)["seconds"]
            if turn or task.whole:  # the first warms caches
                times[worker.backend].append(seconds / (1 if task.whole else task.steps))
    rows = [_row(task, worker, times) for worker in workers]
    for worker in workers:
        worker.ask(end=True)
    return rows


def _row(task: Task, worker: Worker, times: dict[str, list[float]]) -> dict[str, Any]:
    measured, own = worker.ask(measure=True), times[worker.backend]
    peers = [times[backend] for backend in PEERS if backend in times]
    best = [min(turn) for turn in zip(*peers, strict=True)]
    saes = zip(measured["quality"], task.work.saes(), strict=False)
    # A peer's points are all L1: those that ours has too.
    quality = [values for values, (_, name, _) in saes if name == "l1"]
    return {
        "work": task.work.name,
        "backend": worker.backend,
        "seconds": sum(own) if task.whole else statistics.median(own),
        "ratio_best_peer": _ratio(best, own) if best else None,
        "ratio_floor": _ratio(own, times[FLOOR]),
        "peak_bytes": measured["peak_bytes"],
        "fvu": statistics.mean(fvu for fvu, _ in quality) if quality else None,
        "l0": statistics.mean(l0 for _, l0 in quality) if quality else None,
    }


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def user_rows(lens: Worker) -> list[dict[str, Any]]:
    """A whole run of 12 SAEs, and SAELens' trainer on as many, one after the other, with one thread."""
    theirs = 0.0
    for width in GRID_WIDTHS:
        for coefficient in USER_COEFFICIENTS:
            say(f"{AS_A_USER}: SAELens, width {width}, coefficient {coefficient}")
            work = _work(AS_A_USER, "relu", (width,), (("l1", coefficient),))
            lens.ask(load=dataclasses.asdict(dataclasses.replace(work, batch=USER_BATCH)), start="")
            theirs += lens.ask(train=USER_STEPS)["seconds"]
            lens.ask(end=True)
    say(f"{AS_A_USER}: sae-sweep run")
    # The paper's toy, whose logits are as long as those activations.
    words = [f"training.steps={USER_STEPS}", f"training.batch_size={USER_BATCH}", "site=post_unembed", "penalty=l1"]
    words += [f"sae.width={','.join(map(str, GRID_WIDTHS))}", "logger=none", "device=cpu"]
    words.append(f"penalty.coefficient={','.join(map(str, USER_COEFFICIENTS))}")
    with tempfile.TemporaryDirectory() as folder:
        ours = bench_commands.seconds(["-m", "sae_sweep", "run", "toy=max_of_k", *words, f"output_dir={folder}/out"])
    unknown = dict.fromkeys(("ratio_floor", "peak_bytes", "fvu", "l0"))
    return [
        {"work": AS_A_USER, "backend": OURS, "seconds": ours, "ratio_best_peer": theirs / ours, **unknown},
        {"work": AS_A_USER, "backend": lens.backend, "seconds": theirs, "ratio_best_peer": 1.0, **unknown},
    ]


def command_rows() -> list[dict[str, Any]]:
    """The command line's own rows."""
    empty = dict.fromkeys(("ratio_best_peer", "ratio_floor", "peak_bytes", "fvu", "l0"))
    return [
        {"work": name, "backend": OURS, "seconds": seconds, **empty} for name, (seconds,) in bench_commands.measure(say)
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""

    def spell(value: float | None, digits: str, unit: str = "") -> str:
        return "" if value is None else f"{value:{digits}}{unit}"

    lines = [
        "| work | backend | seconds | best peer / this | this / floor | peak memory | FVU | L0 |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
        cells = (
            row["work"],
            row["backend"],
            spell(row["seconds"], ".4f"),
            spell(row["ratio_best_peer"], ".1f", "×"),
            spell(row["ratio_floor"], ".2f"),
            spell(peak, ",.0f", " MiB"),
            spell(row["fvu"], ".4f"),
            spell(row["l0"], ".2f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer widths and steps: under 5 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of every backend (default 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the works whose name contains this")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sae-sweep" / "peers"
    parser.add_argument("--peers-env", type=Path, default=cache, help=f"environment of the peers (default {cache})")
    args = parser.parse_args()

    peers = peers_python(args.peers_env)
    python = {FLOOR: sys.executable, OURS: sys.executable} | dict.fromkeys(PEERS, peers)
    workers = [Worker(executable, backend, args.threads) for backend, executable in python.items()]
    if len({worker.torch for worker in workers}) > 1:
        raise SystemExit(f"different versions of PyTorch: { {w.backend: w.torch for w in workers} }")
    rows = []
    for task in tasks(args.quick):
        if args.only in task.work.name:
            rows += compare(task, workers)
    if args.only in AS_A_USER and not args.quick:
        lens = Worker(peers, PEERS[0], 1)
        rows += user_rows(lens)
        lens.close()
    for worker in workers:
        worker.close()
    if args.only in COMMANDS:
        rows += command_rows()
    print(f"PyTorch {torch.__version__}, {args.threads} threads, {platform.processor() or platform.machine()}\n")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
