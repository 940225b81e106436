"""Tensors as the bytes of a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

# What the header and what safetensors does itself may take.
ROOM = 1 << 20


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The tensors, contiguous, and strings about them. MemoryError if they do not fit."""
    # Twice their size for a moment: where that is not to be had, safetensors ends the process, or hangs in its panic.
    bytearray(2 * sum(tensor.nbytes for tensor in tensors.values()) + ROOM)
    return save(dict(tensors), metadata)
