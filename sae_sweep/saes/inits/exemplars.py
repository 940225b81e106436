"""Exemplars: a latent at each of as many inputs drawn from the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.inits import MARGIN, Init, draw_seed, latents_at

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    exemplars = source.exemplars(point.sae.width, draw_seed(generator))
    return latents_at(exemplars, point, torch.eye(exemplars.shape[1]), generator)


register(
    Init(
        name="exemplars",
        make=_make,
        description="a latent at each of as many inputs drawn from the data",
        source="this project (saes/inits/__init__.py)",
        settings={"margin": MARGIN},
    )
)
