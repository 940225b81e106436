"""Seconds and memory of sae-sweep on this CPU against width, batch, L0, stack size and number of points.

    python scripts/bench_scaling.py [--quick] [--figure FILE] [--threads N]     (a figure needs the extra `bench`)

One setting varies at a time around width 1,024, batch 4,096, L0 8, one SAE, d = 64. SAEs are made so that about L0 of
their latents fire, and a learning rate of nearly zero keeps it so. `growth` is the exponent between a row and the one
before: 1 where twice as much costs twice as much. `estimate` is the planner's (sweep/cost.py), over what was seen.
The last rows are whole runs of the command line, the estimate that of `sae-sweep plan`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_worker import reset_peak, resident_bytes

from sae_sweep.saes.kernels import pick_backend
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.stack import Stack
from sae_sweep.schema import Penalty, Point, Sae, Toy, Training
from sae_sweep.sweep import cost

D, TURNS = 64, 5
# Codes in the steps of a turn, up to as many as training takes in one call.
CODES = 1 << 25
TINY = ("toy=small", "toy.steps=200", "device=cpu", "logger=none", "penalty=l1", "penalty.coefficient=1")


@dataclass(frozen=True)
class Setting:
    """What a row varies."""

    width: int = 1024
    batch: int = 4096
    l0: int = 8
    stack: int = 1


@dataclass(frozen=True)
class Row:
    """Seconds of a step of the stack (or of a run), memory above what was held before, and the planner's seconds."""

    axis: str
    value: int
    seconds: float
    peak_bytes: int
    estimate: float


def settings(quick: bool) -> Iterator[tuple[str, Setting]]:
    """Every row but the runs."""
    base = Setting()
    widths = (64, 256, 1024, 4096, 16384, 65536)
    for width in widths if quick else (*widths, 1 << 18, 1 << 20):
        yield "width", replace(base, width=width)
    for batch in (64, 256, 1024, 4096, 16384):
        yield "batch", replace(base, batch=batch)
    for l0 in (1, 4, 16, 64):
        yield "l0", replace(base, l0=l0)
    for stack in (1, 2, 4, 16, 64):
        yield "stack", replace(base, width=256, batch=512, stack=stack)


def measure(axis: str, setting: Setting, threads: int) -> Row:
    """Time steps of a stack of SAEs of which about L0 latents fire."""
    reset_peak()
    before = resident_bytes("VmRSS")
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(setting.width, D, generator=generator), dim=1)
    # Inputs are standard normal, and so is every projection of theirs.
    quantile = torch.special.ndtri(torch.tensor(1 - setting.l0 / setting.width, dtype=torch.float64)).float()
    start = Parameters(W, W, -quantile.expand(setting.width), torch.zeros(D), torch.zeros(()))
    training = Training(10**6, setting.batch, lr=1e-9, lr_decay=0)
    shape = Sae(width=setting.width, init="exemplars")
    point = Point(sae=shape, penalty=Penalty("l1", 1e-3), training=training)
    stack = Stack.start([point] * setting.stack, [start] * setting.stack, "cpu")
    stack.density.zero_()
    steps = max(1, min(cost.BLOCK, CODES // (setting.batch * setting.width)))
    batches = torch.randn(steps, setting.batch, D, generator=generator)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        backend = pick_backend(stack, pool, threads)
        backend.advance(stack, batches)
        times = []
        for _ in range(TURNS):
            began = time.perf_counter()
            backend.advance(stack, batches)
            times.append((time.perf_counter() - began) / steps)
    # The planner knows the L0 of a counted architecture, and takes that of the others to be usual.
    known = replace(point, toy=Toy(d_model=D), sae=replace(shape, architecture="topk", k=setting.l0))
    speed = replace(cost.SPEEDS["cpu"], batch_input=0.0)  # the batches are there already
    estimate = cost.training_seconds((known,) * setting.stack, speed, threads) / training.steps
    peak = resident_bytes("VmHWM") - before
    return Row(axis, getattr(setting, axis), statistics.median(times), peak, estimate)


def run(points: int) -> Row:
    """A whole run of the command line, and what `plan` says of it."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*TINY, f"seed=range(0,{points})", f"output_dir={folder}"]

        def sae_sweep(command: str) -> str:
            arguments = [sys.executable, "-m", "sae_sweep", command, "--json", *overrides]
            return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

        plan = json.loads(sae_sweep("plan"))["estimate"]
        began = time.perf_counter()
        sae_sweep("run")
        return Row("points", points, time.perf_counter() - began, 0, plan["seconds"])


def growth(row: Row, before: Row | None) -> str:
    """The exponent of the seconds between two rows of an axis."""
    if before is None or before.axis != row.axis:
        return ""
    return f"{math.log(row.seconds / before.seconds) / math.log(row.value / before.value):.2f}"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| varied | value | seconds | growth | estimate / seen | peak memory |", "|---|---|---|---|---|---|"]
    for row, before in zip(rows, [None, *rows], strict=False):
        peak = f"{row.peak_bytes / 2**20:,.0f} MiB" if row.peak_bytes else ""
        lines.append(
            f"| {row.axis} | {row.value:,} | {row.seconds:.5f} | {growth(row, before)} "
            f"| {row.estimate / row.seconds:.2f} | {peak} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel per axis: what was seen, what the planner says, and a line that grows linearly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(row.axis for row in rows))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3 * len(axes), 3), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        own = [row for row in rows if row.axis == axis]
        values, seconds = [row.value for row in own], [row.seconds for row in own]
        panel.loglog(values, seconds, "o-", label="seen")
        panel.loglog(values, [row.estimate for row in own], "x--", label="planned")
        panel.loglog(values, [seconds[-1] * value / values[-1] for value in values], ":", color="grey", label="linear")
        panel.set_xlabel(axis)
        panel.set_title("s per run" if axis == "points" else "s per step", fontsize="small")
    panels[0].legend(fontsize="x-small")
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the widest SAEs and the longest runs")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows there (.svg or .png)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default 2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for axis, setting in settings(args.quick):
        print(axis, setting, file=sys.stderr)
        rows.append(measure(axis, setting, args.threads))
    for points in (1, 8, 64) if args.quick else (1, 8, 64, 256):
        print("points", points, file=sys.stderr)
        rows.append(run(points))
    print(f"PyTorch {torch.__version__}, {args.threads} threads\n")
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
