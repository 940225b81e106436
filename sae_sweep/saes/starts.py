"""Where an SAE starts from. On toys whose splits are worth little variance, the start decides what is found.

An exemplar start gives latent j an exemplar xⱼ: decoder xⱼ/‖xⱼ‖, encoder such that the pre-activation is ‖xⱼ‖ at
xⱼ itself and crosses zero where the projection on it (in the encoder's metric S) has fallen to `margin` of that:
W_enc = g‖x‖·Sx/(xᵀSx), b_enc = −(g−1)‖x‖, g = 1/(1−margin). S = I, or for whitened and oracle starts
(Σ + ridge·λ_max·I)⁻¹, which looks along the directions that tell neighbouring exemplars apart.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from sae_sweep.saes.stack import Parameters
from sae_sweep.schema import ARCHITECTURES, Point

# Exemplars that k-means++ chooses among, per latent and at least; and the Lloyd steps after it.
POOL_PER_LATENT, POOL_AT_LEAST, LLOYD_STEPS = 8, 4096, 5


class Source(Protocol):
    """What a start may look at: the activations that the SAE will be trained on."""

    def exemplars(self, count: int, seed: int) -> Tensor:
        """Independent draws [count, d]."""
        ...

    def covariance(self) -> Tensor:
        """Σ [d, d]."""
        ...

    def class_means(self, partition: str) -> tuple[Tensor, Tensor]:
        """Mean activation [classes, d] and probability [classes] of each class of inputs."""
        ...


def start(point: Point, source: Source) -> Parameters:
    """The untrained SAE of a point, on the CPU.

    Depends on the point's start, seed, width and architecture, never on its penalty or coefficient: SAEs that
    differ in those alone are a paired comparison.
    """
    sae = point.sae
    generator = torch.Generator().manual_seed(_seed(point))
    draw = int(torch.randint(2**62, (), generator=generator))
    if sae.init == "random":
        return _random(sae.width, source.covariance().shape[0], generator)
    if sae.init == "oracle":
        exemplars = _heaviest(*source.class_means(sae.partition), sae.width)
    elif sae.init == "kmeans":
        pool = source.exemplars(max(POOL_PER_LATENT * sae.width, POOL_AT_LEAST), draw)
        exemplars = kmeans(pool, sae.width, generator)
    else:
        exemplars = source.exemplars(sae.width, draw)
    metric = _inverse_covariance(source, sae.ridge) if sae.init in ("whitened", "oracle") else None
    return _pad(from_exemplars(exemplars, sae.margin, metric), sae.width, generator)


def from_exemplars(exemplars: Tensor, margin: float, metric: Tensor | None = None) -> Parameters:
    """One latent per exemplar [width, d], as the head of this file says; `metric` is S [d, d], identity if None."""
    norms = exemplars.norm(dim=1).clamp_min(1e-6)
    seen = exemplars if metric is None else exemplars @ metric.to(exemplars.dtype)
    gain = 1 / (1 - margin)
    along = (exemplars * seen).sum(1).clamp_min(1e-12)
    W_enc = gain * (norms / along)[:, None] * seen
    zero = torch.zeros(())
    return Parameters(W_enc, exemplars / norms[:, None], -(gain - 1) * norms, torch.zeros(exemplars.shape[1]), zero)


def kmeans(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007, 2 + ln k candidates), then Lloyd steps: pool [n, d] -> [count, d]."""
    candidates = 2 + int(math.log(count))
    centres = torch.empty(count, pool.shape[1])
    centres[0] = pool[torch.randint(len(pool), (), generator=generator)]
    distance = (pool - centres[0]).square().sum(1)
    for i in range(1, count):
        # All-zero distances (fewer distinct inputs than centres) would leave nothing to draw from.
        chosen = torch.multinomial(distance + 1e-12, candidates, replacement=True, generator=generator)
        reduced = torch.minimum(distance, torch.cdist(pool[chosen], pool).square())
        best = int(reduced.sum(1).argmin())
        centres[i], distance = pool[chosen[best]], reduced[best]
    for _ in range(LLOYD_STEPS):
        nearest = torch.cdist(pool, centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, pool)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres


def _random(width: int, d: int, generator: torch.Generator) -> Parameters:
    directions = torch.nn.functional.normalize(torch.randn(width, d, generator=generator), dim=1)
    return Parameters(directions.clone(), directions, torch.zeros(width), torch.zeros(d), torch.zeros(()))


def _heaviest(means: Tensor, mass: Tensor, width: int) -> Tensor:
    """The class means to give latents: the heaviest classes where there are more classes than latents."""
    order = torch.argsort(mass, descending=True, stable=True)[:width]
    return means[order[mass[order] > 0]].float()


def _pad(parameters: Parameters, width: int, generator: torch.Generator) -> Parameters:
    """Spare latents are off: their pre-activation is −1 for every input, so they never fire nor train."""
    spare, d = width - len(parameters.W_dec), parameters.W_dec.shape[1]
    if not spare:
        return parameters
    off = _random(spare, d, generator)
    return Parameters(
        torch.cat([parameters.W_enc, torch.zeros(spare, d)]),
        torch.cat([parameters.W_dec, off.W_dec]),
        torch.cat([parameters.b_enc, -torch.ones(spare)]),
        parameters.b_dec,
        parameters.threshold,
    )


def _inverse_covariance(source: Source, ridge: float) -> Tensor:
    covariance = source.covariance().double().cpu()
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors / (values.clamp_min(0) + ridge * values[-1])) @ vectors.T


def _seed(point: Point) -> int:
    """Any two of (seed, width, architecture) that differ give unrelated draws: each field has digits of its own."""
    return (point.seed * 2**21 + point.sae.width) * 8 + ARCHITECTURES.index(point.sae.architecture)
