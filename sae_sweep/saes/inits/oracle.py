"""Oracle: a latent at the mean of each class of a partition: what the optimiser would have to find."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.settings import ORACLES
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.inits import MARGIN, RIDGE, Init, latents_at, spectrum

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")


def _heaviest(means: Tensor, mass: Tensor, width: int) -> Tensor:
    """The class means to give latents: the heaviest classes where there are more classes than latents."""
    order = torch.argsort(mass, descending=True, stable=True)[:width]
    return means[order[mass[order] > 0]].float()


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    sae = point.sae
    values, axes = spectrum(source, sae.ridge)
    exemplars = _heaviest(*source.class_means(sae.partition), sae.width)
    return latents_at(exemplars, point, (axes / values) @ axes.T, generator)


register(
    Init(
        name="oracle",
        make=_make,
        description="the means of the classes of a named partition, or of two whose means add up",
        source="this project (saes/inits/__init__.py)",
        settings={
            "partition": Setting(
                "m",
                "which classes get a latent each, at their mean: maxima (m), pairs of maximum and query (mq), …; m+q: "
                "latents for both, whose means add up",
                choices=ORACLES,
            ),
            "margin": MARGIN,
            "ridge": RIDGE,
        },
    )
)
