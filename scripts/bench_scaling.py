"""Seconds and memory of sae-sweep on this CPU against width, batch, L0, stack size, evaluation, stream and whole grids.

    python scripts/bench_scaling.py [--quick] [--figure FILE] [--threads N]     (a figure needs the extra `bench`)

One setting varies at a time around width 1,024, batch 4,096, L0 8, one SAE, d = 64. SAEs are made so that about L0 of
their latents fire, and a learning rate of nearly zero keeps it so. `growth` is the exponent between a row and the one
before: 1 where twice as much costs twice as much. `estimate` is the planner's (sweep/cost.py), over what was seen.
`over floor`: training and measuring over the encoder product of the same inputs alone, with as many threads; a batch of
the stream over a step of one SAE of width 64. A measurement has one thread, as SAEs of a pack are measured side by
side, and reads the first part of all 64⁴ inputs. The last rows are whole runs of the command line on one core, in
seconds of that core, which others on the machine do not lengthen; their estimate is that of `sae-sweep plan`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from bench_worker import reset_peak, resident_bytes

from sae_sweep.measures.measure import measure
from sae_sweep.saes.kernels import pick_backend
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.penalties import penalty_value
from sae_sweep.saes.stack import Stack
from sae_sweep.schema import Distribution, Evaluation, Penalty, Point, Sae, Toy, Training
from sae_sweep.sweep import cost
from sae_sweep.sweep.pack import PointSae
from sae_sweep.toys.max_of_k import MaxOfK, shapes
from sae_sweep.toys.sequences import CHUNK_ROWS
from sae_sweep.toys.stream import Chunk, EvaluationInputs, Stream

D, TURNS = 64, 5
# Codes in the steps of a turn, up to as many as training takes in one call.
CODES = 1 << 25
# Grids of several kinds, run whole.
GRIDS = {
    "quickstart": ("experiment=quickstart",),
    "topk": ("toy=small", "sae=topk", "sae.k=1,2,4", "sae.width=136", "seed=0,1"),
    "wide": (
        *("toy=small", "sae.width=8192", "sae.init=exemplars", "penalty=l1"),
        *("training.batch_size=2048", "training.steps=200"),
    ),
    "many small": ("toy=small", "sae.width=16", "sae.init=exemplars", "penalty=l1,sqrt", "seed=range(0,8)"),
}
# Products of the encoder in a measurement that is timed: about 3 s.
MEASURED = 1 << 37


@dataclass(frozen=True)
class Setting:
    """What a row varies."""

    width: int = 1024
    batch: int = 4096
    l0: int = 8
    stack: int = 1


@dataclass(frozen=True)
class Row:
    """Seconds of a step of the stack (or of a run), the least they could be, memory above what was held, the plan's."""

    axis: str
    value: int | str
    seconds: float
    floor: float = 0
    peak_bytes: int = 0
    estimate: float = 0


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


def training(axis: str, setting: Setting, threads: int) -> Row:
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
    floor = product_seconds(batches[0], W, threads) * setting.stack
    return Row(axis, getattr(setting, axis), statistics.median(times), floor, peak, estimate)


def product_seconds(x: torch.Tensor, W: torch.Tensor, threads: int) -> float:
    """The encoder product of inputs x [b, d] and W [width, d], into memory that is there already."""
    torch.set_num_threads(threads)
    columns, bias = max(1, CODES // len(x)), torch.zeros(len(W))
    out, times = torch.empty(len(x) * min(columns, len(W))), []
    for _ in range(TURNS + 1):
        began = time.perf_counter()
        for weights, offset in zip(W.split(columns), bias.split(columns), strict=True):
            torch.addmm(offset, x, weights.T, out=out[: len(x) * len(weights)].view(len(x), len(weights)))
        times.append(time.perf_counter() - began)
    torch.set_num_threads(1)
    return statistics.median(times[1:])


def untrained_toy(d_vocab: int, k: int) -> tuple[Toy, MaxOfK]:
    """A toy as wide as the SAEs here; how long its activations take does not depend on what it knows."""
    toy = Toy(d_vocab=d_vocab, k=k, d_model=D)
    generator = torch.Generator().manual_seed(0)
    return toy, MaxOfK(toy, {name: 0.3 * torch.randn(size, generator=generator) for name, size in shapes(toy).items()})


class Part(EvaluationInputs):
    """The first chunks of all inputs."""

    chunks = 0

    def __iter__(self) -> Iterator[Chunk]:
        return islice(super().__iter__(), self.chunks)


def measurement(width: int) -> Row:
    """Measuring one SAE of width `width`, L0 about 8, on an input of the exact pass over 64⁴."""
    toy, model = untrained_toy(64, 4)
    distribution, evaluation = Distribution("max_stratified"), Evaluation(inputs=64**4)
    stream = Stream(model, "pre_unembed", distribution, 0, 64, "cpu")
    inputs = Part(model, "pre_unembed", distribution, stream.mean, stream.scale, evaluation)
    inputs.chunks = max(1, MEASURED // (width * D) // CHUNK_ROWS)
    x = torch.cat([chunk.x for chunk in inputs])
    W = torch.nn.functional.normalize(stream.exemplars(width, 1), dim=1)
    sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: CODES // width]] @ W.T
    bias = -sample.topk(max(1, 8 * len(sample) // width), dim=0).values[-1]
    point = Point(toy=toy, sae=Sae(width=width, init="exemplars"), penalty=Penalty("l1", 1.0))
    sae = PointSae(point, Parameters(W, W, bias, torch.zeros(D), torch.zeros(())))
    began = time.perf_counter()
    measure(sae, inputs, lambda contributions: penalty_value("l1", contributions), evaluation)
    seconds = (time.perf_counter() - began) / len(x)
    floor = product_seconds(x[:CHUNK_ROWS], W, 1) / CHUNK_ROWS
    estimate = cost.measured_seconds(width, D, cost.SPEEDS["cpu"])
    return Row("measuring, width", width, seconds, floor, 0, estimate)


def stream_batch(d_vocab: int, step: float) -> Row:
    """A batch of 4,096 activations of a max-of-4 toy; `step`: seconds of one of an SAE that they are for."""
    _, model = untrained_toy(d_vocab, 4)
    stream = Stream(model, "pre_unembed", Distribution("max_stratified"), 0, Setting.batch, "cpu")
    times = []
    for turn in range(TURNS):
        began = time.perf_counter()
        stream.batches(turn * cost.BLOCK, cost.BLOCK)
        times.append((time.perf_counter() - began) / cost.BLOCK)
    return Row(
        "stream, d_vocab", d_vocab, statistics.median(times), step, 0, Setting.batch * cost.SPEEDS["cpu"].batch_input
    )


def run(name: str) -> Row:
    """A whole run of the command line on one core, and what `plan` says of it there."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*GRIDS[name], "device=cpu", "logger=none", f"output_dir={folder}"]

        def sae_sweep(command: str) -> str:
            arguments = [sys.executable, "-m", "sae_sweep", command, "--json", *overrides]
            return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            plan = json.loads(sae_sweep("plan"))["estimate"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            sae_sweep("run")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        finally:
            os.sched_setaffinity(0, cores)
        seconds = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
        return Row("grid", name, seconds, estimate=plan["seconds"])


def growth(row: Row, before: Row | None) -> str:
    """The exponent of the seconds between two rows of an axis."""
    if before is None or before.axis != row.axis or isinstance(row.value, str) or isinstance(before.value, str):
        return ""
    return f"{math.log(row.seconds / before.seconds) / math.log(row.value / before.value):.2f}"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| varied | value | seconds | growth | over floor | estimate / seen | peak memory |", "|" + "---|" * 7]
    for row, before in zip(rows, [None, *rows], strict=False):
        value = row.value if isinstance(row.value, str) else f"{row.value:,}"
        floor = f"{row.seconds / row.floor:.2f}" if row.floor else ""
        peak = f"{row.peak_bytes / 2**20:,.0f} MiB" if row.peak_bytes else ""
        lines.append(
            f"| {row.axis} | {value} | {row.seconds:.3g} | {growth(row, before)} "
            f"| {floor} | {row.estimate / row.seconds:.2f} | {peak} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel per axis: what was seen, what the planner says, and a line that grows linearly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not isinstance(row.value, str)]
    axes = list(dict.fromkeys(row.axis for row in rows))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3 * len(axes), 3), layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        own = [row for row in rows if row.axis == axis]
        values, seconds = [float(row.value) for row in own], [row.seconds for row in own]
        panel.loglog(values, seconds, "o-", label="seen")
        panel.loglog(values, [row.estimate for row in own], "x--", label="planned")
        panel.loglog(values, [seconds[-1] * value / values[-1] for value in values], ":", color="grey", label="linear")
        panel.set_xlabel(axis)
        panel.set_title("s per input" if axis.startswith("measuring") else "s per step", fontsize="small")
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
        rows.append(training(axis, setting, args.threads))
    for width in (1024, 4096, 16384):
        print("measuring", width, file=sys.stderr)
        rows.append(measurement(width))
    narrow = next(row for row in rows if (row.axis, row.value) == ("width", 64)).seconds
    rows += [stream_batch(d_vocab, narrow) for d_vocab in (16, 64)]
    for name in GRIDS:
        print("grid", name, file=sys.stderr)
        rows.append(run(name))
    print(f"PyTorch {torch.__version__}, {args.threads} threads\n")
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
