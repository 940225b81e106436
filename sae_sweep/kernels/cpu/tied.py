"""Tied weights: ReLU whose encoder and decoder are the rows w/‖w‖ of one matrix.

Signatures are those of architecture_steps.py. What reaches a row of either reaches w by what of it is at right angles
to w, over ‖w‖: also the pull of the penalty on the norm of a row, which therefore comes to nothing.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.kernels.cpu.architecture_steps import ArchitectureSteps, finishes_gradient, refreshes
from sae_sweep.kernels.cpu.relu import reconstruct
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import GAIN, OPTIONS, refresh_latents, views

# What F.normalize divides by at least, and then has no slope.
LEAST = np.float32(1e-12)


@numba.njit(finishes_gradient, **OPTIONS)
def finish_gradient(sae, work, inputs, whole, of_penalty, begin, end):  # type: ignore[no-untyped-def]
    """The biases'; and once it is whole, the gradient of both rows as that of the one that is trained."""
    W_dec, (width, d) = sae.W_dec, sae.W_dec.shape
    _, rows, _, _ = views(sae.flat, width, d)
    g_enc, g_dec, g_benc, _ = views(sae.gradient, width, d)
    for latent in range(begin, end):
        for entry in range(work.bounds[latent], work.bounds[latent + 1]):
            g_benc[latent] += work.sums[entry, GAIN]
        if not (whole and sae.active[latent]):
            continue
        norm = np.float32(math.sqrt(dot(rows, latent, rows, latent)))
        for i in range(d):
            g_dec[latent, i] += g_enc[latent, i]
            g_enc[latent, i] = 0
        along = dot(g_dec, latent, W_dec, latent) if norm >= LEAST else np.float32(0)
        for i in range(d):
            g_dec[latent, i] = (g_dec[latent, i] - along * W_dec[latent, i]) / max(norm, LEAST)


@numba.njit(refreshes, **OPTIONS)
def refresh_tied(sae, begin, end):  # type: ignore[no-untyped-def]
    """The rows of unit norm, W_dec, which are the encoder's too; norms, and the encoder."""
    W_dec, (width, d) = sae.W_dec, sae.W_dec.shape
    _, rows, b_enc, _ = views(sae.flat, width, d)
    for latent in range(begin, end):
        if sae.idle[latent]:
            continue
        norm = max(np.float32(math.sqrt(dot(rows, latent, rows, latent))), LEAST)
        for i in range(d):
            W_dec[latent, i] = rows[latent, i] / norm
    refresh_latents(W_dec, b_enc, sae.encoder, sae.norms, sae.idle, begin, end)


TIED = ArchitectureSteps(reconstruct, finish_gradient, refresh_tied, unit=True, dense=True)
