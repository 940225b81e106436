"""The step on the entries alone: decode, penalty and entry gradients by input, then both weight gradients by latent.

An entry is one latent that fires on one input. SAE i's lie in lists at i·room, in the order of inputs; sorted by latent
they are summed in that order, without atomics. So an SAE's bits are the same every time and in any stack.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def gradients_of_entries(  # type: ignore[no-untyped-def]
    x, flat, norms, slots, counts, offsets, dense, members, settings, schedule, step,
    keys, inputs, codes, g_codes, pulls, residuals, rows_sums, b, n, width, stride, room,
    TERMS: tl.constexpr, TERM_SLOPES: tl.constexpr, OUTER: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, SEGMENTS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One input of one SAE: its codes in float32, x̂ − x, its penalty, and the gradient of each code.

    Writes keys (i·width + latent), inputs, codes, g_codes and pulls (what the penalty adds to the gradient of a W_dec
    row, in units of it) at the input's entries; residuals [n, b, d]; rows_sums [n, b, 3]: error, penalty, latents on.
    """
    i, row = tl.load(members + tl.program_id(1)), tl.program_id(0)
    if tl.load(dense + i) == 0:
        parameters, columns, lanes = flat + i * stride, tl.arange(0, DP), tl.arange(0, CHUNK)
        inside = columns < D
        scale, p = tl.load(settings + 3 * i), tl.load(settings + 3 * i + 1)
        coefficient = tl.load(schedule + (tl.load(step) * n + i) * 3 + 2)
        inputs_row = tl.load(x + row * D + columns, mask=inside, other=0.0)
        residual = tl.load(parameters + 2 * width * D + width + columns, mask=inside, other=0.0) - inputs_row
        sum0, sum1, on = 0.0, 0.0, 0.0
        cell = (i * b + row) * SEGMENTS
        for segment in range(SEGMENTS):
            first = i * room + tl.load(offsets + cell + segment)
            entries = tl.load(counts + cell + segment)
            for start in range(0, entries, CHUNK):
                here = start + lanes < entries
                latents = tl.load(slots + (cell + segment) * CAPACITY + start + lanes, mask=here, other=0)
                at = parameters + latents[:, None] * D + columns[None, :]
                both = here[:, None] & inside[None, :]
                W_enc = tl.load(at, mask=both, other=0.0)
                W_dec = tl.load(at + width * D, mask=both, other=0.0)
                b_enc = tl.load(parameters + 2 * width * D + latents, mask=here, other=0.0)
                pre = tl.sum(W_enc * inputs_row[None, :], 1) + b_enc
                code = tl.where(here & (pre > 0), pre, 0.0)
                v = code * tl.load(norms + i * width + latents, mask=here, other=0.0)
                term0, term1 = TERMS(v, scale, p)
                sum0 += tl.sum(tl.where(v > 0, term0, 0.0), 0)
                sum1 += tl.sum(tl.where(v > 0, term1, 0.0), 0)
                on += tl.sum((code > 0).to(tl.float32), 0)
                residual += tl.sum(code[:, None] * W_dec, 0)
                tl.store(codes + first + start + lanes, code, mask=here)
        value, slope0, slope1 = OUTER(sum0, sum1)
        tl.store(residuals + (i * b + row) * D + columns, residual, mask=inside)
        tl.store(rows_sums + (i * b + row) * 3, tl.sum(residual * residual, 0))
        tl.store(rows_sums + (i * b + row) * 3 + 1, tl.where(on > 0, value, 0.0))
        tl.store(rows_sums + (i * b + row) * 3 + 2, on)
        tl.debug_barrier()  # the codes just written are read by other threads
        of_error, of_penalty = 2.0 / b, coefficient / b
        for segment in range(SEGMENTS):
            first = i * room + tl.load(offsets + cell + segment)
            entries = tl.load(counts + cell + segment)
            for start in range(0, entries, CHUNK):
                here = start + lanes < entries
                latents = tl.load(slots + (cell + segment) * CAPACITY + start + lanes, mask=here, other=0)
                W_dec = tl.load(
                    parameters + width * D + latents[:, None] * D + columns[None, :],
                    mask=here[:, None] & inside[None, :],
                    other=0.0,
                )
                norm = tl.load(norms + i * width + latents, mask=here, other=0.0)
                code = tl.load(codes + first + start + lanes, mask=here, other=0.0)
                v = code * norm
                term_slope0, term_slope1 = TERM_SLOPES(v, scale, p)
                slope = tl.where(v > 0, slope0 * term_slope0 + slope1 * term_slope1, 0.0) * of_penalty
                g_code = of_error * tl.sum(W_dec * residual[None, :], 1) + slope * norm
                tl.store(keys + first + start + lanes, (i * width + latents).to(tl.int32), mask=here)
                tl.store(inputs + first + start + lanes, row, mask=here)
                tl.store(g_codes + first + start + lanes, tl.where(code > 0, g_code, 0.0), mask=here)
                tl.store(pulls + first + start + lanes, slope * code / tl.where(norm > 0, norm, 1.0), mask=here)


@triton.jit
def find_runs(sorted_keys, ranks, runs, length, last, run_count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where each run of equal keys begins: runs[rank]. `last` is the key of unused places: its rank is run_count."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < length
    key = tl.load(sorted_keys + at, mask=there, other=-1)
    before = tl.load(sorted_keys + at - 1, mask=there & (at > 0), other=-1)
    rank = tl.load(ranks + at, mask=there, other=0) - 1
    begins = there & (key != before)
    tl.store(runs + rank, at, mask=begins)
    tl.store(run_count + at * 0, rank, mask=begins & (key == last))


@triton.jit
def gradients_of_latents(  # type: ignore[no-untyped-def]
    x, flat, sorted_keys, order, runs, run_count, inputs, codes, g_codes, pulls, residuals, gradient, squares,
    b, width, stride, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sum the entries of each latent that fired: its gradient, and the square of its norm in squares [n, width].

    Each program takes every num_programs-th run of sorted_keys.
    """
    columns, lanes = tl.arange(0, DP), tl.arange(0, CHUNK)
    inside = columns < D
    for run in range(tl.program_id(0), tl.load(run_count), tl.num_programs(0)):
        begin, end = tl.load(runs + run), tl.load(runs + run + 1)
        key = tl.load(sorted_keys + begin)
        i, latent = (key // width).to(tl.int64), key % width
        g_enc, g_dec = tl.zeros([DP], tl.float32), tl.zeros([DP], tl.float32)
        g_benc, pull = 0.0, 0.0
        for start in range(begin, end, CHUNK):
            here = start + lanes < end
            entry = tl.load(order + start + lanes, mask=here, other=0)
            row = tl.load(inputs + entry, mask=here, other=0)
            code = tl.load(codes + entry, mask=here, other=0.0)
            g_code = tl.load(g_codes + entry, mask=here, other=0.0)
            both = here[:, None] & inside[None, :]
            rows = tl.load(x + row[:, None] * D + columns[None, :], mask=both, other=0.0)
            residual = tl.load(residuals + (i * b + row)[:, None] * D + columns[None, :], mask=both, other=0.0)
            g_enc += tl.sum(g_code[:, None] * rows, 0)
            g_dec += tl.sum(code[:, None] * residual, 0)
            g_benc += tl.sum(g_code, 0)
            pull += tl.sum(tl.load(pulls + entry, mask=here, other=0.0), 0)
        W_dec = tl.load(flat + i * stride + (width + latent) * D + columns, mask=inside, other=0.0)
        g_dec = g_dec * (2.0 / b) + pull * W_dec
        to = gradient + i * stride + latent * D + columns
        tl.store(to, g_enc, mask=inside)
        tl.store(to + width * D, g_dec, mask=inside)
        tl.store(gradient + i * stride + 2 * width * D + latent, g_benc)
        square = tl.sum(g_enc * g_enc + g_dec * g_dec, 0) + g_benc * g_benc
        tl.store(squares + i * width + latent, square)
