"""Whitened: clusters in the metric in which the small differences that splits are made of count as the large."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.inits import MARGIN, RIDGE, Init, draw_seed, latents_at, spectrum
from sae_sweep.saes.inits.kmeans import kmeans, pool_size

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    sae = point.sae
    values, axes = spectrum(source, sae.ridge)
    pool = source.exemplars(pool_size(sae.width), draw_seed(generator))
    whitened = (pool @ (axes * values.rsqrt())).to(source.device)
    centres = kmeans(whitened, sae.width, generator).cpu() @ (axes * values.sqrt()).T
    return latents_at(centres, point, (axes / values) @ axes.T, generator)


register(
    Init(
        name="whitened",
        make=_make,
        description="k-means in the metric in which the small differences that splits are made of count as the large",
        source="this project (saes/inits/__init__.py)",
        settings={"margin": MARGIN, "ridge": RIDGE},
        clusters=True,
    )
)
