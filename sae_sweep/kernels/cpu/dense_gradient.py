"""The gradient of a ReLU SAE by matrix products, some inputs at a time: where much fires they beat lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from sae_sweep.kernels.cpu.sparse_step import LISTED, OPTIONS

# Inputs that are taken at a time: a cache's worth of codes, but enough inputs to be worth a pass over all gradients,
# within 64 MiB.
BUFFER, INPUTS, MOST = 1 << 20, 64, 1 << 24


@numba.njit(**OPTIONS)
def silence(codes, gradient, fired):  # type: ignore[no-untyped-def]
    """No gradient where a code is 0; how many are not, and in fired [width] of which latents one is not.

    codes and gradient [inputs, width]. PyTorch's mask takes longer than its product.
    """
    active = 0
    for row in range(len(codes)):
        for latent in range(len(fired)):
            on = codes[row, latent] != 0
            active += on
            fired[latent] |= on
            gradient[row, latent] = gradient[row, latent] if on else np.float32(0)
    return active


def add_gradient(
    x: Tensor,
    sae: Sequence[Tensor],
    norms: Tensor,
    gradients: Sequence[Tensor],
    penalty: tuple[Callable[..., float], float, float],
    weights: tuple[float, float],
    fired: np.ndarray[Any, Any],
    residuals: Tensor,
) -> tuple[float, ...]:
    """Add the gradient over inputs x [b, d] and return the totals.

    weights of an input, of_error and of_penalty, and totals are those of architecture_steps.py.

    sae and gradients: W_enc, W_dec [width, d], b_enc [width], b_dec [d]. penalty: its slopes, scale and exponent.
    fired uint8 [width] receives a 1 for each latent that fires; residuals [b, d] those of the workspace.
    """
    (W_enc, W_dec, b_enc, b_dec), (g_enc, g_dec, g_benc, g_bdec) = sae, gradients
    (slopes, scale, exponent), (of_error, of_penalty) = penalty, weights
    width, pulls = len(W_dec), torch.zeros(len(W_dec))
    # Whose the entries are matters where they are weighed, which lists are for.
    latents, shares = np.empty((0, LISTED), np.int32), np.empty(0, np.float32)
    value, error, entries = 0.0, 0.0, 0
    together = max(BUFFER // width, min(INPUTS, MOST // width), 1)
    for chunk, of_chunk in zip(x.split(together), residuals.split(together), strict=True):
        codes = torch.addmm(b_enc, chunk, W_enc.T).relu_()
        bounds = np.arange(0, codes.numel() + 1, width)
        slope = torch.empty_like(codes)
        norm_scaled_acts = (codes * norms).numpy().ravel()
        value += slopes(norm_scaled_acts, latents, bounds, shares, scale, exponent, slope.numpy().ravel())
        residual = torch.addmm(b_dec, codes, W_dec).sub_(chunk)
        error += float(residual.square().sum(dtype=torch.float64))
        of_chunk.copy_(residual.mul_(of_error))
        slope *= of_penalty
        pulls += (slope * codes).sum(0)
        g_pre = torch.addcmul(residual @ W_dec.T, slope, norms)
        entries += silence(codes.numpy(), g_pre.numpy(), fired)
        g_enc.addmm_(g_pre.T, chunk)
        g_dec.addmm_(codes.T, residual)
        g_benc += g_pre.sum(0)
        g_bdec += residual.sum(0)
    g_dec.addcmul_((pulls / norms)[:, None], W_dec)
    return value, error, 0.0, entries, entries
