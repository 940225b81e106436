"""The classes of cells that a partition tells apart, kept: every SAE of a sweep needs the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_sweep.config.settings import PARTITIONS
from sae_sweep.toys.classes import Factored

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Classes:
    """The classes of a partition: `of_cell` [T] in 0..count-1 and the `first` cell of each [count]."""

    of_cell: Ints
    first: Ints

    @property
    def count(self) -> int:
        return len(self.first)

    @cached_property
    def order(self) -> Ints:
        """The cells [T] class by class."""
        return np.argsort(self.of_cell, kind="stable")

    @cached_property
    def starts(self) -> Ints:
        """Where in that order each class begins [count]."""
        return run_starts(self.of_cell[self.order])


@lru_cache(maxsize=4 * len(PARTITIONS))
def partition(cells: Factored, name: str) -> Classes:
    """The classes of `cells.partition(name)`."""
    of_cell = cells.partition(name).of_cell
    return Classes(of_cell, np.unique(of_cell, return_index=True)[1].astype(np.int64))


def run_starts(keys: NDArray[Any]) -> Ints:
    """Where each run of equal values in `keys` [n] starts."""
    starts = np.ones(len(keys), np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=starts[1:])
    return np.flatnonzero(starts)
