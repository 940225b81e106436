"""Which latents are active: an architecture a file, pre-activations in, codes out.

All share x̂ = W_dec·z + b_dec; a linear encoder (others: saes/encoders) has pre = W_enc·x + b_enc. What chooses among
latents or compares them with a threshold does so by the contribution z‖d‖, so that a choice cannot be bought by
rescaling a decoder row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Encoder
from sae_sweep.lazy import lazy
from sae_sweep.registry import Kind, get

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")

BY_PENALTY = "that of its penalty"


def contributions(pre: Tensor, codes: Tensor, sae: Parameters) -> Tensor:
    """z‖d‖."""
    return codes * sae.norms()[..., None, :]


def _unchanged(sae: Parameters, width: int) -> Parameters:
    return sae


@dataclass(frozen=True, kw_only=True)
class Architecture(Kind):
    """`activate(pre [..., b, width], sae, settings, training) -> codes [..., b, width]`; what else it has is below.

    formula: z of an input, for people; prior: the density on z that its sparsity is −log of, or why none
    counts: its sparsity is a count of active latents, so that it takes no penalty
    extras: what it trains of each latent beyond its rows and its bias, [width] each
    learns_threshold: it chooses over a batch, and at evaluation by the smallest contribution chosen in training
    penalised: what its penalty acts on [..., b, width], from pre and codes
    auxiliary: what its objective has beside E‖x − x̂‖² and the penalty [...]
    fires: H with a slope, for the penalty `l0`
    effective: from what is trained to what is used
    at_exemplars: from an init without margin, the exemplars' norms [n] and the margin, to one with it
    completed: an init with its extras; `off`: the bias of a latent that never fires
    compiled: devices for which there is a compiled step of its own; autograd trains it elsewhere
    compiles: whether that step knows its settings
    listed: its code is every positive pre-activation, the k of largest contribution, or what reaches a threshold, so
    that compiled code may list it when an SAE is measured
    """

    family = "architecture"
    activate: Callable[[Tensor, Parameters, Sae, bool], Tensor]
    formula: str
    prior: str
    counts: bool = False
    extras: tuple[str, ...] = ()
    learns_threshold: bool = False
    penalised: Callable[[Tensor, Tensor, Parameters], Tensor] = contributions
    auxiliary: Callable[[Tensor, Tensor, Tensor, Parameters, Sae], Tensor] | None = None
    fires: Callable[[Tensor, Parameters, Sae], Tensor] | None = None
    effective: Callable[[Parameters], Parameters] | None = None
    at_exemplars: Callable[[Parameters, Tensor, float], Parameters] | None = None
    completed: Callable[[Parameters, int], Parameters] = _unchanged
    off: float = -1.0
    compiled: tuple[str, ...] = ()
    compiles: Callable[[Sae], bool] = lambda settings: True
    listed: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that make it sparse."""
        return (*(() if self.counts else ("penalty",)), *(f"sae.{name}" for name in self.settings))

    @property
    def step(self) -> str:
        """What trains it, for people."""
        autograd = "autograd: slower, and batch × width numbers for each SAE at work"
        if "cpu" not in self.compiled:
            return autograd
        return "compiled, by active latents" + ("" if "cuda" in self.compiled else f"; on a GPU {autograd}")

    def codes(
        self, x: Tensor, sae: Parameters, settings: Sae, training: bool = False, encoder: Encoder | None = None
    ) -> Tensor:
        """Codes [..., b, width] of inputs x [b, d] by an encoder, by default the linear one."""
        return self.infer(x, sae, settings, training, encoder or Encoder())[1]

    def infer(
        self, x: Tensor, sae: Parameters, settings: Sae, training: bool, encoder: Encoder
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations and codes [..., b, width] of inputs x [b, d] by an encoder of these settings."""

        def activate(pre: Tensor) -> Tensor:
            return self.activate(pre, sae, settings, training)

        pre = get("encoder", encoder.name).infer(x, sae, activate, encoder, settings)
        return pre, activate(pre)


def architecture_of(name: str) -> Architecture:
    """An architecture. KeyError if there is none of that name."""
    architecture: Architecture = get("architecture", name)
    return architecture


def pre_activations(x: Tensor, sae: Parameters) -> Tensor:
    """W_enc·x + b_enc [..., b, width] of inputs x [b, d]."""
    return x @ sae.W_enc.transpose(-1, -2) + sae.b_enc[..., None, :]


def squared_error(x: Tensor, reconstruction: Tensor) -> Tensor:
    """E‖x − x̂‖² over the batch [...]."""
    return (reconstruction - x).square().sum(-1).mean(-1)
