"""K-means: a latent at each cluster of inputs; finds those of large variance, one per maximum before any split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.inits import MARGIN, Init, draw_seed, latents_at

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


# Exemplars that k-means++ chooses among, per latent and at least; and the Lloyd steps after it.
POOL_PER_LATENT, POOL_AT_LEAST, LLOYD_STEPS = 8, 4096, 5
# Distances in the largest array of a Lloyd step on a GPU.
GPU_NUMBERS = 1 << 25


def pool_size(width: int) -> int:
    """Among how many inputs k-means++ chooses that many centres."""
    return max(POOL_PER_LATENT * width, POOL_AT_LEAST)


def kmeans(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007), then Lloyd steps: pool [n, d] -> centres [count, d].

    Distances are taken where the pool lies, draws on the CPU.
    """
    candidates = 2 + int(math.log(count))
    centres = pool.new_empty(count, pool.shape[1])
    centres[0] = pool[torch.randint(len(pool), (), generator=generator)]
    distance = (pool - centres[0]).square().sum(1)
    for i in range(1, count):
        # All-zero distances (fewer distinct inputs than centres) would leave nothing to draw from.
        chosen = torch.multinomial((distance + 1e-12).cpu(), candidates, replacement=True, generator=generator)
        chosen = chosen.to(pool.device)
        reduced = torch.minimum(distance, torch.cdist(pool[chosen], pool).square())
        best = int(reduced.sum(1).argmin())
        centres[i], distance = pool[chosen[best]], reduced[best]
    for _ in range(LLOYD_STEPS):
        sizes, sums = _clusters_by_products(pool, centres) if pool.is_cuda else _clusters(pool, centres)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres


def _clusters(pool: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of each centre, how many inputs are nearest to it [count], and their sum [count, d]."""
    nearest = torch.cdist(pool, centres).argmin(1)
    return torch.bincount(nearest, minlength=len(centres)), torch.zeros_like(centres).index_add_(0, nearest, pool)


def _clusters_by_products(pool: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The same some inputs at a time, in an order that is always the same: a GPU's `index_add_` has none."""
    count = len(centres)
    sizes, sums = pool.new_zeros(count), torch.zeros_like(centres)
    for rows in pool.split(max(1, GPU_NUMBERS // count)):
        members = F.one_hot(torch.cdist(rows, centres).argmin(1), count).to(rows)
        sizes += members.sum(0)
        sums += members.T @ rows
    return sizes, sums


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    width = point.sae.width
    pool = source.exemplars(pool_size(width), draw_seed(generator))
    centres = kmeans(pool.to(source.device), width, generator).cpu()
    return latents_at(centres, point, torch.eye(pool.shape[1]), generator)


register(
    Init(
        name="kmeans",
        make=_make,
        description="a latent at each cluster of inputs, by greedy k-means++ and Lloyd steps",
        source="Arthur & Vassilvitskii 2007",
        settings={"margin": MARGIN},
        clusters=True,
    )
)
