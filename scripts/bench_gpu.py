"""Time training steps on a GPU: stacks of L1 SAEs against one SAE at a time by autograd, and the full width.

    python scripts/bench_gpu.py [--json FILE] [--check] [--profile] [--precisions tf32x3,ieee,tf32] [--full] [--dry]

d 64, batch 4,096; stacks of 16 at widths 64, 1,024 and 16,384, and one SAE of width 1,048,576. Prints a Markdown table:
seconds per step of the whole stack, SAE-steps a second, the ratio of those to the best of the peer rows and of the time
to that of the encoder product alone (float32), peak memory of the device, and FVU and L0 over the last steps.

autograd   one SAE at a time: modules, torch.optim.Adam, clip_grad_norm_, as the loop libraries do; nothing but the step
reference  the whole stack through autograd (saes/train.py)
kernels    kernels/cuda/backend.py, by precision of its float32 products

--check first compares steps with the reference for every penalty and architecture, and bits of one SAE alone and in a
stack; exits with 1 if they differ. --profile adds the time of each kernel. --full trains the full width for 10,000
steps. --dry runs all of it in Triton's interpreter on the CPU at sizes that mean nothing, to see that it runs.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch
from torch import Tensor

from sae_sweep.config.settings import Penalty, Point, Sae, Training
from sae_sweep.kernels.cuda.backend import CudaBackend
from sae_sweep.registry import kinds
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, AutogradBackend, Backend, Progress

COMPETING = tuple(name for name, kind in kinds("penalty").items() if kind.largest)
PENALTIES = tuple(kinds("penalty"))

DEVICE = "cpu" if DRY else "cuda"
D, BATCH, STACK = (16, 20, 2) if DRY else (64, 4096, 16)
WIDTHS, FULL = ((24, 600), 700) if DRY else ((64, 1024, 16384), 2**20)
# Steps before the clock starts, while it runs, and of the full width with --full.
WARM, TIMED, FULL_STEPS = (2, 1, 3) if DRY else (400, 200, 10_000)
RING = 40 if DRY else 200
# L1 coefficients of a stack, from the first to the last.
LADDER = 0.5, 4.0
# Above this much memory for its activations the reference is left out.
REFERENCE_BYTES = 60e9


@dataclass
class Row:
    """One line of the table; seconds of one step of the whole stack."""

    work: str
    backend: str
    seconds: float
    sae_steps_per_second: float
    ratio_best_peer: float | None
    ratio_floor: float | None
    peak_bytes: int
    fvu: float | None
    l0: float | None


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

    def blocks(self, start: int, steps: int) -> Iterator[Tensor]:
        """Batches of steps start … start + steps − 1, BLOCK at a time."""
        for first in range(start, start + steps, BLOCK):
            yield self.ring[torch.arange(first, min(first + BLOCK, start + steps), device=DEVICE) % RING]


def stack(data: Data, width: int, n: int, steps: int) -> Stack:
    """L1 SAEs of coefficients along LADDER, from exemplars."""
    points, starts = [], []
    for seed in range(n):
        coefficient = LADDER[0] * (LADDER[1] / LADDER[0]) ** (seed / max(n - 1, 1))
        training = Training(steps=steps, batch_size=BATCH, lr=1e-3)
        points.append(Point(sae=Sae(width=width), penalty=Penalty("l1", coefficient), training=training, seed=seed))
        starts.append(exemplars(data, width, seed))
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
    zeros = torch.zeros(D, device=DEVICE)
    return Parameters(W_dec, W_dec, -margin * norms[:, 0], zeros, torch.zeros((), device=DEVICE))


class Autograd:
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


def train(backend: Backend, stack: Stack, data: Data, warm: int, timed: int) -> tuple[float, float, float]:
    """Seconds per step, and FVU and L0, means over the SAEs, over the timed steps."""
    for batches in data.blocks(0, warm):
        backend.advance(stack, batches)
    wait()
    started = time.perf_counter()
    sums = [backend.advance(stack, batches) for batches in data.blocks(warm, timed)]
    wait()
    seconds = (time.perf_counter() - started) / timed
    error, l0 = (torch.stack([getattr(s, name) for s in sums]).sum(0).mean() for name in ("error", "l0"))
    variance = torch.stack([s.variance for s in sums]).sum()
    return seconds, float(error / variance), float(l0 / timed)


def floor(data: Data, width: int, n: int) -> float:
    """Seconds of the encoder product alone: [n, batch, width] in float32, a few thousand latents at a time."""
    most = min(width, 2**18 // n)
    weights, out = torch.randn(n, D, most, device=DEVICE), torch.empty(n, BATCH, most, device=DEVICE)
    repeats = 1 if DRY else 20
    for timed in (False, True):
        wait()
        started = time.perf_counter()
        for _ in range(repeats if timed else 2):
            for _ in range(0, width, most):
                torch.matmul(data.ring[0], weights, out=out)
        wait()
    return (time.perf_counter() - started) / repeats


def measure(data: Data, width: int, n: int, precisions: list[str], timed: int, profile: bool) -> Iterator[Row]:
    """The rows of one width."""
    work, base = f"{n} × L1, width {width}", floor(data, width, n)
    yield Row(work, "encoder product", base, n / base, None, 1.0, 0, None, None)
    makers: list[tuple[str, Callable[[Stack], Backend], int, int]] = []
    room = 8 * 4 * BATCH * width < REFERENCE_BYTES
    if room:
        makers.append(("autograd", Autograd, *((1, 1) if DRY else (20, 20))))
    if room and 8 * 4 * BATCH * width * n < REFERENCE_BYTES:
        makers.append(("reference", lambda _: AutogradBackend(), WARM, min(timed, TIMED)))
    makers += [
        (f"kernels {precision}", lambda _, precision=precision: CudaBackend(precision), WARM, timed)
        for precision in precisions
    ]
    peer: float | None = None
    for name, make, warm, count in makers:
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        chosen = stack(data, width, n, WARM + max(timed, TIMED) + BLOCK)
        backend = make(chosen)
        seconds, fvu, l0 = train(backend, chosen, data, warm, count)
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        if name == "autograd":
            peer = seconds
            fvu, l0 = None, None  # too few steps to compare
        ratio = peer / seconds if peer else None
        yield Row(work, name, seconds, n / seconds, ratio, seconds / base, peak, fvu, l0)
        if profile and name.startswith("kernels"):
            _profile(backend, chosen, data)


def _profile(backend: Backend, stack: Stack, data: Data) -> None:
    """Print the time of each kernel over the next steps."""
    activities = [torch.profiler.ProfilerActivity.CPU if DRY else torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for batches in data.blocks(stack.step, 1 if DRY else 20):
            backend.advance(stack, batches)
        wait()
    by = "cpu_time_total" if DRY else "device_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=3 if DRY else 25), file=sys.stderr)


def check(data: Data) -> list[str]:
    """What differs between kernels and reference after one step, or between an SAE alone and in a stack."""
    wrong = []
    x = data.ring[:1] if DRY else data.ring[:1, :500]
    widths = (24,) if DRY else (64, 1000, 9000)
    known = [name for name in PENALTIES if name != "none" and name not in COMPETING]
    cases = [("relu", name, width) for name in known for width in widths]
    cases += [("topk", "none", width) for width in widths]
    for architecture, penalty, width in cases:
        points = [
            Point(
                sae=Sae(architecture, width, 3),
                penalty=Penalty(penalty, 0.01, 0.3),
                training=Training(steps=9),
                seed=seed,
            )
            for seed in range(3)
        ]
        starts = [exemplars(data, width, seed) for seed in range(3)]
        starts[1].b_enc.zero_()  # half of its latents fire: too many for lists
        expected, whole, again = (Stack.start(points, starts, DEVICE) for _ in range(3))
        alone = Stack.start(points[2:], starts[2:], DEVICE)
        reference = AutogradBackend().advance(expected, x)
        progress = CudaBackend().advance(whole, x)
        for other in (again, alone):
            CudaBackend().advance(other, x)
        apart = float(((whole.first - expected.first).abs().amax(1) / expected.first.abs().amax(1)).max())
        loss = float((progress.loss / reference.loss - 1).abs().max())
        case = f"{architecture} {penalty} width {width}: gradients apart {apart:.1e}, loss {loss:.1e}"
        print(case, file=sys.stderr)
        # An activation within rounding of zero may count in one and not in the other.
        if not (apart < 1e-2 and loss < 1e-4):
            wrong.append(case)
        if not (torch.equal(whole.flat, again.flat) and torch.equal(whole.flat[2], alone.flat[0])):
            wrong.append(f"{architecture} {penalty} width {width}: bits differ from run to run or with company")
    return wrong


def line(row: Row) -> str:
    """One line of the table."""

    def number(value: float | None, pattern: str) -> str:
        return "-" if value is None else format(value, pattern)

    cells = [row.work, row.backend, f"{1e3 * row.seconds:.3f}", f"{row.sae_steps_per_second:,.0f}"]
    cells += [number(row.ratio_best_peer, ".1f"), number(row.ratio_floor, ".2f"), f"{row.peak_bytes / 1e9:.2f}"]
    return "| " + " | ".join([*cells, number(row.fvu, ".4f"), number(row.l0, ".2f")]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--check", action="store_true", help="compare with the reference first")
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel on stderr")
    parser.add_argument("--precisions", default="tf32x3", help="of the float32 products: tf32x3, ieee, tf32")
    parser.add_argument("--full", action="store_true", help="10,000 steps at the full width")
    parser.add_argument("--dry", action="store_true", help="in the interpreter, at sizes that mean nothing")
    args = parser.parse_args()
    if not (DRY or torch.cuda.is_available()):
        parser.error("PyTorch sees no GPU here (--dry runs in the interpreter)")

    data, precisions, rows = Data(), args.precisions.split(","), []
    wrong = check(data) if args.check else []
    print(f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'interpreter'}, torch {torch.__version__}\n")
    titles = "work", "backend", "ms/step", "SAE-steps/s", "× peer", "/ floor", "peak GB", "FVU", "L0"
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles), flush=True)
    jobs = [(width, STACK, TIMED) for width in WIDTHS]
    for width, n, timed in [*jobs, (FULL, 1, FULL_STEPS if args.full else TIMED)]:
        for row in measure(data, width, n, precisions, timed, args.profile):
            rows.append(row)
            print(line(row), flush=True)
            if args.json:  # after every row: a run cut short keeps what it measured
                args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    for difference in wrong:
        print(f"error: {difference}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
