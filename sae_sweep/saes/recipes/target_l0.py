"""Sparsity control: what makes an SAE sparse moves while it trains, until its mean L0 is `training.target_l0`.

An example: `training.target_l0=3`. After a block of steps (saes/train.py) with 6 active latents an input, the
coefficient λ becomes λ·2^GAIN: log λ grows by GAIN·log(L0/target), where a ratio beyond e counts as e. Where there is
no penalty, JumpReLU's thresholds grow by the same factor. It begins once `coefficient_warmup` is over. λ stays within
LIMIT times what it was, up and down.

Architectures and penalties are so compared at equal L0 without a search. It is our own; PI controllers of L0 in others'
code differ in the law, not in the aim; JumpReLU's `sae.l0_target` is a loss instead. What is steered is of one SAE
alone, from what it did itself: pack-mates, threads and restarts change nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.recipes import Control, warmup_steps

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.stack import Stack

register(
    Control(
        name="target_l0",
        description="the coefficient, or where there is no penalty the thresholds, is driven to a mean L0",
        source="ours: log λ grows in proportion to log(L0/target)",
    )
)

GAIN, LIMIT = 0.1, 1e4
# A mean L0 is on target within this share of it.
ON_TARGET = 0.1


def steer(stack: Stack, l0: Tensor) -> None:
    """Move every SAE that has a target, given its mean L0 over a block of steps, [n] on the CPU."""
    for i, point in enumerate(stack.points):
        training = point.training
        if training.target_l0 is None or i in stack.failed:
            continue
        if stack.step < warmup_steps(training.coefficient_warmup, training):
            continue
        excess = math.log(max(float(l0[i]), 1e-3) / training.target_l0)
        factor = math.exp(GAIN * min(1.0, max(-1.0, excess)))
        if point.penalty.coefficient:
            stack.rescale[i] = min(LIMIT, max(1 / LIMIT, float(stack.rescale[i]) * factor))
        else:
            stack.named(stack.flat[i])["thresholds"].mul_(factor)


def missed(point: Point, l0: float) -> str | None:
    """What is to be said of an SAE whose mean L0 at the end of training is not its target."""
    target = point.training.target_l0
    if target is None or abs(l0 - target) <= ON_TARGET * target:
        return None
    return f"{point.id} ends training with a mean L0 of {l0:.3g}, its target was {target:g}: more steps may reach it"
