"""Trees of features: a child comes only with its parent, and children of one parent may exclude each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sae_sweep.errors import UserError
from sae_sweep.toys.planted.text import number, which_feature, words


@dataclass(frozen=True)
class Tree:
    """Which feature comes only with which other.

    parents [features]: -1 for a root; rates [features]: of a child, given its parent (0 for a root)
    leaders [features]: whose uniform number decides on a feature, its own unless it excludes a sibling listed before
    starts [features]: where in the unit interval a feature's share begins: children that exclude each other lie beside
    each other there
    """

    parents: tuple[int, ...]
    rates: tuple[float, ...]
    leaders: tuple[int, ...]
    starts: tuple[float, ...]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of every edge, by child."""
        return [(parent, child) for child, parent in enumerate(self.parents) if parent >= 0]

    def ancestry(self, feature: int) -> list[int]:
        """The feature, its parent, and so on up to its root."""
        found = [feature]
        while (parent := self.parents[found[-1]]) >= 0:
            found.append(parent)
        return found

    def levels(self) -> Iterator[list[int]]:
        """Features below the roots, parents before children."""
        depth = [len(self.ancestry(feature)) for feature in range(len(self.parents))]
        for level in range(2, max(depth) + 1):
            yield [feature for feature, at in enumerate(depth) if at == level]


def read_tree(text: str, count: int) -> Tree:
    """The tree of `0>1:0.2, 0>2:0.3|3:0.1`: 1, 2 and 3 come only with 0; 2 and 3 never together. UserError."""
    parents, rates, leaders, starts = [-1] * count, [0.0] * count, list(range(count)), [0.0] * count
    for word in words(text):
        parent, _, children = word.partition(">")
        start, leader = 0.0, None
        for part in children.split("|"):
            child, _, rate = part.partition(":")
            at = which_feature("toy.tree", child, count, word)
            if parents[at] >= 0:
                raise UserError(f"toy.tree={text}: feature {at} has two parents")
            leader = at if leader is None else leader
            parents[at], rates[at] = which_feature("toy.tree", parent, count, word), number("toy.tree", rate)
            leaders[at], starts[at] = leader, start
            start += rates[at]
            if not 0 < rates[at] <= 1 or start > 1 + 1e-9:
                raise UserError(f"toy.tree={text}: rates of a child, or of children that exclude each other, sum to at "
                                "most 1, each above 0")  # fmt: skip
    for feature in range(count):
        seen, at = {feature}, parents[feature]
        while at >= 0:
            if at in seen:
                raise UserError(f"toy.tree={text}: feature {at} comes only with itself")
            seen.add(at)
            at = parents[at]
    return Tree(tuple(parents), tuple(rates), tuple(leaders), tuple(starts))
