"""Matching pursuit: k steps, each of which gives what is left of the input to the decoder row of largest projection.

Of one step, the input goes to the unit row u of largest uᵀ(x − b_dec), with that for its contribution. A row that is
chosen again is added to. A row of zeros is never chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.architectures import pre_activations
from sae_sweep.saes.encoders import Encoder
from sae_sweep.saes.recipes import revival_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config import settings
    from sae_sweep.config.settings import Point, Sae
    from sae_sweep.saes.encoders import Activate
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")

SMALLEST_SQUARE = 1e-30


def _infer(x: Tensor, sae: Parameters, activate: Activate, chosen: settings.Encoder, of_sae: Sae) -> Tensor:
    """Codes [..., b, width] after sae.k steps; of products with all rows no gradient is asked, but of the chosen."""
    codes, left = None, x
    for _ in range(of_sae.k):
        with torch.no_grad():
            pre = pre_activations(left, sae)
            best = (pre * sae.norms()[..., None, :]).argmax(-1)
        at = best[..., None].expand(*best.shape, x.shape[-1])
        projection = (left * sae.W_enc.gather(-2, at)).sum(-1) + sae.b_enc.gather(-1, best)
        value = projection.relu()[..., None]
        codes = (pre.new_zeros(pre.shape) if codes is None else codes).scatter_add(-1, best[..., None], value)
        left = left - value * sae.W_dec.gather(-2, at)
    assert codes is not None, "k is at least 1"
    return codes


def by_projection(sae: Parameters) -> Parameters:
    """W_enc·x + b_enc = uᵀ(x − b_dec)/‖d‖ with u = d/‖d‖: the code whose decoding is the projection on d."""
    W_enc = sae.W_dec / sae.W_dec.square().sum(-1, keepdim=True).clamp_min(SMALLEST_SQUARE)
    return sae.replace(W_enc=W_enc, b_enc=-(W_enc * sae.b_dec[..., None, :]).sum(-1))


def _compiles(point: Point, device: str) -> bool:
    """What counts takes no penalty; and by codes alone no dead latent has anything to learn from AuxK."""
    return device == "cpu" and point.penalty.name == "none" and not revival_of(point.training).auxiliary


def _completed(sae: Parameters, point: Point, generator: torch.Generator) -> Parameters:
    """Latents that the init leaves off have rows of zeros."""
    return sae.replace(W_dec=sae.W_dec * sae.W_enc.any(1)[:, None])


register(
    Encoder(
        name="matching_pursuit",
        infer=_infer,
        description="in sae.k steps, what is left of the input goes to the unit decoder row of largest projection",
        formula="r = x − b_dec; k times: i = argmax dᵢ·r/‖dᵢ‖, zᵢ += max(dᵢ·r, 0)/‖dᵢ‖², r −= zᵢ·dᵢ",
        source="Mallat & Zhang 1993; as an SAE's encoder arXiv 2506.03093",
        completed=_completed,
        effective=by_projection,
        products=lambda chosen, of_sae, d: 1.0 + of_sae.k / 4,
        suits=lambda architecture: architecture.name == "topk",
        # The row of largest projection is that of largest contribution.
        is_product=lambda of_sae: of_sae.k == 1,
        compiles=_compiles,
        version=2,
    )
)
