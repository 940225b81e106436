"""Schedules of the learning rate, all after a linear warm-up over the first `lr_warmup` of the steps, or so many."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.registry import Setting, register
from sae_sweep.saes.recipes import Schedule, warmup_steps

if TYPE_CHECKING:
    from sae_sweep.config.settings import Training


def _constant(training: Training, step: int) -> float:
    return 1.0


def _linear(training: Training, step: int) -> float:
    return min(1.0, (training.steps - step) / max(1.0, training.lr_decay * training.steps))


def _cosine(training: Training, step: int) -> float:
    """(1 + cos πs)/2, where s is the share of the steps after the warm-up that are done."""
    warm = warmup_steps(training.lr_warmup, training)
    done = max(0.0, step + 1 - warm) / max(1.0, training.steps + 1 - warm)
    return (1 + math.cos(math.pi * done)) / 2


register(
    Schedule(
        name="linear",
        share=_linear,
        description="warm-up, constant, then a linear fall to 0 over the last lr_decay of the steps",
        source="arXiv 2406.04093 (no warm-up there)",
        settings={
            "lr_decay": Setting(
                0.2, "share of the steps, at the end, over which the learning rate falls to 0", ge=0, le=1
            )
        },
    )
)
register(
    Schedule(
        name="constant",
        share=_constant,
        by_share=False,
        description="warm-up, then constant",
        source="arXiv 2309.08600",
    )
)
register(
    Schedule(
        name="cosine",
        share=_cosine,
        description="warm-up, then half a cosine down to 0",
        source="Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts",
    )
)
