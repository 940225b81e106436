"""Correlations of features: a Gaussian copula, whose matrix is written down, of low rank, or drawn."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.planted.text import NOTHING, call, number, which_feature, words
from sae_sweep.toys.planted.trees import Tree

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
else:
    np, torch = lazy("numpy"), lazy("torch")

# The share of pairs that `random` correlates.
CORRELATED = 0.7
# Rounding leaves eigenvalues of a correlation matrix that are zero a little below it.
LEAST_EIGENVALUE = -1e-9


def read_correlations(
    text: str, tree: Tree, generator: torch.Generator | None, grouped: Collection[int] = ()
) -> Floats | None:
    """The correlations [features, features] float64 of the normal numbers behind the roots; None for `none`.

    grouped: roots that have no such numbers, as they come in groups

    `0.3`: of every two roots; `0~1:0.4, 2~*:-0.2`: of those two, and of 2 with every other root; `lowrank(r, s)`: s
    times the cosines of vectors drawn in r numbers from `generator` (None: only checked); `random(a, b)`: `_random`'s.
    UserError in one line.
    """
    if text.strip() == NOTHING:
        return None
    count = len(tree.parents)
    bound = {child: "comes with its parent alone" for child, parent in enumerate(tree.parents) if parent >= 0}
    bound |= dict.fromkeys(grouped, "comes in a group, by toy.one_of")
    roots = np.array([feature not in bound for feature in range(count)])
    if "~" in text:
        found = _pairs(text, count, bound)
    elif re.match(r"\s*[a-z]", text):
        found = _drawn(text, count, generator)
    else:
        found = np.full((count, count), number("toy.correlations", text.strip()))
    found = np.where(roots[:, None] & roots, found, 0.0)
    np.fill_diagonal(found, 1.0)
    if np.abs(found).max() > 1 or np.linalg.eigvalsh(found)[0] < LEAST_EIGENVALUE:
        raise UserError(f"toy.correlations={text}: no features can be correlated like this (an eigenvalue is negative)")
    return found


def _pairs(text: str, count: int, bound: Mapping[int, str]) -> Floats:
    found = np.zeros((count, count))
    for word in words(text):
        pair, _, value = word.partition(":")
        one, _, other = pair.partition("~")
        row = which_feature("toy.correlations", one, count, word)
        others = range(count) if other == "*" else [which_feature("toy.correlations", other, count, word)]
        named = [row, *(others if other != "*" else ())]
        at = next((feature for feature in named if feature in bound), None)
        if at is not None or [row] == list(others):
            what = "itself" if at is None else f"feature {at}, which {bound[at]}"
            raise UserError(f"toy.correlations={text}: {word} is a correlation with {what}")
        for column in others:
            found[row, column] = found[column, row] = number("toy.correlations", value)
    return found


def _drawn(text: str, count: int, generator: torch.Generator | None) -> Floats:
    name, given = call("toy.correlations", text)
    right = len(given) == 2 and {
        "lowrank": given[0] >= 1 and given[0] % 1 == 0 and 0 <= given[1] <= 1,
        "random": 0 <= given[0] <= given[1] <= 1,
    }.get(name, False)
    if not right:
        raise UserError(
            f"toy.correlations cannot be {show(text)}: none, a number, pairs 0~1:0.4, lowrank(2, 0.5), or "
            "random(0.3, 0.9)"
        )
    if generator is None:
        return np.eye(count)
    law = _random if name == "random" else _lowrank
    return law(given[0], given[1], count, generator)


def _lowrank(rank: float, strength: float, count: int, generator: torch.Generator) -> Floats:
    drawn = torch.randn(count, int(rank), dtype=torch.float64, generator=generator)
    loadings = torch.nn.functional.normalize(drawn, dim=1).numpy()
    correlations: Floats = strength * loadings @ loadings.T
    return correlations


def _random(least: float, most: float, count: int, generator: torch.Generator) -> Floats:
    """Of CORRELATED pairs, half are correlated by a number uniform in [least, most], half by minus such a number; then
    the nearest such matrix without negative eigenvalues, scaled to a diagonal of 1 (the code of arXiv 2508.16560)."""
    row, column = np.triu_indices(count, 1)
    order = torch.randperm(len(row), generator=generator).numpy()[: len(row) - int(len(row) * (1 - CORRELATED))]
    uniform = torch.rand(len(order), dtype=torch.float64, generator=generator).numpy()
    sign = np.where(np.arange(len(order)) < len(order) // 2, 1, -1)
    found = np.eye(count)
    found[row[order], column[order]] = found[column[order], row[order]] = sign * (least + (most - least) * uniform)
    root = square_root(found)
    nearest = root @ root.T
    size = np.sqrt(np.diag(nearest))
    correlations: Floats = nearest / np.outer(size, size)
    return correlations


def square_root(matrix: Floats) -> Floats:
    """L with L @ L.T = matrix [n, n], which may be singular."""
    values, vectors = np.linalg.eigh(matrix)
    root: Floats = vectors * np.sqrt(values.clip(0))
    return root
