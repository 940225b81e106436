"""Gated: z = H(pre)·m, m = max(exp(r_mag)·(pre − b_enc) + b_mag, 0), and pre is the gate.

Signatures are those of architecture_steps.py. An entry is listed where the gate is open. The gate's gradient comes from
the penalty on max(pre, 0)‖d‖, d held, and from its own reconstruction x̂(max(pre, 0)) through the decoder as it stands;
the magnitude's from x̂(z), which no slope of H passes.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.kernels.cpu.architecture_steps import (
    ENTRIES,
    FIRED,
    FURTHER,
    PENALTY,
    SQUARED,
    ArchitectureSteps,
    finishes_gradient,
    penalise,
    reconstructs,
)
from sae_sweep.kernels.cpu.relu import refresh_relu
from sae_sweep.kernels.cpu.rows import add_rows, dot, prefetch
from sae_sweep.kernels.cpu.sparse_step import AHEAD, CODE, GAIN, LATENT, OPTIONS, OWN, ROW, SLOPE, views

# What the loss gains per unit of an entry's gate, and of its magnitude.
GATE, MAGNITUDE = SLOPE, OWN

_jit = numba.njit(**OPTIONS)


@_jit
def _magnitudes(flat, width, d):  # type: ignore[no-untyped-def]
    """r_mag and b_mag [width] of a flat array."""
    extras = flat[2 * width * d + width + d :]
    return extras[:width], extras[width:]


@_jit
def _opened(codes, latents, sae, strengths, norm_scaled_acts):  # type: ignore[no-untyped-def]
    """How many entries have a magnitude above 0.

    strengths [entries, 1] receives z of each entry, norm_scaled_acts [entries] its gate's norm-scaled activation.
    """
    width, d = sae.W_dec.shape
    _, _, b_enc, _ = views(sae.flat, width, d)
    r_mag, b_mag = _magnitudes(sae.flat, width, d)
    count = 0
    for entry in range(len(norm_scaled_acts)):
        latent, pre = latents[entry, LATENT], codes[entry, CODE]
        magnitude = np.float32(math.exp(r_mag[latent])) * (pre - b_enc[latent]) + b_mag[latent]
        strengths[entry, 0] = max(magnitude, np.float32(0))
        norm_scaled_acts[entry] = pre * sae.norms[latent]
        count += strengths[entry, 0] > 0
    return count


@numba.njit(reconstructs, **OPTIONS)
def reconstruct(x, part, sae, setting, work, weights):  # type: ignore[no-untyped-def]
    """∂L/∂m = (2/b)·r·d; ∂L/∂pre = (2/b)·r′·d + (coefficient/b)·penalty′·‖d‖ of the gate, r′ its residual."""
    begin, end, (of_error, of_penalty) = work.begins[part], work.stops[part], weights
    codes, latents, starts, places = work.codes[part], work.latents[part], work.starts[part], work.places[part]
    residuals, sums, rows, totals = work.residuals, work.sums, work.rows, work.totals[part]
    W_dec, norms = sae.W_dec, sae.norms
    width, d = W_dec.shape
    _, _, _, b_dec = views(sae.flat, width, d)
    r_mag, _ = _magnitudes(sae.flat, width, d)
    total, bounds = starts[end - begin], starts[: end - begin + 1]
    norm_scaled_acts, slope = np.empty(total, np.float32), np.empty(total, np.float32)
    strengths, by_gate = np.empty((total, 1), np.float32), np.empty((1, d), np.float32)
    totals[FIRED] += _opened(codes, latents, sae, strengths, norm_scaled_acts)
    totals[PENALTY] += penalise(setting, norm_scaled_acts, latents, bounds, slope)
    error, further = 0.0, 0.0
    for row in range(begin, end):
        first, last = bounds[row - begin], bounds[row - begin + 1]
        for entry in range(last, min(total, last + AHEAD)):
            prefetch(W_dec, latents[entry, LATENT])
        for i in range(d):
            residuals[row, i] = b_dec[0, i] - x[row, i]
            by_gate[0, i] = residuals[row, i]
        add_rows(residuals, row, strengths, 0, W_dec, latents, LATENT, (first, last))
        add_rows(by_gate, 0, codes, CODE, W_dec, latents, LATENT, (first, last))
        error += dot(residuals, row, residuals, row)
        further += dot(by_gate, 0, by_gate, 0)
        for i in range(d):
            residuals[row, i] *= of_error
            by_gate[0, i] *= of_error
            work.g_bdec[part, i] += residuals[row, i]
        for entry in range(first, last):
            latent, strength, gain = latents[entry, LATENT], strengths[entry, 0], np.float32(0)
            gate = dot(by_gate, 0, W_dec, latent) + of_penalty * slope[entry] * norms[latent]
            if strength > 0:
                sae.fired[latent] = 1
                gain = dot(residuals, row, W_dec, latent)
            at = places[latent]
            places[latent] += 1
            sums[at, CODE] = strength
            sums[at, GAIN] = gate + np.float32(math.exp(r_mag[latent])) * gain
            sums[at, GATE] = gate
            sums[at, MAGNITUDE] = gain
            rows[at, ROW] = row
    totals[SQUARED] += error
    totals[FURTHER] += further
    totals[ENTRIES] += total


@numba.njit(finishes_gradient, **OPTIONS)
def finish_gradient(sae, work, inputs, whole, of_penalty, begin, end):  # type: ignore[no-untyped-def]
    """b_enc's, which the gate alone has; r_mag's, exp(r_mag)·(pre − b_enc) = m − b_mag for each gain; b_mag's."""
    (width, d), sums, bounds = sae.W_dec.shape, work.sums, work.bounds
    _, _, g_benc, _ = views(sae.gradient, width, d)
    (_, b_mag), (g_scale, g_bias) = _magnitudes(sae.flat, width, d), _magnitudes(sae.gradient, width, d)
    for latent in range(begin, end):
        for entry in range(bounds[latent], bounds[latent + 1]):
            g_benc[latent] += sums[entry, GATE]
            g_scale[latent] += sums[entry, MAGNITUDE] * (sums[entry, CODE] - b_mag[latent])
            g_bias[latent] += sums[entry, MAGNITUDE]


GATED = ArchitectureSteps(reconstruct, finish_gradient, refresh_relu, columns=MAGNITUDE + 1)
