"""Matryoshka: BatchTopK of which the first latents of each nested level reconstruct x too.

A latent adds to its own level and to all wider ones, so its gradient lies along the sum of their residuals. Signatures
are those of architecture_steps.py.
"""

from __future__ import annotations

import numba
import numpy as np

from sae_sweep.config.settings import Point
from sae_sweep.kernels.cpu.architecture_steps import (
    ENTRIES,
    FIRED,
    FURTHER,
    PENALTY,
    SQUARED,
    ArchitectureSteps,
    penalise,
    reconstructs,
)
from sae_sweep.kernels.cpu.relu import finish_gradient, refresh_relu
from sae_sweep.kernels.cpu.rows import add_rows, dot, prefetch
from sae_sweep.kernels.cpu.sparse_step import AHEAD, CODE, GAIN, LATENT, OPTIONS, OWN, ROW, SLOPE, views
from sae_sweep.saes.architectures.matryoshka import prefixes

# The column that says along which residual an entry's gradient lies: an input has one residual for each level.
RESIDUAL = OWN

_jit = numba.njit(**OPTIONS)


@_jit
def _reconstruct_levels(residuals, base, levels, codes, latents, W_dec, first, last):  # type: ignore[no-untyped-def]
    """From x̂ − x of no latent in residuals[base] that of each level, the first latents [first, last) of it below its
    end; the squared error of the last, and of the others."""
    error, further, begin = 0.0, 0.0, first
    for level in range(len(levels)):
        at, end = base + level, begin
        if level:
            residuals[at, :] = residuals[at - 1, :]
        while end < last and latents[end, LATENT] < levels[level]:
            end += 1
        add_rows(residuals, at, codes, CODE, W_dec, latents, LATENT, (begin, end))
        further, error, begin = further + error, dot(residuals, at, residuals, at), end
    return error, further


@numba.njit(reconstructs, **OPTIONS)
def reconstruct(x, part, sae, setting, work, weights):  # type: ignore[no-untyped-def]
    """As of relu.py, with r the sum of the residuals of a latent's levels.

    residuals is [b · levels, d]; own holds the levels' ends.
    """
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
    totals[PENALTY] += penalise(setting, norm_scaled_acts, latents, bounds, slope)
    for row in range(begin, end):
        first, last, base = bounds[row - begin], bounds[row - begin + 1], row * len(sae.own)
        for entry in range(last, min(total, last + AHEAD)):
            prefetch(W_dec, latents[entry, LATENT])
        for i in range(d):
            residuals[base, i] = b_dec[0, i] - x[row, i]
        error, further = _reconstruct_levels(residuals, base, sae.own, codes, latents, W_dec, first, last)
        totals[SQUARED] += error
        totals[FURTHER] += further
        for at in range(base + len(sae.own) - 1, base - 1, -1):
            for i in range(d):
                residuals[at, i] *= of_error
                if at < base + len(sae.own) - 1:
                    residuals[at, i] += residuals[at + 1, i]
        for i in range(d):
            work.g_bdec[part, i] += residuals[base, i]
        residual = base
        for entry in range(first, last):
            latent, weighted = latents[entry, LATENT], of_penalty * slope[entry]
            while latent >= sae.own[residual - base]:
                residual += 1
            at = places[latent]
            places[latent] += 1
            sae.fired[latent] = 1
            sums[at, CODE] = codes[entry, CODE]
            sums[at, GAIN] = dot(residuals, residual, W_dec, latent) + weighted * norms[latent]
            sums[at, SLOPE] = weighted
            rows[at, ROW], rows[at, RESIDUAL] = row, residual
    totals[FIRED] += total
    totals[ENTRIES] += total


def _ends(point: Point) -> list[float]:
    return [float(end) for end in prefixes(point.sae)]


MATRYOSHKA = ArchitectureSteps(
    reconstruct,
    finish_gradient,
    refresh_relu,
    columns=RESIDUAL + 1,
    residual_column=RESIDUAL,
    own=_ends,
    levels=lambda point: len(_ends(point)),
)
