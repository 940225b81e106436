"""What the step of narrow SAEs does to a tile of inputs, in vectors: products, transposes, what fires.

A tile holds INPUTS inputs side by side: of codes [width, INPUTS] a row is one latent on every input of the tile, so
what happens to each input by itself happens to sixteen at once, and an input's sums run over latents in order. Each sum
has one order, by its operands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.simd import (
    FLOAT,
    INT32,
    INT64,
    INTS,
    LANES,
    VECTOR,
    add_to,
    arrays,
    fma,
    has,
    load,
    splat,
    store,
    sum_lanes,
)
from sae_sweep.saes.limits import TILE_INPUTS

# Inputs of a tile: one bit of a word each.
INPUTS = TILE_INPUTS
BLOCKS = INPUTS // LANES
# Rows and vectors of a product whose sums are kept in registers (sixteen of eight numbers, or 32 of sixteen), and
# products of each sum between two branches.
_ROWS, _VECTORS = (12, 2) if has("avx512f") else (6, 1)
_UNROLLED = 2
# Side of the square that is transposed in registers.
_SQUARE = 8
_EIGHT = ir.VectorType(FLOAT, _SQUARE)

# llvmlite tells no types.
Builder = Any


def _strides(builder: Builder, array: Any) -> list[Any]:
    """Strides in numbers, not bytes."""
    return [builder.sdiv(stride, INT64(4)) for stride in cgutils.unpack_tuple(builder, array.strides)]


@intrinsic
def product(typingctx, A, B, starts, C):  # type: ignore[no-untyped-def]
    """C = starts[:, None] + A @ B.

    A [m, k], B [k, n], starts [m], C [m, n] float32; n is a multiple of LANES, and rows of B and C are contiguous.
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        A, B, starts, C = arrays(context, builder, signature, arguments)

        _emit_product(builder, A, B, C, lambda row, place: splat(builder, _start(builder, starts, row)))
        return context.get_dummy_value()

    return types.void(A, B, starts, C), codegen


@intrinsic
def encode(typingctx, A, B, starts, C, masks):  # type: ignore[no-untyped-def]
    """C [m, INPUTS] = max(starts[:, None] + A @ B, 0); bit r of masks[i], int64 [m], is set where C[i, r] > 0."""

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        A, B, starts, C, masks = arrays(context, builder, signature, arguments)
        _emit_codes(builder, A, B, C, masks, lambda row, place: splat(builder, _start(builder, starts, row)))
        return context.get_dummy_value()

    return types.void(A, B, starts, C, masks), codegen


@intrinsic
def correct(typingctx, A, B, starts, before, C, masks):  # type: ignore[no-untyped-def]
    """As `encode` of starts[:, None] + before + A @ B; before [m, INPUTS] lies as C does."""

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        A, B, starts, before, C, masks = arrays(context, builder, signature, arguments)
        first, other = (builder.ptrtoint(array.data, INT64) for array in (C, before))
        away = builder.sub(other, first)

        def begin(row: Any, place: Any) -> Any:
            there = builder.inttoptr(builder.add(builder.ptrtoint(place, INT64), away), FLOAT.as_pointer())
            return builder.fadd(splat(builder, _start(builder, starts, row)), load(builder, there))

        _emit_codes(builder, A, B, C, masks, begin)
        return context.get_dummy_value()

    return types.void(A, B, starts, before, C, masks), codegen


def _start(builder: Builder, starts: Any, row: Any) -> Any:
    return builder.load(builder.gep(starts.data, [row]))


def _emit_codes(builder: Builder, A: Any, B: Any, C: Any, masks: Any, begin: Callable[[Any, Any], Any]) -> None:
    """Code of a product of which what exceeds 0 is kept, and marked."""
    bits, zeros = ir.IntType(LANES), ir.Constant(VECTOR, [0.0] * LANES)
    words = builder.bitcast(masks.data, bits.as_pointer())

    def finish(column: Any, sums: Sequence[tuple[Any, Any, Any]]) -> None:
        # From registers: a code that is read, compared and written back becomes a masked store, which is slow.
        for row, place, value in sums:
            on = builder.fcmp_ordered(">", value, zeros)
            store(builder, builder.select(on, value, zeros), place)
            word = builder.add(builder.mul(row, INT64(BLOCKS)), builder.udiv(column, INT64(LANES)))
            builder.store(builder.bitcast(on, bits), builder.gep(words, [word]))

    _emit_product(builder, A, B, C, begin, finish)


@intrinsic
def keep_best(typingctx, A, B, best, latents):  # type: ignore[no-untyped-def]
    """What exceeds `best` [INPUTS] in its column of A @ B replaces it, and its row's number int32 latents [INPUTS].

    Of equal ones the lower row stays. Shapes as of `product`; nothing else of it is written.
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        A, B, best, latents = arrays(context, builder, signature, arguments)
        zeros = ir.Constant(VECTOR, [0.0] * LANES)

        def finish(column: Any, sums: Sequence[tuple[Any, Any, Any]]) -> None:
            kept = [builder.gep(array.data, [column]) for array in (best, latents)]
            most, which = load(builder, kept[0]), load(builder, kept[1], INTS)
            for row, _, value in sums:
                latent, larger = splat(builder, builder.trunc(row, INT32)), builder.fcmp_ordered(">", value, most)
                most, which = builder.select(larger, value, most), builder.select(larger, latent, which)
            for place, value in zip(kept, (most, which), strict=True):
                store(builder, value, place)

        _emit_product(builder, A, B, B, lambda row, place: zeros, finish)
        return context.get_dummy_value()

    return types.void(A, B, best, latents), codegen


@intrinsic
def add_product(typingctx, A, B, C):  # type: ignore[no-untyped-def]
    """C += A @ B, shapes as of `product`."""

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        A, B, C = arrays(context, builder, signature, arguments)
        _emit_product(builder, A, B, C, lambda row, place: load(builder, place))
        return context.get_dummy_value()

    return types.void(A, B, C), codegen


def _emit_product(
    builder: Builder,
    A: Any,
    B: Any,
    C: Any,
    begin: Callable[[Any, Any], Any],
    finish: Callable[[Any, Sequence[tuple[Any, Any, Any]]], None] | None = None,
) -> None:
    """Code of a product: rows in pieces of nearly equal size.

    The sums of a vector begin at `begin(row, address)`; `finish(column, [(row, address, sums), …])` says what becomes
    of those of a piece, by default they are stored.
    """
    m, k = cgutils.unpack_tuple(builder, A.shape)
    n = cgutils.unpack_tuple(builder, B.shape)[1]
    across, along = _strides(builder, A)
    b_row, c_row = (_strides(builder, array)[0] for array in (B, C))

    def piece(rows: int, vectors: int, at: Any, column: Any) -> None:
        numbers = [builder.add(at, INT64(row)) for row in range(rows)]
        factors = [builder.gep(A.data, [builder.mul(number, across)]) for number in numbers]
        places = [[builder.gep(C.data, [builder.add(builder.mul(number, c_row), column)])] for number in numbers]
        for each in places:
            each += [builder.gep(each[0], [INT64(LANES * v)]) for v in range(1, vectors)]
        sums = [
            [cgutils.alloca_once_value(builder, begin(number, place)) for place in each]
            for number, each in zip(numbers, places, strict=True)
        ]
        source = builder.gep(B.data, [column])

        def add(i: Any) -> None:
            first = builder.gep(source, [builder.mul(i, b_row)])
            others = [load(builder, builder.gep(first, [INT64(LANES * v)])) for v in range(vectors)]
            offset = builder.mul(i, along)
            for factor, totals in zip(factors, sums, strict=True):
                scalar = splat(builder, builder.load(builder.gep(factor, [offset])))
                for other, total in zip(others, totals, strict=True):
                    builder.store(fma(builder, scalar, other, builder.load(total)), total)

        whole = builder.and_(k, INT64(~(_UNROLLED - 1)))
        with cgutils.for_range_slice(builder, INT64(0), whole, INT64(_UNROLLED)) as (i, _):
            for unrolled in range(_UNROLLED):
                add(builder.add(i, INT64(unrolled)))
        with cgutils.for_range_slice(builder, whole, k, INT64(1)) as (i, _):
            add(i)
        for v in range(vectors):
            of_piece = [
                (number, each[v], builder.load(totals[v]))
                for number, each, totals in zip(numbers, places, sums, strict=True)
            ]
            if finish:
                finish(builder.add(column, INT64(LANES * v)), of_piece)
                continue
            for _, place, value in of_piece:
                store(builder, value, place)

    pieces = builder.udiv(builder.add(m, INT64(_ROWS - 1)), INT64(_ROWS))
    size, longer = builder.udiv(m, pieces), builder.urem(m, pieces)
    with cgutils.for_range(builder, pieces) as loop:
        more = builder.icmp_signed("<", loop.index, longer)
        at = builder.add(builder.mul(loop.index, size), builder.select(more, loop.index, longer))
        rows, begin_column = builder.add(size, builder.zext(more, INT64)), INT64(0)
        for vectors in range(_VECTORS, 0, -1):
            width = INT64(LANES * vectors)
            stop = builder.sub(n, builder.urem(builder.sub(n, begin_column), width))
            with cgutils.for_range_slice(builder, begin_column, stop, width) as (column, _):
                _switch(builder, rows, lambda rows, v=vectors, c=column: piece(rows, v, at, c))  # type: ignore[misc]
            begin_column = stop


def _switch(builder: Builder, value: Any, case: Callable[[int], None]) -> None:
    """Code of `case(value)` for values from 1 to _ROWS."""
    done = builder.append_basic_block("done")
    switch = builder.switch(value, done)
    for each in range(1, _ROWS + 1):
        block = builder.append_basic_block(f"rows{each}")
        switch.add_case(INT64(each), block)
        with builder.goto_block(block):
            case(each)
            builder.branch(done)
    builder.position_at_end(done)


@intrinsic
def transpose(typingctx, source, target):  # type: ignore[no-untyped-def]
    """target = source.T: float32 matrices with contiguous rows, both sizes multiples of 8."""

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        source, target = arrays(context, builder, signature, arguments)
        rows, columns = cgutils.unpack_tuple(builder, source.shape)
        from_row, to_row = (_strides(builder, array)[0] for array in (source, target))
        side = INT64(_SQUARE)
        with (
            cgutils.for_range_slice(builder, INT64(0), rows, side) as (row, _),
            cgutils.for_range_slice(builder, INT64(0), columns, side) as (column, _),
        ):
            begin = builder.gep(source.data, [builder.add(builder.mul(row, from_row), column)])
            read = [
                load(builder, builder.gep(begin, [builder.mul(INT64(i), from_row)]), _EIGHT) for i in range(_SQUARE)
            ]
            begin = builder.gep(target.data, [builder.add(builder.mul(column, to_row), row)])
            for i, vector in enumerate(_transposed(builder, read)):
                store(builder, vector, builder.gep(begin, [builder.mul(INT64(i), to_row)]))
        return context.get_dummy_value()

    return types.void(source, target), codegen


def _transposed(builder: Builder, rows: Sequence[Any]) -> list[Any]:
    """The columns of eight vectors of eight: pairs of numbers change places, then pairs of pairs, then halves."""

    def mix(one: Any, other: Any, lanes: Sequence[int]) -> Any:
        return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT32, _SQUARE), list(lanes)))

    by_one = [(0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)]
    by_two = [(0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)]
    by_four = [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)]
    ones = [mix(rows[i], rows[i + 1], lanes) for i in range(0, _SQUARE, 2) for lanes in by_one]
    twos = [mix(ones[i + j], ones[i + j + 2], lanes) for i in (0, 4) for j in (0, 1) for lanes in by_two]
    return [mix(twos[i], twos[i + 4], lanes) for lanes in by_four for i in range(4)]


@intrinsic
def finish_gains(typingctx, gains, codes, slopes, scales, of_penalty, biases, pulls):  # type: ignore[no-untyped-def]
    """From what the error gains per unit of a code to what the loss does, in place, and its sums over the inputs.

    gains [n, INPUTS] = gains + of_penalty · scales[:, None] · slopes where codes > 0, else 0; biases [n] += Σ of it;
    pulls [n] += of_penalty · Σ slopes · codes. codes, slopes [n, INPUTS]; scales [n].
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        gains, codes, slopes, scales, weight, biases, pulls = arrays(context, builder, signature, arguments)
        count, zeros = cgutils.unpack_tuple(builder, gains.shape)[0], ir.Constant(VECTOR, [0.0] * LANES)
        with cgutils.for_range(builder, count) as loop:
            scale = builder.fmul(weight, builder.load(builder.gep(scales.data, [loop.index])))
            scale, bias, pull = splat(builder, scale), zeros, zeros
            for block in range(BLOCKS):
                at = builder.add(builder.mul(loop.index, INT64(INPUTS)), INT64(LANES * block))
                gain, code, slope = (load(builder, builder.gep(array.data, [at])) for array in (gains, codes, slopes))
                on = builder.fcmp_ordered(">", code, zeros)
                gain = builder.select(on, fma(builder, slope, scale, gain), zeros)
                store(builder, gain, builder.gep(gains.data, [at]))
                bias, pull = builder.fadd(bias, gain), fma(builder, slope, code, pull)
            add_to(builder, biases, loop.index, sum_lanes(builder, bias))
            add_to(builder, pulls, loop.index, builder.fmul(weight, sum_lanes(builder, pull)))
        return context.get_dummy_value()

    return types.void(gains, codes, slopes, scales, types.float32, biases, pulls), codegen
