"""Work that threads take piece by piece, without Python: to hand it over through a pool takes as long as the work.

A phase is of a kind and has so many pieces. Whoever is running takes the next piece; whoever finishes the last one puts
up the next phase. So nobody waits for a thread that has no core: it only ever waits for pieces that are being done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_INT32, _INT64 = ir.IntType(32), ir.IntType(64)
# What is shared, int64: kind and pieces left in one number, so that both are taken at once; the pieces that are done;
# whether a thread has failed.
OFFER, DONE, FAILED, CREW = 0, 1, 2, 3
LEFT = 1 << 32
# No more phases; its pieces are not counted.
END = 0
# Looks (0.1 ms) before a thread sleeps, and for how many µs.
LOOKS, NAP = 1 << 16, 50

_jit = numba.njit(nogil=True, cache=True)


@contextmanager
def heard(crew: np.ndarray[Any, Any]) -> Iterator[None]:
    """Whoever fails or is interrupted inside stops the others too: they would wait for what it was at."""
    try:
        yield
    except BaseException:
        crew[FAILED] = 1
        raise


@_jit
def offer(crew, kind, pieces):  # type: ignore[no-untyped-def]
    """Put up a phase, once the last is done; what was written before is seen by all who take a piece of it."""
    crew[DONE] = 0
    _write(crew, OFFER, kind * LEFT + pieces)


@_jit
def take(crew):  # type: ignore[no-untyped-def]
    """Kind and number of a piece to do, as soon as there is one; kind END once there will be none.

    Raises MemoryError if another thread has failed: nothing else makes compiled code fail.
    """
    looks = 0
    while not _read(crew, FAILED):
        offered = _read(crew, OFFER)
        kind, left = offered // LEFT, offered % LEFT
        if kind == END:
            return kind, left
        if left and _replace(crew, OFFER, offered, offered - 1):
            return kind, left - 1
        looks += 1
        if looks > LOOKS:
            _sleep(NAP)
    raise MemoryError("another thread of this step has failed")


@_jit
def last(crew, pieces):  # type: ignore[no-untyped-def]
    """Say that a piece is done; whether it was the last of so many."""
    return _add(crew, DONE, 1) == pieces - 1


def _atomic(build: Any) -> Any:
    """An intrinsic on crew[at]: `build` makes its instruction from a builder, the address and further numbers."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return build(builder, builder.gep(array.data, [arguments[1]]), *arguments[2:])

    return codegen


@intrinsic
def _read(typingctx, crew, at):  # type: ignore[no-untyped-def]
    """crew[at] as it is now."""
    return types.int64(crew, types.int64), _atomic(lambda builder, place: builder.load_atomic(place, "seq_cst", 8))


@intrinsic
def _write(typingctx, crew, at, value):  # type: ignore[no-untyped-def]
    """crew[at] = value, seen after all that was written before."""

    def build(builder: ir.IRBuilder, place: Any, value: Any) -> Any:
        builder.store_atomic(value, place, "seq_cst", 8)
        return ir.Constant(_INT64, 0)

    return types.int64(crew, types.int64, types.int64), _atomic(build)


@intrinsic
def _add(typingctx, crew, at, value):  # type: ignore[no-untyped-def]
    """crew[at] += value; what it was before."""

    def build(builder: ir.IRBuilder, place: Any, value: Any) -> Any:
        return builder.atomic_rmw("add", place, value, "seq_cst")

    return types.int64(crew, types.int64, types.int64), _atomic(build)


@intrinsic
def _replace(typingctx, crew, at, old, new):  # type: ignore[no-untyped-def]
    """Put `new` into crew[at] if `old` is there; whether it was."""

    def build(builder: ir.IRBuilder, place: Any, old: Any, new: Any) -> Any:
        return builder.extract_value(builder.cmpxchg(place, old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(crew, types.int64, types.int64, types.int64), _atomic(build)


@intrinsic
def _sleep(typingctx, microseconds):  # type: ignore[no-untyped-def]
    """Leave the core for so long."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        usleep = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT32, [_INT32]), "usleep")
        builder.call(usleep, [builder.trunc(arguments[0], _INT32)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
