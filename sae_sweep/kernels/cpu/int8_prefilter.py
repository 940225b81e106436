"""Which latents may fire, from products of bytes, of which a vector holds four times as many as of float32.

Rows of the encoder and inputs are rounded to multiples of a step of their own, w = s·(q + e) with whole |q| ≤ 127.
Then w·x = s_w·s_x·(q_w·q_x) + w·(s_x·e_x) + (s_w·e_w)·(s_x·q_x), of which the first part is a product of whole numbers
and the others are at most ‖w‖·‖s_x·e_x‖ and ‖s_w·e_w‖·‖s_x·q_x‖ (Cauchy–Schwarz). What cannot exceed its floor even so
is passed over; of the rest the pre-activation is computed as `tile` does: the codes are the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.encoder_tile import ACROSS, ROWS, by_panels, emit_tile, store_masks
from sae_sweep.kernels.cpu.rows import dot, largest
from sae_sweep.kernels.cpu.simd import (
    FLOAT,
    INT32,
    INT64,
    INTS,
    LANES,
    VECTOR,
    arrays,
    fma,
    has,
    load,
    splat,
    store,
    sum_lanes,
)

# Whether the processor multiplies bytes, and how many it adds up in each lane.
PREFILTERS = has("avx512vnni")
DIGITS = 4
# The largest whole number of a rounded row. An encoder's are kept with OFFSET added, as the product wants one side so.
LARGEST, OFFSET = 127, 128
# OFFSET added to each of four bytes, as bits.
OFFSETS = np.int32(-0x7F7F7F80)
# Rows whose largest number lies outside are not rounded: their latents, or inputs, are never passed over.
LEAST, MOST = 1e-30, 1e30
# What is kept of a latent in [BOUNDS, latents], all times the latent's weight: its step; the most that
# its bias may be; ‖w‖ and ‖s_w·e_w‖.
STEP, BIAS, NORM, GAP, BOUNDS = 0, 1, 2, 3, 4
# And of an input behind its whole numbers, as bits of float32 but for START: where its sums begin; one over its step;
# its floor over its step. Behind the last input lies what NORM and GAP are multiplied by, in any input's steps.
START, INVERSE, FLOOR, SIDES = 0, 1, 2, 3
FAR, NEAR = 0, 1
# Rounding of float32, with room: sums of d products are off by less than d + MORE times this share of their parts.
ROUNDING, MORE = 2.0**-23, 32

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
_jit = numba.njit(**OPTIONS)


def digits(d: int) -> int:
    """Lanes' worth of bytes that a row of d numbers fills: whole vectors, so that loops need no rest."""
    return -(-d // LANES) * (LANES // DIGITS)


@intrinsic
def round_row(typingctx, x, row, inverse, out, to):  # type: ignore[no-untyped-def]
    """The bytes of out[to] = x[row] · inverse, rounded; Σ of their squares, of the squares of the rests, and of them.

    x [b, d]; out int32 [·, at least digits(d)], of which what lies behind d stays. These sums need no order.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, row, inverse, out, to = arrays(context, builder, signature, arguments)
        d, length = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (x, out))
        source = builder.gep(x.data, [builder.mul(row, d)])
        byte = builder.bitcast(builder.gep(out.data, [builder.mul(to, length)]), ir.IntType(8).as_pointer())
        whole = builder.and_(d, INT64(~(LANES - 1)))

        def add(at: Any, kind: Any, ints: Any, bytes: Any, name: str, sums: list[Any]) -> None:
            lanes = kind == VECTOR
            value = load(builder, builder.gep(source, [at])) if lanes else builder.load(builder.gep(source, [at]))
            value = builder.fmul(value, splat(builder, inverse) if lanes else inverse)
            nearest = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.rint.{name}")
            rounded = builder.call(nearest, [value])
            rest, number = builder.fsub(value, rounded), builder.fptosi(rounded, ints)
            store(builder, builder.trunc(number, bytes), builder.gep(byte, [at]), 1)
            for total, factor in zip(sums, (rounded, rest), strict=False):
                builder.store(fma(builder, factor, factor, builder.load(total)), total)
            builder.store(builder.add(number, builder.load(sums[2])), sums[2])

        zeros = ir.Constant(VECTOR, [0.0] * LANES), ir.Constant(VECTOR, [0.0] * LANES), ir.Constant(INTS, [0] * LANES)
        sums = [cgutils.alloca_once_value(builder, zero) for zero in zeros]
        with cgutils.for_range_slice(builder, INT64(0), whole, INT64(LANES)) as (at, _):
            add(at, VECTOR, INTS, ir.VectorType(ir.IntType(8), LANES), "v16f32", sums)
        totals = [sum_lanes(builder, builder.load(each)) for each in sums]
        ends = [cgutils.alloca_once_value(builder, total) for total in totals]
        with cgutils.for_range_slice(builder, whole, d, INT64(1)) as (at, _):
            add(at, FLOAT, INT32, ir.IntType(8), "f32", ends)
        return context.make_tuple(builder, signature.return_type, [builder.load(end) for end in ends])

    kinds = types.Tuple((types.float32, types.float32, types.int32))
    return kinds(x, types.int64, types.float32, out, types.int64), codegen


@_jit
def _inverse(square, most):  # type: ignore[no-untyped-def]
    """One over the step of a row from its ‖·‖² and its largest number: 1 of zeros, 0 if it is not to be rounded."""
    if square == 0:
        return np.float32(1)
    return np.float32(LARGEST / most) if square < MOST and most > LEAST else np.float32(0)


@_jit
def coarsen(W, bias, weights, idle, begin, end, coarse, bounds):  # type: ignore[no-untyped-def]
    """Round rows [begin, end) of W [width, d] but idle ones into coarse [panels, digits, LANES], with their bounds."""
    slack, packed = np.float32((W.shape[1] + MORE) * ROUNDING), np.zeros((1, coarse.shape[1]), np.int32)
    for latent in range(begin, end):
        if idle[latent]:
            continue
        weight, limit = weights[latent], bias[latent] + slack * abs(bias[latent])
        inverse = _inverse(dot(W, latent, W, latent), largest(W, latent))
        step, norm, gap = np.float32(0), np.float32(0), np.float32(0)
        if inverse > 0:
            square, rest, _ = round_row(W, latent, inverse, packed, 0)
            step = weight / inverse
            norm, gap = step * (math.sqrt(square) + math.sqrt(rest)), step * math.sqrt(rest)
            limit *= weight
        if not (inverse > 0 and norm + abs(limit) < MOST):
            step, limit, norm, gap = np.float32(0), np.float32(math.inf), np.float32(0), np.float32(0)
        bounds[STEP, latent], bounds[BIAS, latent], bounds[NORM, latent], bounds[GAP, latent] = step, limit, norm, gap
        for digit in range(coarse.shape[1]):
            coarse[latent // LANES, digit, latent % LANES] = packed[0, digit] ^ OFFSETS


@_jit
def coarsen_inputs(x, first, rows, rough, sides):  # type: ignore[no-untyped-def]
    """Round inputs first + [0, rows) into rough int32 [inputs + 1, digits + SIDES], but for their floors.

    sides: the same memory as float32. What lies behind d is 0, and stays.
    """
    slack, most_gap, most = np.float32((x.shape[1] + MORE) * ROUNDING), np.float32(0), np.float32(0)
    size = rough.shape[1] - SIDES
    for row in range(rows):
        inverse, start = _inverse(dot(x, first + row, x, first + row), largest(x, first + row)), np.int32(0)
        if inverse > 0:
            square, gap, total = round_row(x, first + row, inverse, rough, row)
            start = np.int32(-OFFSET * total)
            most, most_gap = max(most, math.sqrt(square)), max(most_gap, math.sqrt(gap))
        rough[row, size + START], sides[row, size + INVERSE] = start, inverse
    sides[-1, FAR], sides[-1, NEAR] = most_gap + slack * (most + most_gap), most * (1 + slack)


@_jit
def set_floors(floors, rows, sides):  # type: ignore[no-untyped-def]
    """The floors of all inputs, in their steps; those from `rows` on are passed over."""
    inverse, floor = sides.shape[1] - SIDES + INVERSE, sides.shape[1] - SIDES + FLOOR
    for row in range(len(floors)):
        if row >= rows:
            sides[row, inverse], sides[row, floor] = 1, math.inf
        elif sides[row, inverse] == 0:  # nothing is known of it
            sides[row, floor] = -math.inf
        else:
            sides[row, floor] = floors[row] * sides[row, inverse] * np.float32(1 - MORE * ROUNDING)


@intrinsic
def prefilter_tile(typingctx, x, inputs, encoder, at, floors, rough, out, masks):  # type: ignore[no-untyped-def]
    """What `tile` says of panels at + [0, PANELS), a tile after the other; inputs: the first and how many.

    floors [inputs]; out [inputs, ACROSS]; masks [inputs · ACROSS / 64]; room for whole tiles. Beyond the last of the
    encoder's panels its rounded rows are read, with bounds; then nothing is written to `out`, and masks are of what may
    exceed its floor. rough is of these inputs, as `coarsen_inputs` and `set_floors` leave it.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, (first, rows), encoder, at, floors, rough, out, masks = arrays(context, builder, signature, arguments)
        coarse, bounds = encoder.coarse, encoder.bounds
        prefiltered = builder.icmp_signed(">=", at, cgutils.unpack_tuple(builder, encoder.panels.shape)[0])

        def blocks(emit: Callable[[Any, Any], None]) -> None:
            with cgutils.for_range_slice(builder, INT64(0), rows, INT64(ROWS)) as (block, _):
                word = builder.udiv(builder.mul(block, INT64(ACROSS)), INT64(64))
                emit(block, builder.gep(masks.data, [word]))

        def exactly(block: Any, to: Any) -> None:
            row, bound = builder.add(first, block), builder.gep(floors.data, [block])
            place = builder.gep(out.data, [builder.mul(block, INT64(ACROSS))])
            emit_tile(builder, x, row, encoder, at, bound, place, to)

        with builder.if_else(prefiltered) as (by_bytes, by_floats):
            with by_bytes:
                if PREFILTERS:
                    blocks(lambda block, to: emit_prefilter(builder, rough, block, coarse, at, bounds, to))
            with by_floats:
                blocks(exactly)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, types.UniTuple(i64, 2), encoder, i64, floors, rough, out, masks), codegen


def emit_prefilter(builder: ir.IRBuilder, rough: Any, row: Any, coarse: Any, at: Any, bounds: Any, masks: Any) -> None:
    """Code that puts at the address `masks` which latents of a tile may exceed their floors."""
    count, length = cgutils.unpack_tuple(builder, rough.shape)
    size = builder.sub(length, INT64(SIDES))
    latents = cgutils.unpack_tuple(builder, bounds.shape)[1]
    inputs = [builder.gep(rough.data, [builder.mul(builder.add(row, INT64(r)), length)]) for r in range(ROWS)]
    ends = builder.gep(rough.data, [builder.mul(builder.sub(count, INT64(1)), length)])

    def number(pointer: Any, at: Any) -> Any:
        """A float32 that lies among whole numbers, in every lane."""
        place = builder.bitcast(builder.gep(pointer, [at]), FLOAT.as_pointer())
        return splat(builder, builder.load(place))

    def side(which: int, r: int) -> Any:
        return number(inputs[r], builder.add(size, INT64(which)))

    def bound(which: int, panel: int) -> Any:
        lanes = builder.mul(builder.add(at, INT64(panel)), INT64(LANES))
        return load(builder, builder.gep(bounds.data, [builder.add(builder.mul(latents, INT64(which)), lanes)]))

    def columns(panels: int) -> None:
        """The sums of so many panels, in registers, and what they may come to."""
        vectors = builder.mul(size, INT64(LANES))
        sources = [builder.gep(coarse.data, [builder.mul(builder.add(at, INT64(p)), vectors)]) for p in range(panels)]
        begin = builder.add(size, INT64(START))
        begins = [splat(builder, builder.load(builder.gep(pointer, [begin]))) for pointer in inputs]
        sums = [[cgutils.alloca_once_value(builder, begin) for _ in range(panels)] for begin in begins]
        with cgutils.for_range(builder, size) as loop:
            step = builder.mul(loop.index, INT64(LANES))
            factors = [load(builder, builder.gep(source, [step]), INTS) for source in sources]
            for pointer, totals in zip(inputs, sums, strict=True):
                four = splat(builder, builder.load(builder.gep(pointer, [loop.index])))
                for factor, total in zip(factors, totals, strict=True):
                    builder.store(_add_products(builder, builder.load(total), factor, four), total)
        above = []
        far, near = (number(ends, INT64(which)) for which in (FAR, NEAR))
        for panel in range(panels):
            steps, bias = bound(STEP, panel), bound(BIAS, panel)
            off = fma(builder, bound(NORM, panel), far, builder.fmul(bound(GAP, panel), near))
            for r in range(ROWS):
                product = builder.sitofp(builder.load(sums[r][panel]), VECTOR)
                most = fma(builder, bias, side(INVERSE, r), fma(builder, product, steps, off))
                # Not ≤: what is no number is not passed over.
                above.append((r, panel, builder.fcmp_unordered(">", most, side(FLOOR, r))))
        store_masks(builder, above, masks)

    by_panels(builder, builder.add(at, INT64(1)), coarse, columns)


def _add_products(builder: ir.IRBuilder, total: Any, unsigned: Any, signed: Any) -> Any:
    """total + Σ of the products of the four bytes in each lane."""
    kind = ir.FunctionType(INTS, [INTS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, [total, unsigned, signed])
