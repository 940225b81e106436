"""The CPU step: a dense encoder product, then work on the active latents only.

Per SAE and chunk of rows: pre-activations by matrix product into a buffer that stays in cache, the active
entries compacted, and from those alone the reconstruction, the penalty and every gradient. Chunks, partitions
and slices follow from shapes, sums run in a fixed order, and an SAE touches nothing of its pack-mates: so its
bits depend neither on the stack nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.saes.kernels import Progress
from sae_sweep.saes.kernels.slopes import compile_slopes
from sae_sweep.saes.stack import ADAM_EPS, BETA1, BETA2, Stack, adam_scale

Floats = NDArray[np.float32]

# Numbers in the buffer of pre-activations, and the most rows it takes: 1 MiB lies in the second-level cache.
BUFFER, ROWS = 1 << 18, 512
# Above this many parameters an SAE's batch is cut in PARTITIONS that threads share; one gradient buffer each.
PARTITION_ABOVE, PARTITIONS = 1 << 17, 4
# Parameters that one thread updates at a time.
SLICE = 1 << 16
# Where more than this share of the latents fires, matrix products beat loops over entries (scripts/bench_kernels.py).
DENSE_ABOVE = 0.1

_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")


class CpuBackend:
    """Threads share the SAEs of a stack, or the partitions of one SAE when there are fewer SAEs than threads."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """`pool` must keep PyTorch to one thread each: its own threads would fight ours, and change the order of sums."""
        self.pool, self.threads = pool, threads

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        n = len(stack.points)
        across = n >= self.threads
        within = map if across else self.pool.map
        trainers = [_Trainer(stack, i, within) for i in range(n)]
        sums = list((self.pool.map if across else map)(lambda trainer: trainer.advance(batches), trainers))
        stack.step += len(batches)
        loss, error, l0 = (torch.tensor(column, dtype=torch.float32) for column in zip(*sums, strict=True))
        variance = batches.square().sum(-1).mean(1).sum()
        return Progress(len(batches), variance, loss, error, l0)


@dataclass
class _Sums:
    """Over one partition of the batch: penalty and squared error summed over inputs, and active entries."""

    penalty: float = 0.0
    error: float = 0.0
    entries: int = 0


class _Trainer:
    """One SAE of the stack: views of its rows, its gradient, and the step."""

    def __init__(self, stack: Stack, i: int, within: Callable[..., Iterable[Any]]) -> None:
        self.stack, self.i, self.within = stack, i, within
        self.point, self.width, self.d = stack.points[i], stack.width, stack.d
        self.flat = stack.flat[i]
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = stack.split(self.flat)
        self.moments = stack.first[i].numpy(), stack.second[i].numpy()
        self.slopes = compile_slopes(self.point.penalty.name)
        count = self.flat.numel()
        self.partitions = PARTITIONS if count > PARTITION_ABOVE else 1
        self.gradients = torch.zeros(self.partitions, count)
        # Σ over inputs of slope·a/‖d‖: what the penalty adds to the gradient of W_dec, in units of W_dec.
        self.pulls = torch.zeros(self.partitions, self.width)
        # What the compiled functions work on; made once, since a view costs as much as a small kernel.
        self.decoder = self.W_dec.numpy(), self.b_dec.numpy()
        self.sinks = [
            (*(view.numpy() for view in stack.split(gradient)), pull.numpy())
            for gradient, pull in zip(self.gradients, self.pulls, strict=True)
        ]
        self.slices = [(at, min(at + SLICE, count)) for at in range(0, count, SLICE)]

    def advance(self, batches: Tensor) -> tuple[float, float, float]:
        """Steps through batches [steps, b, d]; sums of loss, squared error and L0 over the steps."""
        totals = np.zeros(3)
        for offset, x in enumerate(batches):
            totals += self.step(x, self.stack.step + offset)
        return totals[0], totals[1], totals[2]

    def step(self, x: Tensor, step: int) -> tuple[float, float, float]:
        """One Adam step on x [b, d]; loss, squared error and L0 before it."""
        rate, coefficient = self.stack.schedule(self.i, step)
        norms = self.W_dec.norm(dim=-1)
        dense = self.stack.architecture.name == "relu" and float(self.stack.density[self.i]) > DENSE_ABOVE * self.width
        parts = x.tensor_split(self.partitions)
        sums = list(
            self.within(
                lambda part: self.accumulate(part, parts[part], len(x), norms, coefficient, dense),
                range(self.partitions),
            )
        )
        self.update(rate, step)
        l0 = sum(part.entries for part in sums) / len(x)
        self.stack.density[self.i] = l0
        error = sum(part.error for part in sums) / len(x)
        return error + coefficient * sum(part.penalty for part in sums) / len(x), error, l0

    def accumulate(
        self, part: int, x: Tensor, batch: int, norms: Tensor, coefficient: float, dense: bool
    ) -> _Sums:
        """Add the gradient of a partition's rows x [rows, d] to that partition's buffer, chunk by chunk."""
        sums = _Sums()
        rows = min(max(BUFFER // self.width, 16), ROWS)
        work = self.dense_chunk if dense else self.sparse_chunk
        for chunk in x.split(rows):
            pre = torch.addmm(self.b_enc, chunk, self.W_enc.T)
            work(part, chunk, pre, norms, batch, coefficient, sums)
        return sums

    def sparse_chunk(
        self, part: int, x: Tensor, pre: Tensor, norms: Tensor, batch: int, coefficient: float, sums: _Sums
    ) -> None:
        """Gradients from the active entries of pre [rows, width]."""
        norm = norms.numpy()
        if self.stack.architecture.name == "topk":
            entries = select_topk(pre.numpy(), norm, self.point.sae.k)
        else:
            entries = select_positive(pre.numpy(), norm)
        latents, codes, contributions, bounds = entries
        slope = np.empty_like(contributions)
        penalty = self.point.penalty
        sums.penalty += self.slopes(contributions, bounds, penalty.scale, penalty.p, slope)
        sums.error += backward(
            x.numpy(), latents, codes, slope, bounds, *self.decoder, norm, 2 / batch, coefficient / batch, *self.sinks[part]
        )
        sums.entries += len(latents)

    def dense_chunk(
        self, part: int, x: Tensor, pre: Tensor, norms: Tensor, batch: int, coefficient: float, sums: _Sums
    ) -> None:
        """The same gradients by matrix products, for the steps in which much of the dictionary fires."""
        g_enc, g_dec, g_benc, g_bdec = self.stack.split(self.gradients[part])
        codes = pre.relu_()
        contributions = codes * norms
        bounds = np.arange(0, codes.numel() + 1, self.width)
        slope = torch.empty_like(codes)
        penalty = self.point.penalty
        sums.penalty += self.slopes(
            contributions.numpy().ravel(), bounds, penalty.scale, penalty.p, slope.numpy().ravel()
        )
        residual = torch.addmm(self.b_dec, codes, self.W_dec).sub_(x)
        sums.error += float(residual.square().sum(dtype=torch.float64))
        sums.entries += int(codes.count_nonzero())
        self.pulls[part] += (coefficient / batch) * (slope * codes).sum(0) / norms
        g_pre = (2 / batch) * (residual @ self.W_dec.T) + (coefficient / batch) * slope * norms
        g_pre[codes == 0] = 0
        g_enc.addmm_(g_pre.T, x)
        g_dec.addmm_(codes.T, residual, alpha=2 / batch)
        g_benc += g_pre.sum(0)
        g_bdec += (2 / batch) * residual.sum(0)

    def update(self, rate: float, step: int) -> None:
        """Clip this SAE's gradient to its own norm and take Adam's step; leaves the gradient at zero."""
        gradients, pulls = self.gradients.numpy(), self.pulls.numpy()
        weights = self.W_dec.numpy().ravel()
        first, second = self.moments
        squares = self.within(
            lambda bounds: combine(gradients, pulls, weights, self.width, self.d, bounds[0], bounds[1]), self.slices
        )
        norm = float(np.sqrt(sum(squares)))
        clip = min(1.0, self.point.training.clip / max(norm, 1e-30)) if norm == norm else norm
        correction1, correction2 = adam_scale(step)
        flat = self.flat.numpy()
        list(
            self.within(
                lambda bounds: adam(
                    flat, gradients, first, second, bounds[0], bounds[1], clip, rate / correction1, correction2
                ),
                self.slices,
            )
        )
        pulls[:] = 0


@_jit
def select_positive(pre, norms):  # type: ignore[no-untyped-def]
    """Entries above zero of pre [rows, width]: latents, codes, contributions, and where each row's begin."""
    rows, width = pre.shape
    bounds = np.empty(rows + 1, np.int64)
    count = 0
    for row in range(rows):
        for latent in range(width):
            count += pre[row, latent] > 0
    latents, codes, contributions = np.empty(count + 1, np.int32), np.empty(count + 1, np.float32), np.empty(count, np.float32)
    at = 0
    for row in range(rows):
        bounds[row] = at
        for begin in range(0, width, 16):
            end = min(begin + 16, width)
            active = 0
            for latent in range(begin, end):
                active += pre[row, latent] > 0
            if active:
                # Written without a branch: whether a latent fires cannot be predicted. The last write may be spare.
                for latent in range(begin, end):
                    latents[at] = latent
                    codes[at] = pre[row, latent]
                    at += pre[row, latent] > 0
    bounds[rows] = at
    for entry in range(count):
        contributions[entry] = codes[entry] * norms[latents[entry]]
    return latents[:count], codes[:count], contributions, bounds


@_jit
def select_topk(pre, norms, k):  # type: ignore[no-untyped-def]
    """As select_positive, for the k largest contributions of each row; of equals the first."""
    rows, width = pre.shape
    latents, contributions = np.empty(rows * k, np.int32), np.empty(rows * k, np.float32)
    bounds = np.empty(rows + 1, np.int64)
    at = 0
    for row in range(rows):
        bounds[row] = at
        held, floor = 0, np.float32(0)
        for latent in range(width):
            contribution = pre[row, latent] * norms[latent]
            if contribution > floor:
                slot = at + min(held, k - 1)
                while slot > at and contributions[slot - 1] < contribution:
                    contributions[slot], latents[slot] = contributions[slot - 1], latents[slot - 1]
                    slot -= 1
                contributions[slot], latents[slot] = contribution, latent
                held = min(held + 1, k)
                if held == k:
                    floor = contributions[at + k - 1]
        at += held
    bounds[rows] = at
    codes = np.empty(at, np.float32)
    for row in range(rows):
        for entry in range(bounds[row], bounds[row + 1]):
            codes[entry] = pre[row, latents[entry]]
    return latents[:at], codes, contributions[:at], bounds


@_jit
def backward(  # type: ignore[no-untyped-def]
    x, latents, codes, slopes, bounds, W_dec, b_dec, norms, error_weight, penalty_weight, g_enc, g_dec, g_benc, g_bdec, pulls
):
    """Add the gradient of the active entries of x [rows, d]; the squared error summed over the rows.

    The weights are those of an input in the loss: 2/batch for its squared error's slope, coefficient/batch.
    """
    of_error, of_penalty = np.float32(error_weight), np.float32(penalty_weight)
    rows, d = x.shape
    residual = np.empty(d, np.float32)
    total = 0.0
    for row in range(rows):
        for i in range(d):
            residual[i] = b_dec[i] - x[row, i]
        for entry in range(bounds[row], bounds[row + 1]):
            latent, code = latents[entry], codes[entry]
            for i in range(d):
                residual[i] += code * W_dec[latent, i]
        error = np.float32(0)
        for i in range(d):
            error += residual[i] * residual[i]
            residual[i] *= of_error
            g_bdec[i] += residual[i]
        total += error
        for entry in range(bounds[row], bounds[row + 1]):
            latent, code = latents[entry], codes[entry]
            slope = of_penalty * slopes[entry]
            g_code = np.float32(0)
            for i in range(d):
                g_code += residual[i] * W_dec[latent, i]
                g_dec[latent, i] += code * residual[i]
            g_code += slope * norms[latent]
            pulls[latent] += slope * code / norms[latent]
            g_benc[latent] += g_code
            for i in range(d):
                g_enc[latent, i] += g_code * x[row, i]
    return total


@_jit
def combine(gradients, pulls, W_dec, width, d, begin, end):  # type: ignore[no-untyped-def]
    """Sum the partitions' gradients over [begin, end) into the first, with the penalty's pull; the square of its norm."""
    total = 0.0
    first = gradients[0]
    for part in range(1, len(gradients)):
        for i in range(begin, end):
            first[i] += gradients[part, i]
    for latent in range(max(0, begin - width * d) // d, min(width, -(-(end - width * d) // d))):
        pull = np.float32(0)
        for part in range(len(pulls)):
            pull += pulls[part, latent]
        at = latent * d
        for i in range(max(at, begin - width * d), min(at + d, end - width * d)):
            first[width * d + i] += pull * W_dec[i]
    for i in range(begin, end):
        total += float(first[i]) * float(first[i])
    return total


@_jit
def adam(flat, gradients, first, second, begin, end, clip, rate, correction2):  # type: ignore[no-untyped-def]
    """torch.optim.Adam's update of flat[begin:end]; the gradients are left at zero for the next step."""
    scale, step, correction = np.float32(clip), np.float32(rate), np.float32(1 / correction2)
    beta1, beta2, epsilon = np.float32(BETA1), np.float32(BETA2), np.float32(ADAM_EPS)
    one = np.float32(1)
    for i in range(begin, end):
        gradient = gradients[0, i] * scale
        first[i] += (one - beta1) * (gradient - first[i])
        second[i] = beta2 * second[i] + (one - beta2) * gradient * gradient
        flat[i] -= step * first[i] / (np.sqrt(second[i] * correction) + epsilon)
    for part in range(len(gradients)):
        gradients[part, begin:end] = 0
