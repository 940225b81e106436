"""A row of a matrix and those inputs of a tile (narrow_tile.py) that a word has a bit for, in vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.narrow_tile import INPUTS, Builder
from sae_sweep.kernels.cpu.simd import INT64, LANES, VECTOR, add_to, arrays, fma, load, splat, store, sum_lanes

# Vectors of a row that are kept in registers.
_GROUP = 4


@intrinsic
def add_to_inputs(typingctx, rows, row, codes, mask, inputs):  # type: ignore[no-untyped-def]
    """inputs[r] += codes[row, r] · rows[row] for every bit r of the word `mask`.

    rows [n, d] and inputs [INPUTS, d], d a multiple of LANES; codes [n, INPUTS].
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        rows, row, codes, mask, inputs = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, rows.shape)[1]
        scales = builder.gep(codes.data, [builder.mul(row, INT64(INPUTS))])

        def columns(at: Any, vectors: int) -> None:
            source = builder.gep(rows.data, [builder.add(builder.mul(row, d), at)])
            values = [load(builder, builder.gep(source, [INT64(LANES * v)])) for v in range(vectors)]
            with _each_bit(builder, mask) as r:
                scale = splat(builder, builder.load(builder.gep(scales, [r])))
                target = builder.gep(inputs.data, [builder.add(builder.mul(r, d), at)])
                for v, value in enumerate(values):
                    place = builder.gep(target, [INT64(LANES * v)])
                    store(builder, fma(builder, scale, value, load(builder, place)), place)

        _by_groups(builder, d, columns)
        return context.get_dummy_value()

    return types.void(rows, types.int64, codes, types.int64, inputs), codegen


@intrinsic
def add_inputs(typingctx, rows, row, scales, scale, mask, inputs):  # type: ignore[no-untyped-def]
    """rows[row] += Σ scales[scale, r] · inputs[r] over the bits r of the word `mask`, in order.

    rows [n, d] and inputs [INPUTS, d], d a multiple of LANES; scales [·, INPUTS].
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        rows, row, scales, scale, mask, inputs = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, rows.shape)[1]
        factors = builder.gep(scales.data, [builder.mul(scale, INT64(INPUTS))])

        def columns(at: Any, vectors: int) -> None:
            target = builder.gep(rows.data, [builder.add(builder.mul(row, d), at)])
            places = [builder.gep(target, [INT64(LANES * v)]) for v in range(vectors)]
            sums = [cgutils.alloca_once_value(builder, load(builder, place)) for place in places]
            with _each_bit(builder, mask) as r:
                factor = splat(builder, builder.load(builder.gep(factors, [r])))
                source = builder.gep(inputs.data, [builder.add(builder.mul(r, d), at)])
                for v, total in enumerate(sums):
                    value = load(builder, builder.gep(source, [INT64(LANES * v)]))
                    builder.store(fma(builder, factor, value, builder.load(total)), total)
            for place, total in zip(places, sums, strict=True):
                store(builder, builder.load(total), place)

        _by_groups(builder, d, columns)
        return context.get_dummy_value()

    return types.void(rows, types.int64, scales, types.int64, types.int64, inputs), codegen


@intrinsic
def dot_inputs(typingctx, rows, row, mask, inputs, out):  # type: ignore[no-untyped-def]
    """out[r] = rows[row] · inputs[r] for every bit r of the word `mask`, by groups of columns in order.

    rows [n, d] and inputs [INPUTS, d], d a multiple of LANES; out [INPUTS], zeros where a bit is set.
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        rows, row, mask, inputs, out = arrays(context, builder, signature, arguments)
        d = cgutils.unpack_tuple(builder, rows.shape)[1]

        def columns(at: Any, vectors: int) -> None:
            source = builder.gep(rows.data, [builder.add(builder.mul(row, d), at)])
            values = [load(builder, builder.gep(source, [INT64(LANES * v)])) for v in range(vectors)]
            with _each_bit(builder, mask) as r:
                other = builder.gep(inputs.data, [builder.add(builder.mul(r, d), at)])
                total = ir.Constant(VECTOR, [0.0] * LANES)
                for v, value in enumerate(values):
                    total = fma(builder, value, load(builder, builder.gep(other, [INT64(LANES * v)])), total)
                add_to(builder, out, r, sum_lanes(builder, total))

        _by_groups(builder, d, columns)
        return context.get_dummy_value()

    return types.void(rows, types.int64, types.int64, inputs, out), codegen


@intrinsic
def count_bits(typingctx, mask):  # type: ignore[no-untyped-def]
    """How many bits of an int64 are set."""

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(INT64, [INT64])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.i64"), [arguments[0]])

    return types.int64(types.int64), codegen


def _by_groups(builder: Builder, d: Any, columns: Callable[[Any, int], None]) -> None:
    """Code of `columns(at, vectors)` for all of d columns, as many vectors at a time as registers hold."""
    begin: Any = INT64(0)
    for vectors in (_GROUP, _GROUP // 2, 1):
        width = INT64(LANES * vectors)
        stop = builder.sub(d, builder.urem(builder.sub(d, begin), width))
        with cgutils.for_range_slice(builder, begin, stop, width) as (at, _):
            columns(at, vectors)
        begin = stop


class _each_bit:
    """Code for the number of every set bit of a word, ascending."""

    def __init__(self, builder: Builder, word: Any) -> None:
        self.builder, self.word = builder, word

    def __enter__(self) -> Any:
        builder = self.builder
        before, self.head, body, self.done = (
            builder.block,
            *(builder.append_basic_block(n) for n in ("bit", "of", "end")),
        )
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.rest = builder.phi(INT64)
        self.rest.add_incoming(self.word, before)
        builder.cbranch(builder.icmp_unsigned("!=", self.rest, INT64(0)), body, self.done)
        builder.position_at_end(body)
        kind = ir.FunctionType(INT64, [INT64, ir.IntType(1)])
        trailing = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(trailing, [self.rest, ir.IntType(1)(1)])

    def __exit__(self, *_: object) -> None:
        builder = self.builder
        following = builder.and_(self.rest, builder.sub(self.rest, INT64(1)))
        self.rest.add_incoming(following, builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.done)
