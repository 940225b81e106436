"""What the step of narrow SAEs does to a tile of inputs, in vectors: products, transposes, what fires, rows by bits.

A tile holds INPUTS inputs side by side: of codes [width, INPUTS] a row is one latent on every input of the tile, so
what happens to each input by itself happens to sixteen at once, and an input's sums run over latents in order. Each sum
has one order, by its operands alone.
"""

from __future__ import annotations

import math
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
    arrays,
    fma,
    has,
    load,
    splat,
    store,
    sum_lanes,
)

# Inputs of a tile: one bit of a word each.
INPUTS = 64
_BLOCKS = INPUTS // LANES
# Rows and vectors of a product whose sums are kept in registers (sixteen of eight numbers, or 32 of sixteen), and
# products of each sum between two branches.
_ROWS, _VECTORS = (12, 2) if has("avx512f") else (6, 1)
_UNROLLED = 2
# Vectors of a row that are kept in registers.
_GROUP = 4
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
            word = builder.add(builder.mul(row, INT64(_BLOCKS)), builder.udiv(column, INT64(LANES)))
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
def keep_top(typingctx, codes, first, norms, ranks, latents):  # type: ignore[no-untyped-def]
    """Enter codes · norms of latents first + [0, n) among the k largest of each input so far, largest first.

    codes [n, INPUTS]; norms [width]; ranks float32 and latents int32 [k, INPUTS]. Of equal ones the lower latent stays.
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        codes, first, norms, ranks, latents = arrays(context, builder, signature, arguments)
        count, k = (cgutils.unpack_tuple(builder, array.shape)[0] for array in (codes, ranks))
        last, one = builder.mul(builder.sub(k, INT64(1)), INT64(INPUTS)), builder.icmp_signed("==", k, INT64(1))

        def ranked(number: Any, place: Any) -> tuple[Any, Any]:
            """Rank and number of latent first + number, for the inputs from `place` on."""
            latent = builder.add(first, number)
            norm = splat(builder, builder.load(builder.gep(norms.data, [latent])))
            at = builder.add(builder.mul(number, INT64(INPUTS)), place)
            rank = builder.fmul(load(builder, builder.gep(codes.data, [at])), norm)
            return rank, splat(builder, builder.trunc(latent, INT32))

        def keep_one(place: Any) -> None:
            """With one slot it is quicker to choose than to ask whether there is anything to choose."""
            kept = [builder.gep(array.data, [place]) for array in (ranks, latents)]
            most = cgutils.alloca_once_value(builder, load(builder, kept[0]))
            which = cgutils.alloca_once_value(builder, load(builder, kept[1], INTS))
            with cgutils.for_range(builder, count) as loop:
                rank, latent = ranked(loop.index, place)
                larger = builder.fcmp_ordered(">", rank, builder.load(most))
                builder.store(builder.select(larger, rank, builder.load(most)), most)
                builder.store(builder.select(larger, latent, builder.load(which)), which)
            for variable, slot in zip((most, which), kept, strict=True):
                store(builder, builder.load(variable), slot)

        def enter(place: Any, rank: Any, latent: Any) -> None:
            """Go through the slots from the largest down: from where one enters, all that follow move down by one."""
            none = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)
            entered = cgutils.alloca_once_value(builder, none)
            rank, latent = cgutils.alloca_once_value(builder, rank), cgutils.alloca_once_value(builder, latent)
            with cgutils.for_range(builder, k) as slot:
                offset = builder.add(place, builder.mul(slot.index, INT64(INPUTS)))
                kept = [builder.gep(array.data, [offset]) for array in (ranks, latents)]
                old, new = load(builder, kept[0]), builder.load(rank)
                old_latent, new_latent = load(builder, kept[1], INTS), builder.load(latent)
                larger = builder.or_(builder.load(entered), builder.fcmp_ordered(">", new, old))
                builder.store(larger, entered)
                store(builder, builder.select(larger, new, old), kept[0])
                store(builder, builder.select(larger, new_latent, old_latent), kept[1])
                builder.store(builder.select(larger, old, new), rank)
                builder.store(builder.select(larger, old_latent, new_latent), latent)

        def keep_several(place: Any) -> None:
            smallest = builder.gep(ranks.data, [builder.add(last, place)])
            floor = cgutils.alloca_once_value(builder, load(builder, smallest))
            with cgutils.for_range(builder, count) as loop:
                rank, latent = ranked(loop.index, place)
                enters = builder.fcmp_ordered(">", rank, builder.load(floor))
                some = builder.icmp_unsigned("!=", builder.bitcast(enters, ir.IntType(LANES)), ir.IntType(LANES)(0))
                with builder.if_then(some):
                    enter(place, rank, latent)
                    builder.store(load(builder, smallest), floor)

        for block in range(_BLOCKS):
            with builder.if_else(one) as (single, several):
                with single:
                    keep_one(INT64(LANES * block))
                with several:
                    keep_several(INT64(LANES * block))
        return context.get_dummy_value()

    return types.void(codes, types.int64, norms, ranks, latents), codegen


@intrinsic
def mark_top(typingctx, codes, norms, k, masks, ranks, latents):  # type: ignore[no-untyped-def]
    """Bit r of masks[i], int64 [n], is set where codes[i, r] · norms[i] is above 0 and among the k largest of input r.

    codes [n, INPUTS], none below 0; norms [n]; ranks float32 and latents int32 [n · INPUTS] are overwritten. Returns
    whether more than k bits of an input are set, because ranks are equal.

    The least of the largest of k groups of latents is what surely k of an input reach; few others do. Among these the
    k-th largest is sought by halving the numbers between it and the largest.
    """

    def codegen(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        codes, norms, k, masks, ranks, latents = arrays(context, builder, signature, arguments)
        n = cgutils.unpack_tuple(builder, codes.shape)[0]
        words = builder.bitcast(masks.data, ir.IntType(LANES).as_pointer())
        one, wanted = ir.Constant(INTS, [1] * LANES), splat(builder, builder.trunc(k, INT32))
        tied = cgutils.alloca_once_value(builder, INT64(0))
        kept = [cgutils.alloca_once_value(builder, INT64(0)) for _ in range(_BLOCKS)]

        def of_latent(latent: Any) -> list[Any]:
            """Its ranks, a vector for each block of inputs."""
            norm = splat(builder, builder.load(builder.gep(norms.data, [latent])))
            begin = builder.gep(codes.data, [builder.mul(latent, INT64(INPUTS))])
            offsets = (INT64(LANES * block) for block in range(_BLOCKS))
            return [builder.fmul(load(builder, builder.gep(begin, [offset])), norm) for offset in offsets]

        def entry(block: int, at: Any) -> tuple[Any, Any]:
            """Where the ranks and the number of a latent are written down."""
            at = builder.add(builder.mul(n, INT64(block)), at)
            return builder.gep(ranks.data, [builder.mul(at, INT64(LANES))]), builder.gep(latents.data, [at])

        def reach(block: int, floor: Any) -> Any:
            """How many of these ranks come to the number of these bits."""
            count = cgutils.alloca_once(builder, INTS)
            builder.store(ir.Constant(INTS, [0] * LANES), count)
            with cgutils.for_range(builder, builder.load(kept[block])) as loop:
                value = load(builder, entry(block, loop.index)[0])
                on = builder.sext(builder.fcmp_ordered(">=", value, builder.bitcast(floor, VECTOR)), INTS)
                builder.store(builder.sub(builder.load(count), on), count)
            return builder.load(count)

        def halve(block: int, low: Any, high: Any) -> None:
            """Bring the bits `low` up to those of the k-th largest; `high` is above all."""
            count = cgutils.alloca_once(builder, INTS)
            builder.store(reach(block, builder.load(low)), count)
            again, some, done = (builder.append_basic_block(name) for name in ("again", "some", "done"))
            builder.branch(again)
            builder.position_at_end(again)
            gap = builder.sub(builder.load(high), builder.load(low))
            too_many = builder.icmp_signed(">", builder.load(count), wanted)
            goes_on = builder.and_(too_many, builder.icmp_signed(">", gap, one))
            builder.cbranch(_any(builder, goes_on), some, done)
            builder.position_at_end(some)
            middle = builder.add(builder.load(low), builder.lshr(gap, one))
            reached = reach(block, middle)
            enough = builder.icmp_signed(">=", reached, wanted)
            up, down = builder.and_(goes_on, enough), builder.and_(goes_on, builder.not_(enough))
            for moves, value, variable in ((up, middle, low), (up, reached, count), (down, middle, high)):
                builder.store(builder.select(moves, value, builder.load(variable)), variable)
            builder.branch(again)
            builder.position_at_end(done)
            builder.store(builder.or_(builder.load(tied), builder.zext(_any(builder, too_many), INT64)), tied)

        bounds = _bounds_of_groups(builder, n, k, of_latent)
        floors, low, high = [], cgutils.alloca_once(builder, INTS), cgutils.alloca_once(builder, INTS)
        for least, _ in bounds:
            # Of numbers above 0 the larger one has the larger bits.
            bits = builder.bitcast(builder.load(least), INTS)
            floors.append(builder.select(builder.icmp_signed("<", bits, one), one, bits))
        with cgutils.for_range(builder, n) as loop:
            builder.store(INT64(0), builder.gep(masks.data, [loop.index]))
            for block, (value, floor) in enumerate(zip(of_latent(loop.index), floors, strict=True)):
                at = builder.load(kept[block])
                place, number = entry(block, at)
                store(builder, value, place)
                builder.store(builder.trunc(loop.index, INT32), number)
                comes = _any(builder, builder.fcmp_ordered(">=", value, builder.bitcast(floor, VECTOR)))
                builder.store(builder.add(at, builder.zext(comes, INT64)), kept[block])
        for block, (floor, (_, most)) in enumerate(zip(floors, bounds, strict=True)):
            builder.store(floor, low)
            builder.store(builder.add(builder.bitcast(builder.load(most), INTS), one), high)
            halve(block, low, high)
            with cgutils.for_range(builder, builder.load(kept[block])) as loop:
                place, number = entry(block, loop.index)
                latent = builder.zext(builder.load(number), INT64)
                at = builder.add(builder.mul(latent, INT64(_BLOCKS)), INT64(block))
                on = builder.fcmp_ordered(">=", load(builder, place), builder.bitcast(builder.load(low), VECTOR))
                builder.store(builder.bitcast(on, ir.IntType(LANES)), builder.gep(words, [at]))
        return builder.load(tied)

    return types.int64(codes, norms, types.int64, masks, ranks, latents), codegen


def _bounds_of_groups(
    builder: Builder, n: Any, groups: Any, of_latent: Callable[[Any], list[Any]]
) -> list[tuple[Any, Any]]:
    """The least and the largest of the largest ranks of so many groups of neighbours among n, for each block."""
    zeros, infinite = (ir.Constant(VECTOR, [number] * LANES) for number in (0.0, math.inf))
    least, most, of_group = (
        [cgutils.alloca_once_value(builder, begin) for _ in range(_BLOCKS)] for begin in (infinite, zeros, zeros)
    )
    with cgutils.for_range(builder, groups) as group:
        begin, end = (
            builder.udiv(builder.mul(n, at), groups) for at in (group.index, builder.add(group.index, INT64(1)))
        )
        for largest in of_group:
            builder.store(zeros, largest)
        with cgutils.for_range_slice(builder, begin, end, INT64(1)) as (latent, _):
            for value, largest in zip(of_latent(latent), of_group, strict=True):
                _keep(builder, ">", value, largest)
        for largest, *both in zip(of_group, least, most, strict=True):
            for sign, variable in zip("<>", both, strict=True):
                _keep(builder, sign, builder.load(largest), variable)
    return list(zip(least, most, strict=True))


def _any(builder: Builder, lanes: Any) -> Any:
    """Whether any of LANES bits is set."""
    return builder.icmp_unsigned("!=", builder.bitcast(lanes, ir.IntType(LANES)), ir.IntType(LANES)(0))


def _keep(builder: Builder, sign: str, value: Any, variable: Any) -> None:
    """Put into the variable what of each lane is above it, or below."""
    old = builder.load(variable)
    builder.store(builder.select(builder.fcmp_ordered(sign, value, old), value, old), variable)


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
            for block in range(_BLOCKS):
                at = builder.add(builder.mul(loop.index, INT64(INPUTS)), INT64(LANES * block))
                gain, code, slope = (load(builder, builder.gep(array.data, [at])) for array in (gains, codes, slopes))
                on = builder.fcmp_ordered(">", code, zeros)
                gain = builder.select(on, fma(builder, slope, scale, gain), zeros)
                store(builder, gain, builder.gep(gains.data, [at]))
                bias, pull = builder.fadd(bias, gain), fma(builder, slope, code, pull)
            _add_to(builder, biases, loop.index, sum_lanes(builder, bias))
            _add_to(builder, pulls, loop.index, builder.fmul(weight, sum_lanes(builder, pull)))
        return context.get_dummy_value()

    return types.void(gains, codes, slopes, scales, types.float32, biases, pulls), codegen


def _add_to(builder: Builder, array: Any, at: Any, value: Any) -> None:
    place = builder.gep(array.data, [at])
    builder.store(builder.fadd(builder.load(place), value), place)


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
                _add_to(builder, out, r, sum_lanes(builder, total))

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
