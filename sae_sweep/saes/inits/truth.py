"""Truth: a latent for each planted feature, its decoder row the feature's direction and its encoder row the same.

An example: with the first 50 rows right from the start, whatever training makes of them is the objective's doing. Where
features overlap, an encoder of the same rows sees a little of the others in each. An architecture that learns a
threshold begins with the one by which as many latents fire as it is to have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import architecture_of, contributions, pre_activations
from sae_sweep.saes.inits import Init, draw_seed, padded
from sae_sweep.saes.parameters import Parameters

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
else:
    torch = lazy("torch")

# Inputs among which a threshold is chosen.
THRESHOLD_INPUTS = 1 << 14


def _make(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    sae, kind = point.sae, architecture_of(point.sae.architecture)
    directions, origin = source.truth()
    rows = directions[: sae.width]
    rows = rows + sae.jitter * torch.randn(rows.shape, generator=generator)
    made = Parameters(rows.clone(), rows, -(rows @ origin), origin, torch.zeros(()))
    made = padded(made, sae.width, kind.off, generator)
    if not kind.learns_threshold:
        return made
    pre = pre_activations(source.exemplars(THRESHOLD_INPUTS, draw_seed(generator)), made)
    found = contributions(pre, pre.relu(), made).flatten()
    return made.replace(threshold=found.topk(min(len(found), round(sae.k * THRESHOLD_INPUTS))).values[-1])


register(
    Init(
        name="truth",
        make=_make,
        description="the planted features themselves, in their order; spare latents are off",
        source="arXiv 2508.16560, 2505.11756 (their code, with and without jitter)",
        settings={
            "jitter": Setting(
                0.0,
                "standard deviation of the noise added to each number of the encoder and decoder rows; 0: exactly the "
                "truth",
                ge=0,
            )
        },
    )
)
