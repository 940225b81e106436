"""The CPU step: a dense encoder product, then work on the active latents only (sparse.py).

Partitions and slices follow from shapes, sums run in a fixed order, and an SAE touches nothing of its pack-mates: so
its bits depend neither on the stack nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_sweep.saes.kernels import Progress
from sae_sweep.saes.kernels.slopes import compile_slopes
from sae_sweep.saes.kernels.sparse import accumulate, adam, combine, decoder_norms, encoder_panels, take_steps
from sae_sweep.saes.stack import Stack, adam_scale

# Above this many parameters an SAE's batch is cut in PARTITIONS that threads share; one gradient buffer each.
PARTITION_ABOVE, PARTITIONS = 1 << 17, 4
# Parameters that one thread updates at a time.
SLICE = 1 << 16
# Where more than this share of the latents fires, and at least so many, matrix products beat loops over entries.
DENSE_ABOVE, DENSE_AT_LEAST = 0.1, 64
# Numbers in the largest buffer of the dense step: never batch × width of a wide SAE.
DENSE_BUFFER = 1 << 20

# Loss, squared error and L0.
Sums = np.ndarray[Any, np.dtype[np.float64]]


class CpuBackend:
    """Threads share the SAEs of a stack, or the partitions of one SAE when there are fewer SAEs than threads."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """`pool` must keep PyTorch to one thread each: threads of its own would fight ours and reorder sums."""
        self.pool, self.threads = pool, threads

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        n = len(stack.points)
        across = n >= self.threads
        trainers = [_Trainer(stack, i, map if across else self.pool.map) for i in range(n)]
        sums = list((self.pool.map if across else map)(lambda trainer: trainer.advance(batches), trainers))
        stack.step += len(batches)
        loss, error, l0 = torch.tensor(np.array(sums), dtype=torch.float32).unbind(1)
        return Progress(len(batches), batches.square().sum(-1).mean(1).sum(), loss, error, l0)


class _Trainer:
    """One SAE of the stack: views of its rows, its gradient, and the step."""

    def __init__(self, stack: Stack, i: int, within: Callable[..., Iterable[Any]]) -> None:
        self.stack, self.i, self.within = stack, i, within
        self.point, self.width, self.k = stack.points[i], stack.width, 0
        if stack.architecture.name == "topk":
            self.k = stack.points[i].sae.k
        self.flat, self.first, self.second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        self.slopes = compile_slopes(self.point.penalty.name)
        partitions = PARTITIONS if self.flat.size > PARTITION_ABOVE else 1
        self.gradients = torch.zeros(partitions, self.flat.size)
        # Σ over inputs of slope·a/‖d‖: what the penalty adds to the gradient of W_dec, in units of W_dec.
        self.pulls = np.zeros((partitions, self.width), np.float32)
        self.slices = [(at, min(at + SLICE, self.flat.size)) for at in range(0, self.flat.size, SLICE)]

    def advance(self, batches: Tensor) -> Sums:
        """Steps through batches [steps, b, d]; loss, squared error and L0 before each step, summed over the steps."""
        totals, step, most = np.zeros(3), 0, max(DENSE_ABOVE * self.width, DENSE_AT_LEAST)
        while step < len(batches):
            dense = not self.k and float(self.stack.density[self.i]) > most
            if dense or len(self.gradients) > 1:
                totals += self._step(batches[step], self.stack.step + step, dense)
                step += 1
            else:
                taken, *sums, l0 = self._steps(batches[step:], self.stack.step + step, most)
                totals += sums
                self.stack.density[self.i] = l0
                step += int(taken)
        return totals

    def _steps(self, batches: Tensor, first: int, most: float) -> tuple[float, ...]:
        """A narrow SAE's steps, with no Python between them, until more than `most` latents fire."""
        schedule = np.array([self._scheduled(step) for step in range(first, first + len(batches))])
        penalty, clip = self.point.penalty, self.point.training.clip
        return take_steps(
            batches.numpy(),
            schedule,
            self.flat,
            self.first,
            self.second,
            self.gradients.numpy(),
            self.pulls,
            self.width,
            self.k,
            self.slopes,
            penalty.scale,
            penalty.p,
            clip,
            # TopK is sparse by construction.
            np.inf if self.k else most,
        )

    def _step(self, x: Tensor, step: int, dense: bool) -> Sums:
        """One step on x [b, d], its partitions and slices shared by threads; loss, squared error and L0 before it."""
        rate, correction2, coefficient = self._scheduled(step)
        W_enc, W_dec, b_enc, b_dec = self.stack.split(self.stack.flat[self.i])
        norms = decoder_norms(W_dec.numpy())
        panels = None if dense else encoder_panels(W_enc.numpy(), b_enc.numpy())
        parts = x.tensor_split(len(self.gradients))
        weights = 2 / len(x), coefficient / len(x)

        def work(part: int) -> tuple[float, float, int]:
            if panels is None:
                return self._dense(part, parts[part], torch.from_numpy(norms), *weights)
            sinks = (view.numpy() for view in self.stack.split(self.gradients[part]))
            penalty = self.point.penalty
            return accumulate(
                parts[part].numpy(),
                *panels,
                W_dec.numpy(),
                b_dec.numpy(),
                norms,
                self.k,
                self.slopes,
                penalty.scale,
                penalty.p,
                *map(np.float32, weights),
                *sinks,
                self.pulls[part],
            )

        penalty, error, entries = np.array(list(self.within(work, range(len(parts))))).sum(0)
        self._update(rate, correction2, W_dec.numpy())
        self.stack.density[self.i] = entries / len(x)
        return np.array([error + coefficient * penalty, error, entries]) / len(x)

    def _dense(
        self, part: int, x: Tensor, norms: Tensor, of_error: float, of_penalty: float
    ) -> tuple[float, float, int]:
        """What `accumulate` does, by matrix products: for the steps in which much of the dictionary fires."""
        W_enc, W_dec, b_enc, b_dec = self.stack.split(self.stack.flat[self.i])
        g_enc, g_dec, g_benc, g_bdec = self.stack.split(self.gradients[part])
        setting, pulls = self.point.penalty, torch.from_numpy(self.pulls[part])
        penalty, error, entries = 0.0, 0.0, 0
        for chunk in x.split(max(DENSE_BUFFER // self.width, 1)):
            codes = torch.addmm(b_enc, chunk, W_enc.T).relu_()
            bounds = np.arange(0, codes.numel() + 1, self.width)
            slope = torch.empty_like(codes)
            penalty += self.slopes(
                (codes * norms).numpy().ravel(), bounds, setting.scale, setting.p, slope.numpy().ravel()
            )
            residual = torch.addmm(b_dec, codes, W_dec).sub_(chunk)
            error += float(residual.square().sum(dtype=torch.float64))
            entries += int(codes.count_nonzero())
            residual *= of_error
            slope *= of_penalty
            pulls += (slope * codes).sum(0) / norms
            g_pre = torch.addcmul(residual @ W_dec.T, slope, norms)
            g_pre[codes == 0] = 0
            g_enc.addmm_(g_pre.T, chunk)
            g_dec.addmm_(codes.T, residual)
            g_benc += g_pre.sum(0)
            g_bdec += residual.sum(0)
        return penalty, error, entries

    def _update(self, rate: float, correction2: float, W_dec: np.ndarray[Any, Any]) -> None:
        """Clip this SAE's gradient to its own norm and take Adam's step; leaves the gradient at zero."""
        gradients = self.gradients.numpy()
        squares = self.within(lambda part: combine(gradients, self.pulls, W_dec, *part), self.slices)
        norm = float(np.sqrt(sum(squares)))
        clip = min(1.0, self.point.training.clip / max(norm, 1e-30)) if norm == norm else norm
        arrays = self.flat, gradients, self.first, self.second
        list(self.within(lambda part: adam(*arrays, *part, clip, rate, correction2), self.slices))
        self.pulls[:] = 0

    def _scheduled(self, step: int) -> tuple[float, float, float]:
        """Learning rate over Adam's first bias correction, the second correction, and the coefficient."""
        rate, coefficient = self.stack.schedule(self.i, step)
        correction1, correction2 = adam_scale(step)
        return rate / correction1, correction2, coefficient
