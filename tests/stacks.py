"""Small stacks of SAEs for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from sae_sweep.config.settings import Penalty, Point, Sae, Training
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.registry import kinds
from sae_sweep.saes.encoders import encoder_of
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.stack import Stack

EXTRAS = {name: kind.extras for name, kind in kinds("architecture").items()}

# One coefficient for each penalty under which a random SAE keeps some latents alive and loses others.
PENALTIES = [
    Penalty("l1", 1.0),
    Penalty("sqrt", 0.5),
    Penalty("lp", 0.5, p=0.3),
    Penalty("log1p", 0.5, scale=0.7),
    Penalty("log1p_sq", 0.5, scale=2.0),
    Penalty("tanh", 0.3),
    Penalty("prod1p", 0.01),
    Penalty("pair", 0.05),
    Penalty("hoyer", 0.3),
    Penalty("mcp", 0.5, scale=1.5),
    Penalty("lp_annealed", 0.5, p=0.7),
    Penalty("none", 0.0),
]
# Sums of terms, of powers, of cases, and a product: what the others compile to differs in a formula alone.
FEW = [*PENALTIES[:4], PENALTIES[7], PENALTIES[9], PENALTIES[-1]]
# Those in which latents compete, in stacks of their own.
EXCLUSIVE, EXCLUSIVE_PI = Penalty("exclusive", 0.1, scale=1.5), Penalty("exclusive_pi", 0.1, scale=1.5)


def points(
    penalties: Sequence[Penalty], architecture: str = "relu", width: int = 40, k: int = 3, **training: float
) -> list[Point]:
    """A point per penalty, the seed counting up."""
    settings = {"steps": 40, "batch_size": 64, "lr": 3e-3, **training}
    return [
        Point(
            sae=Sae(architecture=architecture, width=width, k=k, init="random"),
            penalty=penalty,
            training=Training(**settings),  # type: ignore[arg-type]
            seed=seed,
        )
        for seed, penalty in enumerate(penalties)
    ]


def start_of(point: Point, d: int = 16) -> Parameters:
    """A random start whose decoder rows are no unit vectors and whose biases are not zero."""
    generator = torch.Generator().manual_seed(point.seed)
    width = point.sae.width
    W_enc, W_dec = torch.randn(2, width, d, generator=generator) / d**0.5
    b_enc, b_dec = torch.randn(width, generator=generator) - 1, torch.randn(d, generator=generator) / 10
    # Drawn last, so that the other numbers are the same for every architecture.
    of_its_own = {"thresholds": (0.2, 1.0), "r_mag": (-0.2, 0.2), "b_mag": (-1.0, 1.0)}
    extras = {
        name: torch.empty(width).uniform_(*of_its_own[name], generator=generator)
        for name in EXTRAS.get(point.sae.architecture, ())
    }
    made = Parameters(W_enc, W_dec, b_enc, b_dec, torch.zeros(()), **extras)
    return encoder_of(point.encoder.name).completed(made, point, generator)


def stack_of(chosen: Sequence[Point], d: int = 16) -> Stack:
    """A stack at step 0."""
    return Stack.start(chosen, [start_of(point, d) for point in chosen], "cpu")


def batches(steps: int, batch_size: int = 64, d: int = 16) -> torch.Tensor:
    """[steps, batch_size, d] of noise with a few directions that matter."""
    generator = torch.Generator().manual_seed(99)
    scales = torch.linspace(0.2, 3, d)
    return torch.randn(steps, batch_size, d, generator=generator) * scales


@contextmanager
def cpu_backend(threads: int = 2) -> Iterator[CpuBackend]:
    """The compiled backend with its own threads."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield CpuBackend(pool, threads)
