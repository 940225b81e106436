"""The tensors and settings of a file, each checked before use: one line says what was found and what is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sae_sweep.errors import UserError


class Tensors:
    """A file's tensors, taken by name, so that what nobody took can be refused: it might change the numbers."""

    def __init__(self, file: str, tensors: Mapping[str, Any]) -> None:
        """file: its name, for messages. UserError if it does not hold tensors by name."""
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise UserError(f"{file} holds {', '.join(map(str, tensors))} and not an SAE's tensors by name")
        self.file, self._left = file, dict(tensors)

    @classmethod
    def of_safetensors(cls, file: str, content: bytes) -> Tensors:
        """Those of a safetensors file. UserError if it is damaged."""
        try:
            return cls(file, load(content))
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{file} is no safetensors file: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def size(self, name: str) -> tuple[int, int]:
        """The shape of a matrix. UserError if it is missing, no matrix, or empty."""
        self._require(name)
        shape = tuple(self._left[name].shape)
        if len(shape) != 2 or 0 in shape:
            raise UserError(f"{self.file}: {name} is {list(shape)}, wanted a matrix")
        return shape[0], shape[1]

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of this shape as contiguous float32, rounded to `dtype` first if that holds fewer digits.

        UserError if it is missing, of another shape, not floating point, or not finite.
        """
        self._require(name)
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{self.file}: {name} is {list(tensor.shape)}, wanted {list(shape)}")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{self.file}: {name} holds {kind}, wanted floating-point numbers")
        numbers = tensor.detach().to(dtype).float().contiguous()
        broken = int((~numbers.isfinite()).sum())
        if broken:
            raise UserError(
                f"{self.file}: {name} has {broken} of {numbers.numel()} numbers that are nan or infinite, wanted finite"
            )
        return numbers

    def take_spread(self, name: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A number for each latent [width], or one for all of them, spread over them."""
        if name in self and self._left[name].numel() == 1:
            return self.take(name, *self._left[name].shape, dtype=dtype).reshape(1).expand(width).contiguous()
        return self.take(name, width, dtype=dtype)

    def take_whole(self, name: str) -> int | None:
        """A whole number that a file keeps as a tensor; None if it has none of this name."""
        if name not in self:
            return None
        tensor = self._left.pop(name)
        if tensor.numel() != 1 or not float(tensor).is_integer():
            raise UserError(f"{self.file}: {name} is {tensor.tolist()}, wanted a whole number")
        return int(tensor)

    def drop(self, name: str) -> None:
        """Take no notice of a tensor that changes nothing."""
        self._left.pop(name, None)

    def nothing_left(self, kind: str) -> None:
        """UserError if there is a tensor that was not taken."""
        if self._left:
            raise UserError(f"{self.file}: {', '.join(sorted(self._left))} is not known for {kind}")

    def _require(self, name: str) -> None:
        if name not in self._left:
            raise UserError(f"{self.file} has no {name}, only {', '.join(sorted(self._left)) or 'no tensors'}")


def whole(key: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` of a settings file as a whole number between limits; UserError otherwise."""
    number = (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )
    limits = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
    if not number:
        raise UserError(f"{key} is {value!r}, wanted {limits}")
    if value < least or (most is not None and value > most):
        raise UserError(f"{key} is {int(value)}, wanted {limits}")
    return int(value)


def count(key: str, value: Any, width: int) -> int:
    """k: latents kept of `width`."""
    return whole(f"{key} (latents kept of {width})", value, 1, width)


def flag(key: str, value: Any) -> bool:
    """`value` of a settings file as true or false, null being false; UserError otherwise."""
    if value is None or isinstance(value, bool):
        return bool(value)
    raise UserError(f"{key} is {value!r}, wanted true or false")


def agree(key: str, said: Any, found: int, tensor: str) -> None:
    """UserError if a settings file says another size than its weights have. What is not said agrees."""
    if said is not None and said != found:
        raise UserError(f"{key} is {said!r}, but {tensor} has {found}")
