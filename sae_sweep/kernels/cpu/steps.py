"""Adam on the latents that need it, and whole steps of an SAE without Python between them.

Shapes are those of sparse_step.py.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.kernels.cpu.architecture_steps import (
    ENTRIES,
    FINISH_GRADIENT,
    FIRED,
    FURTHER,
    PENALTY,
    RECONSTRUCT,
    REFRESH,
    SETTING,
    SQUARED,
)
from sae_sweep.kernels.cpu.function_pointers import function_at
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import (
    COLLECTED,
    OPTIONS,
    SAE,
    WORKSPACE,
    collect,
    count,
    encode,
    place,
    views,
)
from sae_sweep.kernels.cpu.work_queue import END, claim, finish_piece, publish
from sae_sweep.saes.recipes.optimizers import ADAM_EPS, BETA1, BETA2

_jit = numba.njit(**OPTIONS)

_real, _int, _cube = numba.float64, numba.int64, numba.float32[:, :, ::1]

# The phases of a step, of which a piece is a part (1, 2), a slice (3, 5) or all there is.
LIST, PLACE, COLLECT, CLIP, UPDATE = 1, 2, 3, 4, 5
# How far steps have come, int64: how many are done, and from which part on entries are collected.
STEP, FIRST_PART, STATE = 0, 1, 2
# Metrics of steps, float64: loss, squared error and L0 summed over the steps; the largest norm of their gradients; how
# many entries an input had in the last step; and what its gradient is multiplied by.
LOSS, ERROR, L0, NORM, DENSITY, FACTOR, METRICS = 0, 1, 2, 3, 4, 5, 6

_reconstruct_at, _finish_gradient_at, _refresh_at = map(function_at, (RECONSTRUCT, FINISH_GRADIENT, REFRESH))


@_jit
def find_idle(sae):  # type: ignore[no-untyped-def]
    """Mark the latents that have never had a gradient: Adam's moments are 0."""
    width, d = sae.W_dec.shape
    m_enc, m_dec, m_benc, _ = views(sae.first, width, d)
    v_enc, v_dec, v_benc, _ = views(sae.second, width, d)
    for latent in range(width):
        moved = m_benc[latent] != 0 or v_benc[latent] != 0
        for i in range(d):
            if moved:
                break
            moved = m_enc[latent, i] != 0 or v_enc[latent, i] != 0 or m_dec[latent, i] != 0 or v_dec[latent, i] != 0
        sae.idle[latent] = not moved


@_jit
def adam(flat, gradient, first, second, scales, own, begin, end):  # type: ignore[no-untyped-def]
    """torch.optim.Adam's update of flat[begin:end]; `own` 0 stands for a gradient of 0, whatever lies there."""
    clip, step, correction = scales
    beta1, beta2, epsilon = np.float32(BETA1), np.float32(BETA2), np.float32(ADAM_EPS)
    one = np.float32(1)
    for i in range(begin, end):
        g = gradient[i] * clip if own else np.float32(0)
        first[i] += (one - beta1) * (g - first[i])
        second[i] = beta2 * second[i] + (one - beta2) * g * g
        flat[i] -= step * first[i] / (math.sqrt(second[i] * correction) + epsilon)


@_jit
def count_silent(fired, silent, begin, end):  # type: ignore[no-untyped-def]
    """Count for how many steps latents [begin, end) have not fired, and forget which did in this one."""
    for latent in range(begin, end):
        silent[latent] = 0 if fired[latent] else silent[latent] + 1
        fired[latent] = 0


@_jit
def update(sae, scales, begin, end):  # type: ignore[no-untyped-def]
    """Adam's step for latents [begin, end), but for their extras, whose gradient is spent. Leaves none active.

    A latent without gradient takes the step that Adam takes at a gradient of 0. An idle one, which has never had any
    (its moments are 0), is passed over: that step would not move it.
    """
    width, d = sae.W_dec.shape
    size = width * d
    for latent in range(begin, end):
        if sae.active[latent]:
            sae.idle[latent] = 0
        elif sae.idle[latent]:
            continue
        own = np.int64(sae.active[latent])
        for offset, length in ((latent * d, d), (size + latent * d, d), (2 * size + latent, 1)):
            adam(sae.flat, sae.gradient, sae.first, sae.second, scales, own, offset, offset + length)
        sae.active[latent] = 0
    for at in range(2 * size + width + d, len(sae.gradient), width):
        sae.gradient[at + begin : at + end] = 0


@_jit
def encode_part(x, part, encoder, work):  # type: ignore[no-untyped-def]
    """`encode` for a part, from where it begins on; the workspace receives how far it got."""
    work.stops[part] = encode(
        x, work.begins[part], work.parts[part, 1], encoder, work.codes[part], work.latents[part], work.starts[part]
    )


@_jit
def encode_parts(x, chunk, encoder, work):  # type: ignore[no-untyped-def]
    """The same for parts [chunk[0], chunk[1])."""
    for part in range(chunk[0], chunk[1]):
        encode_part(x, part, encoder, work)


@_jit
def count_part(part, work):  # type: ignore[no-untyped-def]
    """Count the entries of a part's list by latent."""
    count(work.latents[part], work.starts[part, work.stops[part] - work.begins[part]], work.places[part])


@_jit
def arrange(work):  # type: ignore[no-untyped-def]
    """Give every listed entry its place."""
    for part in range(len(work.begins)):
        count_part(part, work)
    place(work.places, work.bounds)


@_jit
def square(sae, begin, end):  # type: ignore[no-untyped-def]
    """‖g‖² over the active ones of latents [begin, end)."""
    g_enc, g_dec, g_benc, _ = views(sae.gradient, *sae.W_dec.shape)
    total = 0.0
    for latent in range(begin, end):
        if sae.active[latent]:
            total += dot(g_enc, latent, g_enc, latent) + dot(g_dec, latent, g_dec, latent)
            total += g_benc[latent] * g_benc[latent]
    return total


@_jit
def square_slices(sae, work):  # type: ignore[no-untyped-def]
    """‖g‖² of each slice."""
    for piece in range(len(work.slices)):
        work.squares[piece] = square(sae, work.slices[piece, 0], work.slices[piece, 1])


@_jit
def finish(gradient, place, g_bdec):  # type: ignore[no-untyped-def]
    """Sum the parts' gradients of b_dec into its place, behind which lie the extras'; ‖g‖² of both."""
    total = 0.0
    for i in range(g_bdec.shape[1]):
        value = np.float32(0)
        for part in range(len(g_bdec)):
            value += g_bdec[part, i]
        gradient[place + i] = value
        total += value * value
    for i in range(place + g_bdec.shape[1], len(gradient)):
        total += gradient[i] * gradient[i]
    return total


@_jit
def clip_factor(square, squares, clip):  # type: ignore[no-untyped-def]
    """What scales a gradient whose ‖g‖² is the sum of these down to the norm `clip`, and its norm.

    NaN where the norm is not finite: what is scaled down to nothing stands still, and looks like a trained SAE.
    """
    for value in squares:
        square += value
    norm = math.sqrt(square)
    return min(1.0, clip / max(norm, 1e-30)) if norm < math.inf else math.nan, norm


# Not even fused: loss by loss these are the numbers that Python would sum.
@numba.njit(**(OPTIONS | {"fastmath": False}))
def accumulate_metrics(totals, b, coefficient, metrics):  # type: ignore[no-untyped-def]
    """Add the metrics of a step to `metrics`; totals [parts, TOTALS] are those of its parts."""
    penalty, error, further, fired, entries = 0.0, 0.0, 0.0, 0.0, 0.0
    for part in range(len(totals)):
        penalty, error = penalty + totals[part, PENALTY], error + totals[part, SQUARED]
        further, fired, entries = (
            further + totals[part, FURTHER],
            fired + totals[part, FIRED],
            entries + totals[part, ENTRIES],
        )
    metrics[DENSITY] = entries / b
    metrics[LOSS] += (error + coefficient * penalty + further) / b
    metrics[ERROR] += error / b
    metrics[L0] += fired / b


@numba.njit(numba.void(_cube, _real[:, ::1], SAE, SETTING, WORKSPACE, _int[::1], _int[::1], _real[::1]), **OPTIONS)
def take_steps(batches, schedule, sae, setting, work, queue, state, metrics):  # type: ignore[no-untyped-def]
    """Adam steps of one SAE on batches [steps, b, d], until they end or more latents fire than the setting says.

    Any number of threads may be in here with the same arguments: each does the pieces that it claims from `queue`
    (work_queue.py). schedule [steps, 3]: learning rate over the first bias correction, second bias correction,
    coefficient. state [STATE]: how far the steps have come; metrics [METRICS]: their sums.
    """
    steps, b, d = batches.shape
    parts, slices, width = work.parts, work.slices, len(sae.W_dec)
    reconstruct, finish_gradient, refresh = (
        _reconstruct_at(setting.reconstruct_at),
        _finish_gradient_at(setting.finish_gradient_at),
        _refresh_at(setting.refresh_at),
    )
    together, biases = max(1, COLLECTED // (d * parts[0, 1])), 2 * width * d + width
    while True:
        kind, piece = claim(queue)
        if kind == END:
            return
        step = state[STEP]
        x, rate, correction2, coefficient = batches[step], schedule[step, 0], schedule[step, 1], schedule[step, 2]
        of_penalty = np.float32(coefficient / b)
        if kind == LIST:
            encode_part(x, piece, sae.encoder, work)
            count_part(piece, work)
            if finish_piece(queue, len(parts)):
                place(work.places, work.bounds)
                publish(queue, PLACE, len(parts))
        elif kind == PLACE:
            reconstruct(x, piece, sae, setting, work, (np.float32(2 / b), of_penalty))
            if finish_piece(queue, len(parts)):
                state[FIRST_PART] = 0
                publish(queue, COLLECT, len(slices))
        elif kind == COLLECT:
            begin, end = slices[piece]
            stop = min(state[FIRST_PART] + together, len(parts))
            collect(x, sae, work, setting.residual_column, (begin, end), (state[FIRST_PART], stop))
            full = (work.stops < parts[:, 1]).any()  # a list was
            if stop == len(parts):
                finish_gradient(sae, work, (work.stops - work.begins).sum(), not full, of_penalty, begin, end)
                work.squares[piece] = square(sae, begin, end)
            if finish_piece(queue, len(slices)):
                if stop < len(parts):
                    state[FIRST_PART] = stop
                    publish(queue, COLLECT, len(slices))
                elif full:
                    work.begins[:] = work.stops
                    publish(queue, LIST, len(parts))
                elif setting.unfinished:
                    publish(queue, END, 0)
                else:
                    publish(queue, CLIP, 1)
        elif kind == CLIP:
            square_of_biases = finish(sae.gradient, biases, work.g_bdec)
            metrics[FACTOR], norm = clip_factor(square_of_biases, work.squares, setting.clip)
            metrics[NORM] = max(metrics[NORM], norm)
            scales = np.float32(metrics[FACTOR]), np.float32(rate), np.float32(1 / correction2)
            adam(sae.flat, sae.gradient, sae.first, sae.second, scales, 1, biases, len(sae.flat))
            publish(queue, UPDATE, len(slices))
        else:
            begin, end = slices[piece]
            update(sae, (np.float32(metrics[FACTOR]), np.float32(rate), np.float32(1 / correction2)), begin, end)
            refresh(sae, begin, end)
            count_silent(sae.fired, sae.silent, begin, end)
            if finish_piece(queue, len(slices)):
                accumulate_metrics(work.totals, b, coefficient, metrics)
                state[STEP] += 1
                work.begins[:], work.g_bdec[:], work.totals[:] = parts[:, 0], 0, 0
                if state[STEP] == steps or metrics[DENSITY] > setting.dense_above:
                    publish(queue, END, 0)
                else:
                    publish(queue, LIST, len(parts))
