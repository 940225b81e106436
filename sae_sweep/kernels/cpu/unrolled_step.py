"""Whole steps of an SAE whose encoder is ISTA, LISTA or an MLP: its gradient (unrolled_gradient.py), clip, Adam.

What is trained may be other numbers than are used. Of ISTA, W_enc = exp(log_gain)·W_dec and its bias has W_enc·b_dec
taken off: a gradient g of rows and c of biases, of which g' = g − c·b_decᵀ reaches the rows, adds exp(log_gain)·g' to
that of W_dec, g'·W_enc to that of log_gain, and −Σ c·W_enc to that of b_dec.

Records, parts and threads are as in narrow_step.py.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from sae_sweep.kernels.cpu.narrow_step import finish_step, join_fired
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import OPTIONS, views
from sae_sweep.kernels.cpu.steps import FACTOR, NORM, adam, clip_factor
from sae_sweep.kernels.cpu.unrolled_gradient import add_gradient, part_of
from sae_sweep.kernels.cpu.work_queue import END, claim, finish_piece

_jit = numba.njit(**OPTIONS)


@_jit
def _linear(sae, flat):  # type: ignore[no-untyped-def]
    """W_enc, W_dec, b_enc, b_dec [1, d] of numbers that lie as the parameters do."""
    width, d = len(sae.norms), len(sae.b_dec)
    return views(flat[: 2 * width * d + width + d], width, d)


@_jit
def _own(sae, flat):  # type: ignore[no-untyped-def]
    """Of the same numbers those that encoders have beside: log_gain; or W_hidden, b_hidden and W_out, one by one."""
    width, d = len(sae.norms), len(sae.b_dec)
    return flat[2 * width * d + width + d :]


@_jit
def _hidden_of(sae, flat):  # type: ignore[no-untyped-def]
    """W_hidden [units, d], b_hidden [units] and W_out [width, units] of the same numbers."""
    own, width, d = _own(sae, flat), len(sae.norms), len(sae.b_dec)
    units = len(own) // (width + d + 1)
    rows, rest = own[: units * d].reshape(units, d), own[units * d :]
    return rows, rest[:units], rest[units:].reshape(width, units)


@_jit
def refresh(sae):  # type: ignore[no-untyped-def]
    """Bring what is derived of an SAE's parameters up to date."""
    (width, padded), d = sae.decoder.shape, len(sae.b_dec)
    W_enc, W_dec, b_enc, b_dec = _linear(sae, sae.flat)
    tied = len(sae.gains) > 0
    rows = W_dec if tied else W_enc
    for latent in range(width):
        gain, bias = np.float32(1), b_enc[latent]
        if tied:
            gain = np.float32(math.exp(_own(sae, sae.flat)[latent]))
            sae.gains[latent], bias = gain, bias - gain * dot(W_dec, latent, b_dec, 0)
        sae.norms[latent], sae.biases[latent] = math.sqrt(dot(W_dec, latent, W_dec, latent)), bias
        for i in range(d):
            sae.decoder[latent, i], sae.encoder[latent, i] = W_dec[latent, i], -gain * rows[latent, i]
    if len(sae.hidden):
        W_hidden, b_hidden, W_out = _hidden_of(sae, sae.flat)
        units = len(b_hidden)
        sae.hidden_biases[:units] = b_hidden
        for unit in range(units):
            for i in range(d):
                sae.hidden[unit, i] = -W_hidden[unit, i]
        sae.encoder[:, padded : padded + units] = W_out


@_jit
def _sum_parts(parts):  # type: ignore[no-untyped-def]
    """Add up [parts, …] in the first one's memory."""
    rows = parts.reshape(len(parts), parts.size // len(parts))
    for part in range(1, len(rows)):
        for i in range(rows.shape[1]):
            rows[0, i] += rows[part, i]


@_jit
def _add_up(sae, work):  # type: ignore[no-untyped-def]
    """The gradient of what is trained from the parts' of what is used; ‖g‖²."""
    # Compiled loops go over what is of one type.
    for parts in (work.g_encoder, work.g_decoder, work.g_hidden):
        _sum_parts(parts)
    for parts in (work.g_biases, work.g_bdec, work.pulls, work.g_hidden_biases):
        _sum_parts(parts)
    (width, padded), d, tied = sae.decoder.shape, len(sae.b_dec), len(sae.gains) > 0
    g_encoder, g_biases = work.g_encoder[0], work.g_biases[0]
    g_enc, g_dec, g_benc, g_bdec = _linear(sae, sae.gradient)
    g_benc[:], g_bdec[0] = g_biases, work.g_bdec[0, :d]
    for latent in range(width):
        # d‖d‖/dd = d/‖d‖: what the penalty on a‖d‖ adds.
        pull = work.pulls[0, latent] / sae.norms[latent] if work.pulls[0, latent] else np.float32(0)
        gain, bias = sae.gains[latent] if tied else np.float32(0), g_biases[latent]
        for i in range(d):
            g_dec[latent, i] = work.g_decoder[0, latent, i] + pull * sae.decoder[latent, i]
            if tied:
                g_encoder[latent, i] += bias * sae.b_dec[i]
                g_dec[latent, i] -= gain * g_encoder[latent, i]
                g_bdec[0, i] += bias * sae.encoder[latent, i]
            else:
                g_enc[latent, i] = -g_encoder[latent, i]
        if tied:
            _own(sae, sae.gradient)[latent] = dot(g_encoder, latent, sae.encoder, latent)
    if len(sae.hidden):
        g_rows, g_units, g_out = _hidden_of(sae, sae.gradient)
        g_units[:] = work.g_hidden_biases[0, : len(g_units)]
        for unit in range(len(g_units)):
            for i in range(d):
                g_rows[unit, i] = -work.g_hidden[0, unit, i]
        g_out[:] = g_encoder[:, padded : padded + len(g_units)]
    whole = sae.gradient.reshape(1, len(sae.gradient))
    return float(dot(whole, 0, whole, 0))


@_jit
def take_unrolled_steps(batches, schedule, sae, setting, work, shared):  # type: ignore[no-untyped-def]
    """Adam steps of one SAE on batches [steps, b, d]; the rest is as of `narrow_step.take_narrow_steps`."""
    steps, b, _ = batches.shape
    queue, metrics = shared.queue, shared.metrics
    while True:
        kind, part = claim(queue)
        if kind == END:
            return
        now = shared.step[0]
        rate, correction2, coefficient = schedule[now, 0], schedule[now, 1], schedule[now, 2]
        weights = np.float32(2 / b), np.float32(coefficient / b)
        add_gradient(batches[now], sae, setting, part_of(work, part), weights)
        if finish_piece(queue, len(work.cuts)):
            metrics[FACTOR], norm = clip_factor(_add_up(sae, work), np.empty(0), setting.clip)
            metrics[NORM] = max(metrics[NORM], norm)
            scales = np.float32(metrics[FACTOR]), np.float32(rate), np.float32(1 / correction2)
            adam(sae.flat, sae.gradient, sae.first, sae.second, scales, 1, 0, len(sae.flat))
            refresh(sae)
            join_fired(work.fired)
            finish_step(work, sae.silent, (b, coefficient), steps, shared)
