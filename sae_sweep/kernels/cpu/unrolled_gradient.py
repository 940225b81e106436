"""The gradient of an SAE whose encoder is ISTA, LISTA or an MLP (saes/encoders), a tile of inputs at a time.

With A = −W_enc and s = z·W_dec − x, of z = 0 first, each step of ISTA is z ← f(z + A·s + b): what the codes so far
reconstruct too much is taken off. Going back, with g the gradient of what f was given and h that of s: the last step
has h = ∂L/∂s and of z what the penalty gains; each step has g = (what z gains + W_dec·h) where z > 0, adds g·sᵀ to the
gradient of A and z·hᵀ to that of W_dec, and hands on h = Aᵀ·g and, of z, g to the one before.

An MLP has one step, which reads s = (−x, hidden units) by A = (−W_enc, W_out); what h is of the units goes on to their
rows.

Codes and bits lie as in narrow_gradient.py, those of every step beside each other. Where many latents fire on a tile in
a step, that step is decoded and its gradient taken by products, elsewhere by sums over the bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from sae_sweep.kernels.cpu.encoder_tile import lowest
from sae_sweep.kernels.cpu.narrow_gradient import (
    FIRED,
    PENALTY,
    SQUARED,
    bounds_of,
    choose,
    choose_of_piece,
    penalise_entries,
    pieces_of,
    silence,
    slope_codes_at,
    sum_terms_at,
    weigh_terms_at,
)
from sae_sweep.kernels.cpu.narrow_tile import (
    INPUTS,
    add_product,
    correct,
    encode,
    finish_gains,
    transpose,
)
from sae_sweep.kernels.cpu.rows import dot
from sae_sweep.kernels.cpu.sparse_step import OPTIONS
from sae_sweep.kernels.cpu.tile_rows import add_inputs, add_to_inputs, count_bits, dot_inputs

_jit = numba.njit(**OPTIONS)

Array = np.ndarray[Any, Any]


class Sae(NamedTuple):
    """An SAE's row of a stack, and what is derived of its parameters.

    flat, first, second, gradient [parameter_count]: parameters, Adam's moments and the gradient. As they are used, rows
    filled up with zeros to whole vectors: encoder [width, reach], A, and decoder [width, padded]; biases and norms ‖d‖
    [width]; hidden [units, padded], −W_hidden, and hidden_biases [units] (units are 0 but of an MLP, reach is padded +
    units); gains [width] of rows tied to the decoder's, or [0]. b_dec [d]; silent [width]: for how many steps each
    latent has not fired.
    """

    flat: Array
    first: Array
    second: Array
    gradient: Array
    encoder: Array
    decoder: Array
    biases: Array
    norms: Array
    hidden: Array
    hidden_biases: Array
    gains: Array
    b_dec: Array
    silent: Array


class Workspace(NamedTuple):
    """Memory of each part: what a tile needs, and the part's gradient; or of one part, without the first dimension.

    cuts [parts, 2]: the inputs of each; fired [parts, width]: which latents fire there. Of a tile, for each of the
    steps: over [steps, INPUTS, reach], s; codes [steps, width, INPUTS] and masks [steps, width]; by_products [steps]:
    whether the step's gradient is. residual [INPUTS, padded]; g_over [2, INPUTS, reach], h of a step and of the one
    before; transposed [reach, INPUTS] and decoded [padded, INPUTS], either the other way round; g_codes [width,
    INPUTS], g; slopes [LATENTS, INPUTS] and unused [width]; units [2, units, INPUTS], hidden units and their gradient;
    what narrow_gradient.py has of entries and of the largest of an input. Then the gradient, of what is used.
    """

    over: Array
    codes: Array
    masks: Array
    by_products: Array
    residual: Array
    g_over: Array
    transposed: Array
    decoded: Array
    g_codes: Array
    slopes: Array
    unused: Array
    units: Array
    unit_masks: Array
    norm_scaled_acts: Array
    entry_slopes: Array
    order: Array
    ranks: Array
    latents: Array
    g_encoder: Array
    g_decoder: Array
    g_biases: Array
    g_bdec: Array
    g_hidden: Array
    g_hidden_biases: Array
    pulls: Array
    fired: Array
    totals: Array
    cuts: Array


class Step(NamedTuple):
    """What a tile has of one step, and what choosing and penalising codes take."""

    codes: Array
    masks: Array
    ranks: Array
    latents: Array
    norm_scaled_acts: Array
    entry_slopes: Array
    order: Array


@_jit
def _step_of(tile, step):  # type: ignore[no-untyped-def]
    return Step(
        tile.codes[step], tile.masks[step], tile.ranks, tile.latents, tile.norm_scaled_acts, tile.entry_slopes,
        tile.order,
    )  # fmt: skip


@_jit
def _encode(sae, setting, tile, step, valid):  # type: ignore[no-untyped-def]
    """Codes of a step, 0 where no bit is set; how many are not."""
    now, width, entries = _step_of(tile, step), len(sae.norms), 0
    transpose(tile.over[step], tile.transposed)
    for piece in range(pieces_of(width)):
        begin, end = bounds_of(width, piece)
        rows, biases = sae.encoder[begin:end], sae.biases[begin:end]
        codes, masks = now.codes[begin:end], now.masks[begin:end]
        if step == 0:
            encode(rows, tile.transposed, biases, codes, masks)
        else:
            correct(rows, tile.transposed, biases, tile.codes[step - 1, begin:end], codes, masks)
        choose_of_piece(now, sae.norms, setting.k, begin, end)
    choose(now, sae.norms, setting.k)
    for latent in range(width):
        now.masks[latent] &= valid
        entries += count_bits(now.masks[latent])
    if setting.k or valid != -1:
        silence(now.codes, now.masks)
    return entries


@_jit
def _decode(sae, tile, step, into):  # type: ignore[no-untyped-def]
    """Add z·W_dec of a step's codes to `into` [INPUTS, padded]."""
    codes, masks, width = tile.codes[step], tile.masks[step], len(sae.norms)
    if tile.by_products[step]:
        transpose(into, tile.decoded)
        for piece in range(pieces_of(width)):
            begin, end = bounds_of(width, piece)
            add_product(sae.decoder[begin:end].T, codes[begin:end], tile.decoded)
        transpose(tile.decoded, into)
        return
    for latent in range(width):
        if masks[latent]:
            add_to_inputs(sae.decoder, latent, codes, masks[latent], into)


@_jit
def _infer(sae, setting, tile, rows, valid):  # type: ignore[no-untyped-def]
    """All steps; x̂ − x of the first `rows` inputs in `residual`. How many codes of the last are not 0."""
    last, padded, entries = len(tile.codes) - 1, sae.decoder.shape[1], 0
    for step in range(last + 1):
        entries = _encode(sae, setting, tile, step, valid)
        tile.by_products[step] = entries > setting.dense_above * rows
        into = tile.residual if step == last else tile.over[step + 1]
        into[:] = tile.over[0, :, :padded]
        _decode(sae, tile, step, into)
    for r in range(rows):
        for i in range(len(sae.b_dec)):
            tile.residual[r, i] += sae.b_dec[i]
    tile.residual[rows:] = 0
    for latent in range(len(sae.norms)):
        tile.fired[latent] |= np.uint8(tile.masks[last, latent] != 0)
    return entries


@_jit
def _penalise(sae, setting, tile, of_penalty):  # type: ignore[no-untyped-def]
    """What the penalty alone gains by the last step's codes, in `g_codes`, and by norms; the penalty."""
    last, width = len(tile.codes) - 1, len(sae.norms)
    now = _step_of(tile, last)
    if tile.by_products[last]:
        return _penalise_all(sae, setting, tile, now, of_penalty)
    penalty, entry = penalise_entries(sae, setting, now), 0
    for latent in range(width):
        rest, norm = now.masks[latent], sae.norms[latent]
        while rest:
            r = lowest(rest)
            rest &= rest - 1
            weighted = of_penalty * now.entry_slopes[entry]
            tile.g_codes[latent, r] = weighted * norm
            tile.pulls[latent] += weighted * now.codes[latent, r]
            entry += 1
    return penalty


@_jit
def _penalise_all(sae, setting, tile, now, of_penalty):  # type: ignore[no-untyped-def]
    """The same in vectors, for all codes."""
    width, scale, exponent = len(sae.norms), np.float32(setting.scale), np.float32(setting.exponent)
    sum_terms, slope_codes = sum_terms_at(setting.sum_terms_at), slope_codes_at(setting.slope_codes_at)
    terms, of_terms = np.zeros((2, INPUTS), np.float32), np.empty((2, INPUTS), np.float32)
    sum_terms(now.codes, sae.norms, scale, exponent, terms)
    penalty = weigh_terms_at(setting.weigh_terms_at)(terms, setting.scale, setting.exponent, of_terms)
    for piece in range(pieces_of(width)):
        begin, end = bounds_of(width, piece)
        codes, norms, g_codes = now.codes[begin:end], sae.norms[begin:end], tile.g_codes[begin:end]
        slopes = tile.slopes[: end - begin]
        slope_codes(codes, norms, scale, exponent, of_terms, slopes)
        g_codes[:] = 0
        finish_gains(g_codes, codes, slopes, norms, of_penalty, tile.unused, tile.pulls[begin:end])
    return penalty


@_jit
def _go_back(sae, tile):  # type: ignore[no-untyped-def]
    """Add the gradient of a tile whose `residual` is ∂L/∂s of the last step; h of the inputs in g_over[0]."""
    last, padded = len(tile.codes) - 1, sae.decoder.shape[1]
    later = last
    for step in range(last, -1, -1):
        here = tile.residual if step == last else tile.g_over[(step + 1) & 1]
        # Nothing asks for h of what is given.
        goes_on, there = step > 0 or len(sae.hidden) > 0, tile.g_over[step & 1]
        there[:] = 0
        if tile.by_products[step]:
            if not tile.by_products[later]:
                silence(tile.g_codes, tile.masks[later])
            _back_by_products(sae, tile, step, here, there, goes_on)
        else:
            _back_by_bits(sae, tile, step, tile.masks[later], here, there, goes_on)
        later = step
    for r in range(INPUTS):
        for i in range(padded):
            tile.g_bdec[i] += tile.residual[r, i]


@_jit
def _back_by_products(sae, tile, step, here, there, goes_on):  # type: ignore[no-untyped-def]
    """A step back; g_codes holds what the codes gain beside, 0 where the later step has no bit."""
    width = len(sae.norms)
    transpose(here, tile.decoded)
    tile.transposed[:] = 0
    for piece in range(pieces_of(width)):
        begin, end = bounds_of(width, piece)
        codes, g_codes = tile.codes[step, begin:end], tile.g_codes[begin:end]
        add_product(sae.decoder[begin:end], tile.decoded, g_codes)
        finish_gains(g_codes, codes, codes, sae.norms, np.float32(0), tile.g_biases[begin:end], tile.unused)
        add_product(g_codes, tile.over[step], tile.g_encoder[begin:end])
        add_product(codes, here, tile.g_decoder[begin:end])
        if goes_on:
            add_product(sae.encoder[begin:end].T, g_codes, tile.transposed)
    if goes_on:
        transpose(tile.transposed, there)


@_jit
def _back_by_bits(sae, tile, step, later, here, there, goes_on):  # type: ignore[no-untyped-def]
    """The same by sums over the codes above 0; of g_codes only what has a bit of `later` counts."""
    codes, over, g_codes = tile.codes[step], tile.over[step], tile.g_codes
    for latent in range(len(sae.norms)):
        mask = tile.masks[step, latent]
        if mask == 0:
            continue
        rest = mask & ~later[latent]
        while rest:
            g_codes[latent, lowest(rest)] = 0
            rest &= rest - 1
        dot_inputs(sae.decoder, latent, mask, here, g_codes[latent])
        bias, rest = np.float32(0), mask
        while rest:
            bias += g_codes[latent, lowest(rest)]
            rest &= rest - 1
        tile.g_biases[latent] += bias
        add_inputs(tile.g_encoder, latent, g_codes, latent, mask, over)
        add_inputs(tile.g_decoder, latent, codes, latent, mask, here)
        if goes_on:
            add_to_inputs(sae.encoder, latent, g_codes, mask, there)


@_jit
def _read_hidden(sae, tile):  # type: ignore[no-untyped-def]
    """Put the hidden units of a tile's inputs beside them."""
    padded = sae.decoder.shape[1]
    inputs, beside = tile.over[0, :, :padded], tile.over[0, :, padded:]
    transpose(inputs, tile.decoded)
    encode(sae.hidden, tile.decoded, sae.hidden_biases, tile.units[0], tile.unit_masks)
    transpose(tile.units[0], beside)


@_jit
def _back_to_hidden(sae, tile):  # type: ignore[no-untyped-def]
    """Add the gradient of the hidden units' rows and biases."""
    padded, (units, g_units) = sae.decoder.shape[1], tile.units
    transpose(tile.g_over[0, :, padded:], g_units)
    finish_gains(g_units, units, units, sae.hidden_biases, np.float32(0), tile.g_hidden_biases, tile.unused)
    add_product(g_units, tile.over[0, :, :padded], tile.g_hidden)


@_jit
def add_gradient(x, sae, setting, tile, weights):  # type: ignore[no-untyped-def]
    """The gradient over the inputs of a part, of x [b, d], in its memory, and its totals.

    weights: what an input's error, and its penalty, count in the loss.
    """
    (of_error, of_penalty), cut, totals = weights, tile.cuts, tile.totals
    tile.g_encoder[:], tile.g_decoder[:], tile.g_biases[:], tile.g_bdec[:], tile.pulls[:] = 0, 0, 0, 0, 0
    tile.g_hidden[:], tile.g_hidden_biases[:], totals[:], tile.fired[:] = 0, 0, 0, 0
    flat = tile.residual.reshape(1, tile.residual.size)
    for first in range(cut[0], cut[1], INPUTS):
        rows, inputs = min(INPUTS, cut[1] - first), tile.over[0]
        inputs[rows:] = 0
        for r in range(rows):
            for i in range(x.shape[1]):
                inputs[r, i] = -x[first + r, i]
        if len(sae.hidden):
            _read_hidden(sae, tile)
        valid = np.int64(-1) if rows == INPUTS else (np.int64(1) << rows) - 1
        totals[FIRED] += _infer(sae, setting, tile, rows, valid)
        totals[PENALTY] += _penalise(sae, setting, tile, of_penalty)
        totals[SQUARED] += float(dot(flat, 0, flat, 0))
        for i in range(flat.size):
            flat[0, i] *= of_error
        _go_back(sae, tile)
        if len(sae.hidden):
            _back_to_hidden(sae, tile)


@_jit
def part_of(work, part):  # type: ignore[no-untyped-def]
    """The memory of one part."""
    return Workspace(
        work.over[part], work.codes[part], work.masks[part], work.by_products[part], work.residual[part],
        work.g_over[part], work.transposed[part], work.decoded[part], work.g_codes[part], work.slopes[part],
        work.unused[part], work.units[part], work.unit_masks[part], work.norm_scaled_acts[part],
        work.entry_slopes[part], work.order[part], work.ranks[part], work.latents[part], work.g_encoder[part],
        work.g_decoder[part], work.g_biases[part], work.g_bdec[part], work.g_hidden[part],
        work.g_hidden_biases[part], work.pulls[part], work.fired[part], work.totals[part], work.cuts[part],
    )  # fmt: skip
