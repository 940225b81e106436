"""Compare the compiled CPU step of every architecture with autograd's (saes/train.py), on one core.

    python scripts/bench_architectures.py [--only ARCHITECTURE …]

SAEs are made so that about L0 of their latents fire, and a learning rate of nearly zero keeps it so. Both take the same
steps in turns; printed are medians in seconds of the core, their ratio, and the L0 that each saw.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from sae_sweep.config.settings import Penalty, Point, Sae, Training, canonical
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.registry import kinds
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend

ARCHITECTURES = tuple(name for name, kind in kinds("architecture").items() if "cpu" in kind.compiled)
COUNTED = tuple(name for name, kind in kinds("architecture").items() if kind.counts)

L0, TURNS = 8, 5
# Width, batch, d, and steps of a turn: by autograd, and compiled.
SHAPES = ((1024, 4096, 64, 1, 5), (136, 512, 32, 10, 50))


def stack(architecture: str, width: int, batch: int, d: int) -> Stack:
    """One SAE under L1 of which about L0 latents fire on standard normal inputs."""
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(width, d, generator=generator), dim=1)
    # Those that count have twice as many to choose from.
    fire = L0 * (2 if architecture in COUNTED else 1)
    quantile = float(torch.special.ndtri(torch.tensor(1 - fire / width, dtype=torch.float64)))
    training = Training(10**6, batch, lr=1e-9, lr_decay=0)
    point = canonical(Point(sae=Sae(architecture, width=width, k=L0), penalty=Penalty("l1", 1e-3), training=training))
    start = Parameters(W, W, torch.full((width,), -quantile), torch.zeros(d), torch.zeros(()))
    if architecture == "jumprelu":
        start = start.replace(b_enc=torch.zeros(width), thresholds=torch.full((width,), quantile))
    elif architecture == "gated":
        start = start.replace(r_mag=torch.zeros(width), b_mag=start.b_enc.clone())
    made = Stack.start([point], [start], "cpu")
    made.density.zero_()
    return made


def compare(architecture: str, width: int, batch: int, d: int, slow: int, fast: int) -> str:
    """A line of the table."""
    batches = torch.randn(fast, batch, d, generator=torch.Generator().manual_seed(1))
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sides: list[tuple[Backend, Stack, int]] = [
            (AutogradBackend(), stack(architecture, width, batch, d), slow),
            (CpuBackend(pool, 1), stack(architecture, width, batch, d), fast),
        ]
        times: list[list[float]] = [[], []]
        for turn in range(TURNS + 1):
            seen = []
            for (backend, of, steps), own in zip(sides, times, strict=True):
                began = time.process_time()
                progress = backend.advance(of, batches[:steps])
                if turn:  # the first compiles, and fills caches
                    own.append((time.process_time() - began) / steps)
                seen.append(float(progress.l0) / steps)
    medians = [statistics.median(own) for own in times]
    cells = (f"{value:.5f}" for value in medians)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    shape, found = f"{width:,} × {batch:,} × {d}", f"{seen[0]:.2f} / {seen[1]:.2f}"
    return f"| {architecture} | {shape} | {' | '.join(cells)} | {ratio:.1f}× | {found} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES, metavar="ARCHITECTURE")
    chosen = parser.parse_args().only
    torch.set_num_threads(1)
    print("| architecture | width × batch × d | autograd, s | compiled, s | ratio | L0 |\n|" + "---|" * 6)
    for shape in SHAPES:
        for architecture in chosen:
            print(compare(architecture, *shape), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
