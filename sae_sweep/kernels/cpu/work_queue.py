"""A queue from which threads claim work piece by piece, without Python: a pool would take as long as the work itself.

A phase is of a kind and has so many pieces. A thread that is running claims the next piece; the thread that finishes
the last piece publishes the next phase. So no thread waits for one that has no core, only for pieces that are being
done.
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
# What a queue holds, int64: the kind of the published phase and how many of its pieces are left, in one number, so that
# both are read at once; how many pieces are done; whether a thread has failed.
PUBLISHED, DONE, FAILED, QUEUE_SIZE = 0, 1, 2, 3
LEFT = 1 << 32
# The kind that says that there are no more phases; its pieces are not counted.
END = 0
# How often a thread reads the queue (0.1 ms in all) before it sleeps, and for how many µs it sleeps.
SPINS, NAP = 1 << 16, 50

_jit = numba.njit(nogil=True, cache=True)


@contextmanager
def abort_on_error(queue: np.ndarray[Any, Any]) -> Iterator[None]:
    """A thread that fails or is interrupted inside stops the others too: they would wait for its piece."""
    try:
        yield
    except BaseException:
        queue[FAILED] = 1
        raise


@_jit
def publish(queue, kind, pieces):  # type: ignore[no-untyped-def]
    """Publish a phase, once the one before is done.

    Threads that claim a piece of it see everything that was written before.
    """
    queue[DONE] = 0
    _write(queue, PUBLISHED, kind * LEFT + pieces)


@_jit
def claim(queue):  # type: ignore[no-untyped-def]
    """Kind and number of a piece to do, as soon as there is one; kind END once there will be no more.

    Raises MemoryError if another thread has failed: nothing else makes compiled code fail.
    """
    spins = 0
    while not _read(queue, FAILED):
        published = _read(queue, PUBLISHED)
        kind, left = published // LEFT, published % LEFT
        if kind == END:
            return kind, left
        if left and _replace(queue, PUBLISHED, published, published - 1):
            return kind, left - 1
        spins += 1
        if spins > SPINS:
            _sleep(NAP)
    raise MemoryError("another thread of this step has failed")


@_jit
def finish_piece(queue, pieces):  # type: ignore[no-untyped-def]
    """Count a piece as done; whether it was the last of the phase's `pieces`."""
    return _add(queue, DONE, 1) == pieces - 1


def _atomic(build: Any) -> Any:
    """An intrinsic on queue[at]: `build` makes its instruction from a builder, the address and further numbers."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return build(builder, builder.gep(array.data, [arguments[1]]), *arguments[2:])

    return codegen


@intrinsic
def _read(typingctx, queue, at):  # type: ignore[no-untyped-def]
    """queue[at] as it is now."""
    return types.int64(queue, types.int64), _atomic(lambda builder, place: builder.load_atomic(place, "seq_cst", 8))


@intrinsic
def _write(typingctx, queue, at, value):  # type: ignore[no-untyped-def]
    """queue[at] = value; a thread that reads it also sees everything that was written before."""

    def build(builder: ir.IRBuilder, place: Any, value: Any) -> Any:
        builder.store_atomic(value, place, "seq_cst", 8)
        return ir.Constant(_INT64, 0)

    return types.int64(queue, types.int64, types.int64), _atomic(build)


@intrinsic
def _add(typingctx, queue, at, value):  # type: ignore[no-untyped-def]
    """queue[at] += value; returns what it was before."""

    def build(builder: ir.IRBuilder, place: Any, value: Any) -> Any:
        return builder.atomic_rmw("add", place, value, "seq_cst")

    return types.int64(queue, types.int64, types.int64), _atomic(build)


@intrinsic
def _replace(typingctx, queue, at, old, new):  # type: ignore[no-untyped-def]
    """Put `new` into queue[at] if `old` is there; whether it was."""

    def build(builder: ir.IRBuilder, place: Any, old: Any, new: Any) -> Any:
        return builder.extract_value(builder.cmpxchg(place, old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(queue, types.int64, types.int64, types.int64), _atomic(build)


@intrinsic
def _sleep(typingctx, microseconds):  # type: ignore[no-untyped-def]
    """Leave the core for so long."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        usleep = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_INT32, [_INT32]), "usleep")
        builder.call(usleep, [builder.trunc(arguments[0], _INT32)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
