"""Adam on the latents that need it, and whole steps of an SAE without Python between them. Shapes as in sparse.py."""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.saes.kernels.slopes import SLOPES
from sae_sweep.saes.kernels.sparse import OPTIONS, collect, count, encode, place, reconstruct, refresh, views
from sae_sweep.saes.kernels.tile import dot
from sae_sweep.saes.stack import ADAM_EPS, BETA1, BETA2

_jit = numba.njit(**OPTIONS)

_real, _int, _row = numba.float64, numba.int64, numba.float32[::1]
_table, _cube, _flags = _row.copy(ndim=2), _row.copy(ndim=3), numba.uint8[::1]
_bounds, _ints = _int[:, ::1], numba.int32[:, ::1]


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
def adam(flat, gradient, first, second, rule, own):  # type: ignore[no-untyped-def]
    """torch.optim.Adam's update of `flat`; `own` 0 stands for a gradient of 0, whatever lies there."""
    clip, step, correction = rule
    beta1, beta2, epsilon = np.float32(BETA1), np.float32(BETA2), np.float32(ADAM_EPS)
    one = np.float32(1)
    for i in range(len(flat)):
        g = gradient[i] * clip if own else np.float32(0)
        first[i] += (one - beta1) * (g - first[i])
        second[i] = beta2 * second[i] + (one - beta2) * g * g
        flat[i] -= step * first[i] / (math.sqrt(second[i] * correction) + epsilon)


@_jit
def update(  # type: ignore[no-untyped-def]
    slices, chunk, flat, gradient, first, second, width, d, active, idle, panels, bias, norms, clip, rate, correction2
):
    """Adam's step for slices [chunk[0], chunk[1]), b_dec with the last.

    Leaves no latent active, and what `encode` reads up to date.

    A latent without gradient takes the step that Adam takes at a gradient of 0. An idle one, which has never had any
    (its moments are 0), is passed over: that step would not move it.
    clip: factor on the gradient; rate: learning rate over the first bias correction; correction2: the second.
    """
    rule = np.float32(clip), np.float32(rate), np.float32(1 / correction2)
    size = width * d
    for latent in range(slices[chunk[0], 0], slices[chunk[1] - 1, 1]):
        if active[latent]:
            idle[latent] = 0
        elif idle[latent]:
            continue
        own = np.int64(active[latent])
        for offset, length in ((latent * d, d), (size + latent * d, d), (2 * size + latent, 1)):
            at = slice(offset, offset + length)
            adam(flat[at], gradient[at], first[at], second[at], rule, own)
        active[latent] = 0
        refresh(flat, width, d, panels, bias, norms, latent, latent + 1)
    if chunk[1] == len(slices):
        at = slice(2 * size + width, len(flat))
        adam(flat[at], gradient[at], first[at], second[at], rule, 1)


@_jit
def encode_parts(x, begins, stops, parts, chunk, panels, bias, weights, k, floor, codes, latents, starts):  # type: ignore[no-untyped-def]
    """`encode` for parts [chunk[0], chunk[1]), from begins[part] on; stops [parts] receives how far each got."""
    for part in range(chunk[0], chunk[1]):
        stops[part] = encode(
            x, begins[part], parts[part, 1], panels, bias, weights, k, floor, codes[part], latents[part], starts[part]
        )


@_jit
def arrange(begins, stops, latents, starts, places, bounds):  # type: ignore[no-untyped-def]
    """Give every listed entry its place."""
    for part in range(len(begins)):
        count(latents[part], starts[part, stops[part] - begins[part]], places, part)
    place(places, bounds)


@numba.njit(
    numba.void(
        _table, _int[::1], _int[::1], numba.types.UniTuple(_int, 2), _row, _int, _row, SLOPES, _real, _real,
        numba.float32, numba.float32, _cube, numba.int32[:, :, ::1], _bounds, _table, _ints, _table, _ints, _table,
        _real[:, ::1],
    ),
    **OPTIONS,
)  # fmt: skip
def reconstruct_parts(  # type: ignore[no-untyped-def]
    x, begins, stops, chunk, flat, width, norms, slopes, scale, p, of_error, of_penalty,
    codes, latents, starts, residuals, places, sums, rows, g_bdec, totals,
):  # fmt: skip
    """`reconstruct` for parts [chunk[0], chunk[1]); totals [parts, 3] grow by penalty, squared error and entries."""
    for part in range(chunk[0], chunk[1]):
        penalty, error, entries = reconstruct(
            x, begins[part], stops[part], flat, width, norms, slopes, scale, p, of_error, of_penalty,
            codes[part], latents[part], starts[part], residuals, places, part, sums, rows, g_bdec[part : part + 1],
        )  # fmt: skip
        totals[part, 0] += penalty
        totals[part, 1] += error
        totals[part, 2] += entries


@_jit
def collect_slices(  # type: ignore[no-untyped-def]
    x, slices, chunk, residuals, flat, width, norms, sums, rows, bounds, places, gradient, active
):
    """`collect` for slices [chunk[0], chunk[1])."""
    for piece in range(chunk[0], chunk[1]):
        begin, end = slices[piece]
        collect(x, residuals, flat, width, norms, sums, rows, bounds, places, gradient, active, begin, end)


@_jit
def square_slices(slices, chunk, gradient, width, d, active, squares):  # type: ignore[no-untyped-def]
    """squares [slices]: ‖g‖² over the active latents of each of [chunk[0], chunk[1])."""
    g_enc, g_dec, g_benc, _ = views(gradient, width, d)
    for piece in range(chunk[0], chunk[1]):
        squares[piece] = 0
        for latent in range(slices[piece, 0], slices[piece, 1]):
            if active[latent]:
                squares[piece] += dot(g_enc, latent, g_enc, latent) + dot(g_dec, latent, g_dec, latent)
                squares[piece] += g_benc[latent] * g_benc[latent]


@_jit
def finish(gradient, g_bdec):  # type: ignore[no-untyped-def]
    """Sum the parts' gradients of b_dec into its place; its ‖g‖²."""
    total = 0.0
    place = len(gradient) - g_bdec.shape[1]
    for i in range(g_bdec.shape[1]):
        value = np.float32(0)
        for part in range(len(g_bdec)):
            value += g_bdec[part, i]
        gradient[place + i] = value
        total += value * value
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


@numba.njit(
    numba.types.UniTuple(_real, 6)(
        _cube, _real[:, ::1], _row, _row, _row, _row, _int, _int, SLOPES, _real, _real, _real, _real,
        _cube, _row, _row, _row, _cube, numba.int32[:, :, ::1], _bounds, _table, _ints, _int[::1], _ints, _table,
        _table, _flags, _flags, _bounds, _bounds,
    ),
    # Not even fused: the same steps with Python between them must give the same bits.
    **(OPTIONS | {"fastmath": False}),
)  # fmt: skip
def take_steps(  # type: ignore[no-untyped-def]
    batches, schedule, flat, gradient, first, second, width, k, slopes, scale, p, clip, dense_above,
    panels, bias, norms, weights, codes, latents, starts, sums, rows, bounds, places, residuals, g_bdec,
    active, idle, parts, slices,
):  # fmt: skip
    """Adam steps of one SAE on batches [steps, b, d], until they end or more than `dense_above` latents fire.

    schedule [steps, 3]: learning rate over the first bias correction, second bias correction, coefficient.
    parts, slices [·, 2]: where each begins and ends. Returns the steps taken, loss, squared error and L0 summed over
    them, the largest norm of their gradients, and the last L0.
    """
    steps, b, d = batches.shape
    every_part, every_slice, squares = (0, len(parts)), (0, len(slices)), np.empty(len(slices))
    total_loss, total_error, total_l0, largest, l0 = 0.0, 0.0, 0.0, 0.0, 0.0
    for step in range(steps):
        rate, correction2, coefficient = schedule[step, 0], schedule[step, 1], schedule[step, 2]
        x, of_error, of_penalty = batches[step], np.float32(2 / b), np.float32(coefficient / b)
        totals = np.zeros((len(parts), 3))
        begins, stops = parts[:, 0].copy(), parts[:, 0].copy()
        g_bdec[:] = 0
        while (begins < parts[:, 1]).any():  # once, unless a list is full
            encode_parts(x, begins, stops, parts, every_part, panels, bias, weights, k, 0, codes, latents, starts)
            arrange(begins, stops, latents, starts, places, bounds)
            reconstruct_parts(
                x, begins, stops, every_part, flat, width, norms, slopes, scale, p, of_error, of_penalty,
                codes, latents, starts, residuals, places, sums, rows, g_bdec, totals,
            )  # fmt: skip
            collect_slices(
                x, slices, every_slice, residuals, flat, width, norms, sums, rows, bounds, places, gradient, active
            )
            begins[:] = stops
        square_slices(slices, every_slice, gradient, width, d, active, squares)
        factor, norm = clip_factor(finish(gradient, g_bdec), squares, clip)
        largest = max(largest, norm)
        update(
            slices, every_slice, flat, gradient, first, second, width, d, active, idle, panels, bias, norms,
            factor, rate, correction2,
        )  # fmt: skip
        penalty, error, entries = 0.0, 0.0, 0.0
        for part in range(len(parts)):
            penalty, error, entries = penalty + totals[part, 0], error + totals[part, 1], entries + totals[part, 2]
        l0 = entries / b
        total_loss += (error + coefficient * penalty) / b
        total_error += error / b
        total_l0 += l0
        if l0 > dense_above:
            return step + 1.0, total_loss, total_error, total_l0, largest, l0
    return float(steps), total_loss, total_error, total_l0, largest, l0
