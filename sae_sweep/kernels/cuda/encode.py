"""Which latents fire on which input, found without a [batch, width] tensor.

`screen` multiplies in half precision and marks every latent that might fire within the error of that product;
sparse.py computes those few again in float32: so the codes are float32's, at the speed of half precision.

The last index of a grid is the SAE. Its parameters lie at flat + i·stride: W_enc | W_dec | b_enc | b_dec.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sae_sweep.kernels.cuda.bits import ones_in

# |half-precision w·x − w·x| ≤ ERROR·‖w‖·‖x‖: two operands rounded to 11 bits give 2⁻¹⁰, and 5% of that is more than
# what sums of up to 128 products in float32 add. Rounding below half precision's normal numbers is covered by TINY.
ERROR: tl.constexpr = tl.constexpr(1.05 * 2**-10)
TINY: tl.constexpr = tl.constexpr(1e-6)
# Half precision ends at 65504. A row with a number above LARGEST counts as infinitely long: it is never screened out.
LARGEST: tl.constexpr = tl.constexpr(6e4)


@triton.jit
def _halve(values):  # type: ignore[no-untyped-def]
    """values [rows, d] in half precision, and their lengths [rows], infinite where they did not fit."""
    fits = tl.max(tl.abs(values), 1) <= LARGEST
    length = tl.sqrt(tl.sum(values * values, 1))
    half = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(tl.float16)
    return half, tl.where(fits | (length != length), length, float("inf"))


@triton.jit
def measure_latents(  # type: ignore[no-untyped-def]
    flat, norms, reach, packed, width, stride,
    D: tl.constexpr, DP: tl.constexpr, LATENTS: tl.constexpr, SCREENED: tl.constexpr,
):  # fmt: skip
    """Decoder norms [n, width]; for `screen` W_enc in half precision [n, width, DP], its error's reach [n, width]."""
    i = tl.program_id(1).to(tl.int64)
    latents, columns = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), tl.arange(0, DP)
    there = latents < width
    inside = there[:, None] & (columns < D)[None, :]
    at = flat + i * stride + latents[:, None] * D + columns[None, :]
    W_dec = tl.load(at + width * D, mask=inside, other=0.0)
    tl.store(norms + i * width + latents, tl.sqrt(tl.sum(W_dec * W_dec, 1)), mask=there)
    if SCREENED:
        half, length = _halve(tl.load(at, mask=inside, other=0.0))
        tl.store(reach + i * width + latents, length * ERROR + TINY, mask=there)
        to = packed + (i * width + latents)[:, None] * DP + columns[None, :]
        tl.store(to, half, mask=there[:, None] & (columns < DP)[None, :])


@triton.jit
def screen(  # type: ignore[no-untyped-def]
    x, flat, reach, packed, candidates, counts, b, width, stride, words, segment,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr,
):  # fmt: skip
    """Which latents may fire on which input of x [b, d]: a bit each in candidates [n, b, words], LATENTS to a word.

    A program scans `segment` latents for ROWS inputs, and counts [n, row blocks, segments] how many bits it set.
    """
    i, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    there, lanes = rows < b, tl.arange(0, LATENTS)
    inputs = tl.load(x + rows[:, None] * D + columns[None, :], mask=there[:, None] & (columns < D)[None, :], other=0.0)
    half, length = _halve(inputs)
    # An input or a latent that is not there never fires: its sum is -inf or NaN.
    length = tl.where(there, length + 1e-3, -float("inf"))
    to = candidates + (i * b + rows) * words
    bit = (lanes * 0 + 1).to(tl.int64) << lanes
    found = tl.zeros([ROWS], tl.int32)
    for start in range(part * segment, tl.minimum((part + 1) * segment, width), LATENTS):
        latents = start + lanes
        exists = latents < width
        W_enc = tl.load(
            packed + (i * width + latents)[:, None] * DP + columns[None, :], mask=exists[:, None], other=0.0
        )
        b_enc = tl.load(flat + i * stride + 2 * width * D + latents, mask=exists, other=-float("inf"))
        margin = tl.load(reach + i * width + latents, mask=exists, other=0.0)
        most = tl.dot(half, tl.trans(W_enc)) + b_enc[None, :] + margin[None, :] * length[:, None]
        word = tl.sum(tl.where(most > 0, bit[None, :], 0), 1)
        tl.store(to + start // LATENTS, word, mask=there)
        found += ones_in(word.to(tl.int32)) + ones_in((word >> 32).to(tl.int32))
    program = (i * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + part
    tl.store(counts + program, tl.sum(found, 0))


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    x, flat, norms, reach, packed, chosen_latents, counts, b, width, stride,
    K: tl.constexpr, KP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The K latents of largest contribution for each input (TopK), of equals the lower: chosen_latents [n, b, K].

    counts [n, b]: how many there are, fewer than K where fewer fire.

    Keeps the best so far while it scans; a tile none of whose latents may be better is never computed in float32.
    """
    i = tl.program_id(1).to(tl.int64)
    rows, columns, places = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, KP)
    there, lanes = rows < b, tl.arange(0, LATENTS)
    inputs = tl.load(x + rows[:, None] * D + columns[None, :], mask=there[:, None] & (columns < D)[None, :], other=0.0)
    half, length = _halve(inputs)
    # Places beyond K are taken for good.
    best = tl.zeros([ROWS, KP], tl.float32) + tl.where(places < K, 0.0, float("inf"))[None, :]
    chosen = tl.zeros([ROWS, KP], tl.int32) - 1
    lowest = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, LATENTS):
        latents = start + lanes
        exists = latents < width
        at = i * width + latents
        W_half = tl.load(packed + at[:, None] * DP + columns[None, :], mask=exists[:, None], other=0.0)
        b_enc = tl.load(flat + i * stride + 2 * width * D + latents, mask=exists, other=0.0)
        margin = tl.load(reach + at, mask=exists, other=0.0)
        norm = tl.load(norms + at, mask=exists, other=0.0)
        most = tl.dot(half, tl.trans(W_half)) + b_enc[None, :] + margin[None, :] * (length + 1e-3)[:, None]
        # The margin covers the rounding of the product with the norm too.
        better = (most * norm[None, :] > lowest[:, None]) & there[:, None]
        if tl.sum(tl.sum(better.to(tl.int32), 1), 0) > 0:
            inside = exists[:, None] & (columns < D)[None, :]
            W_enc = tl.load(flat + i * stride + latents[:, None] * D + columns[None, :], mask=inside, other=0.0)
            codes = tl.dot(inputs, tl.trans(W_enc), input_precision=PRECISION) + b_enc[None, :]
            v = tl.where(there[:, None] & exists[None, :] & (codes > 0), codes * norm[None, :], 0.0)
            largest = tl.max(v, 1)
            while tl.sum((largest > lowest).to(tl.int32), 0) > 0:
                lane = tl.argmax(v, 1)
                # Of equally small ones the higher latent goes.
                worst = tl.argmax(tl.where(best == lowest[:, None], chosen, -2), 1)
                taken = (largest > lowest)[:, None]
                here = taken & (places[None, :] == worst[:, None])
                best = tl.where(here, largest[:, None], best)
                chosen = tl.where(here, (start + lane)[:, None], chosen)
                v = tl.where(taken & (lanes[None, :] == lane[:, None]), 0.0, v)
                lowest = tl.min(best, 1)
                largest = tl.max(v, 1)
    taken = (chosen >= 0) & there[:, None]
    cells = i * b + rows
    tl.store(chosen_latents + cells[:, None] * K + places[None, :], chosen, mask=taken)
    tl.store(counts + cells, tl.sum(taken.to(tl.int32), 1), mask=there)
