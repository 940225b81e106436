"""A tile of the encoder product, and the k largest of an input: what the CPU step does to pre-activations.

Each sum has one order, by its operands alone: the bits of a pre-activation depend on its input and its latent, not on
where in a tile they lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.simd import INT32, INT64, INTS, LANES, VECTOR, arrays, fma, has, load, splat, store

# Inputs of a tile and latents of a panel. A tile is of as many panels as the machine has registers for: sixteen vectors
# of sixteen float32, or eight, and room for the operands. Its pre-activations that count are the bits of so many words:
# a loop over the bits of many inputs is mispredicted less often than one for each.
ROWS = 8
PANELS = 2 if has("avx512f") else 1
ACROSS = PANELS * LANES
SHIFT = ACROSS.bit_length() - 1
WORDS = ROWS * ACROSS // 64


@intrinsic
def tile(typingctx, x, row, encoder, at, floors, out, masks):  # type: ignore[no-untyped-def]
    """out[r] = bias[LANES·at :][:ACROSS] + x[row + r] @ panels[at : at + PANELS] for r < ROWS, and which count.

    Bit ACROSS·r + l of masks, read as one number, is set where out[r, l] · weights[LANES·at + l] > floors[r].
    x [b, d]; panels, bias and weights of the encoder (sparse_step.py); floors [ROWS], out [ROWS, ACROSS] float32;
    masks [WORDS] int64. Rows beyond the last are computed from the last row: the caller
    ignores them. Of a panel beyond the last nothing counts.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, row, encoder, at, *places = arrays(context, builder, signature, arguments)
        emit_tile(builder, x, row, encoder, at, *(place.data for place in places))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, encoder, i64, floors, out, masks), codegen


def emit_tile(builder: ir.IRBuilder, x: Any, row: Any, encoder: Any, at: Any, *places: Any) -> None:
    """The code of `tile`; places: the addresses of the first floor, of out and of masks."""
    panels, bias, weights, (floors, out, masks) = encoder.panels, encoder.bias, encoder.weights, places
    b, d = cgutils.unpack_tuple(builder, x.shape)
    last = builder.sub(b, INT64(1))
    inputs = []
    for r in range(ROWS):
        wanted = builder.add(row, INT64(r))
        wanted = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
        inputs.append(builder.gep(x.data, [builder.mul(wanted, d)]))
    offset = builder.mul(at, INT64(LANES))
    size = builder.mul(d, INT64(LANES))

    def columns(count: int) -> None:
        """The sums of so many panels, in registers."""
        begins = [builder.add(offset, INT64(LANES * panel)) for panel in range(count)]
        rows = [builder.gep(panels.data, [builder.mul(builder.add(at, INT64(p)), size)]) for p in range(count)]
        starts = [load(builder, builder.gep(bias.data, [begin])) for begin in begins]
        sums = [[cgutils.alloca_once_value(builder, start) for start in starts] for _ in range(ROWS)]
        with cgutils.for_range(builder, d) as loop:
            step = builder.mul(loop.index, INT64(LANES))
            factors = [load(builder, builder.gep(pointer, [step])) for pointer in rows]
            for pointer, totals in zip(inputs, sums, strict=True):
                scalar = splat(builder, builder.load(builder.gep(pointer, [loop.index])))
                for factor, total in zip(factors, totals, strict=True):
                    builder.store(fma(builder, scalar, factor, builder.load(total)), total)
        scales = [load(builder, builder.gep(weights.data, [begin])) for begin in begins]
        above = []
        for r, totals in enumerate(sums):
            bound = splat(builder, builder.load(builder.gep(floors, [INT64(r)])))
            for panel, (total, scale) in enumerate(zip(totals, scales, strict=True)):
                value = builder.load(total)
                store(builder, value, builder.gep(out, [INT64(r * ACROSS + panel * LANES)]))
                above.append((r, panel, builder.fcmp_ordered(">", builder.fmul(value, scale), bound)))
        store_masks(builder, above, masks)

    by_panels(builder, builder.add(at, INT64(1)), panels, columns)


def by_panels(builder: ir.IRBuilder, second: Any, panels: Any, columns: Callable[[int], None]) -> None:
    """Code of `columns` for as many panels as a tile has: one fewer where `second` is beyond the last of `panels`."""
    if PANELS == 1:
        columns(1)
        return
    count = cgutils.unpack_tuple(builder, panels.shape)[0]
    with builder.if_else(builder.icmp_signed("<", second, count)) as (both, one):
        with both:
            columns(2)
        with one:
            columns(1)


def store_masks(builder: ir.IRBuilder, above: Sequence[tuple[int, int, Any]], masks: Any) -> None:
    """Put which lanes count, of (row, panel, one bit a lane), at `masks`; what is not among them does not count."""
    words = [INT64(0)] * WORDS
    for r, panel, lanes in above:
        bits = builder.zext(builder.bitcast(lanes, ir.IntType(LANES)), INT64)
        word, shift = divmod(r * ACROSS + panel * LANES, 64)
        words[word] = builder.or_(words[word], builder.shl(bits, INT64(shift)))
    for at, word in enumerate(words):
        builder.store(word, builder.gep(masks, [INT64(at)]))


@intrinsic
def keep_largest(typingctx, kept, at, new, waiting, floors, places):  # type: ignore[no-untyped-def]
    """Enter what waits among what is kept, of inputs [LANES·at :][:LANES] side by side: those of largest rank stay.

    kept: ranks and codes float32, latents int32 [inputs / LANES, k, LANES]. new: the same [inputs / LANES, ·, LANES] of
    what waits, latents ascending; waiting int32 [inputs]: how many of each input. What exceeds the smallest takes its
    place: floors float32 [inputs] is its rank, places int32 [inputs] where it lies. Of equal ones the highest latent
    goes.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kept, at, new, waiting, floors, places = arrays(context, builder, signature, arguments)
        offset = builder.mul(at, INT64(LANES))
        k, room = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (kept[0], new[0]))
        kept = [builder.gep(array.data, [builder.mul(offset, k)]) for array in kept]
        new = [builder.gep(array.data, [builder.mul(offset, room)]) for array in new]
        waiting, floors, places = (builder.gep(array.data, [offset]) for array in (waiting, floors, places))
        kinds = VECTOR, VECTOR, INTS

        def row(tables: Any, entry: Any) -> list[Any]:
            return [builder.gep(table, [builder.mul(entry, INT64(LANES))]) for table in tables]

        counts = load(builder, waiting, INTS)
        floor = cgutils.alloca_once_value(builder, load(builder, floors))
        place = cgutils.alloca_once_value(builder, load(builder, places, INTS))
        latest, next_place = (cgutils.alloca_once(builder, INTS) for _ in range(2))
        longest = cgutils.alloca_once_value(builder, INT32(0))
        with cgutils.for_range(builder, INT64(LANES)) as lane:
            count = builder.load(builder.gep(waiting, [lane.index]))
            largest = builder.load(longest)
            builder.store(builder.select(builder.icmp_signed(">", count, largest), count, largest), longest)
        with cgutils.for_range(builder, builder.zext(builder.load(longest), INT64)) as newcomer:
            values = [load(builder, *each) for each in zip(row(new, newcomer.index), kinds, strict=True)]
            entry = splat(builder, builder.trunc(newcomer.index, INT32))
            enters = builder.and_(
                builder.fcmp_ordered(">", values[0], builder.load(floor)), builder.icmp_signed("<", entry, counts)
            )
            some = builder.icmp_unsigned("!=", builder.bitcast(enters, ir.IntType(LANES)), ir.IntType(LANES)(0))
            with builder.if_then(some):
                builder.store(ir.Constant(VECTOR, [math.inf] * LANES), floor)
                builder.store(ir.Constant(INTS, [-1] * LANES), latest)
                with cgutils.for_range(builder, k) as slot:
                    here = splat(builder, builder.trunc(slot.index, INT32))
                    taken = builder.and_(enters, builder.icmp_signed("==", builder.load(place), here))
                    for pointer, value, kind in zip(row(kept, slot.index), values, kinds, strict=True):
                        store(builder, builder.select(taken, value, load(builder, pointer, kind)), pointer)
                    rank, _, latent = (load(builder, *each) for each in zip(row(kept, slot.index), kinds, strict=True))
                    tied = builder.and_(
                        builder.fcmp_ordered("==", rank, builder.load(floor)),
                        builder.icmp_signed(">", latent, builder.load(latest)),
                    )
                    goes = builder.or_(builder.fcmp_ordered("<", rank, builder.load(floor)), tied)
                    for value, variable in ((rank, floor), (latent, latest), (here, next_place)):
                        builder.store(builder.select(goes, value, builder.load(variable)), variable)
                builder.store(builder.load(next_place), place)
        store(builder, builder.load(floor), floors)
        store(builder, builder.load(place), places)
        return context.get_dummy_value()

    return types.void(kept, types.int64, new, waiting, floors, places), codegen


@intrinsic
def lowest(typingctx, mask):  # type: ignore[no-untyped-def]
    """The number of the lowest set bit of an int64; 64 of zero."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(INT64, [INT64, ir.IntType(1)])
        count = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(count, [arguments[0], ir.IntType(1)(0)])

    return types.int64(types.int64), codegen
