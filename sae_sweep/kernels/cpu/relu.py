"""Codes that are the pre-activations listed: ReLU, TopK, BatchTopK. Signatures as in architecture_steps.py."""

from __future__ import annotations

import dataclasses

import numba
import numpy as np

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
from sae_sweep.kernels.cpu.rows import add_rows, dot, prefetch
from sae_sweep.kernels.cpu.sparse_step import AHEAD, CODE, GAIN, LATENT, OPTIONS, ROW, SLOPE, refresh_latents, views


@numba.njit(reconstructs, **OPTIONS)
def reconstruct(x, part, sae, setting, work, weights):  # type: ignore[no-untyped-def]
    """∂L/∂z = (2/b)·r·d + (coefficient/b)·penalty′(z‖d‖)·‖d‖, and what it is by ‖d‖."""
    begin, end, (of_error, of_penalty) = work.begins[part], work.stops[part], weights
    codes, latents, starts, places = work.codes[part], work.latents[part], work.starts[part], work.places[part]
    residuals, sums, rows, totals = work.residuals, work.sums, work.rows, work.totals[part]
    W_dec, norms = sae.W_dec, sae.norms
    width, d = W_dec.shape
    _, _, _, b_dec = views(sae.flat, width, d)
    total, bounds = starts[end - begin], starts[: end - begin + 1]
    norm_scaled_acts, slope = np.empty(total, np.float32), np.empty(total, np.float32)
    for entry in range(total):
        norm_scaled_acts[entry] = codes[entry, CODE] * norms[latents[entry, LATENT]]
    penalty, error = penalise(setting, norm_scaled_acts, latents, bounds, slope), 0.0
    for row in range(begin, end):
        first, last = bounds[row - begin], bounds[row - begin + 1]
        for entry in range(last, min(total, last + AHEAD)):
            prefetch(W_dec, latents[entry, LATENT])
        for i in range(d):
            residuals[row, i] = b_dec[0, i] - x[row, i]
        add_rows(residuals, row, codes, CODE, W_dec, latents, LATENT, (first, last))
        error += dot(residuals, row, residuals, row)
        for i in range(d):
            residuals[row, i] *= of_error
            work.g_bdec[part, i] += residuals[row, i]
        for entry in range(first, last):
            latent, weighted = latents[entry, LATENT], of_penalty * slope[entry]
            at = places[latent]
            places[latent] += 1
            sae.fired[latent] = 1
            sums[at, CODE] = codes[entry, CODE]
            sums[at, GAIN] = dot(residuals, row, W_dec, latent) + weighted * norms[latent]
            sums[at, SLOPE] = weighted
            rows[at, ROW] = row
    totals[PENALTY] += penalty
    totals[SQUARED] += error
    totals[FIRED] += total
    totals[ENTRIES] += total


@numba.njit(**OPTIONS)
def add_scalars(sae, latent, bias, pull):  # type: ignore[no-untyped-def]
    """Add the gradient of a latent's bias, and to that of its decoder row what the loss gains per unit of its norm."""
    width, d = sae.W_dec.shape
    _, g_dec, g_benc, _ = views(sae.gradient, width, d)
    g_benc[latent] += bias
    # d‖d‖/dd = d/‖d‖, and 0 at 0.
    pull = pull / sae.norms[latent] if sae.norms[latent] > 0 else np.float32(0)
    for i in range(d):
        g_dec[latent, i] += pull * sae.W_dec[latent, i]


@numba.njit(finishes_gradient, **OPTIONS)
def finish_gradient(sae, work, inputs, whole, of_penalty, begin, end):  # type: ignore[no-untyped-def]
    """The biases', and what reaches a row through its norm."""
    sums, bounds = work.sums, work.bounds
    for latent in range(begin, end):
        if bounds[latent] == bounds[latent + 1]:
            continue
        bias, pull = np.float32(0), np.float32(0)
        for entry in range(bounds[latent], bounds[latent + 1]):
            bias += sums[entry, GAIN]
            pull += sums[entry, SLOPE] * sums[entry, CODE]
        add_scalars(sae, latent, bias, pull)


@numba.njit(refreshes, **OPTIONS)
def refresh_relu(sae, begin, end):  # type: ignore[no-untyped-def]
    """Norms and the encoder."""
    _, _, b_enc, _ = views(sae.flat, *sae.W_dec.shape)
    refresh_latents(sae.W_dec, b_enc, sae.encoder, sae.norms, sae.idle, begin, end)


RELU = ArchitectureSteps(reconstruct, finish_gradient, refresh_relu, dense=True)
# Sparse by construction.
CHOSEN = dataclasses.replace(RELU, dense=False)
