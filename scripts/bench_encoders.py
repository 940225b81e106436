"""What a step of each encoder, and of AuxK, costs beside the plain linear step: by the reference, and compiled.

    python scripts/bench_encoders.py [--shape WIDTH BATCH D] [--only TEXT]

One SAE on one core, everything in turns; printed are medians in milliseconds of the core: of the reference
(saes/train.py), of the compiled step where there is one and over the compiled linear step with as many latents firing,
and what the planner takes that for. Half of the dead latents of AuxK have pre-activations above 0, too small to be
chosen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from bench_architectures import stack

from sae_sweep.config.settings import Encoder, Point
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.saes.encoders import encoder_of
from sae_sweep.saes.recipes import is_plain
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend
from sae_sweep.sweep.cost import step_seconds
from sae_sweep.sweep.hardware_profile import SPEEDS

TURNS = 7
# Width, batch, d, and steps of a turn: of the reference, and compiled.
SHAPES = ((1056, 1024, 32, 2, 10), (136, 512, 32, 10, 50))
LINEAR = Encoder()


@dataclass(frozen=True)
class Row:
    """A step to measure: an architecture that keeps k where it counts, its encoder, whether half of the latents fire or
    a few, and the share that is dead."""

    architecture: str
    encoder: Encoder = LINEAR
    k: int = 1
    half: bool = False
    dead: float | None = None

    @property
    def title(self) -> str:
        """What it is, for people."""
        settings = (f"{key}={value}" for key, value in self.encoder.to_dict().items() if key != "name")
        aux = () if self.dead is None else (f"auxk, {self.dead:.0%} dead",)
        return " ".join([self.encoder.name, *settings, *(["half fires"] if self.half else []), *aux])

    @property
    def linear(self) -> Row:
        """The plain one beside it."""
        return Row(self.architecture, k=self.k, half=self.half)

    def stack(self, width: int, batch: int, d: int) -> Stack:
        """One such SAE."""
        plain = stack(self.architecture, width, batch, d)
        point: Point = replace(plain.points[0], encoder=self.encoder, toy=plain.points[0].toy.replace(d_model=d))
        if self.architecture == "topk":
            point = replace(point, sae=point.sae.replace(k=self.k))
        if self.dead is not None:
            point = replace(point, training=point.training.replace(revival="auxk"))
        begun = encoder_of(self.encoder.name).completed(plain.parameters(0), point, torch.Generator().manual_seed(0))
        made = Stack.start([point], [begun], "cpu")
        made.density.fill_(width / 2 if self.half else 0)
        named, dead = made.named(made.flat[0]), round((self.dead or 0) * width)
        # Thresholds of as many latents as the linear one has, by the rows that the encoder begins with.
        named["b_enc"].copy_(plain.parameters(0).b_enc * made.parameters(0).W_enc.norm(dim=1))
        named["W_enc"][:dead] /= 100
        if self.half or dead:  # without a threshold living latents have something larger than dead ones for every input
            named["b_enc"].zero_()
        made.silent[0, :dead] = point.training.steps
        return made


ISTA = Encoder("ista", steps=4)
RELU = [Encoder("ista", steps=1), ISTA, Encoder("lista", steps=4), Encoder("mlp")]
ROWS = [
    *(Row("relu", encoder, half=half) for half in (False, True) for encoder in (LINEAR, *RELU)),
    *(Row("topk", encoder, k) for k in (1, 8) for encoder in (LINEAR, Encoder("matching_pursuit"), ISTA)),
    *(Row("topk", dead=share) for share in (0.0, 0.05, 0.5, 0.9)),
]


def compare(rows: Sequence[Row], width: int, batch: int, d: int, slow: int, fast: int) -> None:
    """Print the rows of a shape."""
    batches, cpu = torch.randn(fast, batch, d, generator=torch.Generator().manual_seed(1)), SPEEDS["cpu"]
    times: dict[tuple[Row, str], list[float]] = defaultdict(list)
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sides: dict[tuple[Row, str], tuple[Backend, Stack, int]] = {}
        for row in rows:
            sides[row, "reference"] = AutogradBackend(), row.stack(width, batch, d), slow
            if is_plain(row.stack(width, batch, d).points[0]):
                sides[row, "compiled"] = CpuBackend(pool, 1), row.stack(width, batch, d), fast
        for turn in range(TURNS + 1):
            for key, (backend, of, steps) in sides.items():
                began = time.process_time()
                backend.advance(of, batches[:steps])
                if turn:  # the first compiles, and fills caches
                    times[key].append(1000 * (time.process_time() - began) / steps)
    for row in rows:
        own = "compiled" if (row, "compiled") in times else "reference"
        over = statistics.median(a / b for a, b in zip(times[row, own], times[row.linear, "compiled"], strict=True))
        l0 = width / 2 if row.half else None
        seconds = [step_seconds(sides[each, "reference"][1].points[0], cpu, l0) for each in (row, row.linear)]
        compiled = f"{statistics.median(times[row, own]):.2f}" if own == "compiled" else ""
        shape, k = f"{width:,} × {batch:,} × {d}", "" if row.architecture == "relu" else row.k
        cells = f"{shape} | {statistics.median(times[row, 'reference']):.2f} | {compiled} | {over:.2f}"
        print(f"| {row.architecture}{k} | {row.title} | {cells} | {seconds[0] / seconds[1]:.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=3, type=int, metavar=("WIDTH", "BATCH", "D"), help="instead of the usual two")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose title has it, and the linear ones")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for row in ROWS if asked.only in row.title or row == row.linear]
    head = "| architecture | step | width × batch × d | reference | compiled | over compiled linear | planned |"
    print(f"{head}\n|{'---|' * 7}")
    for shape in [(*asked.shape, 1, 2)] if asked.shape else SHAPES:
        compare(rows, *shape)
    return 0


if __name__ == "__main__":
    sys.exit(main())
