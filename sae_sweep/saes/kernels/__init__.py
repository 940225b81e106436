"""One training step of a stack, computed by different means: the same numbers, at different speeds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from sae_sweep.saes.penalties import FORMULAS
from sae_sweep.saes.stack import Stack
from sae_sweep.schema import KERNELS

# The longest activation of which a tile fits a GPU's registers, and for which the error of its screening is bounded.
LONGEST = 128
# Architectures whose code is every positive pre-activation, the k of largest contribution, or what reaches a threshold:
# those that listing.py lists.
LISTED = ("relu", "topk", "batchtopk", "matryoshka", "tied")


@dataclass
class Progress:
    """Sums over the steps of one call, per SAE [n]; stays on the device until it is read.

    gradient: the largest norm of a step's gradient, over all parameters of the SAE and before it is clipped
    """

    steps: int
    variance: Tensor  # [] Σ E‖x‖² over the batches: x is centred over the distribution
    loss: Tensor
    error: Tensor
    l0: Tensor
    gradient: Tensor

    @classmethod
    def zeros(cls, stack: Stack) -> Progress:
        """Nothing summed yet."""
        zeros = torch.zeros(len(stack.points), device=stack.flat.device)
        return cls(0, torch.zeros((), device=stack.flat.device), zeros, *(zeros.clone() for _ in range(3)))

    def add(self, x: Tensor, loss: Tensor, error: Tensor, l0: Tensor, gradient: Tensor) -> None:
        """Count one step on batch x [b, d]."""
        self.steps += 1
        self.variance += x.square().sum(-1).mean()
        self.loss += loss
        self.error += error
        self.l0 += l0
        self.gradient = torch.maximum(self.gradient, gradient)


def pick_backend(stack: Stack, pool: ThreadPoolExecutor, threads: int) -> Backend:
    """The fastest backend that can train this stack where it lies; `pool` has `threads` threads."""
    device = stack.flat.device.type
    known = stack.architecture.name in KERNELS.get(device, ())
    # Imported here: compiled kernels are of no use on a GPU, and take a second to load.
    if device == "cpu" and known:
        from sae_sweep.saes.kernels.cpu import CpuBackend

        return CpuBackend(pool, threads)
    # All SAEs of a stack have a largest term, or none (plan.stack_key).
    known = known and not FORMULAS[stack.points[0].penalty.name].largest
    if device == "cuda" and known and stack.d <= LONGEST and find_spec("triton"):
        from sae_sweep.saes.kernels.cuda import CudaBackend

        return CudaBackend()
    from sae_sweep.saes.kernels.dense import DenseBackend

    return DenseBackend(pool)


class Backend(Protocol):
    """Trains every SAE of a stack on batches [steps, b, d], in place."""

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Advance by `steps` steps from `stack.step`."""
        ...
