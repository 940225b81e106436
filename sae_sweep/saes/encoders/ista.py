"""ISTA: steps of proximal descent on the reconstruction, unrolled, with the decoder's own rows.

The first step from z = 0 is a linear encoder; each further one corrects the codes by what they leave over,

    z ← f(z + W_enc·(x − b_dec − z·W_dec) + b_enc),

where f is what the architecture makes of pre-activations and W_enc = exp(log_gain)·W_dec. Under L1, f with b_enc < 0 is
the soft threshold of ISTA (Daubechies et al. 2004); gains and thresholds are trained. They begin at a gain of 1/L and
no threshold, L the largest eigenvalue of W_dec·W_decᵀ, or of any k rows of it where the architecture keeps k.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import pre_activations
from sae_sweep.saes.encoders import Encoder, compiles_by_tiles, has_no_rows_of_its_own

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config import settings
    from sae_sweep.config.settings import Point, Sae
    from sae_sweep.saes.architectures import Architecture
    from sae_sweep.saes.encoders import Activate
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")

STEPS = {"steps": Setting(4, "iterations after the first, which is what a linear encoder does", ge=1, le=1000)}
# The log gain of latents that an init leaves off: nothing passes.
OFF = -60.0


def unrolled(x: Tensor, sae: Parameters, activate: Activate, chosen: settings.Encoder, of_sae: Sae) -> Tensor:
    """Pre-activations [..., b, width] of the last step; b_enc has W_enc·b_dec taken off already."""
    first = pre = pre_activations(x, sae)
    for _ in range(chosen.steps):
        codes = activate(pre)
        pre = first + codes - (codes @ sae.W_dec) @ sae.W_enc.transpose(-1, -2)
    return pre


def first_gains(sae: Parameters, point: Point) -> Tensor:
    """1/L for every latent [width], but 0 for those that the init leaves off."""
    largest = float(torch.linalg.matrix_norm(sae.W_dec, 2)) ** 2
    if (k := point.sae.get("k")) is not None:
        largest = min(largest, k * float(sae.norms().max()) ** 2)
    return sae.W_enc.any(1) / largest


def suits_iteration(architecture: Architecture) -> bool:
    """Whether an architecture makes codes of pre-activations alone: a gate's magnitude is no step of descent."""
    return has_no_rows_of_its_own(architecture) and architecture.name != "gated"


def _effective(sae: Parameters) -> Parameters:
    W_enc = sae.log_gain.exp()[..., None] * sae.W_dec
    return sae.replace(W_enc=W_enc, b_enc=sae.b_enc - (W_enc * sae.b_dec[..., None, :]).sum(-1))


def _completed(sae: Parameters, point: Point, generator: torch.Generator) -> Parameters:
    gains = first_gains(sae, point)
    return sae.replace(log_gain=gains.log().clamp_min(OFF), b_enc=torch.where(gains > 0, 0.0, sae.b_enc))


def _revived(sae: Parameters, chosen: settings.Encoder, norm: float) -> Parameters:
    return sae.replace(log_gain=torch.full_like(sae.b_enc, math.log(norm)), b_enc=torch.zeros_like(sae.b_enc))


register(
    Encoder(
        name="ista",
        infer=unrolled,
        description="proximal descent on the reconstruction, unrolled, with the decoder's own rows",
        formula="z ← f(z + W_enc·(x − b_dec − z·W_dec) + b_enc) from z = 0, f the architecture's, W_enc = gain·W_dec",
        source="Daubechies et al. 2004; unrolled as by Gregor & LeCun 2010",
        settings=STEPS,
        tensors=lambda chosen, width, d: {"log_gain": (width,)},
        rows=("log_gain",),
        completed=_completed,
        revived=_revived,
        effective=_effective,
        products=lambda chosen, of_sae, d: 1.0 + chosen.steps,
        suits=suits_iteration,
        compiles=compiles_by_tiles,
        version=2,
    )
)
