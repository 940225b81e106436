"""Check and time training on a GPU, within ten minutes: kernels, the reference, an SAE at a time, and whole sweeps.

    python scripts/bench_gpu.py [--json FILE] [--only NAME …] [--seconds 570] [--dry]

Every job has a process and a time limit of its own, so that an illegal access or a hang loses that job alone; what
differs is printed at once, and rows are written as they come. In this order, of which --only takes those whose name
begins so:

smoke       four steps in one call and four more in a second (launched, captured, replayed), against the reference,
            twice, and one SAE alone: L1 and TopK, at batches of 64, 512, 1,024 and 4,096
kernels     our kernels (kernels/cuda), with the time of each; stacks of 16 at widths 64, 1,024 and 16,384
autograd    one SAE at a time: modules, torch.optim.Adam, clip_grad_norm_, as the loop libraries do
penalties   what `smoke` does, for every penalty
reference   the reference step as a CUDA graph (kernels/cuda/captured.py), for each architecture
wide        one SAE of width 1,048,576
tf32        products of one TF32 instead of three
quickstart  `sae-sweep run experiment=quickstart device=cuda`, as SAEs an hour
grid        the same of 48 L1 and sqrt SAEs
long        width 1,048,576 for 10,000 steps

d 64, batch 4,096. A row is one line of a Markdown table: seconds per step of the whole stack, SAE-steps a second, the
time over that of the encoder product alone (float32), peak memory of the device, and FVU and L0 over the last steps. At
the end the planner's constants for this device (sweep/hardware_profile.py) follow from the rows, as JSON.

--dry runs all of it in Triton's interpreter on the CPU at sizes that mean nothing, to see that it runs.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import numpy as np
import torch
from torch import Tensor

from sae_sweep.config.settings import Penalty, Point, Sae, Training
from sae_sweep.kernels.cuda.backend import CudaBackend
from sae_sweep.kernels.cuda.captured import CapturedReference, cuda_graph, uncaptured
from sae_sweep.kernels.cuda.self_check import Check, compare
from sae_sweep.registry import kinds
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, Backend, Progress

COMPETING = tuple(name for name, kind in kinds("penalty").items() if kind.parsed.largest)
PENALTIES = tuple(kinds("penalty"))

DEVICE = "cpu" if DRY else "cuda"
D, BATCH, STACK = (16, 16, 2) if DRY else (64, 4096, 16)
WIDTHS, FULL = ((24, 600), 700) if DRY else ((64, 1024, 16384), 2**20)
BATCHES = (4, 8) if DRY else (64, 512, 1024, 4096)
CHECKED = (24,) if DRY else (64, 1000, 9000)
# Steps before the clock starts, while it runs, and of the full width in `long`.
WARM, TIMED, LONG = (2, 1, 2) if DRY else (400, 200, 10_000)
RING = 4 if DRY else 200
# By how much longer a job may take.
PATIENCE = 10 if DRY else 1
# L1 coefficients of a stack, from the first to the last.
LADDER = 0.5, 4.0
# What precedes a row, and a difference, in what a job prints.
ROW, WRONG = "row ", "wrong "
# Overrides of the sweeps that are timed as a user runs them.
RUNS = {
    "quickstart": ["experiment=quickstart"],
    "grid": [
        "toy=max_of_k", "toy.steps=3000", "training.steps=3000", "training.batch_size=512", "penalty=l1,sqrt",
        "penalty.coefficient=0.05,0.1,0.2,0.4,0.8,1.6", "sae.width=64,256,1024,2080",
    ],
}  # fmt: skip
TINY = ["toy=small", "toy.d_vocab=5", "toy.k=2", "toy.steps=30", "training.steps=25", "sae.width=5,6"]


@dataclass
class Row:
    """One line of the table; seconds of one step of the whole stack of `n` SAEs, or of one SAE of a whole sweep."""

    work: str
    backend: str
    width: int
    n: int
    seconds: float
    batch: int = BATCH
    floor: float | None = None
    peak_bytes: int = 0
    fvu: float | None = None
    l0: float | None = None

    def line(self) -> str:
        """Its line of the table."""
        per_second = f"{3600 / self.seconds:,.0f} an hour" if not self.width else f"{self.n / self.seconds:,.0f}"
        cells = [self.work, self.backend, f"{1e3 * self.seconds:.3f}", per_second]
        cells += ["-" if self.floor is None else f"{self.seconds / self.floor:.2f}", f"{self.peak_bytes / 1e9:.2f}"]
        cells += ["-" if value is None else f"{value:.4g}" for value in (self.fvu, self.l0)]
        return "| " + " | ".join(cells) + " |"


class Data:
    """Inputs with sparse true features: mean 0, E‖x‖² = d; as many batches as a ring holds, used over again."""

    def __init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        features = torch.randn(512, D, generator=generator, device=DEVICE)
        chosen = torch.randint(0, len(features), (RING * BATCH, 3), generator=generator, device=DEVICE)
        sizes = torch.rand(RING * BATCH, 3, 1, generator=generator, device=DEVICE) + 0.5
        x = (features[chosen] * sizes).sum(1)
        x = x - x.mean(0)
        self.ring = (x * (D / x.square().sum(1).mean()).sqrt()).view(RING, BATCH, D)

    def blocks(self, start: int, steps: int, batch: int = BATCH) -> Iterator[Tensor]:
        """Batches of steps start … start + steps − 1, BLOCK at a time."""
        for first in range(start, start + steps, BLOCK):
            yield self.ring[torch.arange(first, min(first + BLOCK, start + steps), device=DEVICE) % RING, :batch]


def stack_of(data: Data, sae: Sae, n: int, steps: int) -> Stack:
    """SAEs from exemplars, with L1 coefficients along LADDER."""
    points, starts = [], []
    penalty = "none" if sae.architecture in ("topk", "batchtopk", "matryoshka") else "l1"
    for seed in range(n):
        coefficient = LADDER[0] * (LADDER[1] / LADDER[0]) ** (seed / max(n - 1, 1))
        training = Training(steps=steps, batch_size=BATCH, lr=1e-3)
        points.append(Point(sae=sae, penalty=Penalty(penalty, coefficient), training=training, seed=seed))
        starts.append(exemplars(data, sae.width, seed))
    return Stack.start(points, starts, DEVICE)


def exemplars(data: Data, width: int, seed: int) -> Parameters:
    """A latent per exemplar: it fires where the projection exceeds a share of the exemplar's norm."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    # No exemplar twice: of equal latents, TopK's choice is anyone's.
    rows = torch.randperm(RING * BATCH, generator=generator, device=DEVICE).repeat(1 + width // (RING * BATCH))[:width]
    chosen = data.ring.flatten(0, 1)[rows]
    norms = chosen.norm(dim=1, keepdim=True)
    W_dec = chosen / norms
    # So large that some ten latents fire on an input, whatever the width.
    margin = 0.5 if width <= 1024 else 0.8 if width <= 2**14 else 0.9
    zeros = torch.zeros(width, device=DEVICE)
    extras = {"thresholds": zeros + 0.1, "r_mag": zeros, "b_mag": zeros}
    b_dec, threshold = torch.zeros(D, device=DEVICE), torch.zeros((), device=DEVICE)
    return Parameters(W_dec, W_dec, -margin * norms[:, 0], b_dec, threshold, **extras)


class Autograd(Backend):
    """Each SAE of the stack alone, as anybody would train it."""

    def __init__(self, stack: Stack) -> None:
        self.leaves = [[t.clone().requires_grad_() for t in stack.split(flat)] for flat in stack.flat]
        self.optimisers = [torch.optim.Adam(leaves) for leaves in self.leaves]

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """One SAE after the other on every batch."""
        progress = Progress.zeros(stack)
        for x in batches:
            sums = []
            for i, (leaves, optimiser) in enumerate(zip(self.leaves, self.optimisers, strict=True)):
                rate, coefficient = stack.schedule(i, stack.step)
                optimiser.param_groups[0]["lr"] = rate
                W_enc, W_dec, b_enc, b_dec = leaves
                codes = torch.addmm(b_enc, x, W_enc.T).relu()
                error = (torch.addmm(b_dec, codes, W_dec) - x).square().sum(1).mean()
                loss = error + coefficient * (codes * W_dec.norm(dim=1)).sum(1).mean()
                optimiser.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(leaves, stack.points[i].training.clip)
                optimiser.step()
                with torch.no_grad():
                    sums.append(torch.stack([loss, error, (codes > 0).sum(1).float().mean(), norm]))
            progress.add(x, *torch.stack(sums).unbind(1))
            stack.step += 1
        return progress


def wait() -> None:
    """Until the device has done what was asked of it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def encoder_product(x: Tensor, width: int, n: int) -> float:
    """Seconds of the encoder product alone on x [b, D]: [n, b, width] in float32, a few thousand latents at a time."""
    most = min(width, 2**18 // n)
    weights, out = torch.randn(n, D, most, device=DEVICE), torch.empty(n, len(x), most, device=DEVICE)
    repeats = 1 if DRY else 20
    for timed in (False, True):
        wait()
        started = time.perf_counter()
        for _ in range(repeats if timed else 2):
            for _ in range(0, width, most):
                torch.matmul(x, weights, out=out)
        wait()
    return (time.perf_counter() - started) / repeats


@dataclass(frozen=True)
class Steps:
    """How many steps are taken before the clock starts and while it runs, on how large batches."""

    warm: int = WARM
    timed: int = TIMED
    batch: int = BATCH


def time_steps(name: str, make: Callable[[Stack], Backend], sae: Sae, n: int, steps: Steps = Steps()) -> None:
    """Print a row: `n` SAEs trained by what `make` makes."""
    data, warm, timed, batch = Data(), steps.warm, steps.timed, steps.batch
    floor = encoder_product(data.ring[0, :batch], sae.width, n)
    stack = stack_of(data, sae, n, warm + timed + BLOCK)
    backend = make(stack)
    for batches in data.blocks(0, warm, batch):
        backend.advance(stack, batches)
    wait()
    started = time.perf_counter()
    sums = [backend.advance(stack, batches) for batches in data.blocks(warm, timed, batch)]
    wait()
    seconds = (time.perf_counter() - started) / timed
    error, l0 = (torch.stack([getattr(s, key) for s in sums]).sum(0).mean() for key in ("error", "l0"))
    variance = torch.stack([s.variance for s in sums]).sum()
    peak = 0 if DRY else torch.cuda.max_memory_allocated()
    work = f"{n} × {sae.architecture}, width {sae.width:,}"
    fvu, l0_seen = float(error / variance), float(l0 / timed)
    work += "" if batch == BATCH else f", batch {batch:,}"
    show(Row(work, name, sae.width, n, seconds, batch, floor, peak, fvu, l0_seen))
    if name.startswith("kernels") and batch == BATCH:
        print_profile(backend, stack, data)


def show(row: Row) -> None:
    """Hand a row to the process that runs the jobs."""
    print(ROW + json.dumps(asdict(row)), flush=True)


def print_profile(backend: Backend, stack: Stack, data: Data) -> None:
    """The time of each kernel over the next steps."""
    activities = [torch.profiler.ProfilerActivity.CPU if DRY else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for batches in data.blocks(stack.step, 1 if DRY else BLOCK - 5):
            backend.advance(stack, batches)
        wait()
    by = "cpu_time_total" if DRY else "device_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=3 if DRY else 20, max_name_column_width=40), flush=True)


def check(architecture: str, penalties: list[str], b: int) -> None:
    """Compare four steps and four more with the reference, at every width."""
    for width in CHECKED:
        points = [
            Point(
                sae=Sae(architecture, width=width, k=3),
                penalty=Penalty(penalty, 0.05, p=0.5),
                training=Training(steps=100, batch_size=b, lr=1e-4),
            )
            for penalty in penalties * (1 if len(penalties) > 1 else 2)
        ]
        case = Check(tuple(points), D, b, DEVICE, steps=1 if DRY else 4)
        wrong = compare(case, CudaBackend)
        print(f"{architecture}, width {width:,}, batch {b:,}, {' '.join(penalties)}: {wrong or 'agrees'}", flush=True)
        if wrong:
            print(f"{WRONG}{architecture}, width {width:,}, batch {b:,}, {' '.join(penalties)}: {wrong}", flush=True)


def known_penalties() -> list[str]:
    """Those that our kernels train."""
    return [name for name in PENALTIES if name not in COMPETING and name not in ("none", "l0")]


def run_sweep(name: str) -> None:
    """Print a row: a sweep as a user runs it, in seconds an SAE; start-up, toy, measuring and report included."""
    overrides = [*RUNS[name], "device=cuda"] if not DRY else [*TINY, "device=cpu"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "sae_sweep",
            "run",
            "--json",
            *overrides,
            "logger=none",
            f"output_dir={folder}",
        ]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    sys.stderr.write(done.stderr[-2000:])
    if done.returncode:
        print(f"{WRONG}{name}: exit code {done.returncode}", flush=True)
        return
    count = int(json.loads(done.stdout)["ran"])
    show(Row(f"{name}, {count} SAEs", "sae-sweep run", 0, count, seconds / count))


Job = Callable[[], None]


def jobs() -> dict[str, tuple[float, Job]]:
    """All jobs in their order: the time limit of each in seconds, and what it does."""
    made: dict[str, tuple[float, Job]] = {}
    for b in BATCHES:
        made[f"smoke relu {b}"] = 60, lambda b=b: check("relu", ["l1"], b)
        made[f"smoke topk {b}"] = 60, lambda b=b: check("topk", ["none"], b)
    relu, few = Sae("relu"), Steps(1, 1) if DRY else Steps(20, 20)

    def rows(job: str, name: str, make: Callable[[Stack], Backend], sae: Sae, n: int, steps: Steps) -> None:
        made[job] = 90, lambda: time_steps(name, make, sae, n, steps)

    ours, tf32, full, middle = kernels("tf32x3"), kernels("tf32"), relu.replace(width=FULL), WIDTHS[1]
    for width in WIDTHS:
        rows(f"kernels {width}", "kernels", ours, relu.replace(width=width), STACK, Steps())
    rows("kernels small batches", "kernels", ours, relu.replace(width=middle), STACK, Steps(batch=BATCH // 8))
    for width in WIDTHS:
        rows(f"autograd {width}", "autograd", Autograd, relu.replace(width=width), STACK, few)
    for penalty in known_penalties():
        made[f"penalties {penalty}"] = 60, lambda penalty=penalty: check("relu", ["l1", penalty], BATCHES[1])
    captured = "reference, captured"
    for architecture in ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "tied"):
        for width in WIDTHS[:2] if architecture == "relu" else [middle]:
            sae = Sae(architecture, width=width, k=3)
            rows(f"reference {architecture} {width}", captured, reference, sae, STACK, few)
    small = replace(few, batch=BATCH // 8)
    rows("reference small batches", captured, reference, relu.replace(width=middle), STACK, small)
    rows("wide", "kernels", ours, full, 1, Steps())
    rows("tf32", "kernels, tf32", tf32, relu.replace(width=middle), STACK, Steps())
    for name in RUNS:
        made[name] = 150, lambda name=name: run_sweep(name)
    rows("long", "kernels, whole training", ours, full, 1, Steps(0, LONG))
    return made


def kernels(precision: str) -> Callable[[Stack], Backend]:
    """Makes our kernels' backend, by the precision of its float32 products."""
    return lambda stack: CudaBackend(precision)


def reference(stack: Stack) -> Backend:
    """The reference step, captured."""
    return CapturedReference(uncaptured if DRY else cuda_graph)


def run_job(name: str, limit: float, found: Callable[[str], None]) -> str | None:
    """Run a job in a process of its own, which hands over its lines as they come; what went wrong, if anything."""
    command = [sys.executable, __file__, "--job", name, *(["--dry"] if DRY else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:

        def end() -> None:
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                found(line.rstrip("\n"))
            code = process.wait()
        finally:
            late = not timer.is_alive()
            timer.cancel()
    if code:
        return f"it did not end within {limit:.0f} s" if late else f"it broke off with exit code {code}"
    return None


def planner_constants(rows: list[Row]) -> dict[str, float]:
    """Constants of sweep/hardware_profile.py for this device, where there are rows to tell them by.

    Least squares of relative errors; what comes out negative is left out and the others are fitted anew.
    """
    constants: dict[str, float] = {}
    for backend, names in (
        ("kernels", ("step", "product_flops", "parameter")),
        ("reference, captured", ("autograd_step", "autograd_flops", "parameter")),
    ):
        chosen = [row for row in rows if row.backend == backend]
        if len(chosen) < 2:
            continue
        # One step, FLOP of the encoder product, and parameters.
        work = [[1.0, 2.0 * row.n * row.batch * row.width * D, row.n * (2.0 * D + 2) * row.width] for row in chosen]
        found = positive_fit(np.array(work), np.array([row.seconds for row in chosen]))
        for key, value in zip(names, found, strict=True):
            if value > 0 and key not in constants:
                constants[key] = 1 / value if key.endswith("flops") else value
    return constants


def positive_fit(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative factors [kinds] by which work [rows, kinds] comes to seconds [rows], in least relative squares."""
    factors, left = np.zeros(work.shape[1]), list(range(work.shape[1]))
    while left:
        fitted = np.linalg.lstsq(work[:, left] / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
        if (fitted >= 0).all():
            factors[left] = fitted
            break
        left.pop(int(fitted.argmin()))
    return factors


def write(path: Path | None, rows: list[Row], wrong: list[str]) -> None:
    """Write what is known so far: whole or not at all."""
    if path is None:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    known = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows], "wrong": wrong}
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({**known, "constants": planner_constants(rows)}, indent=1))
    shutil.move(aside, path)


def run_all(names: list[str], seconds: float, path: Path | None) -> list[str]:
    """Run jobs one after the other; prints the table as it grows. What went wrong."""
    rows, wrong, end = list[Row](), list[str](), time.monotonic() + seconds

    def found(line: str) -> None:
        if line.startswith(ROW):
            rows.append(Row(**json.loads(line.removeprefix(ROW))))
            print(rows[-1].line(), flush=True)
        elif line.startswith(WRONG):
            wrong.append(line.removeprefix(WRONG))
        else:
            print(line, file=sys.stderr, flush=True)
        write(path, rows, wrong)

    titles = "work", "backend", "ms", "SAE-steps/s", "/ encoder product", "peak GB", "FVU", "L0"
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)
    everything = jobs()
    for name in names:
        left = end - time.monotonic()
        if left < 10:
            wrong.append(f"{name}: left out, as {seconds:.0f} s were over")
            continue
        if problem := run_job(name, min(everything[name][0] * PATIENCE, left), found):
            wrong.append(f"{name}: {problem}")
            print(f"error: {wrong[-1]}", file=sys.stderr, flush=True)
    write(path, rows, wrong)
    print("\n" + json.dumps(planner_constants(rows)))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write rows, differences and constants to this file as they come")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="jobs whose names begin so")
    parser.add_argument("--check", action="store_true", help="only compare with the reference")
    parser.add_argument("--seconds", type=float, default=570.0, help="all jobs together; what is left then is left out")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, at sizes that mean nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        jobs()[args.job][1]()
        return 0
    if not (DRY or torch.cuda.is_available()):
        parser.error("PyTorch sees no GPU here (--dry runs in the interpreter)")
    only = ("smoke", "penalties") if args.check else tuple(args.only)
    names = [name for name in jobs() if name.startswith(only)]
    if not names:
        parser.error(f"no job begins with {' or '.join(only)}: there are {', '.join(jobs())}")
    wrong = run_all(names, args.seconds, args.json)
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
