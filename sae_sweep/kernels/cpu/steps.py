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
    SQUARED,
)
from sae_sweep.kernels.cpu.function_pointers import function_at
from sae_sweep.kernels.cpu.penalty_gradients import SLOPES
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import (
    COLLECTED,
    ENCODER,
    OPTIONS,
    collect,
    count,
    encode,
    place,
    views,
)
from sae_sweep.kernels.cpu.work_queue import END, claim, finish_piece, publish
from sae_sweep.saes.recipes.optimizers import ADAM_EPS, BETA1, BETA2

_jit = numba.njit(**OPTIONS)

_real, _int, _row = numba.float64, numba.int64, numba.float32[::1]
_table, _cube, _flags = _row.copy(ndim=2), _row.copy(ndim=3), numba.uint8[::1]
_bounds, _ints = _int[:, ::1], numba.int32[:, ::1]

# The phases of a step, of which a piece is a part (1, 2), a slice (3, 5) or all there is.
LIST, PLACE, COLLECT, CLIP, UPDATE = 1, 2, 3, 4, 5
# How far steps have come, int64: how many are done, and from which part on entries are collected.
STEP, FIRST_PART, STATE = 0, 1, 2
# Metrics of steps, float64: loss, squared error and L0 summed over the steps; the largest norm of their gradients; how
# many entries an input had in the last step; and what its gradient is multiplied by.
LOSS, ERROR, L0, NORM, DENSITY, FACTOR, METRICS = 0, 1, 2, 3, 4, 5, 6

_reconstruct_at, _finish_gradient_at, _refresh_at, _slopes_at = map(
    function_at, (RECONSTRUCT, FINISH_GRADIENT, REFRESH, SLOPES)
)


@_jit
def find_idle(first, second, width, d, idle):  # type: ignore[no-untyped-def]
    """Mark the latents that have never had a gradient: Adam's moments are 0."""
    m_enc, m_dec, m_benc, _ = views(first, width, d)
    v_enc, v_dec, v_benc, _ = views(second, width, d)
    for latent in range(width):
        moved = m_benc[latent] != 0 or v_benc[latent] != 0
        for i in range(d):
            if moved:
                break
            moved = m_enc[latent, i] != 0 or v_enc[latent, i] != 0 or m_dec[latent, i] != 0 or v_dec[latent, i] != 0
        idle[latent] = not moved


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
def update(flat, gradient, first, second, width, d, active, idle, scales, begin, end):  # type: ignore[no-untyped-def]
    """Adam's step for latents [begin, end), but for their extras, whose gradient is spent. Leaves none active.

    A latent without gradient takes the step that Adam takes at a gradient of 0. An idle one, which has never had any
    (its moments are 0), is passed over: that step would not move it.
    """
    size = width * d
    for latent in range(begin, end):
        if active[latent]:
            idle[latent] = 0
        elif idle[latent]:
            continue
        own = np.int64(active[latent])
        for offset, length in ((latent * d, d), (size + latent * d, d), (2 * size + latent, 1)):
            adam(flat, gradient, first, second, scales, own, offset, offset + length)
        active[latent] = 0
    for at in range(2 * size + width + d, len(gradient), width):
        gradient[at + begin : at + end] = 0


@_jit
def encode_parts(x, begins, stops, parts, chunk, encoder, k, floor, codes, latents, starts):  # type: ignore[no-untyped-def]
    """`encode` for parts [chunk[0], chunk[1]), from begins[part] on; stops [parts] receives how far each got."""
    for part in range(chunk[0], chunk[1]):
        stops[part] = encode(
            x, begins[part], parts[part, 1], encoder, k, floor, codes[part], latents[part], starts[part]
        )


@_jit
def arrange(begins, stops, latents, starts, places, bounds):  # type: ignore[no-untyped-def]
    """Give every listed entry its place."""
    for part in range(len(begins)):
        count(latents[part], starts[part, stops[part] - begins[part]], places[part])
    place(places, bounds)


@_jit
def square(gradient, width, d, active, begin, end):  # type: ignore[no-untyped-def]
    """‖g‖² over the active ones of latents [begin, end)."""
    g_enc, g_dec, g_benc, _ = views(gradient, width, d)
    total = 0.0
    for latent in range(begin, end):
        if active[latent]:
            total += dot(g_enc, latent, g_enc, latent) + dot(g_dec, latent, g_dec, latent)
            total += g_benc[latent] * g_benc[latent]
    return total


@_jit
def square_slices(gradient, width, d, active, slices, squares):  # type: ignore[no-untyped-def]
    """squares [slices]: ‖g‖² of each."""
    for piece in range(len(slices)):
        squares[piece] = square(gradient, width, d, active, slices[piece, 0], slices[piece, 1])


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


@numba.njit(
    numba.void(
        _cube, _real[:, ::1], _int[::1], _int[::1], _real[::1], _row, _row, _row, _row, _table, _int, numba.float32,
        _int, _int, _int, _real[::1], _int, _int, _row, _real, _real, _real, _real, ENCODER,
        _row, _cube, numba.int32[:, :, ::1], _bounds, _table, _ints, _ints, _int[::1], _table, _table, _flags, _flags,
        _bounds, _bounds, _int[::1], _int[::1], _real[:, ::1], _real[::1],
    ),
    **OPTIONS,
)  # fmt: skip
def take_steps(  # type: ignore[no-untyped-def]
    batches, schedule, queue, state, metrics, flat, gradient, first, second, W_dec, k, floor,
    reconstruct_at, finish_gradient_at, refresh_at, own, column, slopes_at, shares, scale, p, clip, dense_above,
    encoder, norms,
    codes, latents, starts, sums, rows, places, bounds, residuals, g_bdec, active, idle,
    parts, slices, begins, stops, totals, squares,
):  # fmt: skip
    """Adam steps of one SAE on batches [steps, b, d], until they end or more than `dense_above` latents fire.

    Any number of threads may be in here with the same arguments: each does the pieces that it claims from `queue`
    (work_queue.py). schedule [steps, 3]: learning rate over the first bias correction, second bias correction,
    coefficient. floor: as of `encode`. reconstruct_at to column: the architecture's functions by address, its own
    numbers, and the column of residuals (architecture_steps.py); W_dec is as that architecture uses it. parts, slices
    [·, 2]: where each begins and ends. state [STATE]: how far the steps have come; metrics [METRICS]: their sums.
    """
    steps, b, d = batches.shape
    width, slopes = len(W_dec), _slopes_at(slopes_at)
    reconstruct, finish_gradient, refresh = (
        _reconstruct_at(reconstruct_at),
        _finish_gradient_at(finish_gradient_at),
        _refresh_at(refresh_at),
    )
    together, biases = max(1, COLLECTED // (d * parts[0, 1])), 2 * width * d + width
    while True:
        kind, piece = claim(queue)
        if kind == END:
            return
        step = state[STEP]
        x, rate, correction2, coefficient = batches[step], schedule[step, 0], schedule[step, 1], schedule[step, 2]
        if kind == LIST:
            stops[piece] = encode(
                x, begins[piece], parts[piece, 1], encoder, k, floor,
                codes[piece], latents[piece], starts[piece],
            )  # fmt: skip
            count(latents[piece], starts[piece, stops[piece] - begins[piece]], places[piece])
            if finish_piece(queue, len(parts)):
                place(places, bounds)
                publish(queue, PLACE, len(parts))
        elif kind == PLACE:
            reconstruct(
                x, begins[piece], stops[piece], flat, W_dec, norms, slopes, shares, scale, p,
                np.float32(2 / b), np.float32(coefficient / b), codes[piece], latents[piece], starts[piece],
                residuals, places[piece], sums, rows, g_bdec[piece : piece + 1], own, totals[piece],
            )  # fmt: skip
            if finish_piece(queue, len(parts)):
                state[FIRST_PART] = 0
                publish(queue, COLLECT, len(slices))
        elif kind == COLLECT:
            begin, end = slices[piece]
            stop = min(state[FIRST_PART] + together, len(parts))
            collect(
                x, residuals, sums, rows, column, bounds, places, gradient, active, begin, end,
                state[FIRST_PART], stop,
            )  # fmt: skip
            full = (stops < parts[:, 1]).any()  # a list was
            if stop == len(parts):
                finish_gradient(
                    flat, W_dec, norms, sums, bounds, gradient, active, (stops - begins).sum(), not full,
                    np.float32(coefficient / b), own, begin, end,
                )  # fmt: skip
                squares[piece] = square(gradient, width, d, active, begin, end)
            if finish_piece(queue, len(slices)):
                if stop < len(parts):
                    state[FIRST_PART] = stop
                    publish(queue, COLLECT, len(slices))
                elif full:
                    begins[:] = stops
                    publish(queue, LIST, len(parts))
                else:
                    publish(queue, CLIP, 1)
        elif kind == CLIP:
            metrics[FACTOR], norm = clip_factor(finish(gradient, biases, g_bdec), squares, clip)
            metrics[NORM] = max(metrics[NORM], norm)
            scales = np.float32(metrics[FACTOR]), np.float32(rate), np.float32(1 / correction2)
            adam(flat, gradient, first, second, scales, 1, biases, len(flat))
            publish(queue, UPDATE, len(slices))
        else:
            scales = np.float32(metrics[FACTOR]), np.float32(rate), np.float32(1 / correction2)
            begin, end = slices[piece]
            update(flat, gradient, first, second, width, d, active, idle, scales, begin, end)
            refresh(flat, W_dec, encoder, norms, idle, own, begin, end)
            if finish_piece(queue, len(slices)):
                accumulate_metrics(totals, b, coefficient, metrics)
                state[STEP] += 1
                begins[:], g_bdec[:], totals[:] = parts[:, 0], 0, 0
                if state[STEP] == steps or metrics[DENSITY] > dense_above:
                    publish(queue, END, 0)
                else:
                    publish(queue, LIST, len(parts))
