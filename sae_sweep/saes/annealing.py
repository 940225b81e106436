"""p-annealing (Karvonen et al. 2024, arXiv 2408.00113, section 3): the exponent of L_p falls while an SAE trains.

Each time it does, the coefficient λ is rescaled so that the penalty of the activations at hand stays what it was:
λ ← λ · Σ aᵖ / Σ aᵖ′. So p changes from block to block of training (train.py), not within one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_sweep.config.settings import Point
from sae_sweep.saes.penalties import penalty_value
from sae_sweep.saes.stack import Stack

# Activations in the largest array held at once.
NUMBERS = 1 << 22


def exponent_at(point: Point, step: int) -> float:
    """p at a step: from penalty.p linearly down to penalty.p_end.

    It gets there as a linear schedule starts to decay; under any other schedule, at the end.
    """
    penalty, training = point.penalty, point.training
    if "p_end" not in penalty.to_dict():
        exponent: float = penalty.get("p", 1.0)
        return exponent
    share = min(1.0, step / max(1.0, (1 - training.get("lr_decay", 0.0)) * training.steps))
    return penalty.p + share * (penalty.p_end - penalty.p)


@torch.no_grad()
def anneal(stack: Stack, x: Tensor) -> None:
    """Take the exponents of the stack's step, and rescale coefficients by the penalty on inputs x [b, d]."""
    changes = [
        (i, before, now)
        for i, (point, before) in enumerate(zip(stack.points, stack.exponent.tolist(), strict=True))
        if (now := exponent_at(point, stack.step)) != before
    ]
    if not changes:
        return
    totals = torch.stack([_penalty(stack, i, x, p) for i, *exponents in changes for p in exponents])
    # The device is waited for once, whatever the number of SAEs.
    for (i, _, now), (old, new) in zip(changes, totals.view(-1, 2).tolist(), strict=True):
        # Where nothing fires neither says anything.
        stack.rescale[i] *= old / new if new > 0 else 1.0
        stack.exponent[i] = now


def _penalty(stack: Stack, i: int, x: Tensor, p: float) -> Tensor:
    """Summed penalty [] of SAE i on inputs x [b, d] at exponent p, in float64 on the stack's device."""
    kind, sae, point = stack.architecture, stack.parameters(i), stack.points[i]
    total = x.new_zeros((), dtype=torch.float64)
    for rows in x.split(max(1, NUMBERS // stack.width)):
        pre, codes = kind.infer(rows, sae, point.sae, True, point.encoder)
        values = penalty_value("lp_annealed", kind.penalised(pre, codes, sae), exponent=p)
        if x.is_cuda:
            total += values.double().sum()
        else:  # summed by numpy, in an order that does not depend on the number of threads
            total += float(values.double().numpy().sum())
    return total
