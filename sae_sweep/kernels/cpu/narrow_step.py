"""Whole steps of a narrow SAE: its gradient (narrow_gradient.py), that of an auxiliary loss, clip, Adam.

A batch is cut into parts, each with a gradient of its own, that threads may share; the parts are added up in order.
What a step computes depends on nothing but the SAE, so neither stack nor threads change a bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from sae_sweep.kernels.cpu.auxiliary import add_fit, find_dead, fit_dead, value
from sae_sweep.kernels.cpu.narrow_gradient import (
    FIRED,
    FURTHER,
    PENALTY,
    SQUARED,
    add_gradient,
    part_of,
    refresh,
)
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import OPTIONS
from sae_sweep.kernels.cpu.steps import DENSITY, ERROR, FACTOR, L0, LOSS, NORM, adam, clip_factor, count_silent
from sae_sweep.kernels.cpu.work_queue import END, claim, finish_piece, publish

_jit = numba.njit(**OPTIONS)

# The phases of a step, of which a piece is a part: its gradient, and that of the auxiliary loss where latents are dead.
GRADIENT, AUXILIARY = 1, 2

Array = np.ndarray[Any, Any]


class Shared(NamedTuple):
    """What the threads of steps share: the queue of pieces; step [1]: how many steps are done; metrics [METRICS]
    (steps.py): their sums."""

    queue: Array
    step: Array
    metrics: Array


@_jit
def join_fired(fired):  # type: ignore[no-untyped-def]
    """In the first part's row which latents fire in any part, of fired [parts, width]."""
    for part in range(1, len(fired)):
        for latent in range(fired.shape[1]):
            fired[0, latent] |= fired[part, latent]


@_jit
def _add_up(sae, work):  # type: ignore[no-untyped-def]
    """The parts' gradients in the first one's memory, with what reaches a decoder row through its norm; ‖g‖²."""
    width, padded = sae.rows.shape
    for part in range(1, len(work.cuts)):
        for latent in range(width):
            for i in range(padded):
                work.g_enc[0, latent, i] += work.g_enc[part, latent, i]
                work.g_dec[0, latent, i] += work.g_dec[part, latent, i]
            work.g_benc[0, latent] += work.g_benc[part, latent]
            work.pulls[0, latent] += work.pulls[part, latent]
        for i in range(padded):
            work.g_bdec[0, i] += work.g_bdec[part, i]
    for latent in range(width):
        # d‖d‖/dd = d/‖d‖: what the penalty on a‖d‖ adds.
        pull = work.pulls[0, latent] / sae.norms[latent] if work.pulls[0, latent] else np.float32(0)
        for i in range(padded):
            work.g_dec[0, latent, i] += pull * sae.rows[latent, i]
    total = 0.0
    g_enc, g_dec = work.g_enc[0].reshape(1, width * padded), work.g_dec[0].reshape(1, width * padded)
    biases = work.g_benc[0].reshape(1, width), work.g_bdec[0].reshape(1, padded)
    total += dot(g_enc, 0, g_enc, 0) + dot(g_dec, 0, g_dec, 0)
    total += dot(biases[0], 0, biases[0], 0) + dot(biases[1], 0, biases[1], 0)
    return total


@_jit
def _update(sae, work, scales):  # type: ignore[no-untyped-def]
    """Adam's step of every parameter."""
    width, padded = sae.rows.shape
    d = (len(sae.flat) - width) // (2 * width + 1)
    # Rows without padding follow each other as one.
    rows, length = (1, width * d) if padded == d else (width, d)
    for side in range(2):
        gradient = (work.g_enc if side == 0 else work.g_dec)[0].reshape(width * padded)
        for row in range(rows):
            begin = side * width * d + row * d
            here = slice(begin, begin + length)
            adam(sae.flat[here], gradient[row * padded :], sae.first[here], sae.second[here], scales, 1, 0, length)
    for begin, gradient in ((2 * width * d, work.g_benc[0]), (2 * width * d + width, work.g_bdec[0])):
        end = min(begin + len(gradient), len(sae.flat))
        here = slice(begin, end)
        adam(sae.flat[here], gradient, sae.first[here], sae.second[here], scales, 1, 0, end - begin)


# Not even fused: loss by loss these are the numbers that Python would sum.
@numba.njit(**(OPTIONS | {"fastmath": False}))
def accumulate_metrics(totals, b, coefficient, metrics):  # type: ignore[no-untyped-def]
    """Add the metrics of a step to `metrics`; totals [parts, TOTALS] are those of its parts."""
    penalty, error, fired, further = 0.0, 0.0, 0.0, 0.0
    for part in range(len(totals)):
        penalty, error = penalty + totals[part, PENALTY], error + totals[part, SQUARED]
        fired, further = fired + totals[part, FIRED], further + totals[part, FURTHER]
    metrics[DENSITY] = fired / b
    metrics[LOSS] += (error + coefficient * penalty + further) / b
    metrics[ERROR] += error / b
    metrics[L0] += fired / b


@_jit
def finish_step(work, silent, loss, steps, shared):  # type: ignore[no-untyped-def]
    """Once the parameters of a step are updated: count silent latents, add up metrics, and publish what comes next.

    loss: over how many inputs it is a mean, and the coefficient of its penalty
    """
    inputs, coefficient = loss
    count_silent(work.fired[0], silent, 0, len(silent))
    accumulate_metrics(work.totals, inputs, coefficient, shared.metrics)
    shared.step[0] += 1
    if shared.step[0] == steps:
        publish(shared.queue, END, 0)
    else:
        publish(shared.queue, GRADIENT, len(work.cuts))


@_jit
def take_narrow_steps(batches, schedule, sae, setting, auxiliary, work, shared):  # type: ignore[no-untyped-def]
    """Adam steps of one SAE on batches [steps, b, d].

    As many threads may be in here as there are, with the same arguments: each does the pieces that it
    claims from the queue (work_queue.py). schedule [steps, 3]: learning rate over the first bias correction, second
    bias correction, coefficient.
    """
    steps, b, _ = batches.shape
    queue, metrics, parts = shared.queue, shared.metrics, len(work.cuts)
    while True:
        kind, part = claim(queue)
        if kind == END:
            return
        now = shared.step[0]
        rate, correction2, coefficient = schedule[now, 0], schedule[now, 1], schedule[now, 2]
        if kind == GRADIENT:
            weights = np.float32(2 / b), np.float32(coefficient / b)
            add_gradient(
                batches[now], auxiliary.left[:0], auxiliary.left, sae, setting, part_of(work, part), weights,
                metrics[DENSITY] > setting.dense_above,
            )  # fmt: skip
        else:
            fit_dead(batches[now], auxiliary, part)
        if not finish_piece(queue, parts):
            continue
        if kind == GRADIENT:
            join_fired(work.fired)
            if find_dead(sae.flat, sae.norms, work.fired[0], sae.silent, auxiliary):
                publish(queue, AUXILIARY, parts)
                continue
        add_fit(auxiliary, work.g_enc[0], work.g_dec[0], work.g_benc[0])
        work.totals[0, FURTHER] = value(auxiliary)
        metrics[FACTOR], norm = clip_factor(_add_up(sae, work), np.empty(0), setting.clip)
        metrics[NORM] = max(metrics[NORM], norm)
        _update(sae, work, (np.float32(metrics[FACTOR]), np.float32(rate), np.float32(1 / correction2)))
        refresh(sae)
        finish_step(work, sae.silent, (b, coefficient), steps, shared)
