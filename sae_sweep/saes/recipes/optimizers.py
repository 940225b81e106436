"""Optimisers: Adam, and Adam with decoupled weight decay. Both compute what PyTorch's of that name do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import Setting, register
from sae_sweep.saes.recipes import Optimizer

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.saes.stack import Stack

BETA1, BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
# They came later than stored points: at these values they are no part of an identity.
MOMENTS = {
    "beta1": Setting(
        BETA1, "Adam's β₁: how much of the running mean of gradients stays at each step", ge=0, lt=1, legacy=BETA1
    ),
    "beta2": Setting(
        BETA2,
        "Adam's β₂: how much of the running mean of squared gradients stays at each step",
        ge=0,
        lt=1,
        legacy=BETA2,
    ),
    "eps": Setting(
        ADAM_EPS, "Adam's ε: added to the root of the running mean of squared gradients", gt=0, legacy=ADAM_EPS
    ),
}


def bias_corrections(step: int, beta1: float = BETA1, beta2: float = BETA2) -> tuple[float, float]:
    """Bias corrections 1 − βᵗ of the step counted from 0 (Kingma & Ba 2015, algorithm 1)."""
    return 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)


def adam(stack: Stack, gradient: Tensor, rates: Tensor, corrections: tuple[Tensor, Tensor]) -> None:
    """torch.optim.Adam's update. All SAEs of a stack have the same betas and eps."""
    training, (correction1, correction2) = stack.points[0].training, corrections
    stack.first.lerp_(gradient, 1 - training.beta1)
    stack.second.mul_(training.beta2).addcmul_(gradient, gradient, value=1 - training.beta2)
    denominator = (stack.second / correction2).sqrt_().add_(training.eps)
    stack.flat.sub_(rates[:, None] * (stack.first / correction1) / denominator)


def adamw(stack: Stack, gradient: Tensor, rates: Tensor, corrections: tuple[Tensor, Tensor]) -> None:
    """torch.optim.AdamW's update: every parameter, biases included, first shrinks by rate · weight_decay."""
    stack.flat.mul_(1 - rates[:, None] * stack.points[0].training.weight_decay)
    adam(stack, gradient, rates, corrections)


register(
    Optimizer(
        name="adam",
        update=adam,
        description="Adam",
        source="Kingma & Ba 2015, arXiv 1412.6980",
        settings=MOMENTS,
        compiled=True,
    )
)
register(
    Optimizer(
        name="adamw",
        update=adamw,
        description="Adam after every parameter has shrunk by learning rate · weight_decay",
        source="Loshchilov & Hutter 2019, arXiv 1711.05101",
        settings={
            **MOMENTS,
            "weight_decay": Setting(0.01, "each step shrinks parameters by learning rate · weight_decay", ge=0),
        },
    )
)
