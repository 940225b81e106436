"""The compiled half of the CPU step: encode, keep what fires, and do all other work on that alone."""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.saes.kernels.slopes import SLOPES
from sae_sweep.saes.kernels.tile import LANES, ROWS, lowest_bit, tile
from sae_sweep.saes.stack import ADAM_EPS, BETA1, BETA2

# Sums may be reordered into vectors and products fused; nothing else of fast-math, so NaN and infinity stay visible.
_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")

_row, _table, _cube = numba.float32[::1], numba.float32[:, ::1], numba.float32[:, :, ::1]


@_jit
def encoder_panels(W_enc, b_enc):  # type: ignore[no-untyped-def]
    """W_enc [width, d] and b_enc [width] as `tile` reads them; latents that fill up the last panel never fire."""
    width, d = W_enc.shape
    count = -(-width // LANES)
    panels, bias = np.zeros((count, d, LANES), np.float32), np.full(count * LANES, -np.inf, np.float32)
    bias[:width] = b_enc
    for latent in range(width):
        panel, lane = latent // LANES, latent % LANES
        for i in range(d):
            panels[panel, i, lane] = W_enc[latent, i]
    return panels, bias


@_jit
def decoder_norms(W_dec):  # type: ignore[no-untyped-def]
    """‖d‖ [width] of W_dec [width, d]."""
    width, d = W_dec.shape
    norms = np.empty(width, np.float32)
    for latent in range(width):
        square = np.float32(0)
        for i in range(d):
            square += W_dec[latent, i] * W_dec[latent, i]
        norms[latent] = math.sqrt(square)
    return norms


@_jit
def keep_largest(latents, codes, norms, count, k):  # type: ignore[no-untyped-def]
    """Move the k entries of largest contribution to the front, of equals the lower latent; how many there are."""
    if count <= k:
        return count
    for place in range(k):
        best, largest = place, codes[place] * norms[latents[place]]
        for entry in range(place + 1, count):
            contribution = codes[entry] * norms[latents[entry]]
            if contribution > largest or (contribution == largest and latents[entry] < latents[best]):
                best, largest = entry, contribution
        latents[place], latents[best] = latents[best], latents[place]
        codes[place], codes[best] = codes[best], codes[place]
    return k


@_jit
def accumulate(  # type: ignore[no-untyped-def]
    x, panels, bias, W_dec, b_dec, norms, k, slopes, scale, p, of_error, of_penalty, g_enc, g_dec, g_benc, g_bdec, pulls
):
    """Add the gradient of inputs x [rows, d] to the g_ arrays; penalty and squared error summed over x, and entries.

    k: the most latents of an input, 0 for all that fire. of_error = 2/batch and of_penalty = coefficient/batch weigh an
    input. pulls [width] receives Σ slope·a/‖d‖: what the penalty adds to the gradient of W_dec, in units of W_dec.
    """
    rows, d = x.shape
    room = len(bias)
    latents, codes = np.empty((ROWS, room), np.int32), np.empty((ROWS, room), np.float32)
    contributions, slope, residual = np.empty(room, np.float32), np.empty(room, np.float32), np.empty(d, np.float32)
    out, masks, counts = np.empty((ROWS, LANES), np.float32), np.empty(ROWS, np.int32), np.empty(ROWS, np.int64)
    bounds = np.zeros(2, np.int64)
    penalty, error, entries = 0.0, 0.0, 0
    for first in range(0, rows, ROWS):
        counts[:] = 0
        for panel in range(len(panels)):
            tile(x, first, panels, panel, bias, out, masks)
            for r in range(ROWS):
                mask = masks[r]
                while mask:
                    lane = lowest_bit(mask)
                    mask &= mask - np.int32(1)
                    latents[r, counts[r]] = panel * LANES + lane
                    codes[r, counts[r]] = out[r, lane]
                    counts[r] += 1
        for r in range(min(ROWS, rows - first)):
            row, count = first + r, counts[r]
            if k:
                count = keep_largest(latents[r], codes[r], norms, count, k)
            for i in range(d):
                residual[i] = b_dec[i] - x[row, i]
            for entry in range(count):
                latent, code = latents[r, entry], codes[r, entry]
                contributions[entry] = code * norms[latent]
                for i in range(d):
                    residual[i] += code * W_dec[latent, i]
            bounds[1] = count
            penalty += slopes(contributions, bounds, scale, p, slope)
            entries += count
            square = np.float32(0)
            for i in range(d):
                square += residual[i] * residual[i]
                residual[i] *= of_error
                g_bdec[i] += residual[i]
            error += square
            for entry in range(count):
                latent, code = latents[r, entry], codes[r, entry]
                weighted = of_penalty * slope[entry]
                g_code = np.float32(0)
                for i in range(d):
                    g_code += residual[i] * W_dec[latent, i]
                    g_dec[latent, i] += code * residual[i]
                g_code += weighted * norms[latent]
                pulls[latent] += weighted * code / norms[latent]
                g_benc[latent] += g_code
                for i in range(d):
                    g_enc[latent, i] += g_code * x[row, i]
    return penalty, error, entries


@_jit
def combine(gradients, pulls, W_dec, begin, end):  # type: ignore[no-untyped-def]
    """Sum the partitions' gradients [parts, count] over [begin, end) into the first, with the penalty's pull.

    Returns the square of the norm of that slice.
    """
    width, d = W_dec.shape
    first = gradients[0]
    for part in range(1, len(gradients)):
        for i in range(begin, end):
            first[i] += gradients[part, i]
    offset = width * d  # W_dec follows W_enc
    for latent in range(max(0, begin - offset) // d, min(width, -(-(end - offset) // d))):
        pull = np.float32(0)
        for part in range(len(pulls)):
            pull += pulls[part, latent]
        low, high = max(0, begin - offset - latent * d), min(d, end - offset - latent * d)
        for i in range(low, high):
            first[offset + latent * d + i] += pull * W_dec[latent, i]
    total = 0.0
    for i in range(begin, end):
        total += first[i] * first[i]
    return total


@_jit
def adam(flat, gradients, first, second, begin, end, clip, rate, correction2):  # type: ignore[no-untyped-def]
    """torch.optim.Adam's update of flat[begin:end]; the gradients are left at zero for the next step.

    clip: factor on the gradient; rate: learning rate over the first bias correction; correction2: the second.
    """
    scale, step, correction = np.float32(clip), np.float32(rate), np.float32(1 / correction2)
    beta1, beta2, epsilon = np.float32(BETA1), np.float32(BETA2), np.float32(ADAM_EPS)
    one = np.float32(1)
    for i in range(begin, end):
        gradient = gradients[0, i] * scale
        first[i] += (one - beta1) * (gradient - first[i])
        second[i] = beta2 * second[i] + (one - beta2) * gradient * gradient
        flat[i] -= step * first[i] / (math.sqrt(second[i] * correction) + epsilon)
    for part in range(len(gradients)):
        gradients[part, begin:end] = 0


_steps_signature = numba.types.UniTuple(numba.float64, 5)(
    _cube, numba.float64[:, ::1], _row, _row, _row, _table, _table, numba.int64, numba.int64, SLOPES,
    numba.float64, numba.float64, numba.float64, numba.float64,
)  # fmt: skip


@numba.njit(_steps_signature, nogil=True, cache=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")
def take_steps(  # type: ignore[no-untyped-def]
    batches, schedule, flat, first, second, gradients, pulls, width, k, slopes, scale, p, clip, dense_above
):
    """Adam steps of one SAE on batches [steps, b, d], until they end or more than `dense_above` latents fire.

    schedule [steps, 3]: learning rate over the first bias correction, second bias correction, coefficient.
    Returns the steps taken, loss, squared error and L0 summed over them, and the last L0.
    """
    steps, b, d = batches.shape
    count = width * d
    W_enc, W_dec = flat[:count].reshape(width, d), flat[count : 2 * count].reshape(width, d)
    b_enc, b_dec = flat[2 * count : 2 * count + width], flat[2 * count + width :]
    gradient = gradients[0]
    g_enc, g_dec = gradient[:count].reshape(width, d), gradient[count : 2 * count].reshape(width, d)
    g_benc, g_bdec = gradient[2 * count : 2 * count + width], gradient[2 * count + width :]
    total_loss, total_error, total_l0, l0 = 0.0, 0.0, 0.0, 0.0
    for step in range(steps):
        rate, correction2, coefficient = schedule[step, 0], schedule[step, 1], schedule[step, 2]
        panels, bias = encoder_panels(W_enc, b_enc)
        norms = decoder_norms(W_dec)
        penalty, error, entries = accumulate(
            batches[step], panels, bias, W_dec, b_dec, norms, k, slopes, scale, p,
            np.float32(2 / b), np.float32(coefficient / b), g_enc, g_dec, g_benc, g_bdec, pulls[0],
        )  # fmt: skip
        norm = math.sqrt(combine(gradients, pulls, W_dec, 0, len(flat)))
        factor = min(1.0, clip / max(norm, 1e-30)) if norm == norm else norm
        adam(flat, gradients, first, second, 0, len(flat), factor, rate, correction2)
        pulls[:] = 0
        l0 = entries / b
        total_loss += (error + coefficient * penalty) / b
        total_error += error / b
        total_l0 += l0
        if l0 > dense_above:
            return step + 1.0, total_loss, total_error, total_l0, l0
    return float(steps), total_loss, total_error, total_l0, l0
