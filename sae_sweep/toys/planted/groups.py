"""Groups of features of which one at a time is active: mixtures, of single features or of manifolds.

`0-7, 8-9:0.5` says that of features 0 to 7 exactly one is active on each input, and on half of the inputs one of 8 and
9 beside it. In a third number the second group follows the first: with `8-9:0.5:0.3`, on .3 of these inputs feature 8
comes with 0, 2, 4 and 6, and 9 with the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.planted.text import number, which_feature, words
from sae_sweep.toys.planted.trees import Tree

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch = lazy("numpy"), lazy("torch")

ALL = "all"


@dataclass(frozen=True)
class Group:
    """Features first to first + size - 1, of which one is active with `chance`.

    weights [size]: how likely each is among them; follows: with this chance it is the feature at the same place as the
    one of the group before, counted round
    """

    first: int
    size: int
    chance: float = 1.0
    follows: float = 0.0
    weights: tuple[float, ...] = ()

    @property
    def members(self) -> slice:
        """Where its features lie among all of them."""
        return slice(self.first, self.first + self.size)

    @property
    def shares(self) -> NDArray[np.float64]:
        """The chance of each feature to be the one, where no group is followed [size]."""
        weights = np.array(self.weights)
        found: NDArray[np.float64] = self.chance * weights / weights.sum()
        return found

    def choose(self, count: int, before: Tensor | None, generator: torch.Generator) -> Tensor:
        """Which feature is active [count, size], 0 or 1. `before` [count]: the places in the group before, if any."""
        device, there = generator.device, None
        if before is not None or self.chance < 1:
            there, matched = torch.rand((2, count), generator=generator, device=device)
        if len(set(self.weights)) == 1:
            place = torch.randint(self.size, (count,), generator=generator, device=device)
        else:
            bounds = torch.tensor(self.weights, device=device).cumsum(0)
            uniform = torch.rand(count, generator=generator, device=device) * bounds[-1]
            place = torch.searchsorted(bounds, uniform, right=True).clamp(max=self.size - 1)
        if before is not None:
            place = torch.where(matched < self.follows, before % self.size, place)
        chosen = torch.nn.functional.one_hot(place, self.size).float()
        return chosen if there is None else chosen * (there < self.chance)[:, None]


def read_groups(text: str, rates: Sequence[float], tree: Tree) -> list[Group]:
    """The groups of `0-7, 8-9:0.5`; `all`: one of all features. Rates weigh the features of a group. UserError."""
    key, count = "toy.one_of", len(rates)
    found: list[Group] = []
    for word in [f"0-{count - 1}"] if text.strip() == ALL else words(text):
        parsed = re.fullmatch(r"([^-:]+)-([^-:]+)(?::([^:]+))?(?::([^:]+))?", word)
        if parsed is None:
            raise UserError(f"{key} cannot be {show(word)}: {ALL}, or features as 0-7, or with a chance, 8-9:0.5")
        first, last = (which_feature(key, each, count, word) for each in parsed.group(1, 2))
        chance, follows = (number(key, each or default) for each, default in zip(parsed.group(3, 4), "10", strict=True))
        if last < first or not (0 <= chance <= 1 and 0 <= follows <= 1):
            raise UserError(f"{key}={text}: {word} is from the lower feature to the higher, its chances from 0 to 1")
        if follows and not (len(found) == 1 and found[0].chance == 1):
            raise UserError(f"{key}={text}: {word} can only follow a first group of which one is always active")
        weights = tuple(rates[first : last + 1])
        equal = len(set(weights)) == 1
        found.append(Group(first, last - first + 1, chance, follows, (1.0,) * len(weights) if equal else weights))
    taken = [member for group in found for member in range(count)[group.members]]
    twice = (
        next((member for member in taken if taken.count(member) > 1), None) if len(set(taken)) < len(taken) else None
    )
    if twice is not None:
        raise UserError(f"{key}={text}: feature {twice} is in two groups")
    child = next((member for member in taken if tree.parents[member] >= 0), None)
    if child is not None:
        raise UserError(f"{key}={text}: feature {child} comes with its parent alone, by toy.tree")
    return found


def pair_chances(first: Group, second: Group) -> NDArray[np.float64]:
    """The chance of each feature of the first group, of which one is always active, with none and with each of the
    second [first, 1 + second]."""
    weights = np.array(second.weights)
    found: NDArray[np.float64] = np.tile((1 - second.follows) * weights / weights.sum(), (first.size, 1))
    places = np.arange(first.size)
    found[places, places % second.size] += second.follows
    found = np.column_stack([np.full(first.size, 1 - second.chance), found * second.chance])
    leading = np.array(first.weights)
    return found * leading[:, None] / leading.sum()
