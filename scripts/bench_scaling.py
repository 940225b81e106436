"""Seconds and memory of sae-sweep on this CPU against width, batch, L0, stack size, points, and of whole grids.

    python scripts/bench_scaling.py [--quick] [--threads N] [--only ROW ...] [--rows FILE] [--figure FILE]

`--rows FILE` keeps the rows in a file and goes on from those that are there; `--only width`, `--only "grid topk"` make
some of them anew; the table and the figure (which needs the extra `bench`) are of all.

One setting varies at a time around width 1,024, batch 4,096, L0 8, one SAE, d = 64. SAEs are made so that about L0 of
their latents fire, and a learning rate of nearly zero keeps it so. `growth` is the exponent between a row and the one
before: 1 where twice as much costs twice as much. `estimate` is the planner's (sweep/cost.py), over what was seen.
`over floor`: training and measuring over the encoder product of the same inputs alone, with as many threads; a batch of
the stream over a step of one SAE of width 64. A measurement has one thread, as SAEs of a pack are measured side by
side, and reads the first part of all 64⁴ inputs. The last rows are whole runs of the command line on one core, in
seconds of that core, which others on the machine do not lengthen; their estimates are those of `sae-sweep plan`.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from sae_sweep.sweep.speeds import SPEEDS
from sae_sweep.toys.max_of_k import MaxOfK, shapes
from sae_sweep.toys.sequences import CHUNK_ROWS
from sae_sweep.toys.stream import Chunk, EvaluationInputs, Stream

D, TURNS = 64, 5
# Codes in the steps of a turn, up to as many as training takes in one call.
CODES = 1 << 25
# Grids of several kinds, run whole: each as its overrides.
_WIDE = "toy=small penalty=l1 penalty.coefficient=1 training.batch_size=2048 training.steps=300"
_ASKED = "sae.width=16,32 training.steps=500 penalty.coefficient=0.5,1"
GRIDS = {
    "quickstart": "experiment=quickstart",
    "topk": "toy=small sae=topk sae.k=1,2,4 sae.width=136 seed=0,1",
    "batchtopk": "toy=small sae=batchtopk sae.k=2,4 sae.width=136,1024 training.steps=1000",
    "many small": "toy=small sae.width=16 sae.init=exemplars penalty=l1,sqrt seed=range(0,8)",
    "wide, exemplars": f"{_WIDE} sae.width=8192 sae.init=exemplars",
    "wide, random": f"{_WIDE} sae.width=4096 sae.init=random",
    "wide, kmeans": f"{_WIDE} sae.width=4096 sae.init=kmeans",
    "widest": "penalty=l1 penalty.coefficient=1 training.steps=300 sae.width=16384 sae.init=exemplars",
    "jumprelu": "toy=small sae=jumprelu sae.width=136 penalty.coefficient=1,2 training.steps=1500",
    "gated": "toy=small sae=gated sae.width=16,136 penalty.coefficient=1,2 training.steps=1500",
    "probing": f"toy=small evaluation.probing=true {_ASKED}",
    "priors": f"toy=independent evaluation.priors=true {_ASKED}",
    "64 tokens": "sae.width=64,512 sae.init=exemplars penalty.coefficient=0.5,1",
}
# The grid of which there are more and more points.
POINTS = "toy=small toy.steps=500 sae.width=16 sae.init=exemplars penalty=l1 training.steps=500 penalty.coefficient=1"
# Of the figure: Okabe and Ito's blue and orange, and a grey for light pages and dark.
SEEN, PLANNED, GREY = "#0072B2", "#E69F00", "#8A8F98"
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
    """Seconds of a step of the stack (or of a run), the least they could be, memory above what was held (of a run: all
    of it), and what the plan says of both."""

    axis: str
    value: int | str
    seconds: float
    floor: float = 0
    peak_bytes: int = 0
    estimate: float = 0
    estimate_bytes: int = 0


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
    sized = replace(point, toy=Toy(d_model=D))
    alone = setting.stack * cost.step_seconds(sized, SPEEDS["cpu"], setting.l0)
    estimate = cost.side_by_side(alone, sized, setting.stack, threads)
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
    estimate = cost.measured_seconds(point, replace(evaluation, inputs=len(x)), SPEEDS["cpu"], 8) / len(x)
    return Row("measuring, width", width, seconds, floor, 0, estimate)


def stream_batch(d_vocab: int, threads: int) -> Row:
    """A batch of 4,096 activations of a max-of-4 toy, over a step of an SAE of width 64 that they are for."""
    step = training("width", Setting(width=64), threads).seconds
    _, model = untrained_toy(d_vocab, 4)
    stream = Stream(model, "pre_unembed", Distribution("max_stratified"), 0, Setting.batch, "cpu")
    times = []
    for turn in range(TURNS):
        began = time.perf_counter()
        stream.batches(turn * cost.BLOCK, cost.BLOCK)
        times.append((time.perf_counter() - began) / cost.BLOCK)
    return Row("stream, d_vocab", d_vocab, statistics.median(times), step, 0, Setting.batch * SPEEDS["cpu"].model_input)


def run(axis: str, value: int | str, overrides: str) -> Row:
    """A whole run of the command line on one core, and what `plan` says of it there."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides.split(), "device=cpu", "logger=none", f"output_dir={folder}"]

        def sae_sweep(command: str) -> str:
            arguments = [sys.executable, "-m", "sae_sweep", command, "--json", *words]
            return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout

        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})
        try:
            plan = json.loads(sae_sweep("plan"))["estimate"]
            arguments = [sys.executable, "-m", "sae_sweep", "run", "--json", *words]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(arguments, **silent)
            _, status, used = os.wait4(process.pid, 0)
        finally:
            os.sched_setaffinity(0, cores)
        if status:
            raise RuntimeError(f"`sae-sweep run {overrides}` failed: {status}")
        seconds, peak = used.ru_utime + used.ru_stime, 1024 * used.ru_maxrss
        return Row(axis, value, seconds, 0, peak, plan["seconds"], plan["peak_memory_bytes"])


def growth(row: Row, before: Row | None) -> str:
    """The exponent of the seconds between two rows of an axis."""
    if before is None or before.axis != row.axis or isinstance(row.value, str) or isinstance(before.value, str):
        return ""
    return f"{math.log(row.seconds / before.seconds) / math.log(row.value / before.value):.2f}"


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    heads = ("varied", "value", "seconds", "growth", "over floor", "estimate / seen", "peak memory", "estimate / seen")
    lines = ["".join(f"| {head} " for head in heads) + "|", "|" + "---|" * len(heads)]
    for row, before in zip(rows, [None, *rows], strict=False):
        value = row.value if isinstance(row.value, str) else f"{row.value:,}"
        floor = f"{row.seconds / row.floor:.2f}" if row.floor else ""
        peak = f"{row.peak_bytes / 2**20:,.0f} MiB" if row.peak_bytes else ""
        planned = f"{row.estimate_bytes / row.peak_bytes:.2f}" if row.estimate_bytes else ""
        lines.append(
            f"| {row.axis} | {value} | {row.seconds:.3g} | {growth(row, before)} "
            f"| {floor} | {row.estimate / row.seconds:.2f} | {peak} | {planned} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel per axis: what was seen, what the planner says, and a line that grows linearly. Reads on any ground."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if not isinstance(row.value, str)]
    axes = list(dict.fromkeys(row.axis for row in rows))
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    pyplot.rcParams.update(dict.fromkeys(keys, GREY))
    columns = -(-len(axes) // 2)
    figure, panels = pyplot.subplots(2, columns, figsize=(3 * columns, 5.4), layout="constrained")
    for axis, panel in zip(axes, panels.flat, strict=False):
        own = [row for row in rows if row.axis == axis]
        values, seconds = [float(row.value) for row in own], [row.seconds for row in own]
        panel.loglog(values, seconds, "o-", color=SEEN, label="seen")
        panel.loglog(values, [row.estimate for row in own], "x--", color=PLANNED, label="planned")
        panel.loglog(values, [seconds[-1] * value / values[-1] for value in values], ":", color=GREY, label="linear")
        panel.set_xlabel(axis)
        units = {"measuring": "s per input", "stream": "s per batch", "points": "s per run"}
        panel.set_title(units.get(axis.split(",")[0], "s per step"), fontsize="small")
        panel.patch.set_alpha(0)
    for panel in panels.flat[len(axes) :]:
        panel.set_axis_off()
    panels.flat[0].legend(fontsize="x-small", framealpha=0)
    figure.savefig(path, transparent=True, dpi=150)


def works(quick: bool, threads: int) -> Iterator[tuple[str, int | str, Callable[[], Row]]]:
    """Axis, value and how to measure it, of every row in order."""
    for axis, setting in settings(quick):
        yield axis, getattr(setting, axis), partial(training, axis, setting, threads)
    for width in (1024, 4096, 16384):
        yield "measuring, width", width, partial(measurement, width)
    for d_vocab in (16, 64):
        yield "stream, d_vocab", d_vocab, lambda d_vocab=d_vocab: stream_batch(d_vocab, threads)
    for points in (1, 4, 16, 64, 256):
        yield "points", points, partial(run, "points", points, f"{POINTS} seed=range(0,{points})")
    for name, overrides in GRIDS.items():
        yield "grid", name, partial(run, "grid", name, overrides)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the widest SAEs")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name, axis and value, begins so")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON of rows: read if it is there, then written")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows there (.svg or .png)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default 2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {}
    if args.rows and args.rows.exists():
        known = {(row["axis"], row["value"]): Row(**row) for row in json.loads(args.rows.read_text())}
    order = []
    for axis, value, work in works(args.quick, args.threads):
        order.append((axis, value))
        wanted = args.only is None or any(f"{axis} {value}".startswith(only) for only in args.only)
        if wanted and (args.only or (axis, value) not in known):
            print(axis, value, file=sys.stderr)
            known[axis, value] = work()
            if args.rows:
                args.rows.write_text(json.dumps([asdict(row) for row in known.values()], indent=1))
    rows = [known[key] for key in order if key in known]
    print(f"PyTorch {torch.__version__}, {args.threads} threads\n")
    print(table(rows))
    if args.figure:
        draw(rows, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
