"""K-means: a latent at each cluster of inputs; finds those of large variance, one per maximum before any split."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.inits import MARGIN, Init, draw_seed, latents_at

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")


# Exemplars that k-means++ chooses among, per latent and at least; and the Lloyd steps after it.
POOL_PER_LATENT, POOL_AT_LEAST, LLOYD_STEPS = 8, 4096, 5


def pool_size(width: int) -> int:
    """Among how many inputs k-means++ chooses that many centres."""
    return max(POOL_PER_LATENT * width, POOL_AT_LEAST)


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


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    width = point.sae.width
    pool = source.exemplars(pool_size(width), draw_seed(generator))
    return latents_at(kmeans(pool, width, generator), point, torch.eye(pool.shape[1]), generator)


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
