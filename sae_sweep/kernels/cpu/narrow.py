"""Trains the SAEs of a stack by the step of narrow SAEs (narrow_step.py)."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor

from sae_sweep.kernels.cpu.function_pointers import address_of
from sae_sweep.kernels.cpu.narrow_step import (
    GRADIENT,
    INPUTS,
    LATENTS,
    TOTALS,
    Sae,
    Setting,
    Workspace,
    refresh,
    take_narrow_steps,
)
from sae_sweep.kernels.cpu.penalty_gradients import compile_slopes, penalises
from sae_sweep.kernels.cpu.simd import LANES
from sae_sweep.kernels.cpu.steps import DENSITY, ERROR, L0, LOSS, METRICS, NORM
from sae_sweep.kernels.cpu.vector_penalty import (
    compile_vectors,
    slopes_codes,
    sums_terms,
    vectorises,
    weighs_terms,
)
from sae_sweep.kernels.cpu.work_queue import QUEUE_SIZE, abort_on_error, publish
from sae_sweep.kernels.limits import NARROW_CHOSEN, NARROW_DENSE_ABOVE, NARROW_WIDTH
from sae_sweep.saes.formula import Formula, parse
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes.optimizers import bias_corrections
from sae_sweep.saes.stack import Stack

# One part for so many products of the encoder; each has a gradient of its own.
PART, MOST_PARTS = 1 << 24, 4
# Bytes of batches that all SAEs see before any sees the next: they stay in a cache.
BATCHES = 1 << 22

Array = np.ndarray[Any, Any]


def is_narrow(stack: Stack, i: int) -> bool:
    """Whether SAE i of the stack is trained here."""
    name, point = stack.architecture.name, stack.points[i]
    if stack.width > NARROW_WIDTH or formula_of(point.penalty).weighs:
        return False
    return name == "relu" or (name == "topk" and point.sae.k <= NARROW_CHOSEN)


@functools.cache
def _penalty(formula: Formula) -> dict[str, int]:
    """The fields of Setting that depend on the penalty alone."""
    vectorised = vectorises(formula)
    by_input = not vectorised or formula.coupled
    functions = compile_vectors(formula if vectorised else parse("a"))
    signatures = (sums_terms, weighs_terms, slopes_codes)
    addresses = [address_of(*pair) for pair in zip(functions, signatures, strict=True)]
    return {
        "by_input": int(by_input),
        "slopes_at": address_of(compile_slopes(formula), penalises) if by_input else 0,
        **dict(zip(("sum_terms_at", "weigh_terms_at", "slope_codes_at"), addresses, strict=True)),
    }


class NarrowTrainer:
    """One SAE of a stack, for blocks of steps."""

    def __init__(self, stack: Stack, i: int, work: Workspace) -> None:
        self.stack, self.i, self.work = stack, i, work
        width, d, point = stack.width, stack.d, stack.points[i]
        flat, first, second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        formula = formula_of(point.penalty)
        rows = flat[width * d : 2 * width * d].reshape(width, d)
        if d != padded(d):
            rows = np.zeros((width, padded(d)), np.float32)
        self.sae = Sae(flat, first, second, np.empty(width, np.float32), rows, stack.silent[i].numpy())
        self.setting = Setting(
            k=point.sae.k if stack.architecture.name == "topk" else 0,
            dense_above=NARROW_DENSE_ABOVE * width if vectorises(formula) else np.inf,
            **_penalty(formula),
            scale=float(point.penalty.get("scale", 1.0)),
            exponent=float(stack.exponent[i]),
            clip=float(point.training.clip),
        )
        refresh(self.sae)

    def advance(self, batches: Array, first: int, metrics: Array, share: Any, threads: int) -> None:
        """Steps first, first + 1, … on batches [steps, b, d]; their metrics are added to `metrics`."""
        queue, step, parts = np.zeros(QUEUE_SIZE, np.int64), np.zeros(1, np.int64), len(self.work.cuts)
        arrays = batches, self._schedule(first, len(batches)), self.sae, self.setting, self.work, queue, step, metrics

        def work(_: int) -> None:
            with abort_on_error(queue):
                take_narrow_steps(*arrays)

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


def padded(d: int) -> int:
    """d, rounded up to whole vectors."""
    return -(-d // LANES) * LANES


def workspace(b: int, width: int, d: int, k: int) -> Workspace:
    """Memory for steps on batches of b inputs."""
    parts = min(MOST_PARTS, max(1, b * width * d // PART))
    length = -(-b // (parts * INPUTS)) * INPUTS
    begins = np.arange(0, b, length)
    cuts, side = np.stack([begins, np.minimum(begins + length, b)], axis=1), padded(d)
    parts = len(cuts)

    def zeros(*shape: int, kind: type = np.float32) -> Array:
        return np.zeros((parts, *shape), kind)

    return Workspace(
        cuts=cuts,
        x=zeros(INPUTS, side),
        transposed=zeros(side, INPUTS),
        residual=zeros(INPUTS, side),
        residual_transposed=zeros(side, INPUTS),
        codes=zeros(width, INPUTS),
        masks=zeros(width, kind=np.int64),
        gains=zeros(LATENTS, INPUTS),
        slopes=zeros(LATENTS, INPUTS),
        norm_scaled_acts=zeros(width * INPUTS),
        entry_slopes=zeros(2 * width * INPUTS),
        order=zeros(width * INPUTS, kind=np.int32),
        ranks=zeros(max(k, 1), INPUTS),
        latents=zeros(max(k, 1), INPUTS, kind=np.int32),
        g_enc=zeros(width, side),
        g_dec=zeros(width, side),
        g_benc=zeros(width),
        g_bdec=zeros(side),
        pulls=zeros(width),
        fired=zeros(width, kind=np.uint8),
        totals=zeros(TOTALS, kind=np.float64),
    )


class NarrowStack:
    """All narrow SAEs of a stack: trained side by side, or if there are fewer than threads one after the other."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        self.pool, self.threads = pool, threads
        self.free: dict[tuple[int, ...], list[Workspace]] = {}

    def advance(self, stack: Stack, members: list[int], batches: Tensor) -> list[Array]:
        """Loss, squared error and L0 before each step, summed over the steps, and the largest norm of their
        gradients, for each member."""
        alone = len(members) < self.threads
        across, within = (map, self.pool.map) if alone else (self.pool.map, map)
        threads, (_, b, d) = self.threads if alone else 1, batches.shape
        shape = b, stack.width, d, stack.points[0].sae.k if stack.architecture.name == "topk" else 0
        free = self.free.setdefault(shape, [])
        metrics = np.zeros((len(members), METRICS))
        metrics[:, DENSITY] = stack.density.numpy()[members]
        together = max(1, BATCHES // (4 * b * d))

        def train(at: int) -> None:
            try:
                work = free.pop()
            except IndexError:
                work = workspace(*shape)
            NarrowTrainer(stack, members[at], work).advance(chunk.numpy(), first, metrics[at], within, threads)
            free.append(work)

        first = stack.step
        for chunk in batches.split(together):
            list(across(train, range(len(members))))
            first += len(chunk)
        stack.density[members] = stack.density.new_tensor(metrics[:, DENSITY])
        return list(metrics[:, [LOSS, ERROR, L0, NORM]])
