"""What the CPU step does to vectors, spelled in LLVM's own: they become AVX-512, AVX2 or NEON as the machine has them.

Numba's loops keep the sums of a product in memory and check for overlapping arrays at every turn, which costs half the
speed. Each sum here has one order, by its operands alone: the bits of a pre-activation depend on its input and its
latent, not on where in a tile they lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Inputs and latents of a tile: eight vectors of sixteen float32, and room for the operands. Its pre-activations that
# count are the bits of so many words: a loop over the bits of many inputs is mispredicted less often than one for each.
ROWS, LANES = 8, 16
WORDS = ROWS * LANES // 64

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
_INTS = ir.VectorType(_INT32, LANES)
# Columns that `axpy` and `dot` take at a time.
_MASK = _INT64(~(LANES - 1))


@intrinsic
def tile(typingctx, x, row, panels, at, bias, weights, floors, floor, out, masks):  # type: ignore[no-untyped-def]
    """out[r] = bias[LANES·at :][:LANES] + x[row + r] @ panels[at] for r < ROWS: pre-activations, and which count.

    Bit LANES·r + l of masks, read as one number, is set where out[r, l] · weights[LANES·at + l] > floors[floor + r].
    x [b, d], panels [panels, d, LANES], bias and weights [panels · LANES], floors [at least floor + ROWS],
    out [ROWS, LANES] float32; masks [WORDS] int64. Rows beyond the last are computed from the last row: the caller
    ignores them.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, row, panels, at, bias, weights, floors, floor, out, masks = _arrays(context, builder, signature, arguments)
        b, d = cgutils.unpack_tuple(builder, x.shape)
        last = builder.sub(b, _INT64(1))
        inputs = []
        for r in range(ROWS):
            wanted = builder.add(row, _INT64(r))
            wanted = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
            inputs.append(builder.gep(x.data, [builder.mul(wanted, d)]))
        offset = builder.mul(at, _INT64(LANES))
        panel = builder.gep(panels.data, [builder.mul(offset, d)])
        start = _load(builder, builder.gep(bias.data, [offset]))
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(ROWS)]
        with cgutils.for_range(builder, d) as loop:
            weight = _load(builder, builder.gep(panel, [builder.mul(loop.index, _INT64(LANES))]))
            for pointer, total in zip(inputs, sums, strict=True):
                scalar = builder.load(builder.gep(pointer, [loop.index]))
                builder.store(_fma(builder, _splat(builder, scalar), weight, builder.load(total)), total)
        scale = _load(builder, builder.gep(weights.data, [offset]))
        words = [_INT64(0)] * WORDS
        for r, total in enumerate(sums):
            value = builder.load(total)
            _store(builder, value, builder.gep(out.data, [_INT64(r * LANES)]))
            bound = builder.load(builder.gep(floors.data, [builder.add(floor, _INT64(r))]))
            above = builder.fcmp_ordered(">", builder.fmul(value, scale), _splat(builder, bound))
            bits = builder.zext(builder.bitcast(above, ir.IntType(LANES)), _INT64)
            word, shift = divmod(r * LANES, 64)
            words[word] = builder.or_(words[word], builder.shl(bits, _INT64(shift)))
        for at, word in enumerate(words):
            builder.store(word, builder.gep(masks.data, [_INT64(at)]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(x, i64, panels, i64, bias, weights, floors, i64, out, masks), codegen


@intrinsic
def keep_largest(typingctx, ranks, codes, latents, at, new_ranks, new_codes, new_latents, waiting, floors, places):  # type: ignore[no-untyped-def]
    """Enter what waits among what is kept, of inputs [LANES·at :][:LANES] side by side: those of largest rank stay.

    ranks, codes float32 and latents int32 [inputs / LANES, k, LANES]: what is kept. new_* [inputs / LANES, ·, LANES]:
    what waits, latents ascending, waiting int32 [inputs] of each input. What exceeds the smallest takes its place:
    floors float32 [inputs] is its rank, places int32 [inputs] where it lies. Of equal ones the highest latent goes.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        ranks, codes, latents, at, *new, waiting, floors, places = _arrays(context, builder, signature, arguments)
        offset = builder.mul(at, _INT64(LANES))
        k, room = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (ranks, new[0]))
        kept = [builder.gep(array.data, [builder.mul(offset, k)]) for array in (ranks, codes, latents)]
        new = [builder.gep(array.data, [builder.mul(offset, room)]) for array in new]
        waiting, floors, places = (builder.gep(array.data, [offset]) for array in (waiting, floors, places))
        kinds = _VECTOR, _VECTOR, _INTS

        def row(tables: Any, entry: Any) -> list[Any]:
            return [builder.gep(table, [builder.mul(entry, _INT64(LANES))]) for table in tables]

        counts = _load(builder, waiting, _INTS)
        floor = cgutils.alloca_once_value(builder, _load(builder, floors))
        place = cgutils.alloca_once_value(builder, _load(builder, places, _INTS))
        latest, next_place = (cgutils.alloca_once(builder, _INTS) for _ in range(2))
        longest = cgutils.alloca_once_value(builder, _INT32(0))
        with cgutils.for_range(builder, _INT64(LANES)) as lane:
            count = builder.load(builder.gep(waiting, [lane.index]))
            largest = builder.load(longest)
            builder.store(builder.select(builder.icmp_signed(">", count, largest), count, largest), longest)
        with cgutils.for_range(builder, builder.zext(builder.load(longest), _INT64)) as newcomer:
            values = [_load(builder, *each) for each in zip(row(new, newcomer.index), kinds, strict=True)]
            entry = _splat(builder, builder.trunc(newcomer.index, _INT32))
            enters = builder.and_(
                builder.fcmp_ordered(">", values[0], builder.load(floor)), builder.icmp_signed("<", entry, counts)
            )
            some = builder.icmp_unsigned("!=", builder.bitcast(enters, ir.IntType(LANES)), ir.IntType(LANES)(0))
            with builder.if_then(some):
                builder.store(ir.Constant(_VECTOR, [math.inf] * LANES), floor)
                builder.store(ir.Constant(_INTS, [-1] * LANES), latest)
                with cgutils.for_range(builder, k) as slot:
                    here = _splat(builder, builder.trunc(slot.index, _INT32))
                    taken = builder.and_(enters, builder.icmp_signed("==", builder.load(place), here))
                    for pointer, value, kind in zip(row(kept, slot.index), values, kinds, strict=True):
                        _store(builder, builder.select(taken, value, _load(builder, pointer, kind)), pointer)
                    rank, _, latent = (_load(builder, *each) for each in zip(row(kept, slot.index), kinds, strict=True))
                    tied = builder.and_(
                        builder.fcmp_ordered("==", rank, builder.load(floor)),
                        builder.icmp_signed(">", latent, builder.load(latest)),
                    )
                    goes = builder.or_(builder.fcmp_ordered("<", rank, builder.load(floor)), tied)
                    for value, variable in ((rank, floor), (latent, latest), (here, next_place)):
                        builder.store(builder.select(goes, value, builder.load(variable)), variable)
                builder.store(builder.load(next_place), place)
        _store(builder, builder.load(floor), floors)
        _store(builder, builder.load(place), places)
        return context.get_dummy_value()

    i64 = types.int64
    tables = ranks, codes, latents, i64, new_ranks, new_codes, new_latents
    return types.void(*tables, waiting, floors, places), codegen


@intrinsic
def add_rows(typingctx, y, i, scales, scale, x, rows, row, begin, end):  # type: ignore[no-untyped-def]
    """y[i] += Σ scales[e, scale] · x[rows[e, row]] over e in [begin, end), in order.

    y and x: float32 matrices of as many columns; scales float32 [entries, ·], rows int32 [entries, ·].
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        y, i, scales, scale, x, rows, row, begin, end = _arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, y.shape)[1]
        target = builder.gep(y.data, [builder.mul(i, d)])

        def entry(table: Any, e: Any, column: Any) -> Any:
            stride = cgutils.unpack_tuple(builder, table.shape)[1]
            return builder.load(builder.gep(table.data, [builder.add(builder.mul(e, stride), column)]))

        def columns(at: Any, vectors: int) -> None:
            """So many vectors of columns from `at` (0: one column), their sums in registers."""
            load, store = (_load, _store) if vectors else (ir.IRBuilder.load, ir.IRBuilder.store)
            offsets = [builder.add(at, _INT64(LANES * v)) for v in range(max(vectors, 1))]
            places = [builder.gep(target, [offset]) for offset in offsets]
            sums = [cgutils.alloca_once_value(builder, load(builder, place)) for place in places]
            with cgutils.for_range_slice(builder, begin, end, _INT64(1)) as (e, _):
                factor = entry(scales, e, scale)
                factor = _splat(builder, factor) if vectors else factor
                source = builder.gep(x.data, [builder.mul(builder.zext(entry(rows, e, row), _INT64), d)])
                for offset, total in zip(offsets, sums, strict=True):
                    value = load(builder, builder.gep(source, [offset]))
                    builder.store(_fma(builder, factor, value, builder.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                store(builder, builder.load(total), place)

        at = _INT64(0)
        for vectors in (4, 1, 0):
            step = _INT64(LANES * vectors or 1)
            stop = builder.sub(d, builder.urem(builder.sub(d, at), step))
            with cgutils.for_range_slice(builder, at, stop, step) as (column, _):
                columns(column, vectors)
            at = stop
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(y, i64, scales, i64, x, rows, i64, i64, i64), codegen


@intrinsic
def prefetch(typingctx, x, j):  # type: ignore[no-untyped-def]
    """Ask for row j of a float32 matrix, which will be needed soon."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, j = _arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, x.shape)[1]
        row = builder.gep(x.data, [builder.mul(j, d)])
        byte = ir.IntType(8).as_pointer()
        ask = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32]), "llvm.prefetch.p0i8"
        )
        with cgutils.for_range_slice(builder, _INT64(0), d, _INT64(LANES)) as (at, _):
            # To be read, and kept; data, not code.
            builder.call(ask, [builder.bitcast(builder.gep(row, [at]), byte), _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@intrinsic
def dot(typingctx, y, i, x, j):  # type: ignore[no-untyped-def]
    """y[i] · x[j]: rows of float32 matrices of as many columns."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        y, i, x, j = _arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, y.shape)[1]
        one, other = builder.gep(y.data, [builder.mul(i, d)]), builder.gep(x.data, [builder.mul(j, d)])
        whole = builder.and_(d, _MASK)
        sums = cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * LANES))
        with cgutils.for_range_slice(builder, _INT64(0), whole, _INT64(LANES)) as (at, _):
            factors = [_load(builder, builder.gep(pointer, [at])) for pointer in (one, other)]
            builder.store(_fma(builder, factors[0], factors[1], builder.load(sums)), sums)
        total = cgutils.alloca_once_value(builder, _sum(builder, builder.load(sums)))
        with cgutils.for_range_slice(builder, whole, d, _INT64(1)) as (at, _):
            factors = [builder.load(builder.gep(pointer, [at])) for pointer in (one, other)]
            builder.store(_fma(builder, factors[0], factors[1], builder.load(total)), total)
        return builder.load(total)

    return types.float32(y, types.int64, x, types.int64), codegen


@intrinsic
def position(typingctx, word, mask):  # type: ignore[no-untyped-def]
    """Input and lane in the tile of the lowest set bit of masks[word], which is not zero."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        count = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INT64, [_INT64, ir.IntType(1)]), "llvm.cttz.i64"
        )
        word, mask = arguments
        bit = builder.call(count, [mask, ir.IntType(1)(1)])
        row = builder.add(builder.mul(word, _INT64(64 // LANES)), builder.udiv(bit, _INT64(LANES)))
        return context.make_tuple(builder, signature.return_type, [row, builder.urem(bit, _INT64(LANES))])

    return types.UniTuple(types.int64, 2)(types.int64, types.int64), codegen


def _arrays(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> list[Any]:
    """The arguments, arrays as structures with their data and shape."""
    return [
        context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def _load(builder: ir.IRBuilder, pointer: Any, vector: Any = _VECTOR) -> Any:
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = 4
    return loaded


def _store(builder: ir.IRBuilder, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 4


def _fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, of vectors or of scalars."""
    name = "llvm.fmuladd.v16f32" if a.type == _VECTOR else "llvm.fmuladd.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined), scalar, _INT32(0))
    return _shuffle(builder, first, [0] * LANES)


def _sum(builder: ir.IRBuilder, vector: Any) -> Any:
    """The sum of a vector's lanes: halves onto each other."""
    half = LANES // 2
    while half:
        vector = builder.fadd(vector, _shuffle(builder, vector, [(lane + half) % LANES for lane in range(LANES)]))
        half //= 2
    return builder.extract_element(vector, _INT32(0))


def _shuffle(builder: ir.IRBuilder, vector: Any, lanes: Sequence[int]) -> Any:
    undefined = ir.Constant(vector.type, ir.Undefined)
    return builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(_INT32, LANES), list(lanes)))
