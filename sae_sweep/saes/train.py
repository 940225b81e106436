"""The training loop, and the step that it takes: batch, encode, activate, decode, loss, gradient, clip, optimiser.

The step here is PyTorch's autograd. It runs on any device and trains whatever has no faster step of its own there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from sae_sweep.registry import get
from sae_sweep.saes.annealing import anneal
from sae_sweep.saes.formula import Formula
from sae_sweep.saes.limits import BLOCK, COPIES, GPU_BYTES
from sae_sweep.saes.penalties import formula_of, log_shares, penalty_value
from sae_sweep.saes.recipes import DecoderNorm, Optimizer, Respond, revival_of
from sae_sweep.saes.recipes.k_annealing import annealed
from sae_sweep.saes.recipes.optimizers import BETA1, BETA2, bias_corrections
from sae_sweep.saes.recipes.revivals import responses
from sae_sweep.saes.recipes.target_l0 import steer
from sae_sweep.saes.recipes.until import settled
from sae_sweep.saes.stack import Stack

# BatchTopK's evaluation threshold is an exponential mean of the smallest contribution chosen (as in SAELens).
THRESHOLD_RATE = 0.01


class Batches(Protocol):
    """Training data: batch t depends on t and the data seed alone."""

    def batches(self, start_step: int, count: int) -> Tensor:
        """Batches start_step … start_step + count − 1: [count, b, d]."""
        ...


@dataclass(frozen=True)
class Look:
    """Means over the steps since the last look, per SAE [n] on the CPU; of the gradient's norm the largest.

    NaN of an SAE that had stopped before (recipes/until.py).
    revived: how many latents were revived at the end of these steps, or came back to life in them by an auxiliary loss
    dead: how many are dead at their end, where the recipe revives; else 0
    rescale: what the coefficient was multiplied by in them
    """

    step: int
    loss: Tensor
    fvu: Tensor
    l0: Tensor
    gradient: Tensor
    revived: Tensor
    dead: Tensor
    rescale: Tensor

    def spread(self, members: Sequence[int], n: int) -> Look:
        """Of n SAEs, of which it has seen these."""
        columns = {name: torch.full((n,), torch.nan) for name in OF_EACH}
        for name, column in columns.items():
            column[members] = getattr(self, name)
        return Look(self.step, **columns)


# What a look has of each SAE, in the order of its fields.
OF_EACH = tuple(field.name for field in fields(Look) if field.name != "step")


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

    @classmethod
    def joined(cls, steps: int, parts: Sequence[Progress]) -> Progress:
        """That of a whole stack from those of its parts over the same steps, in tensors of its own."""
        names = ("loss", "error", "l0", "gradient")
        return cls(steps, parts[0].variance.clone(), *(torch.cat([getattr(p, name) for p in parts]) for name in names))

    def reset(self) -> None:
        """Forget what was summed, in place."""
        self.steps = 0
        for sums in (self.variance, self.loss, self.error, self.l0, self.gradient):
            sums.zero_()

    def add(self, x: Tensor, loss: Tensor, error: Tensor, l0: Tensor, gradient: Tensor) -> None:
        """Count one step on batch x [b, d]."""
        self.steps += 1
        self.variance += x.square().sum(-1).mean()
        self.loss += loss
        self.error += error
        self.l0 += l0
        torch.maximum(self.gradient, gradient, out=self.gradient)


class Backend(Protocol):
    """Trains every SAE of a stack on batches [steps, b, d], in place."""

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Advance by `steps` steps from `stack.step`."""
        ...

    def responses(self, stack: Stack, i: int, batches: Tensor) -> tuple[Tensor, Tensor]:
        """Which latents of SAE i fire on batches [steps, b, d]: [width]; and the squared error of each input."""
        return responses(stack, i, batches)


def train(
    stack: Stack,
    data: Batches,
    backend: Backend,
    pool: ThreadPoolExecutor | None = None,
    before: Sequence[Look] = (),
) -> Iterator[Look]:
    """Train the stack to the end of its steps, in place; yields after every BLOCK of steps.

    `pool`, each of whose threads keeps PyTorch to itself, shares the SAEs where latents are revived on the CPU.
    `before`: what was seen of a stack that goes on.

    An SAE whose loss is no longer finite is entered in `stack.failed` with the step by which it broke; its
    pack-mates share nothing with it and go on. One that stops before the end (recipes/until.py) is entered in
    `stack.stopped`; the others go on in a smaller stack.
    """
    looks, steps = list(before), stack.points[0].training.steps
    running, members = stack, list(range(len(stack.points)))
    while stack.step < steps and len(stack.stopped) < len(stack.points):
        if len(members) + len(stack.stopped) > len(stack.points):
            members = [i for i in range(len(stack.points)) if i not in stack.stopped]
            running = stack.copied(members)
        batches = data.batches(stack.step, min(BLOCK, steps - stack.step))
        look = take_block(running, batches, backend, pool)
        if running is not stack:
            stack.put_back(running, members)
            look = look.spread(members, len(stack.points))
        looks.append(look)
        for i in members:
            if stack.points[i].training.until == "plateau" and (i in stack.failed or settled(stack, looks, i)):
                stack.stopped[i] = stack.step
        yield look


def take_block(stack: Stack, batches: Tensor, backend: Backend, pool: ThreadPoolExecutor | None) -> Look:
    """Train every SAE of the stack on a block of batches [steps, b, d], in place, with what happens between blocks."""
    anneal(stack, batches[0])
    now = annealed(stack)
    progress = backend.advance(now, batches)
    stack.step = now.step

    # The one synchronisation with the device per block.
    loss, error, l0 = (torch.as_tensor(s).cpu() / progress.steps for s in (progress.loss, progress.error, progress.l0))
    for i in torch.nonzero(~loss.isfinite()).flatten().tolist():
        stack.failed.setdefault(i, stack.step)
    gradient = torch.as_tensor(progress.gradient).cpu()
    revived, dead = revive(now, batches, backend.responses, pool)
    fvu, rescale = error * progress.steps / progress.variance.cpu(), stack.rescale.float()
    steer(stack, l0)
    return Look(stack.step, loss, fvu, l0, gradient, revived, dead, rescale)


@torch.no_grad()
def revive(stack: Stack, batches: Tensor, respond: Respond, pool: ThreadPoolExecutor | None) -> tuple[Tensor, Tensor]:
    """Give dead latents another start where the recipes ask for it after the block [steps, b, d].

    How many were revived, and how many are dead then, per SAE [n]. A latent is dead that has not fired for
    `dead_after` steps; one that fires again counts as revived where an auxiliary loss trained it.
    """
    kinds = [revival_of(point.training) for point in stack.points]

    def one(i: int) -> Tensor:
        kind, training = kinds[i], stack.points[i].training
        dead_after = training.get("dead_after") or BLOCK
        revived = stack.dead[i] & (stack.silent[i] < dead_after) & bool(kind.auxiliary)
        if kind.revive and kind.due(training, stack.step, len(batches)):
            restarted = kind.revive(stack, i, batches, respond)
            stack.silent[i][restarted] = 0
            revived = revived | restarted
        stack.dead[i] = stack.silent[i] >= dead_after
        stack.ever_revived[i] |= revived
        return torch.stack([revived.sum(), stack.dead[i].sum()]).cpu()

    at_work = [i for i, kind in enumerate(kinds) if kind.revives and i not in stack.failed]
    share = pool.map if pool and not batches.is_cuda else map
    counts = torch.zeros(2, len(stack.points), dtype=torch.int64)
    for i, found in zip(at_work, share(one, at_work), strict=True):
        counts[:, i] = found
        stack.revived[i] += found[0]
        if found[0]:
            stack.last_revived[i] = found[0]
    revived, dead = counts.float()
    return revived, dead


class AutogradBackend(Backend):
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
        parts = parts_at_once(stack, batches.shape[1], batches.is_cuda)
        share = self.pool.map if self.pool and not batches.is_cuda else map
        done = list(share(lambda part: self._advance(part, batches), parts))
        stack.step += len(batches)
        return Progress.joined(len(batches), done)

    def _advance(self, stack: Stack, batches: Tensor) -> Progress:
        progress, step = Progress.zeros(stack), ReferenceStep(stack)
        for x, numbers in zip(batches, step_numbers(stack, len(batches)), strict=True):
            progress.add(x, *step(x, numbers))
        return progress


def parts_at_once(stack: Stack, b: int, on_gpu: bool) -> list[Stack]:
    """The stack in parts, each of which takes the reference step at once on batches of `b`: on the CPU single SAEs."""
    products = stack.encoder.products(stack.points[0].encoder, stack.points[0].sae, stack.d)
    copies = COPIES * products + revival_of(stack.points[0].training).copies
    together = max(1, int(GPU_BYTES / (4 * copies * b * stack.width))) if on_gpu else 1
    return [stack.part(slice(first, first + together)) for first in range(0, len(stack.points), together)]


def step_numbers(stack: Stack, steps: int) -> Tensor:
    """What the next steps take from their place in the training: [steps, 2n + 3], on the stack's device.

    Of each SAE the learning rate [n] and the coefficient as annealing rescales it [n]; then Adam's two bias
    corrections, and how far a learned threshold moves to the smallest contribution chosen.
    """
    members, training = range(len(stack.points)), stack.points[0].training
    betas = training.get("beta1", BETA1), training.get("beta2", BETA2)
    rows = []
    for step in range(stack.step, stack.step + steps):
        rates, coefficients = zip(*(stack.schedule(i, step) for i in members), strict=True)
        rows.append([*rates, *coefficients, *bias_corrections(step, *betas), 1.0 if step == 0 else THRESHOLD_RATE])
    numbers = torch.tensor(rows)
    numbers[:, len(members) : 2 * len(members)] *= stack.rescale.to(numbers)
    return numbers.to(stack.flat.device)


class ReferenceStep:
    """One step of every SAE of a stack at once: encode, activate, decode, loss, gradient, clip, optimiser.

    Whatever changes from step to step is handed over in `numbers`, and what stays is on the device from the start, so
    that no step waits for the device and a CUDA graph of one is a graph of all (kernels/cuda/captured.py). Annealed
    exponents stay from one block of training to the next.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack, device = stack, stack.flat.device
        self.limits = torch.tensor([point.training.clip for point in stack.points], device=device)
        self.groups = PenaltyGroup.of(stack)
        # Of the recipe what all SAEs of the stack share.
        training = stack.points[0].training
        self.optimizer: Optimizer = get("optimizer", training.optimizer)
        self.decoder_norm: DecoderNorm = get("decoder_norm", training.decoder_norm)
        self.revival = revival_of(training)

    def __call__(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step on batch x [b, d] with a row of `step_numbers`: loss, squared error, L0, gradient's norm, [n] each."""
        stack = self.stack
        n = len(stack.points)
        rates, coefficients, (correction1, correction2, threshold_rate) = numbers.split([n, n, 3])
        # `.data` has a count of changes of its own: autograd does not mind that other threads change their own rows.
        leaves = [view.requires_grad_() for view in stack.views(stack.flat.data)]
        kind, settings, encoder = stack.architecture, stack.points[0].sae, stack.points[0].encoder
        sae = stack.used(leaves, stack.threshold)
        pre, codes = kind.infer(x, sae, settings, True, encoder)
        contributions = kind.penalised(pre, codes, sae)
        fires = kind.fires(pre, sae, settings) if kind.fires else None
        residual = x - (codes @ sae.W_dec + sae.b_dec[:, None])
        error = residual.square().sum(-1).mean(-1)
        loss = error + coefficients * penalties(self.groups, contributions, fires)
        if kind.auxiliary:
            loss = loss + kind.auxiliary(x, pre, codes, sae, settings)
        stack.silent.add_(1).masked_fill_((codes > 0).any(-2), 0)
        if self.revival.auxiliary:
            loss = loss + self.revival.auxiliary(stack, residual.detach(), pre, sae)
        # What is not used has no gradient: the encoder's rows where weights are tied.
        gradients = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        if self.decoder_norm.constrain:
            self.decoder_norm.constrain(gradients[1], leaves[1].detach())
        gradient = torch.cat([g.flatten(1) for g in gradients], dim=1)
        with torch.no_grad():
            if kind.learns_threshold:
                smallest = contributions.masked_fill(~(contributions > 0), torch.inf).amin((-2, -1))
                stack.threshold.lerp_(torch.where(smallest.isinf(), stack.threshold, smallest), threshold_rate)
            norms = gradient.norm(dim=1)
            limited = clipped(gradient, norms, self.limits)
            self.optimizer.update(stack, limited, rates, (correction1, correction2))
            if self.decoder_norm.restore:
                self.decoder_norm.restore(stack.split(stack.flat)[1])
        return loss.detach(), error.detach(), (codes > 0).sum(-1).float().mean(-1), norms


@dataclass(frozen=True)
class PenaltyGroup:
    """SAEs of a stack that share a penalty's formula and numbers; members: their places [count], on its device."""

    name: str
    formula: Formula
    scale: float
    exponent: float
    members: Tensor

    @classmethod
    def of(cls, stack: Stack) -> list[PenaltyGroup]:
        """The groups of a stack, with its exponents as they are now."""
        groups = defaultdict(list)
        for i, (point, exponent) in enumerate(zip(stack.points, stack.exponent.tolist(), strict=True)):
            groups[point.penalty.name, formula_of(point.penalty), point.penalty.get("scale", 1.0), exponent].append(i)
        device = stack.flat.device
        return [cls(*key, torch.tensor(members, device=device)) for key, members in groups.items()]


def penalties(groups: Sequence[PenaltyGroup], contributions: Tensor, fires: Tensor | None) -> Tensor:
    """Mean penalty of each SAE over the batch: contributions, and whether each fires, [n, b, width] -> [n]."""
    result = contributions.new_zeros(len(contributions))
    for group in groups:
        of_members = contributions.index_select(0, group.members) if len(groups) > 1 else contributions
        shares = log_shares(of_members)[..., None, :] if group.formula.weighs else None
        if group.name == "l0" and fires is not None:  # a count has no slope but the one that goes straight through
            values = fires.index_select(0, group.members).sum(-1).mean(-1)
        else:
            values = penalty_value(group.formula, of_members, group.scale, group.exponent, shares).mean(-1)
        result = result.index_copy(0, group.members, values)
    return result


def clipped(gradient: Tensor, norms: Tensor, limits: Tensor) -> Tensor:
    """Scale each SAE's gradient [n, parameter_count] of norm [n] down to its own limit [n]: never one over the stack.

    NaN where that norm is not finite: an SAE that stood still would look trained.
    """
    factors = (limits / norms.clamp_min(1e-30)).clamp_max(1.0)
    return gradient * factors.masked_fill(~norms.isfinite(), torch.nan)[:, None]
