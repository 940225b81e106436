"""Gated: a gate decides what fires, a magnitude how strongly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.architectures import Architecture, squared_error

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters


def gated(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = H(pre)·max(exp(r_mag)·(pre − b_enc) + b_mag, 0): pre is the gate, which no gradient of z passes."""
    magnitude = sae.r_mag.exp()[..., None, :] * (pre - sae.b_enc[..., None, :]) + sae.b_mag[..., None, :]
    return magnitude.relu() * (pre > 0)


def gate(pre: Tensor, codes: Tensor, sae: Parameters) -> Tensor:
    """max(gate, 0)‖d‖: what a Gated SAE's penalty acts on. No slope to ‖d‖, which magnitudes could make up for."""
    return pre.relu() * sae.norms().detach()[..., None, :]


def reconstructed_by_gate(x: Tensor, pre: Tensor, codes: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """E‖x − x̂(max(gate, 0))‖² through the decoder as it stands: what trains the gate (arXiv 2404.16014, eq. 8)."""
    reconstruction = pre.relu() @ sae.W_dec.detach() + sae.b_dec.detach()[..., None, :]
    return squared_error(x, reconstruction)


def _completed(sae: Parameters, width: int) -> Parameters:
    """The same magnitude as that of a ReLU whose pre-activation is the gate, where it has none."""
    if "r_mag" in sae.tensors:
        return sae
    return sae.replace(r_mag=sae.b_enc.new_zeros(width), b_mag=sae.b_enc.clone())


register(
    Architecture(
        name="gated",
        activate=gated,
        description="a gate decides what fires, a magnitude how strongly; the penalty acts on the gate, which learns "
        "from its own reconstruction through the frozen decoder",
        formula="H(pre > 0)·max(exp(r_mag)·W_enc·x + b_mag, 0)",
        prior="none: the penalty acts on max(pre, 0), not on z",
        source="arXiv 2404.16014",
        extras=("r_mag", "b_mag"),
        penalised=gate,
        auxiliary=reconstructed_by_gate,
        completed=_completed,
        compiled=("cpu",),
    )
)
