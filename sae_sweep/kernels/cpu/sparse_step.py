"""The compiled half of the CPU step: encode, keep what fires, and do all other work on that alone.

A batch is cut into parts, an SAE's latents into slices; threads may share both. A part lists its entries, one per
active latent of an input, input by input. Once all entries are counted, each has its place in an order by latent and
then by input. A part reconstructs its inputs and puts its entries into their places; a slice then sums the gradient
of its latents, only where there is one. What a part or a slice computes depends on nothing but its operands.

Shapes are those of the records `Encoder`, `Sae` and `Workspace`; x is [b, d].
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from sae_sweep.kernels.cpu.encoder_tile import ACROSS, PANELS, ROWS, SHIFT, keep_largest, lowest
from sae_sweep.kernels.cpu.int8_prefilter import (
    BIAS,
    BOUNDS,
    PREFILTERS,
    SIDES,
    coarsen,
    coarsen_inputs,
    digits,
    prefilter_tile,
    set_floors,
)
from sae_sweep.kernels.cpu.rows import SIDE_BY_SIDE, add_rows, chains, dot, prefetch
from sae_sweep.kernels.cpu.simd import LANES

# Inputs that pass a panel of the encoder while it is in the nearest cache.
GROUP = 8 * ROWS
# Entries of an input that wait to be compared with the k largest so far: a tile's worth and as many again. Above the
# number of any latent.
WAITING, FREE = 2 * ACROSS, np.iinfo(np.int32).max
# A listed entry: its pre-activation and its latent. One that has its place: its code, what the loss gains per unit of
# its pre-activation, and, through the penalty, of its norm-scaled activation (an architecture may put another number
# there); its input; and, where an architecture has one, a column of its own.
CODE, LATENT, LISTED = 0, 1, 2
GAIN, SLOPE, ROW, OWN = 1, 2, 3, 4
# Latents, for each of k, after which few of the others are among the k largest so far.
FIRST = 24
# Entries from asking for a row to using it: what a far cache takes to answer.
AHEAD = 8
# Numbers of the inputs whose entries are collected in one go: with their residuals they fit the second cache.
COLLECTED = 1 << 16

# Products may be fused with sums inside a function; sums keep their order, also where a function is built into another.
OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}
_jit = numba.njit(**OPTIONS)

Array = np.ndarray[Any, Any]

_float, _int = numba.float32, numba.int64
_row, _table, _cube = _float[::1], _float[:, ::1], _float[:, :, ::1]
_ints = numba.int32[:, ::1]


@_jit
def views(flat, width, d):  # type: ignore[no-untyped-def]
    """W_enc, W_dec [width, d], b_enc [width], b_dec [1, d] of a flat array."""
    count = width * d
    weights, biases = flat[: 2 * count].reshape(2, width, d), flat[2 * count :]
    return weights[0], weights[1], biases[:width], biases[width : width + d].reshape(1, d)


@_jit
def refresh_latents(W_dec, b_enc, encoder, norms, idle, begin, end):  # type: ignore[no-untyped-def]
    """Take the ‖d‖ of latents [begin, end) but idle ones, then lay out their encoder as `prefilter_tile` reads it.

    norms may be the encoder's weights. One call for many: to hand over arrays costs as much as a latent.
    """
    W_enc, panels, bias = encoder.W_enc, encoder.panels, encoder.bias
    exact = min(end, len(panels) * LANES)
    for latent in range(begin, end):
        if not idle[latent]:
            bias[latent] = b_enc[latent]
            norms[latent] = math.sqrt(dot(W_dec, latent, W_dec, latent))
    for latent in range(begin, exact):
        if not idle[latent]:
            for i in range(W_enc.shape[1]):
                panels[latent // LANES, i, latent % LANES] = W_enc[latent, i]
    if exact < end:
        coarsen(W_enc, bias, encoder.weights, idle, max(begin, exact), end, encoder.coarse, encoder.bounds)


@_jit
def refresh(flat, width, d, encoder, norms):  # type: ignore[no-untyped-def]
    """Bring every latent up to date."""
    _, W_dec, b_enc, _ = views(flat, width, d)
    refresh_latents(W_dec, b_enc, encoder, norms, np.zeros(width, np.uint8), 0, width)


@_jit
def unpack(masks, places):  # type: ignore[no-untyped-def]
    """places [·]: the numbers of the bits that are set in the words `masks`, ascending; how many they are.

    Two bits of every word are written down without looking whether they are set: a branch would often be mispredicted.
    Room is needed for these, and some more are 0 behind the last.
    """
    count = 0
    for word in range(len(masks)):
        mask = masks[word]
        second = mask & (mask - 1)
        places[count], places[count + 1] = 64 * word + lowest(mask), 64 * word + lowest(second)
        count += np.int64(mask != 0) + np.int64(second != 0)
        rest = second & (second - 1)
        while rest:
            places[count] = 64 * word + lowest(rest)
            rest &= rest - 1
            count += 1
    for place in range(count, count + SIDE_BY_SIDE):
        places[place] = 0
    return count


@_jit
def list_all(x, first, rows, encoder, rough, values, counts):  # type: ignore[no-untyped-def]
    """List the latents of inputs first + [0, rows) with code · weight > floor in values [rows, ·, 2], and counts."""
    W, panels, bias, weights, floor = encoder.W_enc, encoder.panels, encoder.bias, encoder.weights, encoder.floor
    found = values.view(np.int32)
    floors, out = np.full(GROUP, floor, np.float32), np.empty((GROUP, ACROSS), np.float32)
    masks, places = np.zeros(GROUP * ACROSS // 64, np.int64), np.empty(GROUP * ACROSS + SIDE_BY_SIDE, np.int32)
    pre = np.empty(len(places), np.float32)
    counts[:] = 0
    set_floors(floors, rows, rough.view(np.float32))
    for panel in range(0, len(bias) // LANES, PANELS):
        prefilter_tile(x, (first, rows), encoder, panel, floors, rough, out, masks)
        candidates = unpack(masks, places)
        if panel >= len(panels):
            chains(W, panel * LANES, x, first, places, candidates, bias, pre)
        for each in range(candidates):
            row, lane = places[each] >> SHIFT, places[each] & (ACROSS - 1)
            value = out[row, lane] if panel < len(panels) else pre[each]
            latent, entry = panel * LANES + lane, counts[row]
            if value * weights[latent] > floor:
                values[row, entry, CODE], found[row, entry, LATENT] = value, latent
                counts[row] = entry + 1


@_jit
def list_largest(x, first, rows, encoder, rough, values, counts):  # type: ignore[no-untyped-def]
    """The same of at most k latents of an input: those of largest code · weight, of equals the lower.

    What exceeds the smallest kept so far waits until one of its sixteen inputs has a tile's worth; those sixteen are
    then compared together.
    """
    W, panels, bias, weights = encoder.W_enc, encoder.panels, encoder.bias, encoder.weights
    k, floor, groups, found = encoder.k, encoder.floor, GROUP // LANES, values.view(np.int32)
    out, masks = np.empty((GROUP, ACROSS), np.float32), np.zeros(GROUP * ACROSS // 64, np.int64)
    places_found = np.empty(GROUP * ACROSS + SIDE_BY_SIDE, np.int32)
    pre = np.empty(len(places_found), np.float32)
    floors, places, waiting = np.full(GROUP, floor), np.zeros(GROUP, np.int32), np.zeros(GROUP, np.int32)
    ranks, codes = np.full((groups, k, LANES), floor), np.zeros((groups, k, LANES), np.float32)
    latents, new_latents = np.empty((groups, k, LANES), np.int32), np.empty((groups, WAITING, LANES), np.int32)
    new_ranks, new_codes = np.empty((2, groups, WAITING, LANES), np.float32)
    kept, new = (ranks, codes, latents), (new_ranks, new_codes, new_latents)
    # A free place is the smallest, and the first of them the highest latent: it is taken next.
    for slot in range(k):
        latents[:, slot] = FREE - slot
    for panel in range(0, len(bias) // LANES, PANELS):
        set_floors(floors, rows, rough.view(np.float32))
        prefilter_tile(x, (first, rows), encoder, panel, floors, rough, out, masks)
        candidates, full = unpack(masks, places_found), False
        if panel >= len(panels):
            chains(W, panel * LANES, x, first, places_found, candidates, bias, pre)
        for each in range(candidates):
            row, lane = places_found[each] >> SHIFT, places_found[each] & (ACROSS - 1)
            value, latent = out[row, lane] if panel < len(panels) else pre[each], panel * LANES + lane
            rank = value * weights[latent]
            if rank > floors[row]:
                group, side, entry = row // LANES, row % LANES, waiting[row]
                new_ranks[group, entry, side], new_codes[group, entry, side] = rank, value
                new_latents[group, entry, side] = latent
                waiting[row] = entry + 1
                full |= entry >= WAITING - ACROSS
        if full:
            for group in range(groups):
                keep_largest(kept, group, new, waiting, floors, places)
            waiting[:] = 0
    for group in range(groups):
        keep_largest(kept, group, new, waiting, floors, places)
    for row in range(rows):
        group, side, slot = row // LANES, row % LANES, 0
        while slot < k and latents[group, slot, side] < len(bias):
            values[row, slot, CODE], found[row, slot, LATENT] = codes[group, slot, side], latents[group, slot, side]
            slot += 1
        counts[row] = slot


class Encoder(NamedTuple):
    """What says which latents an input has.

    W_enc [width, d]; the first of its rows in panels [panels, d, LANES]; bias and weights [panels · LANES]; the other
    rows rounded, coarse [panels, digits, LANES] with bounds (int8_prefilter.py). A latent counts whose code · weight
    exceeds floor ≥ 0. k: how many of an input at most, those of largest code · weight, in an order that they alone
    decide; 0: all, latents ascending.
    """

    W_enc: Array
    panels: Array
    bias: Array
    weights: Array
    coarse: Array
    bounds: Array
    k: int
    floor: np.float32


def record(kind: type, *members: Any) -> Any:
    """numba's type of a record, from the types of its members."""
    return numba.types.BaseTuple.from_types(members, kind)


ENCODER = record(Encoder, _table, _cube, _row, _row, numba.int32[:, :, ::1], _table, _int, _float)


class Sae(NamedTuple):
    """An SAE's row of a stack, and what is derived of its parameters.

    flat, first, second [parameter_count]: parameters and Adam's moments, and gradient; W_dec [width, d], as the
    architecture uses it; norms [panels · LANES]: ‖d‖; own: the architecture's numbers; active [width]: which latents
    have a gradient; idle [width]: which have never had any. fired [width]: which fire in this step; silent [width]: for
    how many steps each has not fired.
    """

    flat: Array
    first: Array
    second: Array
    gradient: Array
    W_dec: Array
    norms: Array
    own: Array
    active: Array
    idle: Array
    fired: Array
    silent: Array
    encoder: Encoder


class Workspace(NamedTuple):
    """Memory of a step.

    codes and latents [parts, capacity, 2] are one memory, the list of each part, and starts [parts, rows + 1] bounds a
    row's entries in it. sums and rows [parts · capacity, columns] are one memory, the entries by latent, and bounds
    [width + 1] those of a latent; places [parts, width] where a part's next entry of a latent goes. residuals
    [b · levels, d]. g_bdec [parts, d] and totals [parts, TOTALS]: what each part adds. parts, slices [·, 2]: where each
    begins and ends; begins, stops [parts]: the inputs of each that are listed; squares [slices]: ‖g‖² of each.
    """

    codes: Array
    latents: Array
    starts: Array
    sums: Array
    rows: Array
    bounds: Array
    places: Array
    residuals: Array
    g_bdec: Array
    totals: Array
    parts: Array
    slices: Array
    begins: Array
    stops: Array
    squares: Array


_flags, _reals, _pairs = numba.uint8[::1], numba.float64[::1], _int[:, ::1]
SAE = record(Sae, _row, _row, _row, _row, _table, _row, _reals, _flags, _flags, _flags, _int[::1], ENCODER)
WORKSPACE = record(
    Workspace, _cube, numba.int32[:, :, ::1], _pairs, _table, _ints, _int[::1], _ints, _table, _table,
    _reals.copy(ndim=2), _pairs, _pairs, _int[::1], _int[::1], _reals,
)  # fmt: skip


def encoder_of(W_enc: Array, weights: Array, rounded: bool, k: int = 0, floor: float = 0.0) -> Encoder:
    """Room for an encoder of W_enc [width, d] and weights [panels · LANES], for `refresh` to fill.

    Rounded rows find what few latents fire sooner; without them, or where the processor has no use for them, `tile`
    computes every pre-activation. The codes are the same. Of k, so many are the largest of the first latents anyway
    that these are not rounded.
    """
    panels, d = len(weights) // LANES, W_enc.shape[1]
    exact = min(PANELS * -(-FIRST * k // ACROSS), panels) if rounded and PREFILTERS else panels
    coarse = panels if exact < panels else 0
    # Latents that fill up the last panel never fire.
    bias, bounds = np.full(len(weights), -np.inf, np.float32), np.zeros((BOUNDS, coarse * LANES), np.float32)
    bounds[BIAS] = -np.inf
    rows = np.zeros((coarse, digits(d), LANES), np.int32)
    return Encoder(W_enc, np.zeros((exact, d, LANES), np.float32), bias, weights, rows, bounds, k, np.float32(floor))


@numba.njit(_int(_table, _int, _int, ENCODER, _table, _ints, _int[::1]), **OPTIONS)
def encode(x, begin, end, encoder, codes, latents, starts):  # type: ignore[no-untyped-def]
    """List the latents that inputs [begin, end) have, row by row. Returns the first input that found no room."""
    # And a cache line: rows whose distance is a power of two would take each other's place in a cache.
    most = encoder.k if encoder.k else len(encoder.bias)
    values = np.empty((GROUP, most + LANES // LISTED, LISTED), np.float32)
    found, counts, count = values.view(np.int32), np.zeros(GROUP, np.int64), 0
    rough = np.zeros((GROUP + 1, encoder.coarse.shape[1] + SIDES), np.int32)
    starts[0] = 0
    for first in range(begin, end, GROUP):
        rows = min(GROUP, end - first)
        if len(encoder.coarse):
            coarsen_inputs(x, first, rows, rough, rough.view(np.float32))
        if encoder.k:
            list_largest(x, first, rows, encoder, rough, values, counts)
        else:
            list_all(x, first, rows, encoder, rough, values, counts)
        for row in range(rows):
            if count + counts[row] > len(codes):
                return first + row
            for entry in range(counts[row]):
                codes[count + entry, CODE] = values[row, entry, CODE]
                latents[count + entry, LATENT] = found[row, entry, LATENT]
            count += counts[row]
            starts[first + row - begin + 1] = count
    return end


@_jit
def count(latents, entries, places):  # type: ignore[no-untyped-def]
    """Count the first `entries` of a part's list by latent, in its row of the places."""
    places[:] = 0
    for entry in range(entries):
        places[latents[entry, LATENT]] += 1


@_jit
def place(places, bounds):  # type: ignore[no-untyped-def]
    """From the counts, where the entries of a latent begin, and in them those of each part."""
    parts, width = places.shape
    bounds[:] = 0
    for part in range(parts):
        for latent in range(width):
            bounds[latent + 1] += places[part, latent]
    for latent in range(width):
        bounds[latent + 1] += bounds[latent]
    at = bounds[:width].astype(np.int32)
    for part in range(parts):
        for latent in range(width):
            entries = places[part, latent]
            places[part, latent] = at[latent]
            at[latent] += entries


@_jit
def _entries_of(latent, bounds, places, first, last):  # type: ignore[no-untyped-def]
    """Where a latent's entries of parts [first, last) lie: once in place, a part's end where the next would go."""
    return places[first - 1, latent] if first else np.int32(bounds[latent]), places[last - 1, latent]


@_jit
def collect(x, sae, work, residual_column, latents, parts):  # type: ignore[no-untyped-def]
    """Add the gradient of latents [begin, end) over the entries of parts [first, last), but for scalars.

    The gradient of a latent counts only where it is marked active; whatever lies there before is overwritten.
    residual_column: the column that says along which residual an entry's gradient lies.
    """
    (begin, end), (first, last) = latents, parts
    residuals, sums, rows, bounds, places = work.residuals, work.sums, work.rows, work.bounds, work.places
    g_enc, g_dec, g_benc, _ = views(sae.gradient, len(sae.active), x.shape[1])
    here, stop = _entries_of(begin, bounds, places, first, last)
    for latent in range(begin, end):
        at, until = here, stop
        if latent + 1 < end:
            here, stop = _entries_of(latent + 1, bounds, places, first, last)
            for entry in range(here, min(here + AHEAD, stop)):
                prefetch(x, rows[entry, ROW])
                prefetch(residuals, rows[entry, residual_column])
        if at == until:
            continue
        if not sae.active[latent]:
            sae.active[latent] = 1
            g_enc[latent, :] = 0
            g_dec[latent, :] = 0
            g_benc[latent] = 0
        add_rows(g_enc, latent, sums, GAIN, x, rows, ROW, (at, until))
        add_rows(g_dec, latent, sums, CODE, residuals, rows, residual_column, (at, until))
