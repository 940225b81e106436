"""JumpReLU: a latent fires where its contribution exceeds a threshold of its own, which is trained."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import BY_PENALTY, Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")

# Thresholds where no exemplar says better; activations have E‖x‖² = d.
THRESHOLD = 0.1


@functools.cache
def _step() -> Any:
    class Step(torch.autograd.Function):
        """H(u) with the slope of a rectangle passed straight through: 1/bandwidth where |u| < bandwidth/2."""

        @staticmethod
        def forward(ctx, u: Tensor, bandwidth: float) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(u)
            ctx.bandwidth = bandwidth
            return (u > 0).to(u.dtype)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            (u,) = ctx.saved_tensors
            return gradient * (u.abs() < ctx.bandwidth / 2) / ctx.bandwidth, None

    return Step


def straight_through_gate(pre: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """H(max(pre, 0)‖d‖ − θ): whether a latent's contribution exceeds its threshold.

    The slope reaches thresholds and pre-activations alike. Where thresholds alone have it (as in arXiv 2407.14435),
    Adam normalises away how large it is, and the coefficient hardly moves L0.
    """
    reach = pre.relu() * sae.norms()[..., None, :] - sae.thresholds[..., None, :]
    fires: Tensor = _step().apply(reach, settings.bandwidth)
    return fires


def jumprelu(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = max(pre, 0)·H(max(pre, 0)‖d‖ − θ)."""
    return pre.relu() * straight_through_gate(pre, sae, settings)


def _with_thresholds(sae: Parameters, norms: Tensor, margin: float) -> Parameters:
    return sae.replace(thresholds=(margin * norms).clamp_min(THRESHOLD))


def _completed(sae: Parameters, width: int) -> Parameters:
    known = sae.tensors.get("thresholds", sae.b_enc.new_zeros(0))
    rest = torch.full((width - len(known),), THRESHOLD)
    return sae.replace(thresholds=torch.cat([known, rest]))


register(
    Architecture(
        name="jumprelu",
        activate=jumprelu,
        description="a threshold of each latent's own on its contribution; slopes pass straight through the jump. "
        "penalty=l0 counts what fires",
        formula="max(pre, 0)·H(max(pre, 0)·‖d‖ > θ)",
        prior=f"{BY_PENALTY}; of penalty=l0 a spike and a flat slab, improper",
        source="arXiv 2407.14435",
        settings={"bandwidth": Setting(0.5, "how near a contribution must be to its threshold to move it", gt=0)},
        extras=("thresholds",),
        fires=straight_through_gate,
        at_exemplars=_with_thresholds,
        completed=_completed,
        compiled=("cpu",),
    )
)
