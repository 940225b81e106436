"""Features that are manifolds: where one is active, its activation is a point on it, not a direction.

`0:circle(12)` makes a circle of feature 0, which is counted in twelve places; `*:sphere(3)` makes spheres of all. A
place is what a latent can stand for: the part of the manifold that is nearest to it, with a direction of its own.

Sources: arXiv 2509.02565 (circles, spheres), 2405.14860 (circles of days and months), LessWrong comment
EkibeZomncsPxfYwu (P8: a circle between places and a curve).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sae_sweep.config.keys import nearest, show
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.planted.text import NOTHING, call, which_feature

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


class Manifold(ABC):
    """Points of length 1 in `dims` numbers, drawn evenly, and `places` that are equally often the nearest.

    positions: how many numbers say where on it a point lies
    """

    dims: int
    places: int
    positions: int

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent positions [count, positions] float32."""

    @abstractmethod
    def place_positions(self) -> Tensor:
        """Where the places lie [places, positions]."""

    @abstractmethod
    def points(self, at: Tensor) -> Tensor:
        """The points at positions [..., positions]: [..., dims] float32."""

    @abstractmethod
    def nearest(self, at: Tensor) -> Tensor:
        """The place nearest to each position [batch] int64."""

    @abstractmethod
    def coordinates(self, at: Tensor) -> Tensor:
        """Where each position lies, in numbers that say so alike all over the manifold [batch, …] float64."""

    def mean(self) -> Tensor:
        """E[point] [dims] float64."""
        return torch.zeros(self.dims, dtype=torch.float64)


class Circle(Manifold):
    """`circle(places, spread, harmonics)`: √(1/H)·(cos hθ, sin hθ) for h = 1 … H, in places from 0 to 1 turn.

    spread 0: points lie at the places alone; 1: anywhere alike. With more than one harmonic the circle is a curve, not
    a plane, and the inner product of two points a Dirichlet kernel in θ.
    """

    positions = 1

    def __init__(self, places: float = 8, spread: float = 1.0, harmonics: float = 1) -> None:
        """ValueError: what makes no circle."""
        self.places, self.spread, self.harmonics = _whole(places, 1), spread, _whole(harmonics, 1)
        self.dims = 2 * self.harmonics
        if not 0 <= spread <= 1:
            raise ValueError

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Positions in places, from -½ to places - ½."""
        device = generator.device
        place = torch.randint(self.places, (count,), generator=generator, device=device)
        return (place + self.spread * (torch.rand(count, generator=generator, device=device) - 0.5))[:, None]

    def place_positions(self) -> Tensor:
        """Whole numbers."""
        return torch.arange(self.places)[:, None]

    def points(self, at: Tensor) -> Tensor:
        """As the class says."""
        angles = self._theta(at) * torch.arange(1, self.harmonics + 1, device=at.device)
        return math.sqrt(1 / self.harmonics) * torch.cat([angles.cos(), angles.sin()], -1).float()

    def nearest(self, at: Tensor) -> Tensor:
        """The nearest whole number, counted round."""
        return at[:, 0].round().long() % self.places

    def coordinates(self, at: Tensor) -> Tensor:
        """Cosine and sine of the angle [batch, 2]."""
        theta = self._theta(at)
        return torch.cat([theta.cos(), theta.sin()], -1)

    def mean(self) -> Tensor:
        """Only harmonics that are alike at all places have one."""
        order = torch.arange(1, self.harmonics + 1, dtype=torch.float64)
        cosines = torch.where(order % self.places == 0, torch.sinc(order * self.spread / self.places), 0.0)
        return math.sqrt(1 / self.harmonics) * torch.cat([cosines, torch.zeros_like(order)])

    def _theta(self, at: Tensor) -> Tensor:
        return 2 * math.pi / self.places * at.double()


class Sphere(Manifold):
    """`sphere(dims)`: points at distance 1 from the middle; its places are the two ends of each axis."""

    def __init__(self, dims: float = 3) -> None:
        """ValueError: what makes no sphere."""
        self.dims = self.positions = _whole(dims, 2)
        self.places = 2 * self.dims

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """The points themselves."""
        return F.normalize(torch.randn(count, self.dims, generator=generator, device=generator.device), dim=1)

    def place_positions(self) -> Tensor:
        """The positive ends, then the negative ones."""
        return torch.cat([torch.eye(self.dims), -torch.eye(self.dims)])

    def points(self, at: Tensor) -> Tensor:
        """The positions."""
        return at.float()

    def nearest(self, at: Tensor) -> Tensor:
        """The end that shares most with each."""
        return torch.cat([at, -at], 1).argmax(1)

    def coordinates(self, at: Tensor) -> Tensor:
        """The points [batch, dims]."""
        return at.double()


class Torus(Manifold):
    """`torus(places)`: two circles at once, with places round each: √½·(cos θ, sin θ, cos φ, sin φ)."""

    positions, dims = 2, 4

    def __init__(self, places: float = 4) -> None:
        """ValueError: what makes no torus."""
        self.circle = Circle(places)
        self.places = self.circle.places**2

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """A position on each circle."""
        return torch.cat([self.circle.draw(count, generator) for _ in range(2)], 1)

    def place_positions(self) -> Tensor:
        """Every pair of places."""
        around = torch.arange(self.circle.places)
        return torch.cartesian_prod(around, around)

    def points(self, at: Tensor) -> Tensor:
        """As the class says."""
        return math.sqrt(0.5) * torch.cat([self.circle.points(one) for one in at.split(1, -1)], -1)

    def nearest(self, at: Tensor) -> Tensor:
        """That of both circles."""
        first, second = (self.circle.nearest(one) for one in at.split(1, -1))
        return first * self.circle.places + second

    def coordinates(self, at: Tensor) -> Tensor:
        """Those of both circles [batch, 4]."""
        return torch.cat([self.circle.coordinates(one) for one in at.split(1, -1)], -1)


MANIFOLDS: Mapping[str, type[Manifold]] = {"circle": Circle, "sphere": Sphere, "torus": Torus}


def read_manifolds(text: str, count: int) -> dict[int, Manifold]:
    """The manifolds of `0:circle(12), 3:sphere(3)` by their features, `*` for every feature. UserError."""
    key = "toy.manifolds"
    found: dict[int, Manifold] = {}
    for word in [] if text.strip() == NOTHING else re.split(r"[,\s]+(?![^(]*\))", text.strip()):
        which, _, rest = word.partition(":")
        name, given = call(key, rest)
        if name not in MANIFOLDS:
            raise UserError(f"{key} cannot be {show(rest)}{nearest(name, MANIFOLDS)}")
        try:
            manifold = MANIFOLDS[name](*given)
        except (TypeError, ValueError):
            said = (MANIFOLDS[name].__doc__ or "").partition(":")[0]
            raise UserError(f"{key}={text}: {rest} is out of range or has too many numbers: {said}") from None
        found |= dict.fromkeys(range(count) if which == "*" else [which_feature(key, which, count, word)], manifold)
    return dict(sorted(found.items()))


def _whole(value: float, least: int) -> int:
    if value % 1 or value < least:
        raise ValueError
    return int(value)
