"""Parents and modifiers: (math, physics, …) × (topology, high dimensions), or no modifier."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Toy
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.classes import FeatureCells, count_pairs
from sae_sweep.toys.planted import MAGNITUDES, features, planted_kind, unit_vectors
from sae_sweep.toys.planted.exclusive import Exclusive

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor
else:
    torch, np, F = lazy("torch"), lazy("numpy"), lazy("torch.nn.functional")


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

    @property
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T]."""
        toy = self.toy
        parents = np.arange(toy.features)
        chance = np.full((toy.features, toy.modifiers + 1), (1 - toy.co_occurrence) / toy.modifiers)
        chance[parents, 1 + parents % toy.modifiers] += toy.co_occurrence
        chance *= toy.modifier_rate
        chance[:, 0] = 1 - toy.modifier_rate
        return chance.ravel() / toy.features

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """Directions of parents, modifiers, and modifiers of one parent [features, d_model]."""
        shared = toy.modifiers if toy.interaction < 1 else 0
        own = toy.features * toy.modifiers if toy.interaction > 0 else 0
        return {"directions": unit_vectors(toy.features + shared + own, toy.d_model, generator).float()}

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


register(
    planted_kind(
        lambda: Parents,
        lambda partition, toy: count_pairs(partition, toy.features, toy.modifiers + 1),
        name="parents",
        description="one of several parents, and with some chance a modifier: is it a latent of its own, or are the "
        "parents split?",
        source="LessWrong comment EkibeZomncsPxfYwu (P4)",
        settings={
            **features(8, 32),
            "magnitudes": MAGNITUDES,
            "modifiers": Setting(2, "how many modifiers there are: features that come only with a parent", ge=1),
            "modifier_rate": Setting(0.5, "the chance that an input has a modifier beside its parent", ge=0, le=1),
            "modifier_magnitude": Setting(1.0, "mean magnitude of an active modifier; a parent's is 1", gt=0),
            "co_occurrence": Setting(
                0.0,
                "which modifiers come with which parents: 0: any with any; 1: parent i only with modifier i mod "
                "modifiers",
                ge=0,
                le=1,
            ),
            "interaction": Setting(
                0.0,
                "share of a modifier's squared norm that lies along a direction that it has with one parent alone; 0: "
                "the same direction with every parent",
                ge=0,
                le=1,
            ),
        },
    )
)
