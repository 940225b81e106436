"""Tied: a ReLU whose encoder is its decoder, rows of unit norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.architectures import BY_PENALTY, Architecture
from sae_sweep.saes.architectures.relu import relu

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor

    from sae_sweep.saes.parameters import Parameters
else:
    F = lazy("torch.nn.functional")


def unit_rows(sae: Parameters) -> Parameters:
    """W_enc = W_dec, with rows of unit norm."""
    rows = F.normalize(sae.W_dec, dim=-1)
    return sae.replace(W_enc=rows, W_dec=rows)


def _along_the_exemplars(sae: Parameters, norms: Tensor, margin: float) -> Parameters:
    """Tied weights can only look along the exemplar itself."""
    return sae.replace(W_enc=sae.W_dec, b_enc=-margin * norms)


register(
    Architecture(
        name="tied",
        activate=relu,
        description="ReLU whose encoder is its decoder, rows of unit norm",
        formula="max(W_dec·x + b_enc, 0), ‖d‖ = 1",
        prior=BY_PENALTY,
        source="arXiv 2309.08600",
        effective=unit_rows,
        at_exemplars=_along_the_exemplars,
        # Its encoder cannot be zero.
        off=-1e3,
        compiled=("cpu",),
        listed=True,
    )
)
