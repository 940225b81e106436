"""The step by matrix products in tiles: for narrow SAEs, and for those of which too much fires for lists of entries.

The encoder's tiles are computed twice, once to decode and once for the gradients, so that none is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def reconstruct(  # type: ignore[no-untyped-def]
    x, flat, norms, dense, members, settings, residuals, rows_sums, slopes, b, width, stride,
    TERMS: tl.constexpr, OUTER: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS inputs of one SAE: residuals x̂ − x [n, b, d], rows_sums [n, b, 3]: error, penalty, latents on.

    slopes [n, b, 2]: the penalty's derivatives in the two sums of an input.
    """
    i = tl.load(members + tl.program_id(1))
    if tl.load(dense + i) != 0:
        rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
        there, inside = rows < b, columns < D
        both = there[:, None] & inside[None, :]
        inputs = tl.load(x + rows[:, None] * D + columns[None, :], mask=both, other=0.0)
        parameters = flat + i * stride
        scale, p = tl.load(settings + 3 * i), tl.load(settings + 3 * i + 1)
        decoded = tl.zeros([ROWS, DP], tl.float32)
        sum0, sum1 = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        on = tl.zeros([ROWS], tl.float32)
        for start in range(0, width, LATENTS):
            latents = start + tl.arange(0, LATENTS)
            exists = latents < width
            at = parameters + latents[:, None] * D + columns[None, :]
            tile = exists[:, None] & inside[None, :]
            W_enc = tl.load(at, mask=tile, other=0.0)
            b_enc = tl.load(parameters + 2 * width * D + latents, mask=exists, other=0.0)
            pre = tl.dot(inputs, tl.trans(W_enc), input_precision=PRECISION) + b_enc[None, :]
            # Not pre > 0: a NaN must reach the loss.
            code = tl.where((pre <= 0) | ~exists[None, :], 0.0, pre)
            v = code * tl.load(norms + i * width + latents, mask=exists, other=0.0)[None, :]
            term0, term1 = TERMS(v, scale, p)
            sum0 += tl.sum(tl.where(v > 0, term0, 0.0), 1)
            sum1 += tl.sum(tl.where(v > 0, term1, 0.0), 1)
            on += tl.sum((code > 0).to(tl.float32), 1)
            W_dec = tl.load(at + width * D, mask=tile, other=0.0)
            decoded += tl.dot(code, W_dec, input_precision=PRECISION)
        b_dec = tl.load(parameters + 2 * width * D + width + columns, mask=inside, other=0.0)
        residual = tl.where(both, decoded + b_dec[None, :] - inputs, 0.0)
        value, slope0, slope1 = OUTER(sum0, sum1)
        cells = i * b + rows
        tl.store(residuals + cells[:, None] * D + columns[None, :], residual, mask=both)
        tl.store(rows_sums + cells * 3, tl.sum(residual * residual, 1), mask=there)
        tl.store(rows_sums + cells * 3 + 1, tl.where(on > 0, value, 0.0), mask=there)
        tl.store(rows_sums + cells * 3 + 2, on, mask=there)
        tl.store(slopes + cells * 2, slope0, mask=there)
        tl.store(slopes + cells * 2 + 1, slope1, mask=there)


@triton.jit(do_not_specialize=["n"])
def gradients(  # type: ignore[no-untyped-def]
    x, flat, norms, dense, members, settings, schedule, step, residuals, slopes, gradient, pulls,
    b, n, width, stride, share,
    TERM_SLOPES: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, LATENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of LATENTS latents of one SAE from `share` inputs: gradient [parts, n, stride], pulls [parts, n, width].

    A pull is what the penalty adds to the gradient of a W_dec row, in units of it; it is not yet added.
    """
    i, part = tl.load(members + tl.program_id(2)), tl.program_id(1).to(tl.int64)
    if tl.load(dense + i) != 0:
        latents, columns = tl.program_id(0) * LATENTS + tl.arange(0, LATENTS), tl.arange(0, DP)
        exists, inside = latents < width, columns < D
        tile = exists[:, None] & inside[None, :]
        parameters = flat + i * stride
        at = latents[:, None] * D + columns[None, :]
        W_enc = tl.load(parameters + at, mask=tile, other=0.0)
        W_dec = tl.load(parameters + width * D + at, mask=tile, other=0.0)
        b_enc = tl.load(parameters + 2 * width * D + latents, mask=exists, other=0.0)
        norm = tl.load(norms + i * width + latents, mask=exists, other=0.0)
        scale, p = tl.load(settings + 3 * i), tl.load(settings + 3 * i + 1)
        of_error, of_penalty = 2.0 / b, tl.load(schedule + (tl.load(step) * n + i) * 3 + 2) / b
        g_enc, g_dec = tl.zeros([LATENTS, DP], tl.float32), tl.zeros([LATENTS, DP], tl.float32)
        g_benc, pull = tl.zeros([LATENTS], tl.float32), tl.zeros([LATENTS], tl.float32)
        for start in range(part * share, tl.minimum((part + 1) * share, b), ROWS):
            rows = start + tl.arange(0, ROWS)
            there = rows < b
            both = there[:, None] & inside[None, :]
            inputs = tl.load(x + rows[:, None] * D + columns[None, :], mask=both, other=0.0)
            residual = tl.load(residuals + (i * b + rows)[:, None] * D + columns[None, :], mask=both, other=0.0)
            slope0 = tl.load(slopes + (i * b + rows) * 2, mask=there, other=0.0)
            slope1 = tl.load(slopes + (i * b + rows) * 2 + 1, mask=there, other=0.0)
            pre = tl.dot(W_enc, tl.trans(inputs), input_precision=PRECISION) + b_enc[:, None]
            code = tl.where((pre <= 0) | ~there[None, :], 0.0, pre)
            v = code * norm[:, None]
            term_slope0, term_slope1 = TERM_SLOPES(v, scale, p)
            slope = tl.where(v > 0, slope0[None, :] * term_slope0 + slope1[None, :] * term_slope1, 0.0) * of_penalty
            back = tl.dot(W_dec, tl.trans(residual), input_precision=PRECISION)
            g_code = tl.where(code > 0, of_error * back + slope * norm[:, None], 0.0)
            g_enc += tl.dot(g_code, inputs, input_precision=PRECISION)
            g_dec += tl.dot(code, residual, input_precision=PRECISION)
            g_benc += tl.sum(g_code, 1)
            pull += tl.sum(tl.where(v > 0, slope * code, 0.0), 1)
        to = gradient + (part * n + i) * stride
        tl.store(to + at, g_enc, mask=tile)
        tl.store(to + width * D + at, g_dec * of_error, mask=tile)
        tl.store(to + 2 * width * D + latents, g_benc, mask=exists)
        tl.store(pulls + (part * n + i) * width + latents, pull / tl.where(norm > 0, norm, 1.0), mask=exists)
