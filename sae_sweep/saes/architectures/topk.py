"""TopK: the k largest contributions of each input fire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.errors import UserError
from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters

K = {"k": Setting(1, "how many latents an input keeps", kind="number", ge=1)}
# The k largest fire: a threshold of their own would only silence them.
NO_MARGIN = {"margin": 0.0}


def at_most_the_width(sae: Sae) -> None:
    """UserError if more latents are to be active than there are."""
    if sae.k > sae.width:
        raise UserError(f"sae.k={sae.k} is more than sae.width={sae.width}")


def _whole(sae: Sae) -> None:
    """UserError for part of a latent."""
    at_most_the_width(sae)
    if sae.k != int(sae.k):
        raise UserError(f"sae.k={sae.k} must be whole under sae=topk (sae=batchtopk takes a mean over the batch)")


def topk(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """Keep the k largest contributions of each input."""
    codes = pre.relu()
    chosen = (codes * sae.norms()[..., None, :]).topk(settings.k, dim=-1).indices
    return codes.new_zeros(codes.shape).scatter(-1, chosen, codes.gather(-1, chosen))


register(
    Architecture(
        name="topk",
        activate=topk,
        description="the k largest contributions of each input",
        formula="max(pre, 0) on the k latents of largest max(pre, 0)·‖d‖, else 0",
        prior="flat on codes of at most k active latents, none elsewhere",
        source="arXiv 2406.04093",
        settings=K,
        check=_whole,
        counts=True,
        defaults=NO_MARGIN,
        compiled=("cpu", "cuda"),
        listed=True,
    )
)
