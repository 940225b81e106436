"""Trains SAEs of a stack by a compiled step that takes a tile of inputs at a time, side by side or on all threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from sae_sweep.kernels.cpu.narrow_step import GRADIENT, Shared
from sae_sweep.kernels.cpu.narrow_tile import INPUTS
from sae_sweep.kernels.cpu.simd import LANES
from sae_sweep.kernels.cpu.steps import DENSITY, ERROR, L0, LOSS, METRICS, NORM
from sae_sweep.kernels.cpu.work_queue import QUEUE_SIZE, abort_on_error, publish
from sae_sweep.saes.limits import TILE_PARTS
from sae_sweep.saes.recipes.optimizers import bias_corrections
from sae_sweep.saes.stack import Stack

# One part for so many products of the encoder; each has a gradient of its own.
PART = 1 << 24
# Bytes of batches that all SAEs see before any sees the next: they stay in a cache.
BATCHES = 1 << 22

Array = np.ndarray[Any, Any]


def padded(d: int) -> int:
    """d, rounded up to whole vectors."""
    return -(-d // LANES) * LANES


def cut(b: int, products: int) -> Array:
    """Begin and end of the parts of a batch of b inputs whose encoder takes so many products: [parts, 2]."""
    parts = min(TILE_PARTS, max(1, products // PART))
    length = -(-b // (parts * INPUTS)) * INPUTS
    begins = np.arange(0, b, length)
    return np.stack([begins, np.minimum(begins + length, b)], axis=1)


class TileTrainer(ABC):
    """One SAE of a stack, for blocks of steps that are compiled, each a tile of inputs at a time.

    `arguments` are what `take_steps` has between the schedule and what threads share; `workspace` makes what it needs
    beside the SAE.
    """

    take_steps: Callable[..., None]
    arguments: tuple[Any, ...]

    def __init__(self, stack: Stack, i: int, work: Any) -> None:
        self.stack, self.i, self.work = stack, i, work

    @classmethod
    @abstractmethod
    def workspace(cls, stack: Stack, b: int) -> Any:
        """Memory for steps of an SAE of the stack on batches of b inputs."""

    def advance(self, batches: Array, first: int, metrics: Array, share: Any, threads: int) -> None:
        """Steps first, first + 1, … on batches [steps, b, d]; their metrics are added to `metrics`."""
        queue, parts = np.zeros(QUEUE_SIZE, np.int64), len(self.work.cuts)
        shared = Shared(queue, np.zeros(1, np.int64), metrics)
        arrays = batches, self._schedule(first, len(batches)), *self.arguments, self.work, shared

        def work(_: int) -> None:
            with abort_on_error(queue):
                self.take_steps(*arrays)

        publish(queue, GRADIENT, parts)
        with abort_on_error(queue):
            list(share(work, range(min(threads, parts))))

    def _schedule(self, first: int, steps: int) -> Array:
        """[steps, 3]: learning rate over Adam's first bias correction, the second correction, and the coefficient."""
        rows, rescale = np.empty((steps, 3)), float(self.stack.rescale[self.i])
        for at, step in enumerate(range(first, first + steps)):
            rate, coefficient = self.stack.schedule(self.i, step)
            correction1, correction2 = bias_corrections(step)
            rows[at] = rate / correction1, correction2, coefficient * rescale
        return rows


class TileStack:
    """SAEs of a stack that a trainer takes: side by side, or if there are fewer than threads one after the other."""

    def __init__(self, trainer: type[TileTrainer], pool: ThreadPoolExecutor, threads: int) -> None:
        self.trainer, self.pool, self.threads = trainer, pool, threads
        self.free: dict[tuple[Any, ...], list[Any]] = {}

    def advance(self, stack: Stack, members: list[int], batches: Tensor) -> list[Array]:
        """Loss, squared error and L0 before each step, summed over the steps, and the largest norm of their
        gradients, for each member."""
        alone = len(members) < self.threads
        across, within = (map, self.pool.map) if alone else (self.pool.map, map)
        threads, (_, b, d) = self.threads if alone else 1, batches.shape
        point = stack.points[0]
        key = b, d, point.encoder, point.sae, point.training
        # Where k is annealed each block has another: what the one before held is of no use.
        if key not in self.free:
            self.free = {key: []}
        free = self.free[key]
        metrics = np.zeros((len(members), METRICS))
        metrics[:, DENSITY] = stack.density.numpy()[members]
        together = max(1, BATCHES // (4 * b * d))

        def train(at: int) -> None:
            try:
                work = free.pop()
            except IndexError:
                work = self.trainer.workspace(stack, b)
            self.trainer(stack, members[at], work).advance(chunk.numpy(), first, metrics[at], within, threads)
            free.append(work)

        first = stack.step
        for chunk in batches.split(together):
            list(across(train, range(len(members))))
            first += len(chunk)
        stack.density[members] = stack.density.new_tensor(metrics[:, DENSITY])
        return list(metrics[:, [LOSS, ERROR, L0, NORM]])
