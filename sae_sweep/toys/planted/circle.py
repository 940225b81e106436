"""Circle: many close discrete features (spread 0), a manifold cut into pieces (spread 1), or what lies between."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.aligned import product
from sae_sweep.toys.classes import count_pairs
from sae_sweep.toys.planted import features, planted_kind, unit_vectors
from sae_sweep.toys.planted.exclusive import Exclusive

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")


class Circle(Exclusive):
    """Places on a circle of harmonics, all equally likely. An input is a place [], a whole number where spread is 0.

    x = √(2/d)·(cos hθ, sin hθ) for h = 1 … d/2, in random axes: unit vectors whose inner product is a Dirichlet kernel
    in θ, so that neighbours are alike where there are more places than d, and the circle is a curve, not a plane.
    """

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """The axes [d_model, d_model], and the directions of the places [features, d_model]."""
        axes = unit_vectors(toy.d_model, toy.d_model, generator).float()
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

    def coordinates(self, inputs: Tensor) -> Tensor:
        """Where on the circle each input lies [batch, 2]: cosine and sine of its angle."""
        theta = 2 * math.pi / self.toy.features * inputs.double()
        return torch.stack([theta.cos(), theta.sin()], -1)

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32, of the place itself."""
        return product(_harmonics(inputs, self.toy), self.params["axes"]).contiguous()


def _harmonics(places: Tensor, toy: Toy) -> Tensor:
    """What `Circle` says, before the axes [..., d_model] float32."""
    theta = 2 * math.pi / toy.features * places.double()
    angles = theta[..., None] * torch.arange(1, toy.d_model // 2 + 1, device=places.device)
    return math.sqrt(2 / toy.d_model) * torch.cat([angles.cos(), angles.sin()], -1).float()


def _check(toy: Toy) -> None:
    if toy.d_model % 2:
        raise UserError(f"toy=circle has a sine for every cosine: toy.d_model={toy.d_model} must be even")


register(
    planted_kind(
        lambda: Circle,
        lambda partition, toy: count_pairs(partition, toy.features, 1),
        name="circle",
        description="many close discrete features, a manifold cut into pieces, or what lies between",
        source="LessWrong comment EkibeZomncsPxfYwu (P8)",
        settings={
            **features(32, 8),
            "spread": Setting(
                0.0,
                "how far inputs lie from the features' places on the circle: 0: at them; 1: anywhere on the circle "
                "alike",
                ge=0,
                le=1,
            ),
        },
        check=_check,
    )
)
