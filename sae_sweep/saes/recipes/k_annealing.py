"""k annealing: an SAE that counts begins with more active latents than it ends with.

An example: `sae.k=2 training.k_start=32 training.k_anneal=0.25` keeps 32 latents of an input at first, 2 from a quarter
of the steps on, and between these the line from one to the other, taken anew after every block of steps (saes/train.py)
and rounded where the architecture wants it whole. As dictionary_learning's TopK and BatchTopK trainers have it
(`k_anneal_steps`), which begin with all latents.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.recipes import Control

if TYPE_CHECKING:
    from sae_sweep.config.settings import Point
    from sae_sweep.saes.stack import Stack


register(
    Control(
        name="k_start",
        description="an SAE that counts begins with more active latents than it ends with",
        source="saprmarks/dictionary_learning, k_anneal_steps of its TopK and BatchTopK trainers",
    )
)


def k_at(point: Point, step: int) -> float:
    """Active latents of an input at a step."""
    sae, training = point.sae, point.training
    start = min(training.k_start, sae.width)
    share = min(1.0, step / max(1.0, training.k_anneal * training.steps))
    k: float = start + share * (sae.k - start)
    return round(k) if sae.architecture == "topk" else k


def annealed(stack: Stack) -> Stack:
    """The stack with k as it is at its step: the same tensors, and itself where k stays. All its SAEs have one k."""
    point = stack.points[0]
    if point.training.k_start is None or (k := k_at(point, stack.step)) == point.sae.k:
        return stack
    points = [dataclasses.replace(each, sae=each.sae.replace(k=k)) for each in stack.points]
    return dataclasses.replace(stack, points=points)
