"""The k largest codes of each input of a tile (narrow_tile.py), in vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.narrow_tile import BLOCKS, INPUTS, Builder
from sae_sweep.kernels.cpu.simd import INT32, INT64, INTS, LANES, VECTOR, arrays, load, splat, store


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
                with builder.if_then(_any(builder, enters)):
                    enter(place, rank, latent)
                    builder.store(load(builder, smallest), floor)

        for block in range(BLOCKS):
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
        kept = [cgutils.alloca_once_value(builder, INT64(0)) for _ in range(BLOCKS)]

        def of_latent(latent: Any) -> list[Any]:
            """Its ranks, a vector for each block of inputs."""
            norm = splat(builder, builder.load(builder.gep(norms.data, [latent])))
            begin = builder.gep(codes.data, [builder.mul(latent, INT64(INPUTS))])
            offsets = (INT64(LANES * block) for block in range(BLOCKS))
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
                at = builder.add(builder.mul(latent, INT64(BLOCKS)), INT64(block))
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
        [cgutils.alloca_once_value(builder, begin) for _ in range(BLOCKS)] for begin in (infinite, zeros, zeros)
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
