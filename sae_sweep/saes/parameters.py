"""The numbers of a trained SAE."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def _none() -> Tensor:
    return torch.zeros(0)


@dataclass(frozen=True)
class Parameters:
    """One SAE, or a stack of them under a leading dimension: pre = W_enc·x + b_enc, x̂ = z·W_dec + b_dec.

    W_enc, W_dec [..., width, d] (a row per latent) · b_enc [..., width] · b_dec [..., d] · threshold [...]:
    the smallest contribution that fires at evaluation (BatchTopK; 0 elsewhere).
    Beyond these, empty where the architecture has none: thresholds [..., width], what a latent's contribution must
    exceed (JumpReLU); r_mag, b_mag [..., width], the magnitude exp(r_mag)·W_enc·x + b_mag (Gated).
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    thresholds: Tensor = field(default_factory=_none)
    r_mag: Tensor = field(default_factory=_none)
    b_mag: Tensor = field(default_factory=_none)

    def norms(self) -> Tensor:
        """Decoder norms ‖d‖ [..., width]."""
        return self.W_dec.norm(dim=-1)
