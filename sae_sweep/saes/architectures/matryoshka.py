"""Matryoshka: BatchTopK of which also the first half, quarter, … of the latents must reconstruct by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import Architecture, squared_error
from sae_sweep.saes.architectures.batchtopk import MEAN_K, OF_BATCH, batchtopk
from sae_sweep.saes.architectures.topk import NO_MARGIN, at_most_the_width

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters


def reconstructed_by_prefixes(x: Tensor, pre: Tensor, codes: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """Σ E‖x − x̂ of the first latents alone‖² over the nested levels short of the whole (arXiv 2503.17547)."""
    total, begin = x.new_zeros(()), 0
    reconstruction = sae.b_dec[..., None, :]
    for end in prefixes(settings)[:-1]:
        reconstruction = reconstruction + codes[..., begin:end] @ sae.W_dec[..., begin:end, :]
        total, begin = total + squared_error(x, reconstruction), end
    return total


def prefixes(settings: Sae) -> list[int]:
    """Latents in each nested level, the whole last: each level is half of the next, rounded up."""
    sizes = {-(-settings.width // 2**level) for level in range(settings.levels)}
    return sorted(sizes)


register(
    Architecture(
        name="matryoshka",
        activate=batchtopk,
        description="BatchTopK of which also the first 1/2, 1/4, … of the latents must reconstruct x by themselves",
        formula="that of batchtopk; squared errors of x̂ from the first width/2, width/4, … latents are added to the "
        "loss",
        prior=OF_BATCH,
        source="arXiv 2503.17547",
        settings={
            **MEAN_K,
            "levels": Setting(
                4,
                "how many nested SAEs there are, each of half the latents of the next; 4: 1/8, 1/4, 1/2 and all",
                ge=1,
                le=30,
            ),
        },
        check=at_most_the_width,
        counts=True,
        learns_threshold=True,
        auxiliary=reconstructed_by_prefixes,
        defaults=NO_MARGIN,
        compiled=("cpu",),
        listed=True,
    )
)
