"""JumpReLU: z = max(pre, 0)·H(u), u = max(pre, 0)‖d‖ − θ, whose slope passes straight through the jump.

With H′ = 1/bandwidth where |u| < bandwidth/2, and g = ∂L/∂z as in relu.py, ∂L/∂H = g·max(pre, 0), and coefficient/b
more under penalty l0, which counts H. An entry is listed where H or H′ is not 0. Signatures: architecture_steps.py.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.config.settings import Point
from sae_sweep.kernels.cpu.architecture_steps import (
    ENTRIES,
    FIRED,
    PENALTY,
    SQUARED,
    ArchitectureSteps,
    finishes_gradient,
    penalise,
    reconstructs,
    refreshes,
)
from sae_sweep.kernels.cpu.relu import add_scalars
from sae_sweep.kernels.cpu.rows import add_rows, dot, prefetch
from sae_sweep.kernels.cpu.sparse_step import (
    AHEAD,
    CODE,
    GAIN,
    LATENT,
    OPTIONS,
    OWN,
    ROW,
    SLOPE,
    refresh_latents,
    views,
)

# Places of the numbers in `own`, and the column of its own that an entry has: ∂L/∂u.
BANDWIDTH, COUNTS = 0, 1
GATE_GRADIENT = OWN
# An entry is listed if it exceeds the lower end of its window, or comes within rounding of it; whether it does is
# decided when it is reconstructed. Where the window reaches 0, every entry above 0 is listed: its latent's weight is
# then the largest that the bounds of int8_prefilter.py can still hold.
NEAR, MOST = np.float32(1 - 2**-20), np.float32(1e20)

_jit = numba.njit(**OPTIONS)


@_jit
def _thresholds(flat, width, d):  # type: ignore[no-untyped-def]
    """θ [width] of a flat array."""
    return flat[2 * width * d + width + d :]


@_jit
def _counted(codes, latents, total, norms, thresholds, fired, norm_scaled_acts):  # type: ignore[no-untyped-def]
    """How many entries fire; `fired` [entries, 1] receives their z, `norm_scaled_acts` z‖d‖."""
    count = 0
    for entry in range(total):
        latent = latents[entry, LATENT]
        reach = codes[entry, CODE] * norms[latent]
        fires = reach > thresholds[latent]
        fired[entry, 0] = codes[entry, CODE] if fires else np.float32(0)
        norm_scaled_acts[entry] = reach if fires else np.float32(0)
        count += fires
    return count


@_jit
def _count_penalty(latents, total, inputs, thresholds, fired):  # type: ignore[no-untyped-def]
    """Σ H over so many inputs: of a latent whose threshold is below 0 also where its pre-activation is."""
    penalty = 0.0
    for threshold in thresholds:
        penalty += inputs if threshold < 0 else 0
    for entry in range(total):
        penalty += fired[entry, 0] > 0 and thresholds[latents[entry, LATENT]] >= 0
    return penalty


@numba.njit(reconstructs, **OPTIONS)
def reconstruct(x, part, sae, setting, work, weights):  # type: ignore[no-untyped-def]
    """∂L/∂pre = g·H + ∂L/∂u·‖d‖ with ∂L/∂u = ∂L/∂H·H′; ∂L/∂‖d‖ = (coefficient/b)·penalty′·z + ∂L/∂u·max(pre, 0)."""
    begin, end, (of_error, of_penalty) = work.begins[part], work.stops[part], weights
    codes, latents, starts, places = work.codes[part], work.latents[part], work.starts[part], work.places[part]
    residuals, sums, rows, totals = work.residuals, work.sums, work.rows, work.totals[part]
    W_dec, norms = sae.W_dec, sae.norms
    width, d = W_dec.shape
    _, _, _, b_dec = views(sae.flat, width, d)
    thresholds, bandwidth = _thresholds(sae.flat, width, d), np.float32(sae.own[BANDWIDTH])
    total, bounds = starts[end - begin], starts[: end - begin + 1]
    norm_scaled_acts, slope = np.empty(total, np.float32), np.zeros(total, np.float32)
    fired = np.empty((total, 1), np.float32)
    totals[FIRED] += _counted(codes, latents, total, norms, thresholds, fired, norm_scaled_acts)
    counted = of_penalty if sae.own[COUNTS] else np.float32(0)
    if sae.own[COUNTS]:
        totals[PENALTY] += _count_penalty(latents, total, end - begin, thresholds, fired)
    else:
        totals[PENALTY] += penalise(setting, norm_scaled_acts, latents, bounds, slope)
    error = 0.0
    for row in range(begin, end):
        first, last = bounds[row - begin], bounds[row - begin + 1]
        for entry in range(last, min(total, last + AHEAD)):
            prefetch(W_dec, latents[entry, LATENT])
        for i in range(d):
            residuals[row, i] = b_dec[0, i] - x[row, i]
        add_rows(residuals, row, fired, 0, W_dec, latents, LATENT, (first, last))
        error += dot(residuals, row, residuals, row)
        for i in range(d):
            residuals[row, i] *= of_error
            work.g_bdec[part, i] += residuals[row, i]
        for entry in range(first, last):
            latent, pre, weighted = latents[entry, LATENT], codes[entry, CODE], of_penalty * slope[entry]
            gain, gate_gradient = dot(residuals, row, W_dec, latent) + weighted * norms[latent], np.float32(0)
            if abs(pre * norms[latent] - thresholds[latent]) < bandwidth / 2:
                gate_gradient = (gain * pre + counted) / bandwidth
            at = places[latent]
            places[latent] += 1
            if fired[entry, 0] > 0:
                sae.fired[latent] = 1
            sums[at, CODE] = fired[entry, 0]
            sums[at, GAIN] = (gain if fired[entry, 0] > 0 else np.float32(0)) + gate_gradient * norms[latent]
            sums[at, SLOPE] = weighted * fired[entry, 0] + gate_gradient * pre
            sums[at, GATE_GRADIENT] = gate_gradient
            rows[at, ROW] = row
    totals[SQUARED] += error
    totals[ENTRIES] += total


@numba.njit(finishes_gradient, **OPTIONS)
def finish_gradient(sae, work, inputs, whole, of_penalty, begin, end):  # type: ignore[no-untyped-def]
    """The biases', the thresholds', and what reaches a row through its norm.

    Under l0 the slope of H reaches a threshold so near to 0 from the inputs, too, on which its latent is not listed.
    """
    width, d = sae.W_dec.shape
    thresholds, g_thresholds = _thresholds(sae.flat, width, d), _thresholds(sae.gradient, width, d)
    bandwidth, sums, bounds = np.float32(sae.own[BANDWIDTH]), work.sums, work.bounds
    for latent in range(begin, end):
        first, last = bounds[latent], bounds[latent + 1]
        if sae.own[COUNTS] and abs(thresholds[latent]) < bandwidth / 2:
            g_thresholds[latent] -= (inputs - (last - first)) * (of_penalty / bandwidth)
        bias, pull, gate_gradients = np.float32(0), np.float32(0), np.float32(0)
        for entry in range(first, last):
            bias += sums[entry, GAIN]
            pull += sums[entry, SLOPE]
            gate_gradients += sums[entry, GATE_GRADIENT]
        if first < last:
            add_scalars(sae, latent, bias, pull)
            g_thresholds[latent] -= gate_gradients


@numba.njit(refreshes, **OPTIONS)
def refresh_jumprelu(sae, begin, end):  # type: ignore[no-untyped-def]
    """Norms, the encoder, and weights that make an entry count once it reaches the lower end of its window."""
    W_dec, (width, d) = sae.W_dec, sae.W_dec.shape
    _, _, b_enc, _ = views(sae.flat, width, d)
    thresholds, half = _thresholds(sae.flat, width, d), np.float32(sae.own[BANDWIDTH] / 2)
    weights, still = sae.encoder.weights, sae.idle.copy()
    for latent in range(begin, end):
        lower = thresholds[latent] * NEAR - half / NEAR
        norm = np.float32(math.sqrt(dot(W_dec, latent, W_dec, latent)))
        weight = min(MOST, norm / lower) if lower > 0 else MOST
        # A threshold may move where its latent does not.
        still[latent] = sae.idle[latent] and weight == weights[latent]
        weights[latent] = weight
    refresh_latents(W_dec, b_enc, sae.encoder, sae.norms, still, begin, end)


def _numbers(point: Point) -> list[float]:
    return [point.sae.bandwidth, point.penalty.name == "l0"]


JUMPRELU = ArchitectureSteps(
    reconstruct, finish_gradient, refresh_jumprelu, columns=GATE_GRADIENT + 1, own=_numbers, floor=float(NEAR),
    at_zero=True,
)  # fmt: skip
