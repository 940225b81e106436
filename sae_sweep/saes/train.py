"""The training loop: batches in, a trained stack out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_sweep.saes.annealing import anneal
from sae_sweep.saes.kernels import Backend
from sae_sweep.saes.stack import Stack

# Steps between two looks at the metrics: each look waits for the device.
BLOCK = 25


class Batches(Protocol):
    """Training data: batch t depends on t and the data seed alone."""

    def batches(self, start_step: int, count: int) -> Tensor:
        """Batches start_step … start_step + count − 1: [count, b, d]."""
        ...


@dataclass(frozen=True)
class Look:
    """Means over the steps since the last look, per SAE [n] on the CPU; of the gradient's norm the largest."""

    step: int
    loss: Tensor
    fvu: Tensor
    l0: Tensor
    gradient: Tensor


def train(stack: Stack, data: Batches, backend: Backend) -> Iterator[Look]:
    """Train the stack to the end of its steps, in place; yields after every BLOCK of steps.

    An SAE whose loss is no longer finite is entered in `stack.failed` with the step by which it broke; its
    pack-mates share nothing with it and go on. Dead latents are counted, not revived: resampling changed
    nothing in the pilot, where what a latent becomes is decided by its start.
    """
    steps = stack.points[0].training.steps
    while stack.step < steps:
        batches = data.batches(stack.step, min(BLOCK, steps - stack.step))
        anneal(stack, batches[0])
        progress = backend.advance(stack, batches)

        # The one synchronisation with the device per block.
        loss, error, l0 = (
            torch.as_tensor(s).cpu() / progress.steps for s in (progress.loss, progress.error, progress.l0)
        )
        for i in torch.nonzero(~loss.isfinite()).flatten().tolist():
            stack.failed.setdefault(i, stack.step)
        gradient = torch.as_tensor(progress.gradient).cpu()
        yield Look(stack.step, loss, error * progress.steps / progress.variance.cpu(), l0, gradient)
