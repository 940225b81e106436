"""Modules that are loaded when something of them is first used.

The file of a kind holds its declaration and its code. Reading the declaration, as listings, completion and plans do,
must not take the two seconds of importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """Stands for a module until an attribute of it is read."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        self.__dict__[attribute] = value
        return value


def lazy(name: str) -> Any:
    """The module of that name: `torch = lazy("torch")` in place of `import torch`."""
    return LazyModule(name)
