"""Time steps of stacks of narrow SAEs over the encoder product of the same run, beside older code if it is at hand.

    python scripts/bench_steps.py [--old DIR] [--only TEXT] [--turns N] [--trainings]

A row is a stack of SAEs with random encoders, of which about L0 latents fire, and a learning rate of nearly zero keeps
it so; its steps, those of the code in DIR (a checkout), and torch.addmm of one encoder take turns in processes of their
own, on one core, in processor seconds, which others on the machine do not lengthen. Printed are medians over the turns.
`--trainings` trains 16 SAEs on the small toy from random starts instead, and times steps 1,000 to 4,000.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve()
# Numbers in the batches of a turn, at most as many steps as training takes in a call.
NUMBERS, BLOCK = 1 << 21, 25
# Products of a turn: about 50 ms.
PRODUCTS = 1 << 31
# A whole training: all steps, and those before which nothing is timed.
STEPS, UNTIMED = 4000, 1000


@dataclass(frozen=True)
class Row:
    """A stack: how many SAEs of which kind, about how many latents of each fire (of TopK: k), which share is dead under
    AuxK."""

    count: int
    architecture: str
    width: int
    d: int
    batch: int
    penalty: str
    l0: int
    dead: float | None = None

    @property
    def name(self) -> str:
        """The row in words."""
        kind = f"{self.architecture}{self.l0 if self.architecture == 'topk' else ''} {self.penalty}"
        kind += "" if self.dead is None else f" auxk, {self.dead:.0%} dead"
        return f"{self.count} × {kind}, width {self.width:,}, d {self.d}, b {self.batch:,}"


ROWS = [
    Row(16, "relu", 16, 32, 512, "l1", 9),
    Row(16, "relu", 64, 32, 512, "l1", 16),
    Row(16, "relu", 136, 32, 512, "l1", 32),
    Row(16, "relu", 136, 32, 512, "sqrt", 14),
    Row(16, "topk", 136, 32, 512, "none", 1),
    Row(16, "topk", 136, 32, 512, "none", 8),
    Row(4, "topk", 1056, 32, 512, "none", 2),
    Row(4, "topk", 1056, 32, 512, "none", 8),
    *(Row(16, "topk", 136, 32, 512, "none", 1, dead) for dead in (0.05, 0.5)),
    *(Row(4, "topk", 1056, 32, 512, "none", 1, dead) for dead in (0.05, 0.5)),
    Row(4, "relu", 1056, 32, 512, "l1", 120),
    Row(16, "relu", 64, 64, 4096, "l1", 4),
    Row(8, "relu", 256, 64, 4096, "l1", 11),
]
TRAININGS = [
    Row(16, "relu", 16, 32, 512, "l1", 0),
    Row(16, "relu", 136, 32, 512, "l1", 0),
    Row(16, "topk", 136, 32, 512, "none", 1),
]


class Side:
    """What a process is asked: a stack of its code's own, and its steps."""

    def __init__(self) -> None:
        try:
            from sae_sweep.config import settings
            from sae_sweep.kernels.cpu.backend import CpuBackend
        except ImportError:  # a checkout from before the rooms
            from sae_sweep.saes.kernels.cpu import CpuBackend

            from sae_sweep import schema as settings
        from sae_sweep.saes.parameters import Parameters
        from sae_sweep.saes.stack import Stack

        self.settings, self.Parameters, self.Stack = settings, Parameters, Stack
        pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.backend = CpuBackend(pool, 1)

    def start(self, row: Row, activations: str) -> float:
        """Make the stack; the L0 of its first steps."""
        self.row, self.rows = row, torch.load(activations) if activations else None
        self.stack = self.Stack.start(
            [self._point(row, seed, bool(activations)) for seed in range(row.count)],
            [self._start(row, seed, bool(activations)) for seed in range(row.count)],
            "cpu",
        )
        if row.dead is not None:  # half of their pre-activations are above 0, and none is among the largest
            dead = round(row.dead * row.width)
            for flat in self.stack.flat:
                self.stack.split(flat)[0][:dead] /= 100
            self.stack.silent[:, :dead] = 10**9
        steps = max(1, min(BLOCK, NUMBERS // (row.batch * row.d)))
        self.generator = torch.Generator().manual_seed(0)
        self.batches = torch.randn(steps, row.batch, row.d, generator=self.generator)
        if activations:
            return 0.0
        self.step()
        return float(self.backend.advance(self.stack, self.batches).l0.mean()) / steps

    def step(self) -> float:
        """Seconds of a step of one SAE."""
        if self.rows is not None:
            drawn = torch.randint(len(self.rows), (BLOCK, self.row.batch), generator=self.generator)
            self.batches = self.rows[drawn]
        began = time.process_time()
        progress = self.backend.advance(self.stack, self.batches)
        seconds = (time.process_time() - began) / len(self.batches) / self.row.count
        self.l0 = float(progress.l0.mean()) / len(self.batches)
        return seconds

    def train(self, steps: int) -> tuple[float, float]:
        """So many steps: mean seconds of a step of one SAE, and the last L0."""
        return statistics.mean(self.step() for _ in range(steps // BLOCK)), self.l0

    def product(self, row: Row) -> float:
        """Seconds of one encoder product, into memory that is there already."""
        x, W, bias = torch.randn(row.batch, row.d), torch.randn(row.width, row.d), torch.zeros(row.width)
        out, times = torch.empty(row.batch, row.width), max(3, PRODUCTS // (row.batch * row.d * row.width))
        torch.addmm(bias, x, W.T, out=out)
        began = time.process_time()
        for _ in range(times):
            torch.addmm(bias, x, W.T, out=out)
        return (time.process_time() - began) / times

    def _point(self, row: Row, seed: int, whole: bool) -> Any:
        training = {"steps": STEPS} if whole else {"steps": 10**6, "lr": 1e-9, "lr_decay": 0.0}
        training |= {} if row.dead is None else {"revival": "auxk"}
        return self.settings.Point(
            sae=self.settings.Sae(architecture=row.architecture, width=row.width, k=max(row.l0, 1), init="random"),
            penalty=self.settings.Penalty(row.penalty, (1.0 if whole else 1e-3) * (row.penalty != "none")),
            training=self.settings.Training(batch_size=row.batch, **training),
            seed=seed,
        )

    def _start(self, row: Row, seed: int, whole: bool) -> Any:
        generator = torch.Generator().manual_seed(seed)
        W = torch.nn.functional.normalize(torch.randn(row.width, row.d, generator=generator), dim=1)
        bias = 0.0
        if not whole and row.architecture != "topk":
            # Inputs are standard normal, and so is every projection of theirs.
            bias = -float(torch.special.ndtri(torch.tensor(1 - row.l0 / row.width, dtype=torch.float64)))
        return self.Parameters(W, W.clone(), torch.full((row.width,), bias), torch.zeros(row.d), torch.zeros(()))


def serve() -> None:
    """Answer requests, JSON lines in and out: {"start": row, …}, {"train": steps}, {"step": 1}, {"product": row}."""
    torch.set_num_threads(1)
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        if "start" in request:
            answer = side.start(Row(**request["start"]), request["activations"])
        elif "train" in request:
            answer = side.train(request["train"])
        elif "product" in request:
            answer = side.product(Row(**request["product"]))
        else:
            answer = side.step()
        print(json.dumps(answer), flush=True)


class Process:
    """`serve` over the code of one checkout."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE), "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=environment, cwd=tree, **pipes)  # type: ignore[call-overload]

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process has ended (exit status {self.process.wait()})")
        return json.loads(line)


def stacks(rows: Sequence[Row], sides: dict[str, Process], turns: int) -> Iterator[str]:
    """Lines of the table of steps."""
    for row in rows:
        fields = dataclasses.asdict(row)
        l0 = [side.ask(start=fields, activations="") for side in sides.values()][-1]
        products: list[float] = []
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(turns):
            products.append(sides["new"].ask(product=fields))
            for name, side in sides.items():
                times[name].append(side.ask(step=1))
        yield line(row.name, l0, products, times)


def trainings(rows: Sequence[Row], sides: dict[str, Process]) -> Iterator[str]:
    """Lines of the table of whole trainings."""
    with tempfile.TemporaryDirectory() as folder:
        activations = str(Path(folder) / "activations.pt")
        torch.save(toy_activations(), activations)
        for row in rows:
            fields = dataclasses.asdict(row)
            products: list[float] = []
            times: dict[str, list[float]] = {name: [] for name in sides}
            l0 = 0.0
            for side in sides.values():
                side.ask(start=fields, activations=activations)
                side.ask(train=UNTIMED)
            for _ in range(0, STEPS - UNTIMED, 10 * BLOCK):
                products.append(sides["new"].ask(product=fields))
                for name, side in sides.items():
                    seconds, l0 = side.ask(train=10 * BLOCK)
                    times[name].append(seconds)
            yield line(row.name, l0, products, times)


def line(name: str, l0: float, products: Sequence[float], times: dict[str, list[float]]) -> str:
    """A row in Markdown: milliseconds of a step, and the ratio to the product of the same turn."""
    cells = [name, f"{l0:.1f}", f"{1e3 * statistics.median(products):.3f}"]
    for each in times.values():
        ratio = statistics.median(a / b for a, b in zip(each, products, strict=True))
        cells += [f"{1e3 * statistics.median(each):.3f}", f"{ratio:.1f}"]
    return "| " + " | ".join(cells) + " |"


def toy_activations() -> Tensor:
    """Activations of a trained small toy as SAEs see them, 2¹⁶ of the distribution: [n, d]."""
    from sae_sweep.config.settings import Distribution, Toy
    from sae_sweep.toys.max_of_k import MaxOfK, train
    from sae_sweep.toys.sampling import Stream

    toy = Toy(d_vocab=16, k=3, d_model=32, d_head=32, steps=1500, batch_size=256, lr=3e-3)
    (parameters,) = train([toy], "cpu")
    stream = Stream(MaxOfK(toy, parameters), "pre_unembed", Distribution("max_stratified"), 0, 1 << 12, "cpu")
    return stream.batches(0, 16).flatten(0, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--old", type=Path, metavar="DIR", help="a checkout of older code to compare with")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose name contains this")
    parser.add_argument("--turns", type=int, default=7, help="of a row (default 7)")
    parser.add_argument("--trainings", action="store_true", help="whole trainings instead of single steps")
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    torch.set_num_threads(1)
    trees = ({"old": args.old.resolve()} if args.old else {}) | {"new": HERE.parent.parent}
    sides = {name: Process(tree) for name, tree in trees.items()}
    heads = ["stack", "L0", "product, ms", *(f"{name}{unit}" for name in sides for unit in (", ms", " / product"))]
    print(f"PyTorch {torch.__version__}, one core\n")
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    rows = [row for row in (TRAININGS if args.trainings else ROWS) if args.only in row.name]
    for text in trainings(rows, sides) if args.trainings else stacks(rows, sides, args.turns):
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
