"""Inputs without end, drawn anew for every chunk of an evaluation and the same at every pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sae_sweep.config.settings import derive_seed
from sae_sweep.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    torch = lazy("torch")

# Inputs per chunk of an evaluation.
CHUNK_ROWS = 1 << 14


class SampledPopulation(ABC):
    """The part of a `Population` (toys/model.py) that follows from drawing inputs of equal weight."""

    total = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where inputs and activations live."""

    @property
    @abstractmethod
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T], empty without cells."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, ...]."""

    @abstractmethod
    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each input [count] int64; 0 where there are none."""

    def weighted(self, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of `limit` inputs, their cells [b] int64 and equal weights [b] float64; the same at every pass."""
        for number, start in enumerate(range(0, limit, CHUNK_ROWS)):
            count = min(CHUNK_ROWS, limit - start)
            inputs = self.draw(
                count, torch.Generator(self.device).manual_seed(derive_seed("evaluation", limit, number))
            )
            yield inputs, self.cell(inputs), torch.full((count,), 1 / limit, dtype=torch.float64, device=self.device)

    def count(self, limit: int) -> int:
        """How many inputs `weighted` gives."""
        return limit

    def inputs_of_cells(self, limit: int) -> NDArray[np.float64]:
        """How many of the inputs that `weighted` gives are of each cell [T], as may be expected."""
        return limit * self.chance
