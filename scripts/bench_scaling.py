"""Seconds and memory of sae-sweep on this CPU against width, batch, L0, stack size, points, and of whole grids.

    python scripts/bench_scaling.py [--quick] [--threads N] [--only ROW ...] [--rows FILE] [--figure FILE]

`--rows FILE` keeps the rows in a file and goes on from those that are there; `--only width`, `--only "grid topk"` make
some of them anew; the table and the figure (which needs the extra `bench`) are of all.

One setting varies at a time around width 1,024, batch 4,096, L0 8, one SAE, d = 64. SAEs are made so that about L0 of
their latents fire, and a learning rate of nearly zero keeps it so. `growth` is the exponent between a row and the one
before: 1 where twice as much costs twice as much. `estimate` is the planner's (sweep/cost.py), over what was seen.
`over floor`: training and measuring over the encoder product of the same inputs alone, with as many threads; a batch of
the stream over a step of one SAE of width 64. A measurement has one thread, as SAEs of a pack are measured side by
side, and reads the first part of all 64⁴ inputs. The last rows are whole runs of the command line on one core; their
estimates are those of `sae-sweep plan`. What has one thread is in seconds of its core, which others do not lengthen.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from bench_worker import reset_peak, resident_bytes

from sae_sweep.config import overrides as config
from sae_sweep.config.settings import Distribution, Evaluation, Penalty, Point, Sae, Toy, Training
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.evaluation_batches import accuracy_of
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.penalties import penalty_value
from sae_sweep.saes.stack import Stack
from sae_sweep.sweep import cost
from sae_sweep.sweep.backend import pick_backend
from sae_sweep.sweep.context import PointSae
from sae_sweep.sweep.hardware_profile import SPEEDS
from sae_sweep.sweep.plan import plan
from sae_sweep.toys.max_of_k import MaxOfK, shapes
from sae_sweep.toys.sampling import Chunk, EvaluationInputs, Stream
from sae_sweep.toys.sequences import CHUNK_ROWS

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
    "wide, random": f"{_WIDE} sae.width=4096 sae.init=random_unit",
    "wide, kmeans": f"{_WIDE} sae.width=4096 sae.init=kmeans",
    "widest": "toy=small penalty=l1 penalty.coefficient=1 training.steps=500 sae.width=16384 sae.init=exemplars",
    "jumprelu": "toy=small sae=jumprelu sae.width=136 penalty.coefficient=1,2 training.steps=1500",
    "gated": "toy=small sae=gated sae.width=16,136 penalty.coefficient=1,2 training.steps=1500",
    "probing": f"toy=small evaluation.probing=true {_ASKED}",
    "priors": f"toy=independent evaluation.priors=true {_ASKED}",
    "64 tokens": "sae.width=64,512 sae.init=exemplars penalty.coefficient=0.5,1",
    "64 tokens, wide": "sae.width=1024 sae.init=exemplars penalty=l1 penalty.coefficient=1 training.steps=500",
}
# What all of them have; and the grid of which there are more and more points.
GRID = ("device=cpu", "logger=none")
POINTS = "toy=small toy.steps=500 sae.width=16 sae.init=exemplars penalty=l1 training.steps=500 penalty.coefficient=1"
# Of the figure: Okabe and Ito's blue and orange, and a grey for light pages and dark.
SEEN, PLANNED, GREY = "#0072B2", "#E69F00", "#8A8F98"
# Products of the encoder in a measurement that is timed: about 3 s; of narrow SAEs fewer, as inputs are kept in memory.
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
    """What was seen: seconds of a step of the stack (or of a run), the least they could be, memory above what was held
    (of a run: all of it)."""

    axis: str
    value: int | str
    seconds: float
    floor: float = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """A row to be: how it is measured, and what the planner says of its seconds and bytes (0: nothing)."""

    axis: str
    value: int | str
    measure: Callable[[], Row]
    plan: Callable[[], tuple[float, int]]


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
        now, times = clock(threads), []
        for _ in range(TURNS):
            began = now()
            backend.advance(stack, batches)
            times.append((now() - began) / steps)
    peak = resident_bytes("VmHWM") - before
    floor = product_seconds(batches[0], W, threads) * setting.stack
    return Row(axis, getattr(setting, axis), statistics.median(times), floor, peak)


def planned_training(setting: Setting, threads: int) -> tuple[float, int]:
    """The same step, as the planner has it; batches are there already."""
    shape = Sae(width=setting.width, init="exemplars")
    point = Point(toy=Toy(d_model=D), sae=shape, training=Training(batch_size=setting.batch))
    alone = setting.stack * cost.step_seconds(point, SPEEDS["cpu"], setting.l0)
    return cost.side_by_side(alone, point, setting.stack, threads), 0


def clock(threads: int) -> Callable[[], float]:
    """What time is taken by: one thread by the processor's, which others on the machine do not lengthen."""
    return time.process_time if threads == 1 else time.perf_counter


def product_seconds(x: torch.Tensor, W: torch.Tensor, threads: int) -> float:
    """The encoder product of inputs x [b, d] and W [width, d], into memory that is there already."""
    torch.set_num_threads(threads)
    columns, bias = max(1, CODES // len(x)), torch.zeros(len(W))
    out, now, times = torch.empty(len(x) * min(columns, len(W))), clock(threads), []
    for _ in range(TURNS + 1):
        began = now()
        for weights, offset in zip(W.split(columns), bias.split(columns), strict=True):
            torch.addmm(offset, x, weights.T, out=out[: len(x) * len(weights)].view(len(x), len(weights)))
        times.append(now() - began)
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
    inputs.chunks = measured_chunks(width)
    x = torch.cat([chunk.x for chunk in inputs])
    W = torch.nn.functional.normalize(stream.exemplars(width, 1), dim=1)
    sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: CODES // width]] @ W.T
    bias = -sample.topk(max(1, 8 * len(sample) // width), dim=0).values[-1]
    point = Point(toy=toy, sae=Sae(width=width, init="exemplars"), penalty=Penalty("l1", 1.0))
    sae = PointSae(point, Parameters(W, W, bias, torch.zeros(D), torch.zeros(())))
    accuracy_of(inputs)  # once for all SAEs of a toy
    began = time.process_time()
    measure(sae, inputs, lambda contributions: penalty_value("l1", contributions), evaluation)
    seconds = (time.process_time() - began) / len(x)
    return Row("measuring, width", width, seconds, product_seconds(x[:CHUNK_ROWS], W, 1) / CHUNK_ROWS)


def measured_chunks(width: int) -> int:
    """Chunks of inputs in a measurement."""
    return max(1, MEASURED // (max(width, 1024) * D) // CHUNK_ROWS)


def planned_measurement(width: int) -> tuple[float, int]:
    """An input of the same measurement, as the planner has it."""
    point, inputs = Point(toy=Toy(d_model=D), sae=Sae(width=width)), CHUNK_ROWS * measured_chunks(width)
    return cost.measured_seconds(point, Evaluation(inputs=inputs), SPEEDS["cpu"], 8) / inputs, 0


def stream_batch(d_vocab: int, threads: int) -> Row:
    """A batch of 4,096 activations of a max-of-4 toy, over a step of an SAE of width 64 that they are for."""
    step = training("width", Setting(width=64), threads).seconds
    _, model = untrained_toy(d_vocab, 4)
    stream = Stream(model, "pre_unembed", Distribution("max_stratified"), 0, Setting.batch, "cpu")
    times = []
    for turn in range(TURNS):
        began = time.process_time()
        stream.batches(turn * cost.BLOCK, cost.BLOCK)
        times.append((time.process_time() - began) / cost.BLOCK)
    return Row("stream, d_vocab", d_vocab, statistics.median(times), step)


def planned_batch(d_vocab: int) -> tuple[float, int]:
    """The same batch, as the planner has it."""
    kept = cost.toy_inputs(Toy(d_vocab=d_vocab, k=4)) <= cost.TABLE_INPUTS
    return Setting.batch * (SPEEDS["cpu"].batch_input if kept else SPEEDS["cpu"].model_input), 0


def run(axis: str, value: int | str, overrides: str) -> Row:
    """A whole run of the command line on one core."""
    with tempfile.TemporaryDirectory() as folder, one_core():
        arguments = [sys.executable, "-m", "sae_sweep", "run", "--json", *GRID, *overrides.split()]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*arguments, f"output_dir={folder}"], **silent)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise RuntimeError(f"`sae-sweep run {overrides}` failed")
    return Row(axis, value, used.ru_utime + used.ru_stime, 0, 1024 * used.ru_maxrss)


def planned_run(overrides: str) -> tuple[float, int]:
    """What `sae-sweep plan` says of it there."""
    with one_core():
        planned = plan(config.load([*GRID, *overrides.split()]), set())
    return planned.seconds, planned.peak_memory_bytes


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and those that it starts, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def growth(row: Row, before: Row | None) -> str:
    """The exponent of the seconds between two rows of an axis."""
    if before is None or before.axis != row.axis or isinstance(row.value, str) or isinstance(before.value, str):
        return ""
    return f"{math.log(row.seconds / before.seconds) / math.log(row.value / before.value):.2f}"


def table(rows: Sequence[Row], plans: Sequence[tuple[float, int]]) -> str:
    """The rows in Markdown, each with what the planner says of its seconds and bytes."""
    heads = ("varied", "value", "seconds", "growth", "over floor", "estimate / seen", "peak memory", "estimate / seen")
    lines = ["".join(f"| {head} " for head in heads) + "|", "|" + "---|" * len(heads)]
    for row, (seconds, size), before in zip(rows, plans, [None, *rows], strict=False):
        value = row.value if isinstance(row.value, str) else f"{row.value:,}"
        floor = f"{row.seconds / row.floor:.2f}" if row.floor else ""
        peak = f"{row.peak_bytes / 2**20:,.0f} MiB" if row.peak_bytes else ""
        of_peak = f"{size / row.peak_bytes:.2f}" if size and row.peak_bytes else ""
        lines.append(
            f"| {row.axis} | {value} | {row.seconds:.3g} | {growth(row, before)} "
            f"| {floor} | {seconds / row.seconds:.2f} | {peak} | {of_peak} |"
        )
    return "\n".join(lines)


def draw(rows: Sequence[Row], plans: Sequence[tuple[float, int]], path: Path) -> None:
    """A panel per axis: what was seen, what the planner says, and a line that grows linearly. Reads on any ground."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [(row, seconds) for row, (seconds, _) in zip(rows, plans, strict=True) if not isinstance(row.value, str)]
    axes = list(dict.fromkeys(row.axis for row, _ in shown))
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    pyplot.rcParams.update(dict.fromkeys(keys, GREY))
    columns = max(1, -(-len(axes) // 2))
    figure, panels = pyplot.subplots(2, columns, figsize=(3 * columns, 5.4), layout="constrained")
    for axis, panel in zip(axes, panels.flat, strict=False):
        own = [(float(row.value), row.seconds, planned) for row, planned in shown if row.axis == axis]
        values, seconds, planned = zip(*own, strict=True)
        panel.loglog(values, seconds, "o-", color=SEEN, label="seen")
        panel.loglog(values, planned, "x--", color=PLANNED, label="planned")
        panel.loglog(values, [seconds[-1] * value / values[-1] for value in values], ":", color=GREY, label="linear")
        panel.set_xlabel(axis)
        panel.set_xticks(values, [f"{value:,.0f}" for value in values], fontsize="x-small", rotation=25)
        panel.minorticks_off()
        units = {"measuring": "s per input", "stream": "s per batch", "points": "s per run"}
        panel.set_title(units.get(axis.split(",")[0], "s per step"), fontsize="small")
        panel.patch.set_alpha(0)
    for panel in panels.flat[len(axes) :]:
        panel.set_axis_off()
    panels.flat[0].legend(fontsize="x-small", framealpha=0)
    figure.savefig(path, transparent=True, dpi=150)


def works(quick: bool, threads: int) -> Iterator[Work]:
    """Every row in order."""
    for axis, setting in settings(quick):
        see, planned = partial(training, axis, setting, threads), partial(planned_training, setting, threads)
        yield Work(axis, getattr(setting, axis), see, planned)
    for width in (136, 1024, 4096, 16384):
        yield Work("measuring, width", width, partial(measurement, width), partial(planned_measurement, width))
    for d_vocab in (16, 64):
        yield Work("stream, d_vocab", d_vocab, partial(stream_batch, d_vocab, threads), partial(planned_batch, d_vocab))
    runs: list[tuple[str, int | str, str]] = [("points", n, f"{POINTS} seed=range(0,{n})") for n in (1, 4, 16, 64, 256)]
    runs += [("grid", name, overrides) for name, overrides in GRIDS.items()]
    for axis, value, overrides in runs:
        yield Work(axis, value, partial(run, axis, value, overrides), partial(planned_run, overrides))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the widest SAEs")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows whose name, axis and value, begins so")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON of rows: read if it is there, then written")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows there (.svg or .png)")
    parser.add_argument("--threads", type=int, default=1, help="that train an SAE; default 1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known = {}
    if args.rows and args.rows.exists():
        known = {(row["axis"], row["value"]): Row(**row) for row in json.loads(args.rows.read_text())}
    every = list(works(args.quick, args.threads))
    for work in every:
        wanted = args.only is None or any(f"{work.axis} {work.value}".startswith(only) for only in args.only)
        if wanted and (args.only or (work.axis, work.value) not in known):
            print(work.axis, work.value, file=sys.stderr)
            known[work.axis, work.value] = work.measure()
            if args.rows:
                args.rows.write_text(json.dumps([asdict(row) for row in known.values()], indent=1))
    done = [work for work in every if (work.axis, work.value) in known]
    rows, plans = [known[work.axis, work.value] for work in done], [work.plan() for work in done]
    print(f"PyTorch {torch.__version__}, threads: {args.threads}\n")
    print(table(rows, plans))
    if args.figure:
        draw(rows, plans, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
