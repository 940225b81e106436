"""Exclusive features: exactly one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.settings import Toy
from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.toys.classes import FeatureCells, count_pairs
from sae_sweep.toys.planted import MAGNITUDES, Synthetic, features, planted_kind

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, F = lazy("numpy"), lazy("torch.nn.functional")


class Exclusive(Synthetic):
    """One feature at a time, all equally likely: the cell m."""

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `plant` returns them, float32 on one device."""
        super().__init__(toy, params)
        self.cells = FeatureCells(toy.features)

    @property
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T]: all alike."""
        return np.full(self.toy.features, 1 / self.toy.features)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, features]."""
        leading = F.one_hot(self._choice(self.toy.features, count, generator), self.toy.features)
        return leading * self._magnitudes((count, 1), generator)

    def cell(self, inputs: Tensor) -> Tensor:
        """The active feature [count]."""
        return inputs.argmax(1)


register(
    planted_kind(
        lambda: Exclusive,
        lambda partition, toy: count_pairs(partition, toy.features, 1),
        name="exclusive",
        description="one feature at a time, all equally likely",
        source="LessWrong comment EkibeZomncsPxfYwu (P6)",
        settings={**features(), "magnitudes": MAGNITUDES},
        defaults={"magnitudes": "exponential"},
    )
)
