"""Tensors as the bytes of a safetensors file."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

# What the header and what safetensors does itself may take.
ROOM = 1 << 20
# Two threads that look at once both find the room of one.
_one_at_a_time = threading.Lock()


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The tensors, contiguous, and strings about them. MemoryError if they do not fit."""
    with _one_at_a_time:
        # Twice their size for a moment: without it, safetensors ends the process, hangs in its panic, or raises one.
        bytearray(2 * sum(tensor.nbytes for tensor in tensors.values()) + ROOM)
        try:
            return save(dict(tensors), metadata)
        except BaseException as panic:  # a panic of Rust's is no Exception
            if type(panic).__name__ != "PanicException":
                raise
            raise MemoryError(f"safetensors: {panic}") from None
