"""Rows of float32 matrices in compiled code: sums of them, products with each other. Each sum has one order."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.encoder_tile import ACROSS
from sae_sweep.kernels.cpu.simd import (
    FLOAT,
    INT32,
    INT64,
    LANES,
    VECTOR,
    arrays,
    fma,
    load,
    splat,
    store,
    sum_lanes,
)

# Columns that `dot` takes at a time.
_MASK = INT64(~(LANES - 1))
# As many sums as it takes to have the next ready when its last product is, and products of each without a branch.
SIDE_BY_SIDE, UNROLLED = 8, 8


@intrinsic
def add_rows(typingctx, y, i, scales, scale, x, rows, row, entries):  # type: ignore[no-untyped-def]
    """y[i] += Σ scales[e, scale] · x[rows[e, row]] over the entries [begin, end), in order.

    y and x: float32 matrices of as many columns; scales float32 [entries, ·], rows int32 [entries, ·].
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        y, i, scales, scale, x, rows, row, (begin, end) = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, y.shape)[1]
        target = builder.gep(y.data, [builder.mul(i, d)])

        def entry(table: Any, e: Any, column: Any) -> Any:
            stride = cgutils.unpack_tuple(builder, table.shape)[1]
            return builder.load(builder.gep(table.data, [builder.add(builder.mul(e, stride), column)]))

        def columns(at: Any, vectors: int) -> None:
            """So many vectors of columns from `at` (0: one column), their sums in registers."""
            get, put = (load, store) if vectors else (ir.IRBuilder.load, ir.IRBuilder.store)
            offsets = [builder.add(at, INT64(LANES * v)) for v in range(max(vectors, 1))]
            places = [builder.gep(target, [offset]) for offset in offsets]
            sums = [cgutils.alloca_once_value(builder, get(builder, place)) for place in places]
            with cgutils.for_range_slice(builder, begin, end, INT64(1)) as (e, _):
                factor = entry(scales, e, scale)
                factor = splat(builder, factor) if vectors else factor
                source = builder.gep(x.data, [builder.mul(builder.zext(entry(rows, e, row), INT64), d)])
                for offset, total in zip(offsets, sums, strict=True):
                    value = get(builder, builder.gep(source, [offset]))
                    builder.store(fma(builder, factor, value, builder.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                put(builder, builder.load(total), place)

        at = INT64(0)
        for vectors in (4, 1, 0):
            step = INT64(LANES * vectors or 1)
            stop = builder.sub(d, builder.urem(builder.sub(d, at), step))
            with cgutils.for_range_slice(builder, at, stop, step) as (column, _):
                columns(column, vectors)
            at = stop
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(y, i64, scales, i64, x, rows, i64, types.UniTuple(i64, 2)), codegen


@intrinsic
def prefetch(typingctx, x, j):  # type: ignore[no-untyped-def]
    """Ask for row j of a float32 matrix, which will be needed soon."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, j = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, x.shape)[1]
        row = builder.gep(x.data, [builder.mul(j, d)])
        byte = ir.IntType(8).as_pointer()
        ask = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32]), "llvm.prefetch.p0i8"
        )
        with cgutils.for_range_slice(builder, INT64(0), d, INT64(LANES)) as (at, _):
            # To be read, and kept; data, not code.
            builder.call(ask, [builder.bitcast(builder.gep(row, [at]), byte), INT32(0), INT32(3), INT32(1)])
        return context.get_dummy_value()

    return types.void(x, types.int64), codegen


@intrinsic
def dot(typingctx, y, i, x, j):  # type: ignore[no-untyped-def]
    """y[i] · x[j]: rows of float32 matrices of as many columns."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        y, i, x, j = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, y.shape)[1]
        one, other = builder.gep(y.data, [builder.mul(i, d)]), builder.gep(x.data, [builder.mul(j, d)])
        whole = builder.and_(d, _MASK)
        sums = cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES))
        with cgutils.for_range_slice(builder, INT64(0), whole, INT64(LANES)) as (at, _):
            factors = [load(builder, builder.gep(pointer, [at])) for pointer in (one, other)]
            builder.store(fma(builder, factors[0], factors[1], builder.load(sums)), sums)
        total = cgutils.alloca_once_value(builder, sum_lanes(builder, builder.load(sums)))
        with cgutils.for_range_slice(builder, whole, d, INT64(1)) as (at, _):
            factors = [builder.load(builder.gep(pointer, [at])) for pointer in (one, other)]
            builder.store(fma(builder, factors[0], factors[1], builder.load(total)), total)
        return builder.load(total)

    return types.float32(y, types.int64, x, types.int64), codegen


@intrinsic
def chains(typingctx, W, first, x, row, places, count, starts, out):  # type: ignore[no-untyped-def]
    """out[e] = starts[first + lane] + W[first + lane] · x[row + r], where places[e] = r · ACROSS + lane, e < count.

    Added up one product after the other, as a lane of `tile` does; SIDE_BY_SIDE at a time, since each waits for itself.
    places int32 and out float32 [at least count + SIDE_BY_SIDE]: what lies behind the count is computed from the last
    row of W where there is no other. starts float32.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        W, first, x, row, places, count, starts, out = arrays(context, builder, signature, arguments)
        width, d = cgutils.unpack_tuple(builder, W.shape)
        last = builder.sub(width, INT64(1))
        together = builder.and_(d, INT64(~(UNROLLED - 1)))
        with cgutils.for_range_slice(builder, INT64(0), count, INT64(SIDE_BY_SIDE)) as (begin, _):
            factors, sums = [], []
            for e in range(SIDE_BY_SIDE):
                place = builder.zext(builder.load(builder.gep(places.data, [builder.add(begin, INT64(e))])), INT64)
                latent = builder.add(first, builder.and_(place, INT64(ACROSS - 1)))
                known = builder.select(builder.icmp_signed("<", latent, last), latent, last)
                pairs = (W, known), (x, builder.add(row, builder.udiv(place, INT64(ACROSS))))
                factors.append([builder.gep(array.data, [builder.mul(at, d)]) for array, at in pairs])
                sums.append(cgutils.alloca_once_value(builder, builder.load(builder.gep(starts.data, [latent]))))

            def add(which: range, at: Any) -> None:
                for e in which:
                    one, other = (builder.load(builder.gep(pointer, [at])) for pointer in factors[e])
                    builder.store(fma(builder, one, other, builder.load(sums[e])), sums[e])

            with cgutils.for_range_slice(builder, INT64(0), together, INT64(UNROLLED)) as (at, _):
                # As many at a time as there are registers for their addresses.
                for which in (range(begin, begin + SIDE_BY_SIDE // 2) for begin in (0, SIDE_BY_SIDE // 2)):
                    for i in range(UNROLLED):
                        add(which, builder.add(at, INT64(i)))
            with cgutils.for_range_slice(builder, together, d, INT64(1)) as (at, _):
                add(range(SIDE_BY_SIDE), at)
            for e, total in enumerate(sums):
                builder.store(builder.load(total), builder.gep(out.data, [builder.add(begin, INT64(e))]))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(W, i64, x, i64, places, i64, starts, out), codegen


@intrinsic
def largest(typingctx, x, row):  # type: ignore[no-untyped-def]
    """The largest |x[row, i]|; of no meaning where one of them is no number."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, row = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, x.shape)[1]
        pointer, whole = builder.gep(x.data, [builder.mul(row, d)]), builder.and_(d, _MASK)

        def keep(value: Any, most: Any, name: str) -> None:
            kind = ir.FunctionType(value.type, [value.type])
            size = builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fabs.{name}"), [value])
            before = builder.load(most)
            builder.store(builder.select(builder.fcmp_ordered(">", size, before), size, before), most)

        lanes = cgutils.alloca_once_value(builder, ir.Constant(VECTOR, [0.0] * LANES))
        with cgutils.for_range_slice(builder, INT64(0), whole, INT64(LANES)) as (at, _):
            keep(load(builder, builder.gep(pointer, [at])), lanes, "v16f32")
        most = cgutils.alloca_once_value(builder, FLOAT(0))
        for lane in range(LANES):
            keep(builder.extract_element(builder.load(lanes), INT32(lane)), most, "f32")
        with cgutils.for_range_slice(builder, whole, d, INT64(1)) as (at, _):
            keep(builder.load(builder.gep(pointer, [at])), most, "f32")
        return builder.load(most)

    return types.float32(x, types.int64), codegen
