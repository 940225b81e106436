"""What a step of each encoder costs beside the plain linear step, by the reference (saes/train.py) and compiled.

    python scripts/bench_encoders.py

One SAE on one core, all encoders in turns; printed are medians in milliseconds of the core, their ratio to the linear
step of the reference, what the planner takes that for, and their ratio to the compiled linear step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from bench_architectures import stack

from sae_sweep.config.settings import Encoder, Point
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.saes.encoders import encoder_of
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend

TURNS = 7
# Width, batch, d, and steps of a turn: of the reference, and compiled.
SHAPES = ((1056, 1024, 32, 2, 10), (136, 512, 32, 10, 50))
LINEAR = Encoder()
BESIDE = {
    "relu": [Encoder("mlp"), *(Encoder(name, steps=n) for name, n in (("ista", 1), ("ista", 4), ("lista", 4)))],
    "topk": [Encoder("matching_pursuit")],
}


def with_encoder(plain: Stack, encoder: Encoder) -> Stack:
    """The same SAE with another encoder."""
    point: Point = replace(plain.points[0], encoder=encoder)
    begun = encoder_of(encoder.name).completed(plain.parameters(0), point, torch.Generator().manual_seed(0))
    return Stack.start([point], [begun], "cpu")


def compare(architecture: str, width: int, batch: int, d: int, slow: int, fast: int) -> list[str]:
    """The lines of an architecture."""
    batches = torch.randn(fast, batch, d, generator=torch.Generator().manual_seed(1))
    times: dict[str, list[float]] = defaultdict(list)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sides: dict[str, tuple[Backend, Stack, int]] = {
            "compiled": (CpuBackend(pool, 1), stack(architecture, width, batch, d), fast)
        }
        for encoder in (LINEAR, *BESIDE[architecture]):
            made = with_encoder(stack(architecture, width, batch, d), encoder)
            sides[title(encoder)] = AutogradBackend(), made, slow
        for turn in range(TURNS + 1):
            for name, (backend, of, steps) in sides.items():
                began = time.process_time()
                backend.advance(of, batches[:steps])
                if turn:  # the first compiles, and fills caches
                    times[name].append((time.process_time() - began) / steps)
    lines = []
    for encoder in (LINEAR, *BESIDE[architecture]):
        own = times[title(encoder)]
        against = (
            statistics.median(a / b for a, b in zip(own, times[of], strict=True)) for of in ("linear", "compiled")
        )
        of_linear, of_compiled = against
        point = sides[title(encoder)][1].points[0]
        planned = encoder_of(encoder.name).products(encoder, point.sae, d)
        cells = f"{1000 * statistics.median(own):.2f} | {of_linear:.2f} | {planned:.2f} | {of_compiled:.1f}"
        lines.append(f"| {architecture} | {title(encoder)} | {width:,} × {batch:,} × {d} | {cells} |")
    return lines


def title(encoder: Encoder) -> str:
    """Its name and settings."""
    return " ".join([encoder.name, *(f"{key}={value}" for key, value in encoder.to_dict().items() if key != "name")])


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("| architecture | encoder | width × batch × d | ms | of linear | planned | of compiled |\n|" + "---|" * 7)
    for shape in SHAPES:
        for architecture in BESIDE:
            print("\n".join(compare(architecture, *shape)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
