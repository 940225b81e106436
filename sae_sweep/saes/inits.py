"""Where an SAE starts from. Where splits are worth little variance, the start decides what a short run finds.

An exemplar start gives latent j an exemplar xⱼ: decoder xⱼ/‖xⱼ‖, encoder such that the pre-activation is ‖xⱼ‖ at
xⱼ itself and crosses zero where the projection on it (in the encoder's metric S) has fallen to `margin` of that:
W_enc = g‖x‖·Sx/(xᵀSx), b_enc = −(g−1)‖x‖, g = 1/(1−margin). S = I, or for whitened and oracle starts
(Σ + ridge·λ_max·I)⁻¹, which looks along the directions that tell neighbouring exemplars apart.

random     directions uniform on the sphere, encoder = decoder, no bias
exemplars  inputs drawn from the data
kmeans     greedy k-means++ and Lloyd steps: finds the clusters of large variance, one per maximum before any split
whitened   the same in the metric S, in which the small differences that splits are made of count as much as the large
oracle     the means of the classes of a named partition: what the optimiser would have to find

Where an architecture has thresholds, the margin is one: JumpReLU's W_enc = ‖x‖·Sx/(xᵀSx), b_enc = 0, θ = margin·‖x‖.
Gated has the same gate as ReLU its pre-activation, and the same magnitude. Tied weights can only look along the
exemplar itself: b_enc = −margin·‖x‖. Matryoshka's first levels get the first exemplars: k-means++ takes those that are
furthest apart first, the oracle the heaviest classes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
from torch import Tensor

from sae_sweep.config.settings import ARCHITECTURES, Point
from sae_sweep.saes.parameters import Parameters

# Exemplars that k-means++ chooses among, per latent and at least; and the Lloyd steps after it.
POOL_PER_LATENT, POOL_AT_LEAST, LLOYD_STEPS = 8, 4096, 5
# JumpReLU's thresholds where no exemplar says better; activations have E‖x‖² = d.
THRESHOLD = 0.1
# A bias under which nothing fires, also where a latent's encoder cannot be zero.
OFF, FAR_OFF = -1.0, -1e3


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
    return _fitted(point, _of_relu(point, source))


def _of_relu(point: Point, source: Source) -> Parameters:
    """The start of a ReLU SAE, or of one that differs from it only in what it trains."""
    sae = point.sae
    generator = torch.Generator().manual_seed(_seed(point))
    draw = int(torch.randint(2**62, (), generator=generator))
    if sae.init == "random":
        return _random(sae.width, source.covariance().shape[0], generator)
    d = source.covariance().shape[0]
    values, axes = _spectrum(source, sae.ridge) if sae.init in ("whitened", "oracle") else (torch.ones(d), torch.eye(d))
    if sae.init == "oracle":
        exemplars = _heaviest(*source.class_means(sae.partition), sae.width)
    elif sae.init == "exemplars":
        exemplars = source.exemplars(sae.width, draw)
    else:
        pool = source.exemplars(max(POOL_PER_LATENT * sae.width, POOL_AT_LEAST), draw)
        root = axes * values.rsqrt()
        exemplars = kmeans(pool @ root, sae.width, generator) @ (axes * values.sqrt()).T
    jump = sae.architecture == "jumprelu"
    parameters = from_exemplars(exemplars, 0.0 if jump else sae.margin, (axes / values) @ axes.T)
    norms = exemplars.norm(dim=1)
    if jump:
        parameters = dataclasses.replace(parameters, thresholds=(sae.margin * norms).clamp_min(THRESHOLD))
    if sae.architecture == "tied":
        parameters = dataclasses.replace(parameters, W_enc=parameters.W_dec, b_enc=-sae.margin * norms)
    return _pad(parameters, sae.width, FAR_OFF if sae.architecture == "tied" else OFF, generator)


def _fitted(point: Point, start: Parameters) -> Parameters:
    """The start with the extras of the point's architecture."""
    architecture, width = point.sae.architecture, point.sae.width
    if architecture == "jumprelu":
        known = start.thresholds
        rest = torch.full((width - len(known),), THRESHOLD)
        return dataclasses.replace(start, thresholds=torch.cat([known, rest]))
    if architecture == "gated":
        return dataclasses.replace(start, r_mag=torch.zeros(width), b_mag=start.b_enc.clone())
    return start


def from_exemplars(exemplars: Tensor, margin: float, metric: Tensor) -> Parameters:
    """One latent per exemplar [width, d], as the head of this file says; `metric` is S [d, d]."""
    norms = exemplars.norm(dim=1).clamp_min(1e-6)
    seen = exemplars @ metric
    gain = 1 / (1 - margin)
    along = (exemplars * seen).sum(1).clamp_min(1e-12)
    W_enc = gain * (norms / along)[:, None] * seen
    zero = torch.zeros(())
    return Parameters(W_enc, exemplars / norms[:, None], -(gain - 1) * norms, torch.zeros(exemplars.shape[1]), zero)


def kmeans(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007), then Lloyd steps: pool [n, d] -> centres [count, d]."""
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


def _pad(parameters: Parameters, width: int, off_at: float, generator: torch.Generator) -> Parameters:
    """Spare latents are off: their pre-activation is negative for every input, so they never fire nor train."""
    spare, d = width - len(parameters.W_dec), parameters.W_dec.shape[1]
    if not spare:
        return parameters
    off = _random(spare, d, generator)
    return dataclasses.replace(
        parameters,
        W_enc=torch.cat([parameters.W_enc, torch.zeros(spare, d)]),
        W_dec=torch.cat([parameters.W_dec, off.W_dec]),
        b_enc=torch.cat([parameters.b_enc, torch.full((spare,), off_at)]),
    )


def _spectrum(source: Source, ridge: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues [d] of Σ + ridge·λ_max·I and its axes [d, d], float32."""
    values, axes = torch.linalg.eigh(source.covariance().double().cpu())
    return (values.clamp_min(0) + ridge * values[-1]).float(), axes.float()


def _seed(point: Point) -> int:
    """Any two of (seed, width, architecture) that differ give unrelated draws: each field has digits of its own."""
    return (point.seed * 2**21 + point.sae.width) * 8 + ARCHITECTURES.index(point.sae.architecture)
