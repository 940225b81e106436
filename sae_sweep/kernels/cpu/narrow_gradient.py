"""The gradient of a narrow SAE, a tile of inputs at a time, while the tile's codes are in the cache.

A tile is encoded, decoded and its gradient added up before the next one is looked at. Codes lie latent by latent, and
a word of bits says on which of the tile's inputs a latent fires. Where many fire, decoding and gradients are matrix
products; where few do, they are sums over the bits. Which of the two follows from the SAE's own last step.

A batch is cut into parts, each with a gradient of its own, that threads may share (narrow_step.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from sae_sweep.kernels.cpu.encoder_tile import lowest
from sae_sweep.kernels.cpu.function_pointers import function_at
from sae_sweep.kernels.cpu.narrow_tile import (
    INPUTS,
    add_product,
    encode,
    finish_gains,
    product,
    transpose,
)
from sae_sweep.kernels.cpu.penalty_loops import SLOPES
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import LISTED, OPTIONS, views
from sae_sweep.kernels.cpu.tile_largest import keep_top, mark_top
from sae_sweep.kernels.cpu.tile_rows import add_inputs, add_to_inputs, count_bits, dot_inputs
from sae_sweep.kernels.cpu.vector_loops import SLOPE_CODES, SUM_TERMS, WEIGH_TERMS

_jit = numba.njit(**OPTIONS)

# Latents whose codes of a tile (16 KiB), and as much beside them, the nearest cache holds.
LATENTS = 64
# What is counted of a part: penalty, squared error, codes above 0, and what else the objective has.
PENALTY, SQUARED, FIRED, FURTHER, TOTALS = 0, 1, 2, 3, 4

Array = np.ndarray[Any, Any]

_slopes_at, sum_terms_at, weigh_terms_at, slope_codes_at = map(
    function_at, (SLOPES, SUM_TERMS, WEIGH_TERMS, SLOPE_CODES)
)


class Sae(NamedTuple):
    """An SAE's row of a stack, and what is derived of its parameters.

    flat, first, second [parameter_count]: parameters and Adam's moments; norms [width]: ‖d‖; rows [width, padded]:
    the decoder, its rows filled up with zeros to whole vectors; silent [width]: for how many steps each latent has not
    fired.
    """

    flat: Array
    first: Array
    second: Array
    norms: Array
    rows: Array
    silent: Array


class Setting(NamedTuple):
    """The settings of a step.

    k: latents of an input that stay, 0: all. dense_above: latents of an input above which products are taken. by_input:
    whether the penalty couples the latents of an input. The rest: addresses of the penalty's functions
    (penalty_gradients.py, vector_penalty.py), its scale and exponent, and the norm to which gradients are clipped.
    """

    k: int
    dense_above: float
    by_input: int
    slopes_at: int
    sum_terms_at: int
    weigh_terms_at: int
    slope_codes_at: int
    scale: float
    exponent: float
    clip: float


class Workspace(NamedTuple):
    """Memory of each part: what a tile needs, and the part's gradient; or of one part, without the first dimension.

    cuts [parts, 2]: the inputs of each; fired [parts, width]: which latents fire there. Of a tile: x [INPUTS, padded],
    transposed [padded, INPUTS], what is to be reconstructed and the residual, both ways, codes [width, INPUTS] and
    masks [width], gains and slopes [LATENTS, INPUTS]; of its entries, one for each code above 0, norm-scaled
    activations and slopes [width · INPUTS], and the order by input; ranks and latents [k, INPUTS]. padded is d,
    rounded up to whole vectors.
    """

    x: Array
    transposed: Array
    target: Array
    target_transposed: Array
    residual: Array
    residual_transposed: Array
    codes: Array
    masks: Array
    gains: Array
    slopes: Array
    norm_scaled_acts: Array
    entry_slopes: Array
    order: Array
    ranks: Array
    latents: Array
    g_enc: Array
    g_dec: Array
    g_benc: Array
    g_bdec: Array
    pulls: Array
    fired: Array
    totals: Array
    cuts: Array


@_jit
def refresh(sae):  # type: ignore[no-untyped-def]
    """Bring what is derived of an SAE's parameters up to date."""
    width, d = len(sae.norms), (len(sae.flat) - len(sae.norms)) // (2 * len(sae.norms) + 1)
    _, W_dec, _, _ = views(sae.flat, width, d)
    for latent in range(width):
        sae.norms[latent] = math.sqrt(dot(W_dec, latent, W_dec, latent))
    if sae.rows.shape[1] != d:
        for latent in range(width):
            for i in range(d):
                sae.rows[latent, i] = W_dec[latent, i]


@_jit
def pieces_of(width):  # type: ignore[no-untyped-def]
    """How many pieces of nearly equal size the latents are taken in."""
    return (width + LATENTS - 1) // LATENTS


@_jit
def bounds_of(width, piece):  # type: ignore[no-untyped-def]
    """Begin and end of a piece's latents."""
    pieces = pieces_of(width)
    return width * piece // pieces, width * (piece + 1) // pieces


@_jit
def _encode(sae, setting, tile, valid):  # type: ignore[no-untyped-def]
    """Codes of the tile's inputs and the bits of those above 0; how many these are."""
    width, d = len(sae.norms), (len(sae.flat) - len(sae.norms)) // (2 * len(sae.norms) + 1)
    W_enc, _, b_enc, _ = views(sae.flat, width, d)
    entries = 0
    for piece in range(pieces_of(width)):
        begin, end = bounds_of(width, piece)
        encode(W_enc[begin:end], tile.transposed, b_enc[begin:end], tile.codes[begin:end], tile.masks[begin:end])
        choose_of_piece(tile, sae.norms, setting.k, begin, end)
    choose(tile, sae.norms, setting.k)
    for latent in range(width):
        tile.masks[latent] &= valid
        tile.fired[latent] |= np.uint8(tile.masks[latent] != 0)
        entries += count_bits(tile.masks[latent])
    return entries


@_jit
def choose_of_piece(tile, norms, k, begin, end):  # type: ignore[no-untyped-def]
    """What `choose` needs of latents [begin, end), whose codes are in the nearest cache."""
    if k == 1:
        if begin == 0:
            tile.ranks[:] = 0
        keep_top(tile.codes[begin:end], begin, norms, tile.ranks, tile.latents)


@_jit
def choose(tile, norms, k):  # type: ignore[no-untyped-def]
    """The bits of the codes that are among the k largest of their input, of equal ones the lower latents'; k 0: all."""
    if k == 0:
        return
    if k > 1:
        if not mark_top(tile.codes, norms, k, tile.masks, tile.norm_scaled_acts, tile.order):
            return
        tile.ranks[:] = 0
        keep_top(tile.codes, 0, norms, tile.ranks, tile.latents)
    tile.masks[:] = 0
    for slot in range(k):
        for r in range(INPUTS):
            if tile.ranks[slot, r] > 0:
                tile.masks[tile.latents[slot, r]] |= np.int64(1) << r


@_jit
def silence(codes, masks):  # type: ignore[no-untyped-def]
    """Codes [·, INPUTS] of 0 where no bit is set."""
    for latent in range(len(masks)):
        mask = masks[latent]
        for r in range(INPUTS):
            codes[latent, r] = codes[latent, r] if (mask >> r) & 1 else np.float32(0)


@_jit
def _dense_tile(sae, setting, tile, rows, weights):  # type: ignore[no-untyped-def]
    """Add the gradient over the first `rows` inputs of a tile by products; penalty and squared error of it.

    weights: what an input's error, and its penalty, count in the loss.
    """
    width, padded = sae.rows.shape
    d = (len(sae.flat) - width) // (2 * width + 1)
    _, W_dec, _, b_dec = views(sae.flat, width, d)
    sum_terms, slope_codes = sum_terms_at(setting.sum_terms_at), slope_codes_at(setting.slope_codes_at)
    weigh_terms = weigh_terms_at(setting.weigh_terms_at)
    scale, exponent = np.float32(setting.scale), np.float32(setting.exponent)
    of_error, of_penalty = weights
    terms, of_terms = np.zeros((2, INPUTS), np.float32), np.empty((2, INPUTS), np.float32)
    residual = tile.residual_transposed
    for i in range(d):
        for r in range(INPUTS):
            residual[i, r] = b_dec[0, i] - tile.target_transposed[i, r]
    for piece in range(pieces_of(width)):
        begin, end = bounds_of(width, piece)
        sum_terms(tile.codes[begin:end], sae.norms[begin:end], scale, exponent, terms)
        add_product(W_dec[begin:end].T, tile.codes[begin:end], residual)
    penalty = weigh_terms(terms, setting.scale, setting.exponent, of_terms)
    if rows < INPUTS:
        for i in range(d):
            residual[i, rows:] = 0
    flat = residual.reshape(1, padded * INPUTS)
    error = float(dot(flat, 0, flat, 0))
    for i in range(d):
        for r in range(INPUTS):
            residual[i, r] *= of_error
    transpose(residual, tile.residual)
    zeros = np.zeros(LATENTS, np.float32)
    for piece in range(pieces_of(width)):
        begin, end = bounds_of(width, piece)
        codes, norms = tile.codes[begin:end], sae.norms[begin:end]
        gains, slopes = tile.gains[: end - begin], tile.slopes[: end - begin]
        product(W_dec[begin:end], residual, zeros, gains)
        slope_codes(codes, norms, scale, exponent, of_terms, slopes)
        finish_gains(gains, codes, slopes, norms, of_penalty, tile.g_benc[begin:end], tile.pulls[begin:end])
        add_product(gains, tile.x, tile.g_enc[begin:end])
        add_product(codes, tile.residual, tile.g_dec[begin:end])
    return penalty, error


@_jit
def _sparse_tile(sae, setting, tile, rows, weights):  # type: ignore[no-untyped-def]
    """The same by sums over the codes above 0."""
    width, padded = sae.rows.shape
    d = (len(sae.flat) - width) // (2 * width + 1)
    _, _, _, b_dec = views(sae.flat, width, d)
    of_error, of_penalty = weights
    residual = tile.residual
    for r in range(rows):
        for i in range(d):
            residual[r, i] = b_dec[0, i] - tile.target[r, i]
    for latent in range(width):
        mask = tile.masks[latent]
        if mask:
            add_to_inputs(sae.rows, latent, tile.codes, mask, residual)
    flat = residual[:rows].reshape(1, rows * padded)
    error = float(dot(flat, 0, flat, 0))
    for r in range(rows):
        for i in range(padded):
            residual[r, i] *= of_error
    penalty, entry, gains = penalise_entries(sae, setting, tile), 0, tile.gains
    for latent in range(width):
        mask = tile.masks[latent]
        if mask == 0:
            continue
        gains[0] = 0
        dot_inputs(sae.rows, latent, mask, residual, gains[0])
        norm, bias, pull, rest = sae.norms[latent], np.float32(0), np.float32(0), mask
        while rest:
            r = lowest(rest)
            rest &= rest - 1
            weighted = of_penalty * tile.entry_slopes[entry]
            gain = gains[0, r] + weighted * norm
            gains[0, r], bias, pull = gain, bias + gain, pull + weighted * tile.codes[latent, r]
            entry += 1
        tile.g_benc[latent] += bias
        tile.pulls[latent] += pull
        add_inputs(tile.g_enc, latent, gains, 0, mask, tile.x)
        add_inputs(tile.g_dec, latent, tile.codes, latent, mask, residual)
    return penalty, error


@_jit
def penalise_entries(sae, setting, tile):  # type: ignore[no-untyped-def]
    """The penalty of a tile, and its slope in each entry, in the order of latents and then inputs."""
    if setting.by_input:
        return _penalise_by_input(sae, setting, tile)
    entry = 0
    for latent in range(len(tile.masks)):
        rest, norm = tile.masks[latent], sae.norms[latent]
        while rest:
            r = lowest(rest)
            rest &= rest - 1
            tile.norm_scaled_acts[entry] = tile.codes[latent, r] * norm
            entry += 1
    # Whose the entries are makes no difference: they pass for the codes of a few latents of norm 1.
    rows = (entry + INPUTS - 1) // INPUTS
    tile.norm_scaled_acts[entry : rows * INPUTS] = 0
    codes, slopes = tile.norm_scaled_acts.reshape(-1, INPUTS)[:rows], tile.entry_slopes.reshape(-1, INPUTS)[:rows]
    norms, scale, exponent = np.ones(rows, np.float32), np.float32(setting.scale), np.float32(setting.exponent)
    sum_terms, slope_codes = sum_terms_at(setting.sum_terms_at), slope_codes_at(setting.slope_codes_at)
    weigh_terms = weigh_terms_at(setting.weigh_terms_at)
    terms, of_terms = np.zeros((2, INPUTS), np.float32), np.empty((2, INPUTS), np.float32)
    sum_terms(codes, norms, scale, exponent, terms)
    penalty = weigh_terms(terms, setting.scale, setting.exponent, of_terms)
    slope_codes(codes, norms, scale, exponent, of_terms, slopes)
    return penalty


@_jit
def _penalise_by_input(sae, setting, tile):  # type: ignore[no-untyped-def]
    """The same of a penalty that couples the latents of an input: entries are put into the order of inputs first."""
    slopes = _slopes_at(setting.slopes_at)
    latents, shares = np.empty((0, LISTED), np.int32), np.empty(0, np.float32)
    bounds = np.zeros(INPUTS + 1, np.int64)
    for latent in range(len(tile.masks)):
        rest = tile.masks[latent]
        while rest:
            bounds[lowest(rest) + 1] += 1
            rest &= rest - 1
    for r in range(INPUTS):
        bounds[r + 1] += bounds[r]
    places, entry = bounds[:INPUTS].copy(), 0
    for latent in range(len(tile.masks)):
        rest, norm = tile.masks[latent], sae.norms[latent]
        while rest:
            r = lowest(rest)
            rest &= rest - 1
            tile.norm_scaled_acts[places[r]] = tile.codes[latent, r] * norm
            tile.order[entry] = places[r]
            places[r] += 1
            entry += 1
    # The second half of the memory of slopes, of which each entry then has one.
    by_input = tile.entry_slopes[entry:]
    penalty = slopes(tile.norm_scaled_acts, latents, bounds, shares, setting.scale, setting.exponent, by_input)
    for at in range(entry):
        tile.entry_slopes[at] = by_input[tile.order[at]]
    return penalty


@_jit
def _own_target(targets, first, rows, tile, inputs):  # type: ignore[no-untyped-def]
    """The tile with its inputs, and with what is to be reconstructed of them: `targets` [b, d], or if empty, they."""
    if len(targets) == 0:
        return Workspace(inputs, tile.transposed, inputs, tile.transposed, *tile[4:])
    tile.target[rows:] = 0
    for r in range(rows):
        for i in range(targets.shape[1]):
            tile.target[r, i] = targets[first + r, i]
    transpose(tile.target, tile.target_transposed)
    return Workspace(inputs, *tile[1:])


@_jit
def add_gradient(x, targets, left, sae, setting, tile, weights, dense):  # type: ignore[no-untyped-def]
    """The gradient over the inputs of a part, of x [b, d], in its memory, and its totals.

    targets [b, d]: what is to be reconstructed, if it is not x; left [b, d]: receives what is not. Either may be empty.
    """
    d, padded, cut, totals = x.shape[1], sae.rows.shape[1], tile.cuts, tile.totals
    tile.g_enc[:], tile.g_dec[:], tile.g_benc[:], tile.g_bdec[:], tile.pulls[:] = 0, 0, 0, 0, 0
    totals[:], tile.fired[:] = 0, 0
    for first in range(cut[0], cut[1], INPUTS):
        rows, inputs = min(INPUTS, cut[1] - first), tile.x
        if rows == INPUTS and d == padded:
            inputs = x[first : first + INPUTS]
        else:
            tile.x[rows:] = 0
            for r in range(rows):
                for i in range(d):
                    tile.x[r, i] = x[first + r, i]
        transpose(inputs, tile.transposed)
        own = _own_target(targets, first, rows, tile, inputs)
        valid = np.int64(-1) if rows == INPUTS else (np.int64(1) << rows) - 1
        totals[FIRED] += _encode(sae, setting, own, valid)
        if dense:
            if setting.k or rows < INPUTS:
                silence(own.codes, own.masks)
            penalty, error = _dense_tile(sae, setting, own, rows, weights)
        else:
            penalty, error = _sparse_tile(sae, setting, own, rows, weights)
        totals[PENALTY] += penalty
        totals[SQUARED] += error
        for r in range(rows):
            for i in range(d):
                tile.g_bdec[i] += tile.residual[r, i]
        if len(left):
            for r in range(rows):
                for i in range(d):
                    left[first + r, i] = -tile.residual[r, i] / weights[0]


@_jit
def part_of(work, part):  # type: ignore[no-untyped-def]
    """The memory of one part."""
    return Workspace(
        work.x[part], work.transposed[part], work.target[part], work.target_transposed[part], work.residual[part],
        work.residual_transposed[part], work.codes[part], work.masks[part], work.gains[part], work.slopes[part],
        work.norm_scaled_acts[part], work.entry_slopes[part], work.order[part], work.ranks[part], work.latents[part],
        work.g_enc[part], work.g_dec[part], work.g_benc[part], work.g_bdec[part], work.pulls[part], work.fired[part],
        work.totals[part], work.cuts[part],
    )  # fmt: skip
