"""Random: directions uniform on the sphere, encoder = decoder, no bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.inits import Init, directions

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    return directions(point.sae.width, source.covariance().shape[0], generator)


register(
    Init(
        name="random",
        make=_make,
        description="directions uniform on the sphere, encoder = decoder, no bias",
        source="arXiv 2309.08600",
    )
)
