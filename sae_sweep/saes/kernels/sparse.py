"""The compiled half of the CPU step: encode, keep what fires, and do all other work on that alone.

A batch is cut into parts, an SAE's latents into slices; threads may share both. A part encodes its inputs into a list of
entries (one per active latent of an input), reconstructs them, and links the entries of each latent. A slice then
collects the gradient of its latents along those links, so that a gradient is written once and only where there is one.
What a part or a slice computes depends on nothing but its operands.

Shapes: x [b, d]; flat and gradient [2·width·d + width + d]; panels [panels, d, LANES]; bias, norms, weights
[panels · LANES]; floats and ints [parts, capacity, FIELDS] are one memory; starts [parts, rows + 1] bounds a row's
entries; heads [parts, width] is a latent's last entry or −1; residuals [b, d]; active [width].
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.saes.kernels.slopes import SLOPES
from sae_sweep.saes.kernels.tile import LANES, ROWS, axpy, dot, lowest_bit, tile

# Inputs that pass a panel of the encoder while it is in the nearest cache.
GROUP = 8 * ROWS
# An entry: its code, what the loss gains per unit of its code, and of its contribution through the penalty;
# its latent, its input, and the entry of the same latent before it.
CODE, GAIN, SLOPE, LATENT, ROW, BEFORE, FIELDS = 0, 1, 2, 3, 4, 5, 8

# Sums may be reordered into vectors and products fused; nothing else of fast-math, so NaN and infinity stay visible.
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
_jit = numba.njit(**OPTIONS)

_float, _int = numba.float32, numba.int64
_real, _row, _table, _cube = numba.float64, _float[::1], _float[:, ::1], _float[:, :, ::1]
_places, _entries, _heads, _flags = _int[::1], numba.int32[:, ::1], numba.int32[::1], numba.uint8[::1]


@_jit
def views(flat, width, d):  # type: ignore[no-untyped-def]
    """W_enc, W_dec [width, d], b_enc [width], b_dec [1, d] of a flat array."""
    count = width * d
    weights, biases = flat[: 2 * count].reshape(2, width, d), flat[2 * count :]
    return weights[0], weights[1], biases[:width], biases[width:].reshape(1, d)


@_jit
def refresh(flat, width, d, panels, bias, norms, begin, end):  # type: ignore[no-untyped-def]
    """Copy the encoder of latents [begin, end) into the panels that `tile` reads, and take their ‖d‖."""
    W_enc, W_dec, b_enc, _ = views(flat, width, d)
    for latent in range(begin, end):
        panel, lane = latent // LANES, latent % LANES
        bias[latent] = b_enc[latent]
        norms[latent] = math.sqrt(dot(W_dec, latent, W_dec, latent))
        for i in range(d):
            panels[panel, i, lane] = W_enc[latent, i]


@_jit
def keep(latents, codes, ranks, count, k, latent, code, rank):  # type: ignore[no-untyped-def]
    """Enter a latent among the k of largest contribution (`rank`), of equals the lower; the smallest, once there are k.

    Latents come in ascending order, so a newcomer has to exceed the smallest.
    """
    if count < k:
        place = count
    else:
        place = 0
        for entry in range(1, k):
            if ranks[entry] < ranks[place] or (ranks[entry] == ranks[place] and latents[entry] > latents[place]):
                place = entry
    latents[place], codes[place], ranks[place] = latent, code, rank
    if count + 1 < k:
        return np.float32(0)
    smallest = ranks[0]
    for entry in range(1, k):
        smallest = min(smallest, ranks[entry])
    return smallest


@numba.njit(
    _int(_table, _int, _int, _cube, _row, _row, _int, _float, _table, _entries, _places), **OPTIONS
)
def encode(x, begin, end, panels, bias, weights, k, floor, floats, ints, starts):  # type: ignore[no-untyped-def]
    """List the latents of inputs [begin, end) with code · weight > floor, row by row, latents ascending.

    k: only so many of an input, those of the largest code · weight; 0: all. floor ≥ 0.
    Returns the first input that found no room.
    """
    room = k if k else len(bias)
    latents, codes = np.empty((GROUP, room), np.int32), np.empty((GROUP, room), np.float32)
    ranks, floors = np.empty((GROUP, k), np.float32), np.empty(GROUP, np.float32)
    out, masks, counts = np.empty((ROWS, LANES), np.float32), np.empty(ROWS, np.int32), np.empty(GROUP, np.int64)
    count = 0
    starts[0] = 0
    for first in range(begin, end, GROUP):
        floors[:] = floor
        counts[:] = 0
        rows = min(GROUP, end - first)
        for panel in range(len(panels)):
            for block in range(0, rows, ROWS):
                tile(x, first + block, panels, panel, bias, weights, floors, block, out, masks)
                for r in range(ROWS):
                    mask, row = masks[r], block + r
                    while mask:
                        lane = lowest_bit(mask)
                        mask &= mask - np.int32(1)
                        latent, code = panel * LANES + lane, out[r, lane]
                        if k:
                            rank = code * weights[latent]
                            if rank > floors[row]:
                                floors[row] = max(
                                    floor, keep(latents[row], codes[row], ranks[row], counts[row], k, latent, code, rank)
                                )
                                counts[row] = min(counts[row] + 1, k)
                        else:
                            latents[row, counts[row]] = latent
                            codes[row, counts[row]] = code
                            counts[row] += 1
        for row in range(rows):
            if count + counts[row] > len(floats):
                return first + row
            for entry in range(counts[row]):
                floats[count + entry, CODE] = codes[row, entry]
                ints[count + entry, LATENT] = latents[row, entry]
            count += counts[row]
            starts[first + row - begin + 1] = count
    return end


@numba.njit(
    numba.types.UniTuple(_real, 3)(
        _table, _int, _int, _row, _int, _row, SLOPES, _real, _real, _float, _float,
        _table, _entries, _places, _table, _heads, _table,
    ),
    **OPTIONS,
)  # fmt: skip
def reconstruct(  # type: ignore[no-untyped-def]
    x, begin, end, flat, width, norms, slopes, scale, p, of_error, of_penalty,
    floats, ints, starts, residuals, heads, g_bdec,
):  # fmt: skip
    """Complete and link the entries of inputs [begin, end); penalty and squared error summed over them, and entries.

    of_error = 2/batch and of_penalty = coefficient/batch weigh an input. residuals receives of_error · (x̂ − x).
    """
    d = x.shape[1]
    _, W_dec, _, b_dec = views(flat, width, d)
    count, bounds = starts[end - begin], starts[: end - begin + 1]
    contributions, slope = np.empty(count, np.float32), np.empty(count, np.float32)
    for entry in range(count):
        contributions[entry] = floats[entry, CODE] * norms[ints[entry, LATENT]]
    penalty, error = slopes(contributions, bounds, scale, p, slope), 0.0
    for row in range(begin, end):
        for i in range(d):
            residuals[row, i] = b_dec[0, i] - x[row, i]
        for entry in range(bounds[row - begin], bounds[row - begin + 1]):
            axpy(residuals, row, floats[entry, CODE], W_dec, ints[entry, LATENT])
        error += dot(residuals, row, residuals, row)
        for i in range(d):
            residuals[row, i] *= of_error
        axpy(g_bdec, 0, np.float32(1), residuals, row)
        for entry in range(bounds[row - begin], bounds[row - begin + 1]):
            latent, weighted = ints[entry, LATENT], of_penalty * slope[entry]
            floats[entry, GAIN] = dot(residuals, row, W_dec, latent) + weighted * norms[latent]
            floats[entry, SLOPE] = weighted
            ints[entry, ROW], ints[entry, BEFORE] = row, heads[latent]
            heads[latent] = entry
    return penalty, error, float(count)


@_jit
def collect(x, residuals, flat, width, norms, floats, ints, heads, gradient, active, begin, end):  # type: ignore[no-untyped-def]
    """Add the gradient of latents [begin, end) over all listed entries, and clear the links.

    The gradient of a latent counts only where it is marked active; whatever lies there before is overwritten.
    """
    d = x.shape[1]
    _, W_dec, _, _ = views(flat, width, d)
    g_enc, g_dec, g_benc, _ = views(gradient, width, d)
    for latent in range(begin, end):
        bias, pull, found = np.float32(0), np.float32(0), False
        for part in range(len(heads)):
            entry = heads[part, latent]
            if entry < 0:
                continue
            heads[part, latent] = -1
            found = True
            if not active[latent]:
                active[latent] = 1
                g_enc[latent, :] = 0
                g_dec[latent, :] = 0
                g_benc[latent] = 0
            while entry >= 0:
                row, code, gain = ints[part, entry, ROW], floats[part, entry, CODE], floats[part, entry, GAIN]
                axpy(g_enc, latent, gain, x, row)
                axpy(g_dec, latent, code, residuals, row)
                bias += gain
                pull += floats[part, entry, SLOPE] * code
                entry = ints[part, entry, BEFORE]
        if found:
            # d‖d‖/dd = d/‖d‖: what the penalty on a‖d‖ adds.
            axpy(g_dec, latent, pull / norms[latent], W_dec, latent)
            g_benc[latent] += bias
