"""The training loop, and the step that it takes: batch, encode, activate, decode, loss, gradient, clip, Adam.

The step here is PyTorch's autograd. It runs on any device and trains whatever has no faster step of its own there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sae_sweep.saes.annealing import anneal
from sae_sweep.saes.architectures import pre_activations
from sae_sweep.saes.penalties import log_shares, penalty_value
from sae_sweep.saes.stack import ADAM_EPS, BETA1, BETA2, Stack, adam_scale

# Steps between two looks at the metrics: each look waits for the device.
BLOCK = 25
# BatchTopK's evaluation threshold is an exponential mean of the smallest contribution chosen (as in SAELens).
THRESHOLD_RATE = 0.01
# Tensors of batch × width that autograd holds at once, about; and the bytes of them that SAEs on a GPU share
# (sweep/cost.py counts on both).
COPIES, GPU_BYTES = 12, 1 << 28


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


class Backend(Protocol):
    """Trains every SAE of a stack on batches [steps, b, d], in place."""

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Advance by `steps` steps from `stack.step`."""
        ...


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


class AutogradBackend:
    """The reference step: faster backends compute the same, and where they differ from this one, they are wrong.

    On the CPU each SAE takes its steps by itself on one thread, so its bits depend neither on pack-mates nor on
    threads. On a GPU as many as fit take them at once; the library's batched products may then choose kernels, and so
    bits, by how many there are. It holds several [batch, width] tensors for each SAE at work.
    """

    def __init__(self, pool: ThreadPoolExecutor | None = None) -> None:
        """`pool`, each of whose threads keeps PyTorch to itself, shares a stack's SAEs on the CPU."""
        self.pool = pool

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        n, numbers = len(stack.points), batches.shape[1] * stack.width
        together = max(1, GPU_BYTES // (4 * COPIES * numbers)) if batches.is_cuda else 1
        parts = [stack.part(slice(first, first + together)) for first in range(0, n, together)]
        share = self.pool.map if self.pool and not batches.is_cuda else map
        done = list(share(lambda part: self._advance(part, batches), parts))
        stack.step += len(batches)
        names = ("loss", "error", "l0", "gradient")
        sums = (torch.cat([getattr(progress, name) for progress in done]) for name in names)
        return Progress(len(batches), done[0].variance, *sums)

    def _advance(self, stack: Stack, batches: Tensor) -> Progress:
        progress = Progress.zeros(stack)
        for x in batches:
            progress.add(x, *self._step(stack, x))
            stack.step += 1
        return progress

    def _step(self, stack: Stack, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # `.data` has a count of changes of its own: autograd does not mind that other threads change their own rows.
        leaves = [view.requires_grad_() for view in stack.views(stack.flat.data)]
        rates, coefficients = (
            torch.tensor(column, device=x.device)
            for column in zip(*(stack.schedule(i, stack.step) for i in range(len(stack.points))), strict=True)
        )
        kind, settings = stack.architecture, stack.points[0].sae
        sae = stack.used(leaves, stack.threshold)
        pre = pre_activations(x, sae)
        codes = kind.activate(pre, sae, settings, True)
        contributions = kind.penalised(pre, codes, sae)
        fires = kind.fires(pre, sae, settings) if kind.fires else None
        error = (codes @ sae.W_dec + sae.b_dec[:, None] - x).square().sum(-1).mean(-1)
        loss = error + coefficients * stack.rescale.to(coefficients) * penalties(stack, contributions, fires)
        if kind.auxiliary:
            loss = loss + kind.auxiliary(x, pre, codes, sae, settings)
        # What is not used has no gradient: the encoder's rows where weights are tied.
        gradients = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        gradient = torch.cat([g.flatten(1) for g in gradients], dim=1)
        with torch.no_grad():
            self._learn_threshold(stack, contributions)
            norms = gradient.norm(dim=1)
            adam(stack, clipped(stack, gradient, norms), rates)
        return loss.detach(), error.detach(), (codes > 0).sum(-1).float().mean(-1), norms

    def _learn_threshold(self, stack: Stack, contributions: Tensor) -> None:
        if stack.architecture.learns_threshold:
            smallest = torch.where(contributions > 0, contributions, torch.inf).amin((-2, -1))
            rate = 1.0 if stack.step == 0 else THRESHOLD_RATE
            stack.threshold.lerp_(torch.where(smallest.isinf(), stack.threshold, smallest), rate)


def penalties(stack: Stack, contributions: Tensor, fires: Tensor | None) -> Tensor:
    """Mean penalty of each SAE over the batch: contributions, and whether each fires, [n, b, width] -> [n]."""
    groups = defaultdict(list)
    for i, point in enumerate(stack.points):
        groups[point.penalty.name, point.penalty.get("scale", 1.0), float(stack.exponent[i])].append(i)
    result = contributions.new_zeros(len(stack.points))
    for (name, scale, exponent), members in groups.items():
        of_members = contributions[members]
        shares = log_shares(of_members)[..., None, :] if name == "exclusive_pi" else None
        if name == "l0" and fires is not None:  # a count has no slope but the one that goes straight through
            values = fires[members].sum(-1).mean(-1)
        else:
            values = penalty_value(name, of_members, scale, exponent, shares).mean(-1)
        result = result.index_put((torch.tensor(members, device=result.device),), values)
    return result


def clipped(stack: Stack, gradient: Tensor, norms: Tensor) -> Tensor:
    """Scale each SAE's gradient [n, parameter_count] of norm [n] down to its own largest: never one over the stack.

    NaN where that norm is not finite: an SAE that stood still would look trained.
    """
    limits = torch.tensor([point.training.clip for point in stack.points], device=gradient.device)
    factors = (limits / norms.clamp_min(1e-30)).clamp_max(1.0)
    return gradient * torch.where(norms.isfinite(), factors, torch.nan)[:, None]


def adam(stack: Stack, gradient: Tensor, rates: Tensor) -> None:
    """torch.optim.Adam's update for every SAE, with one learning rate each."""
    correction1, correction2 = adam_scale(stack.step)
    stack.first.lerp_(gradient, 1 - BETA1)
    stack.second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    denominator = (stack.second / correction2).sqrt_().add_(ADAM_EPS)
    stack.flat.sub_(rates[:, None] * (stack.first / correction1) / denominator)
