"""Toys with planted features, for what max-of-K cannot show: activations are sums of known directions.

independent  every feature comes and goes by itself; with more features than d_model: superposition
exclusive    exactly one feature at a time
parents      one of several parents (math, physics), and with some chance a modifier (topology, high dimensions)
circle       one of many places on a circle, or, with `spread`, what lies between them too: a manifold

Directions are orthonormal where they fit into d_model numbers, else random unit vectors. An active feature's magnitude
has mean 1 (`magnitudes`). Cells: m is the leading feature, parent or nearest place, q a parent's modifier or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_sweep.config.settings import Distribution, Toy
from sae_sweep.toys.classes import FeatureCells
from sae_sweep.toys.max_of_k import product
from sae_sweep.toys.sampled_population import Endless

# P(magnitude > x) = (1 + x/s)^-shape: with s = shape - 1 the mean is 1, and with 3 the variance is finite.
LOMAX_SHAPE = 3
# Magnitudes of mean 1 from numbers uniform on (0, 1].
QUANTILES: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda tail: 2 * tail,
    "exponential": lambda tail: -tail.log(),
    "lomax": lambda tail: (LOMAX_SHAPE - 1) * (tail ** (-1 / LOMAX_SHAPE) - 1),
}


def stack_key(toy: Toy) -> None:
    """Any toys are planted together."""


def train(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """Draw what each toy plants by its seed. Nothing is trained, and nothing reported."""
    return [KINDS[toy.name].plant(toy, torch.Generator().manual_seed(toy.seed)) for toy in toys]


def load(toy: Toy, params: dict[str, Tensor]) -> Synthetic:
    """The toy whose parameters `train` returned."""
    return KINDS[toy.name](toy, params)


class Synthetic(Endless):
    """A toy with planted features: its own `Model`, `Planted` and `Population` (toys/model.py).

    How inputs are distributed is a matter of the toy's own settings. An input is how active each feature is
    [features], unless the kind says otherwise.
    """

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `plant` returns them, float32 on one device."""
        self.toy, self.params = toy, params

    # -- what a kind says of itself -------------------------------------------------------------------------------

    cells: FeatureCells | None = None
    chance = np.zeros(0)

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """The directions of the features [features, d_model], and whatever else inputs are made with."""
        return {"directions": _unit_vectors(toy.features, toy.d_model, generator).float()}

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

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator, device=self.device)

    def _choice(self, options: int, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(options, (count,), generator=generator, device=self.device)

    def _magnitudes(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent magnitudes of mean 1."""
        if self.toy.magnitudes == "constant":
            return torch.ones(shape, device=self.device)
        return QUANTILES[self.toy.magnitudes](1 - self._uniform(shape, generator))


class Independent(Synthetic):
    """Each feature is active with the chance `rate`. No cells: any features come together."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, features]."""
        shape = count, self.toy.features
        active = self._uniform(shape, generator) < self.toy.rate
        return active * self._magnitudes(shape, generator)


class Exclusive(Synthetic):
    """One feature at a time, all equally likely: the cell m."""

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `plant` returns them, float32 on one device."""
        super().__init__(toy, params)
        self.cells, self.chance = FeatureCells(toy.features), np.full(toy.features, 1 / toy.features)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, features]."""
        leading = F.one_hot(self._choice(self.toy.features, count, generator), self.toy.features)
        return leading * self._magnitudes((count, 1), generator)

    def cell(self, inputs: Tensor) -> Tensor:
        """The active feature [count]."""
        return inputs.argmax(1)


class Parents(Exclusive):
    """One parent, all equally likely, and with the chance `modifier_rate` one modifier: the cell (m, q).

    Of a modifier's square, the share `interaction` lies in a direction that it has with this parent alone, the rest in
    one that all parents share. An input is [parents + modifiers]; the features are the parents, the modifiers' shared
    directions (unless interaction is 1), and the parents' own (unless it is 0), parent by parent.
    """

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `plant` returns them, float32 on one device."""
        super().__init__(toy, params)
        self.cells = FeatureCells(toy.features, toy.modifiers)
        parents = np.arange(toy.features)
        chance = np.full((toy.features, toy.modifiers + 1), (1 - toy.co_occurrence) / toy.modifiers)
        chance[parents, 1 + parents % toy.modifiers] += toy.co_occurrence
        chance *= toy.modifier_rate
        chance[:, 0] = 1 - toy.modifier_rate
        self.chance = chance.ravel() / toy.features

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """Directions of parents, modifiers, and modifiers of one parent [features, d_model]."""
        shared = toy.modifiers if toy.interaction < 1 else 0
        own = toy.features * toy.modifiers if toy.interaction > 0 else 0
        return {"directions": _unit_vectors(toy.features + shared + own, toy.d_model, generator).float()}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, parents + modifiers]."""
        toy = self.toy
        parents = super().draw(count, generator)
        there, matched = self._uniform((2, count), generator)
        own, other = parents.argmax(1) % toy.modifiers, self._choice(toy.modifiers, count, generator)
        modifier = F.one_hot(torch.where(matched < toy.co_occurrence, own, other), toy.modifiers)
        strength = toy.modifier_magnitude * self._magnitudes((count, 1), generator)
        return torch.cat([parents, modifier * strength * (there < toy.modifier_rate)[:, None]], 1)

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of parent and modifier [count]."""
        parents, modifiers = inputs.split([self.toy.features, self.toy.modifiers], 1)
        modifier = torch.where(modifiers.amax(1) > 0, modifiers.argmax(1) + 1, 0)
        return parents.argmax(1) * (self.toy.modifiers + 1) + modifier

    def features(self, inputs: Tensor) -> Tensor:
        """How active each planted feature is [batch, features]."""
        toy = self.toy
        parents, modifiers = inputs.split([toy.features, toy.modifiers], 1)
        found = [parents]
        if toy.interaction < 1:
            found.append(modifiers * math.sqrt(1 - toy.interaction))
        if toy.interaction > 0:
            own = (parents > 0)[:, :, None] * modifiers[:, None, :]
            found.append(own.flatten(1) * math.sqrt(toy.interaction))
        return torch.cat(found, 1)


class Circle(Exclusive):
    """Places on a circle of harmonics, all equally likely. An input is a place [], a whole number where spread is 0.

    x = √(2/d)·(cos hθ, sin hθ) for h = 1 … d/2, in random axes: unit vectors whose inner product is a Dirichlet kernel
    in θ, so that neighbours are alike where there are more places than d, and the circle is a curve, not a plane.
    """

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """The axes [d_model, d_model], and the directions of the places [features, d_model]."""
        axes = _unit_vectors(toy.d_model, toy.d_model, generator).float()
        directions = product(_harmonics(torch.arange(toy.features), toy), axes)
        return {"axes": axes, "directions": directions.contiguous()}

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent places [count], from -½ to features - ½."""
        place = self._choice(self.toy.features, count, generator)
        return place + self.toy.spread * (self._uniform((count,), generator) - 0.5)

    def cell(self, inputs: Tensor) -> Tensor:
        """The nearest place [count]."""
        return inputs.round().long() % self.toy.features

    def features(self, inputs: Tensor) -> Tensor:
        """1 at the nearest place [batch, features]."""
        return F.one_hot(self.cell(inputs), self.toy.features).float()

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32, of the place itself."""
        return product(_harmonics(inputs, self.toy), self.params["axes"]).contiguous()


KINDS: dict[str, type[Synthetic]] = {
    "independent": Independent,
    "exclusive": Exclusive,
    "parents": Parents,
    "circle": Circle,
}


def _unit_vectors(count: int, d: int, generator: torch.Generator) -> Tensor:
    """[count, d] float64: orthonormal where they fit."""
    drawn = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn.T)[0].T.contiguous() if count <= d else F.normalize(drawn, dim=1)


def _harmonics(places: Tensor, toy: Toy) -> Tensor:
    """What `Circle` says, before the axes [..., d_model] float32."""
    theta = 2 * math.pi / toy.features * places.double()
    angles = theta[..., None] * torch.arange(1, toy.d_model // 2 + 1, device=places.device)
    return math.sqrt(2 / toy.d_model) * torch.cat([angles.cos(), angles.sin()], -1).float()
