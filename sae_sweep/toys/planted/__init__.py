"""Toys with planted features, for what max-of-K cannot show: activations are sums of known directions.

Directions are orthonormal where they fit into d_model numbers, else random unit vectors. An active feature's magnitude
has mean 1 (`magnitudes`). Cells: m is the leading feature, parent or nearest place, q a parent's modifier or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

from sae_sweep.config.settings import Distribution, Toy
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting
from sae_sweep.toys.aligned import product
from sae_sweep.toys.model import Report, ToyKind
from sae_sweep.toys.planted.directions import directions
from sae_sweep.toys.sampled_population import SampledPopulation

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_sweep.toys.classes import FeatureCells
else:
    np, torch = lazy("numpy"), lazy("torch")

MAGNITUDES = Setting(
    "constant",
    "distribution of the magnitude of an active feature, whose mean is 1",
    choices=("constant", "uniform", "exponential", "lomax"),
)


def features(count: int = 32, d_model: int = 64) -> dict[str, Setting]:
    """The settings that all planted toys have, with a kind's defaults."""
    return {
        "features": Setting(count, "how many features are planted", ge=1),
        "d_model": Setting(d_model, "dimension of an activation", ge=1),
    }


def planted_kind(model: Callable[[], type[Synthetic]], classes: Callable[[str, Toy], int], **said: Any) -> ToyKind:
    """A kind of toy that plants features and trains nothing: one site, and inputs as its own settings say.

    model: the class of its toys; said: what else a `ToyKind` takes
    """

    def plant(toys: Sequence[Toy], device: str | torch.device, report: Report | None) -> list[dict[str, Tensor]]:
        return [model().plant(toy, torch.Generator().manual_seed(toy.seed)) for toy in toys]

    def cells(toy: Toy, distribution: Distribution) -> tuple[FeatureCells, NDArray[np.float64]] | None:
        made = model()(toy, {})  # its cells follow from its settings
        return None if made.cells is None else (made.cells, made.chance)

    return ToyKind(
        train=plant,
        cells=cells,
        load=lambda toy, params: model()(toy, params),
        maxima=lambda toy: toy.features,
        size=lambda toy: (toy.d_model,),
        classes=classes,
        d=lambda toy, site: toy.d_model,
        inputs=lambda toy: math.inf,
        trains=lambda toy: (0, 0),
        planted=True,
        **said,
    )


class Synthetic(SampledPopulation):
    """A toy with planted features: its own `Model`, `Planted` and `Population` (toys/model.py).

    How inputs are distributed is a matter of the toy's own settings. An input is how active each feature is
    [features], unless the kind says otherwise.
    """

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `plant` returns them, float32 on one device."""
        self.toy, self.params = toy, params

    # -- what a kind says of itself -------------------------------------------------------------------------------

    cells: FeatureCells | None = None

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child): features of which one comes only with the other."""
        return []

    @property
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T], empty without cells."""
        return np.zeros(0)

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """The directions of the features [features, d_model], and whatever else inputs are made with."""
        return {"directions": directions("fitting", toy.features, toy.d_model, generator).float()}

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each input [count] int64; 0 where there are none."""
        return torch.zeros(len(inputs), dtype=torch.int64, device=self.device)

    def features(self, inputs: Tensor) -> Tensor:
        """How active each planted feature is [batch, features]."""
        return inputs

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32; there is one site."""
        return product(self.features(inputs), self.directions).contiguous()

    # -- what all kinds share -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs and activations live."""
        return self.directions.device

    @property
    def directions(self) -> Tensor:
        """The features' directions in raw activations [features, d]."""
        return self.params["directions"]

    @property
    def origin(self) -> Tensor:
        """The raw activation where no feature is active [d]."""
        return torch.zeros(self.toy.d_model, device=self.device)

    @property
    def planted(self) -> Self:
        """This toy knows its features."""
        return self

    def to(self, device: str | torch.device) -> Self:
        """The same toy on `device`."""
        return type(self)(self.toy, {name: param.to(device) for name, param in self.params.items()})

    def width(self, site: str) -> int:
        """d: numbers per activation."""
        return self.toy.d_model

    def logits(self, acts: Tensor, site: str) -> None:
        """There is no output."""

    def truth(self, inputs: Tensor) -> None:
        """There is nothing to predict."""

    def population(self, distribution: Distribution, device: str | torch.device) -> Self:
        """Its inputs; the distribution is always the toy's own."""
        return self.to(device)
