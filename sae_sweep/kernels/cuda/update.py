"""From gradients to parameters: sums over a batch, the gradient's norm, clipping and Adam, for every SAE of a stack."""

from __future__ import annotations

import triton
import triton.language as tl

from sae_sweep.saes.recipes.optimizers import ADAM_EPS, BETA1, BETA2

_BETA1: tl.constexpr = tl.constexpr(BETA1)
_BETA2: tl.constexpr = tl.constexpr(BETA2)
_EPSILON: tl.constexpr = tl.constexpr(ADAM_EPS)


@triton.jit
def sum_inputs(  # type: ignore[no-untyped-def]
    residuals, rows_sums, sums, b, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Sums over ROWS inputs [n, blocks, DP + 4]: the residual's d numbers, and from DP error, penalty, latents on."""
    i, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    rows, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    there = rows < b
    cells = i * b + rows
    inside = there[:, None] & (columns < D)[None, :]
    residual = tl.load(residuals + cells[:, None] * D + columns[None, :], mask=inside, other=0.0)
    to = sums + (i * tl.num_programs(0) + block) * (DP + 4)
    tl.store(to + columns, tl.sum(residual, 0))
    for which in range(3):
        tl.store(to + DP + which, tl.sum(tl.load(rows_sums + cells * 3 + which, mask=there, other=0.0), 0))


@triton.jit(do_not_specialize=["n"])
def sum_latents(  # type: ignore[no-untyped-def]
    flat, dense, gradient, pulls, squares, sums, n, width, stride, parts,
    D: tl.constexpr, DP: tl.constexpr, LATENTS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr,
    SPARSE: tl.constexpr,
):  # fmt: skip
    """Square of the gradient's norm over LATENTS latents: sums [n, blocks].

    Where the gradient came in parts (dense.py), adds them up in the first with the penalty's pull: PARTS at a
    time, of TILE latents.
    """
    i, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    total = tl.zeros([], tl.float32)
    if tl.load(dense + i) != 0:
        columns = tl.arange(0, DP)
        for start in range(block * LATENTS, tl.minimum((block + 1) * LATENTS, width), TILE):
            latents = start + tl.arange(0, TILE)
            exists = latents < width
            tile = exists[:, None] & (columns < D)[None, :]
            at = i * stride + latents[:, None] * D + columns[None, :]
            bias_at = i * stride + 2 * width * D + latents
            g_enc, g_dec = tl.zeros([TILE, DP], tl.float32), tl.zeros([TILE, DP], tl.float32)
            g_benc, pull = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
            for first in range(0, parts, PARTS):
                part = first + tl.arange(0, PARTS).to(tl.int64)
                has = part < parts
                tiles = has[:, None, None] & tile[None, :, :]
                flats = has[:, None] & exists[None, :]
                cube = gradient + part[:, None, None] * n * stride + at[None, :, :]
                g_enc += tl.sum(tl.load(cube, mask=tiles, other=0.0), 0)
                g_dec += tl.sum(tl.load(cube + width * D, mask=tiles, other=0.0), 0)
                bias = gradient + part[:, None] * n * stride + bias_at[None, :]
                g_benc += tl.sum(tl.load(bias, mask=flats, other=0.0), 0)
                pull_at = pulls + (part[:, None] * n + i) * width + latents[None, :]
                pull += tl.sum(tl.load(pull_at, mask=flats, other=0.0), 0)
            g_dec += pull[:, None] * tl.load(flat + width * D + at, mask=tile, other=0.0)
            # Where a tile has fewer numbers than there are threads, several warps hold the same ones: all must have
            # read the first part before any of them writes the sum over it.
            tl.debug_barrier()
            tl.store(gradient + at, g_enc, mask=tile)
            tl.store(gradient + width * D + at, g_dec, mask=tile)
            tl.store(gradient + bias_at, g_benc, mask=exists)
            total += tl.sum(tl.sum(g_enc * g_enc + g_dec * g_dec, 1) + g_benc * g_benc, 0)
    elif SPARSE:
        latents = block * LATENTS + tl.arange(0, LATENTS)
        total += tl.sum(tl.load(squares + i * width + latents, mask=latents < width, other=0.0), 0)
    tl.store(sums + i * tl.num_programs(0) + block, total)


@triton.jit(do_not_specialize=["n"])
def finish_sums(  # type: ignore[no-untyped-def]
    input_sums, latent_sums, gradient, settings, schedule, step, factors, metrics,
    b, n, width, stride, input_blocks, latent_blocks, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of b_dec, the factor [n] that clips an SAE's gradient to its own norm, and its metrics of this step.

    metrics [n, 4]: loss, squared error and L0, means over the batch, are added to; of norms the largest is kept.
    """
    i = tl.program_id(0).to(tl.int64)
    columns, blocks = tl.arange(0, DP), tl.arange(0, BLOCK)
    g_bdec = tl.zeros([DP], tl.float32)
    error, penalty, on, square = 0.0, 0.0, 0.0, 0.0
    for start in range(0, input_blocks, BLOCK):
        there = start + blocks < input_blocks
        at = input_sums + (i * input_blocks + start + blocks) * (DP + 4)
        g_bdec += tl.sum(tl.load(at[:, None] + columns[None, :], mask=there[:, None], other=0.0), 0)
        error += tl.sum(tl.load(at + DP, mask=there, other=0.0), 0)
        penalty += tl.sum(tl.load(at + DP + 1, mask=there, other=0.0), 0)
        on += tl.sum(tl.load(at + DP + 2, mask=there, other=0.0), 0)
    for start in range(0, latent_blocks, BLOCK):
        at = latent_sums + i * latent_blocks + start + blocks
        square += tl.sum(tl.load(at, mask=start + blocks < latent_blocks, other=0.0), 0)
    g_bdec *= 2.0 / b
    tl.store(gradient + i * stride + (2 * D + 1) * width + columns, g_bdec, mask=columns < D)
    norm = tl.sqrt(square + tl.sum(g_bdec * g_bdec, 0))
    factor = tl.load(settings + 3 * i + 2) / tl.where(norm > 1e-30, norm, 1e-30)
    # A broken SAE must not look clipped, nor stand still and look trained.
    tl.store(factors + i, tl.where(norm < float("inf"), tl.where(factor < 1.0, factor, 1.0), float("nan")))
    coefficient = tl.load(schedule + (tl.load(step) * n + i) * 3 + 2)
    to = metrics + 4 * i
    tl.store(to, tl.load(to) + (error + coefficient * penalty) / b)
    tl.store(to + 1, tl.load(to + 1) + error / b)
    tl.store(to + 2, tl.load(to + 2) + on / b)
    tl.store(to + 3, tl.maximum(tl.load(to + 3), norm))


@triton.jit
def _adam(flat, first, second, gradient, at, mask, rate, correction):  # type: ignore[no-untyped-def]
    mean = tl.load(first + at, mask=mask, other=0.0)
    mean += (gradient - mean) * (1.0 - _BETA1)
    square = tl.load(second + at, mask=mask, other=0.0) * _BETA2 + gradient * gradient * (1.0 - _BETA2)
    value = tl.load(flat + at, mask=mask, other=0.0) - rate * mean / (tl.sqrt(square * correction) + _EPSILON)
    tl.store(first + at, mean, mask=mask)
    tl.store(second + at, square, mask=mask)
    tl.store(flat + at, value, mask=mask)


@triton.jit(do_not_specialize=["n"])
def adam(  # type: ignore[no-untyped-def]
    flat, first, second, gradient, squares, dense, factors, schedule, step, n, width, stride,
    D: tl.constexpr, DP: tl.constexpr, LATENTS: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """torch.optim.Adam's update of LATENTS latents of an SAE.

    A latent that did not fire has gradient zero, which is not read: its moments decay, and move it, all the same.
    """
    i, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    latents, columns = block * LATENTS + tl.arange(0, LATENTS), tl.arange(0, DP)
    exists, inside = latents < width, columns < D
    row = schedule + (tl.load(step) * n + i) * 3
    rate, correction, factor = tl.load(row), tl.load(row + 1), tl.load(factors + i)
    tile = exists[:, None] & inside[None, :]
    at = i * stride + latents[:, None] * D + columns[None, :]
    bias_at = i * stride + 2 * width * D + latents
    fired = exists
    if SPARSE:
        # Not > 0: a NaN is a gradient too.
        fired = exists & (tl.load(squares + i * width + latents, mask=exists, other=0.0) + tl.load(dense + i) != 0)
    read = tile & fired[:, None]
    g_enc = tl.where(read, tl.load(gradient + at, mask=read, other=0.0) * factor, 0.0)
    g_dec = tl.where(read, tl.load(gradient + width * D + at, mask=read, other=0.0) * factor, 0.0)
    g_benc = tl.where(fired, tl.load(gradient + bias_at, mask=fired, other=0.0) * factor, 0.0)
    _adam(flat, first, second, g_enc, at, tile, rate, correction)
    _adam(flat, first, second, g_dec, width * D + at, tile, rate, correction)
    _adam(flat, first, second, g_benc, bias_at, exists, rate, correction)
    if block == 0:
        at_bdec = i * stride + (2 * D + 1) * width + columns
        g_bdec = tl.load(gradient + at_bdec, mask=inside, other=0.0) * factor
        _adam(flat, first, second, g_bdec, at_bdec, inside, rate, correction)
