"""The step on the active latents alone: decode and penalty by input, then both weight gradients by latent.

Which inputs a latent fires on is kept as bits, set in any order and read in that of the inputs: sums need no sorting,
and no atomic that rounds. So an SAE's bits are the same every time and in any stack.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sae_sweep.kernels.cuda.bits import ones_in, places_of_bits


@triton.jit
def check_room(counts, dense, fired_count, cells, room, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether few latents may fire, counts [n, cells]: then dense [n] is 0. fired_count [n] becomes 0.

    It becomes 1 where an SAE holds more than `room`: so many cost more than products, and such an SAE takes this step
    by dense.py.
    """
    i = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], tl.int64)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(counts + i * cells + cell, mask=cell < cells, other=0).to(tl.int64), 0)
    tl.store(dense + i, (total > room).to(tl.int32))
    tl.store(fired_count + i, 0)


@triton.jit
def decode(  # type: ignore[no-untyped-def]
    x, flat, norms, candidates, counts, dense, members, settings, masks, hits, fired, fired_count,
    residuals, rows_sums, slopes, b, width, stride, latent_words, words,
    TERMS: tl.constexpr, OUTER: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One input of one SAE: residuals x̂ − x [n, b, d], rows_sums [n, b, 3]: error, penalty, latents on.

    Its candidates are bits [n, b, latent_words], read WORDS words at a time; with K > 0 latents [n, b, K] instead, of
    which there are counts [n, b], and latent_words is 1.
    slopes [n, b, 2]: the penalty's derivatives in the two sums of an input. Of each latent that fires sets the input's
    bit in masks [n, width, words]; the first of its inputs to come adds it to fired [n, width], fired_count [n] so far.
    """
    i, row = tl.load(members + tl.program_id(1)), tl.program_id(0)
    if tl.load(dense + i) == 0:
        parameters, columns, lanes = flat + i * stride, tl.arange(0, DP), tl.arange(0, CHUNK)
        inside, places = columns < D, tl.arange(0, WORDS)
        scale, p = tl.load(settings + 3 * i), tl.load(settings + 3 * i + 1)
        inputs_row = tl.load(x + row * D + columns, mask=inside, other=0.0)
        residual = tl.load(parameters + 2 * width * D + width + columns, mask=inside, other=0.0) - inputs_row
        sum0, sum1, on = 0.0, 0.0, 0.0
        bit = (lanes * 0 + 1) << (row % 32)
        cell = i * b + row
        for block in range(0, latent_words, WORDS):
            if K > 0:
                entries = tl.load(counts + cell)
            else:
                word_at = candidates + cell * latent_words + block + places
                bits = tl.load(word_at, mask=block + places < latent_words, other=0)
                ends = tl.cumsum(ones_in(bits), 0)
                entries = tl.max(ends, 0)
            for start in range(0, entries, CHUNK):
                here = start + lanes < entries
                if K > 0:
                    latents = tl.load(candidates + cell * K + start + lanes, mask=here, other=0)
                else:
                    latents = tl.where(here, block * 32 + places_of_bits(bits, ends, start + lanes, WORDS), 0)
                at = parameters + latents[:, None] * D + columns[None, :]
                both = here[:, None] & inside[None, :]
                W_enc = tl.load(at, mask=both, other=0.0)
                W_dec = tl.load(at + width * D, mask=both, other=0.0)
                b_enc = tl.load(parameters + 2 * width * D + latents, mask=here, other=0.0)
                pre = tl.sum(W_enc * inputs_row[None, :], 1) + b_enc
                fires = here & (pre > 0)
                code = tl.where(fires, pre, 0.0)
                key = i * width + latents
                v = code * tl.load(norms + key, mask=here, other=0.0)
                term0, term1 = TERMS(v, scale, p)
                sum0 += tl.sum(tl.where(v > 0, term0, 0.0), 0)
                sum1 += tl.sum(tl.where(v > 0, term1, 0.0), 0)
                on += tl.sum(fires.to(tl.float32), 0)
                residual += tl.sum(code[:, None] * W_dec, 0)
                tl.atomic_or(masks + key * words + row // 32, bit, mask=fires, sem="relaxed")
                before = tl.atomic_add(hits + key, 1, mask=fires, sem="relaxed")
                first = (fires & (before == 0)).to(tl.int32)
                new = tl.sum(first, 0)
                if new > 0:
                    place = tl.atomic_add(fired_count + i, new, sem="relaxed") + tl.cumsum(first, 0) - 1
                    tl.store(fired + i * width + place, latents, mask=first > 0)
        value, slope0, slope1 = OUTER(sum0, sum1)
        tl.store(residuals + cell * D + columns, residual, mask=inside)
        tl.store(rows_sums + cell * 3, tl.sum(residual * residual, 0))
        tl.store(rows_sums + cell * 3 + 1, tl.where(on > 0, value, 0.0))
        tl.store(rows_sums + cell * 3 + 2, on)
        tl.store(slopes + cell * 2, slope0)
        tl.store(slopes + cell * 2 + 1, slope1)


@triton.jit(do_not_specialize=["n"])
def gradients_of_latents(  # type: ignore[no-untyped-def]
    x, flat, norms, members, settings, schedule, step, masks, hits, fired, fired_count, residuals, slopes,
    gradient, squares, b, n, width, stride, words,
    TERM_SLOPES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of each latent of an SAE that fired, and the square of its norm in squares [n, width].

    A program takes every num_programs-th of them, and their inputs in order: WORDS words of bits, of these CHUNK inputs
    at a time, whose codes it computes again. Leaves masks and hits at 0.
    One warp alone may run this: of two, each holding a copy of the same words, the faster would clear them before the
    slower has read them.
    """
    i = tl.load(members + tl.program_id(1))
    parameters, columns = flat + i * stride, tl.arange(0, DP)
    lanes, places = tl.arange(0, CHUNK), tl.arange(0, WORDS)
    inside = columns < D
    scale, p = tl.load(settings + 3 * i), tl.load(settings + 3 * i + 1)
    of_error, of_penalty = 2.0 / b, tl.load(schedule + (tl.load(step) * n + i) * 3 + 2) / b
    for number in range(tl.program_id(0), tl.load(fired_count + i), tl.num_programs(0)):
        latent = tl.load(fired + i * width + number)
        key = i * width + latent
        at = latent * D + columns
        W_enc = tl.load(parameters + at, mask=inside, other=0.0)
        W_dec = tl.load(parameters + width * D + at, mask=inside, other=0.0)
        b_enc, norm = tl.load(parameters + 2 * width * D + latent), tl.load(norms + key)
        g_enc, g_dec = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
        g_benc, pull = 0.0, 0.0
        for block in range(0, words, WORDS):
            there = block + places < words
            word_at = masks + key * words + block + places
            bits = tl.load(word_at, mask=there, other=0)
            tl.store(word_at, 0, mask=there)
            ends = tl.cumsum(ones_in(bits), 0)
            entries = tl.max(ends, 0)
            for start in range(0, entries, CHUNK):
                rank = start + lanes
                here = rank < entries
                row = tl.where(here, block * 32 + places_of_bits(bits, ends, rank, WORDS), 0)
                at_row = i * b + row
                both = here[:, None] & inside[None, :]
                rows = tl.load(x + row[:, None] * D + columns[None, :], mask=both, other=0.0)
                residual = tl.load(residuals + at_row[:, None] * D + columns[None, :], mask=both, other=0.0)
                slope0 = tl.load(slopes + at_row * 2, mask=here, other=0.0)
                slope1 = tl.load(slopes + at_row * 2 + 1, mask=here, other=0.0)
                pre = tl.sum(W_enc[None, :] * rows, 1) + b_enc
                code = tl.where(here & (pre > 0), pre, 0.0)
                v = code * norm
                term_slope0, term_slope1 = TERM_SLOPES(v, scale, p)
                slope = tl.where(v > 0, slope0 * term_slope0 + slope1 * term_slope1, 0.0) * of_penalty
                g_code = of_error * tl.sum(W_dec[None, :] * residual, 1) + slope * norm
                g_code = tl.where(code > 0, g_code, 0.0)
                g_enc += tl.sum(g_code[:, None] * rows, 0)
                g_dec += tl.sum(code[:, None] * residual, 0)
                g_benc += tl.sum(g_code, 0)
                pull += tl.sum(slope * code, 0)
        tl.store(hits + key, 0)
        g_dec = g_dec * of_error + pull / tl.where(norm > 0, norm, 1.0) * W_dec
        to = gradient + i * stride
        tl.store(to + at, g_enc, mask=inside)
        tl.store(to + width * D + at, g_dec, mask=inside)
        tl.store(to + 2 * width * D + latent, g_benc)
        square = tl.sum(g_enc * g_enc + g_dec * g_dec, 0) + g_benc * g_benc
        tl.store(squares + key, square)
