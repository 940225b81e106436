"""The CPU step: a dense encoder product, then work on the active latents only (sparse.py).

Parts and slices follow from shapes, sums run in a fixed order, and an SAE touches nothing of its pack-mates: so its
bits depend neither on the stack nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_sweep.saes.kernels import Progress
from sae_sweep.saes.kernels.batchtopk import HALF, contributions, drop_below, rank_in, tally
from sae_sweep.saes.kernels.dense import THRESHOLD_RATE
from sae_sweep.saes.kernels.slopes import compile_slopes
from sae_sweep.saes.kernels.sparse import FIELDS, GROUP, collect, encode, reconstruct, refresh
from sae_sweep.saes.kernels.steps import clip_factor, find_idle, finish, squares, take_steps, update
from sae_sweep.saes.kernels.tile import LANES
from sae_sweep.saes.stack import Stack, adam_scale

# One part for so many products of the encoder (1 ms): less is not worth sharing. More than MOST_PARTS no laptop has cores.
PART, MOST_PARTS = 1 << 26, 16
# Entries that a part lists before their gradients are collected; and always room for one more input.
ENTRIES = 1 << 17
# Where more than this share of the latents fires, and at least so many, matrix products beat loops over entries.
DENSE_ABOVE, DENSE_AT_LEAST = 0.1, 64
# Numbers in the largest buffer of a dense step, and gradients that its threads fill.
DENSE_BUFFER, DENSE_PARTS = 1 << 20, 4
# BatchTopK looks for its threshold above this share of the last.
GUESS = np.float32(0.9)

Array = np.ndarray[Any, Any]


class CpuBackend:
    """Threads share the SAEs of a stack, or the parts and slices of one SAE when there are fewer SAEs than threads."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """`pool` must keep PyTorch to one thread each: its own threads would fight ours, and change the order of sums."""
        self.pool, self.threads = pool, threads

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        n = len(stack.points)
        alone = n < self.threads

        def train(i: int) -> Array:
            return _Trainer(stack, i, batches.shape[1], self.pool.map if alone else None).advance(batches)

        sums = list((map if alone else self.pool.map)(train, range(n)))
        stack.step += len(batches)
        loss, error, l0 = torch.tensor(np.array(sums), dtype=torch.float32).unbind(1)
        return Progress(len(batches), batches.square().sum(-1).mean(1).sum(), loss, error, l0)


class _Trainer:
    """One SAE of the stack: views of its rows, what a step needs beside them, and the step."""

    def __init__(self, stack: Stack, i: int, b: int, share: Callable[..., Iterable[Any]] | None) -> None:
        self.stack, self.i = stack, i
        self.point, self.width, self.d = stack.points[i], stack.width, stack.d
        self.k = self.point.sae.k if stack.architecture.name == "topk" else 0
        # BatchTopK: so many entries of a batch.
        self.chosen = b * self.point.sae.k if stack.architecture.name == "batchtopk" else 0
        self.flat, self.first, self.second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        self.slopes = compile_slopes(self.point.penalty.name)
        count = min(MOST_PARTS, max(1, b * self.width * self.d // PART))
        self.parts = _cut(b, count, GROUP)
        self.slices = _cut(self.width, 1 if count == 1 else 2 * count, LANES)
        self.share = share if count > 1 else None
        self._allocate(b)

    def _allocate(self, b: int) -> None:
        width, d, parts = self.width, self.d, len(self.parts)
        panels = -(-width // LANES)
        self.gradient = np.empty(self.flat.size, np.float32)
        self.active, self.idle = np.zeros((2, width), np.uint8)
        # Latents that fill up the last panel never fire.
        self.panels, self.bias = np.zeros((panels, d, LANES), np.float32), np.full(panels * LANES, -np.inf, np.float32)
        self.norms, ones = np.ones((2, panels * LANES), np.float32)
        # What decides which latents count is their contribution, or only its sign.
        self.weights = self.norms if self.k or self.chosen else ones
        self.floats = np.empty((parts, ENTRIES + width, FIELDS), np.float32)
        self.ints = self.floats.view(np.int32)
        self.starts = np.empty((parts, int((self.parts[:, 1] - self.parts[:, 0]).max()) + 1), np.int64)
        self.heads = np.full((parts, width), -1, np.int32)
        self.residuals, self.g_bdec = np.empty((b, d), np.float32), np.empty((parts, d), np.float32)

    def advance(self, batches: Tensor) -> Array:
        """Steps through batches [steps, b, d]; loss, squared error and L0 before each step, summed over the steps."""
        find_idle(self.first, self.second, self.width, self.d, self.idle)
        refresh(self.flat, self.width, self.d, self.panels, self.bias, self.norms, 0, self.width)
        # TopK and BatchTopK are sparse by construction.
        most = np.inf if self.k or self.chosen else max(DENSE_ABOVE * self.width, DENSE_AT_LEAST)
        totals, step = np.zeros(3), 0
        while step < len(batches):
            dense = float(self.stack.density[self.i]) > most
            if dense or self.chosen or self.share:
                totals += self._step(batches[step], self.stack.step + step, dense)
                step += 1
            else:
                taken, *sums, l0 = self._steps(batches[step:], self.stack.step + step, most)
                totals += sums
                self.stack.density[self.i] = l0
                step += int(taken)
        return totals

    def _steps(self, batches: Tensor, first: int, most: float) -> tuple[float, ...]:
        """Steps on one thread, with no Python between them, until more than `most` latents fire."""
        schedule = np.array([self._scheduled(step) for step in range(first, first + len(batches))])
        penalty, clip = self.point.penalty, self.point.training.clip
        return take_steps(
            batches.numpy(),
            schedule,
            self.flat,
            self.gradient,
            self.first,
            self.second,
            self.width,
            self.k,
            self.slopes,
            penalty.scale,
            penalty.p,
            clip,
            most,
            self.panels,
            self.bias,
            self.norms,
            self.weights,
            self.floats,
            self.ints,
            self.starts,
            self.heads,
            self.residuals,
            self.g_bdec,
            self.active,
            self.idle,
            self.parts,
            self.slices,
        )

    def _step(self, batch: Tensor, step: int, dense: bool) -> Array:
        """One step on batch [b, d], shared by threads; loss, squared error and L0 before it."""
        rate, correction2, coefficient = self._scheduled(step)
        b = len(batch)
        weights = np.float32(2 / b), np.float32(coefficient / b)
        if dense:
            penalty, error, entries = self._dense_gradient(batch, *weights)
        else:
            penalty, error, entries = self._sparse_gradient(batch.numpy(), step, *weights)
        self._update(rate, correction2)
        self.stack.density[self.i] = entries / b
        return np.array([error + coefficient * penalty, error, entries]) / b

    def _sparse_gradient(self, x: Array, step: int, *weights: np.float32) -> Array:
        """Penalty and squared error summed over x, and entries; the gradient of the latents marked active."""
        sums, begins, penalty = np.zeros((len(self.parts), 3)), self.parts[:, 0].copy(), self.point.penalty
        self.g_bdec[:] = 0
        floor, stops = self._choose(x, step) if self.chosen else (np.float32(0), None)

        def work(part: int) -> int:
            stop = self._encode(x, part, begins[part], floor) if stops is None else stops[part]
            sums[part] += reconstruct(
                x,
                begins[part],
                stop,
                self.flat,
                self.width,
                self.norms,
                self.slopes,
                penalty.scale,
                penalty.p,
                *weights,
                *self._list(part),
                self.residuals,
                self.heads[part],
                self.g_bdec[part : part + 1],
            )
            return stop

        while (begins < self.parts[:, 1]).any():
            begins[:] = list(self._map(work, range(len(self.parts))))
            self._over_slices(
                lambda begin, end: collect(
                    x,
                    self.residuals,
                    self.flat,
                    self.width,
                    self.norms,
                    self.floats,
                    self.ints,
                    self.heads,
                    self.gradient,
                    self.active,
                    begin,
                    end,
                )
            )
        return sum(sums, np.zeros(3))

    def _encode(self, x: Array, part: int, begin: int, floor: np.float32) -> int:
        end = self.parts[part, 1]
        return encode(x, begin, end, self.panels, self.bias, self.weights, self.k, floor, *self._list(part))

    def _list(self, part: int) -> tuple[Array, Array, Array]:
        return self.floats[part], self.ints[part], self.starts[part]

    def _choose(self, x: Array, step: int) -> tuple[np.float32, list[int] | None]:
        """BatchTopK: the number below the smallest contribution kept; and where each part ends, if they are listed.

        The threshold learned for evaluation follows that contribution.
        """
        learned, rate = self.stack.threshold[self.i], 1.0 if step == 0 else THRESHOLD_RATE
        least, stops = np.float32(0), None
        guess = GUESS * np.float32(learned)
        if guess > 0:
            least, stops = self._choose_above(x, guess)
        if stops is None:
            least = self._choose_by_count(x)
        smallest = least
        if least > 0:
            learned.lerp_(torch.tensor(smallest), rate)
        return np.nextafter(least, np.float32(0)), stops

    def _update(self, rate: float, correction2: float) -> None:
        """Clip this SAE's gradient to its own norm and take Adam's step."""
        square = finish(self.gradient, self.g_bdec)
        size = self.width, self.d
        square = sum(
            self._over_slices(lambda begin, end: squares(self.gradient, *size, self.active, begin, end)), square
        )
        factor = clip_factor(square, self.point.training.clip)
        arrays = self.flat, self.gradient, self.first, self.second
        encoder = self.panels, self.bias, self.norms
        self._over_slices(
            lambda begin, end: update(
                *arrays, *size, self.active, self.idle, *encoder, begin, end, factor, rate, correction2
            )
        )
