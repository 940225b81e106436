"""The short texts by which `toy=planted` says how features come together, read into numbers.

`linear(0.345, 0.05)` are rates that fall evenly from the first feature to the last; `0>1:0.2` is a tree in which
feature 1 comes only with feature 0, on a fifth of the inputs that have it; `0~1:0.4` a correlation of the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.config.keys import nearest, show
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]
else:
    np, torch = lazy("numpy"), lazy("torch")

NOTHING = "none"
# Nodes of Gauss-Legendre: with them a chance of two correlated features is exact to about 1e-9.
NODES = 64
# The share of pairs that `random` correlates.
CORRELATED = 0.7
# Rounding leaves eigenvalues of a correlation matrix that are zero a little below it.
LEAST_EIGENVALUE = -1e-9


@dataclass(frozen=True)
class Magnitude:
    """How strong an active feature is.

    arguments: their defaults, in order; draw(arguments, shape, generator) -> Tensor; mean(*arguments): exact
    right(*arguments): whether they make sense
    """

    arguments: tuple[float, ...]
    draw: Callable[[Sequence[float], tuple[int, ...], torch.Generator], Tensor]
    mean: Callable[..., float]
    right: Callable[..., bool]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers uniform on (0, 1]."""
    return 1 - torch.rand(shape, generator=generator, device=generator.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _folded_mean(center: float, spread: float) -> float:
    """E|N(center, spread²)|."""
    ratio = center / spread
    return spread * math.sqrt(2 / math.pi) * math.exp(-(ratio**2) / 2) + center * math.erf(ratio / math.sqrt(2))


MAGNITUDES: Mapping[str, Magnitude] = {
    "constant": Magnitude(
        (1.0,),
        lambda of, shape, generator: torch.full(shape, of[0], device=generator.device),
        lambda value: value,
        lambda value: value > 0,
    ),
    "uniform": Magnitude(
        (1.0,),
        lambda of, shape, generator: 2 * of[0] * _uniform(shape, generator),
        lambda mean: mean,
        lambda mean: mean > 0,
    ),
    "exponential": Magnitude(
        (1.0,),
        lambda of, shape, generator: -of[0] * _uniform(shape, generator).log(),
        lambda mean: mean,
        lambda mean: mean > 0,
    ),
    # P(magnitude > x) = (1 + x/s)^-shape has the mean s / (shape - 1).
    "lomax": Magnitude(
        (3.0, 1.0),
        lambda of, shape, generator: of[1] * (of[0] - 1) * (_uniform(shape, generator) ** (-1 / of[0]) - 1),
        lambda shape, mean: mean,
        lambda shape, mean: shape > 1 and mean > 0,
    ),
    "lognormal": Magnitude(
        (0.0, 0.25),
        lambda of, shape, generator: (of[0] + of[1] * _normal(shape, generator)).exp(),
        lambda mu, sigma: math.exp(mu + sigma**2 / 2),
        lambda mu, sigma: sigma > 0,
    ),
    "folded": Magnitude(
        (1.0, 0.15),
        lambda of, shape, generator: (of[0] + of[1] * _normal(shape, generator)).abs(),
        _folded_mean,
        lambda center, spread: spread > 0,
    ),
}
# Name → arguments; what each means is said by `read_rates`.
RATES = {"linear": 2, "zipf": 2, "loguniform": 2}


def read_magnitude(text: str) -> tuple[Magnitude, list[float]]:
    """`name` or `name(arguments)` of MAGNITUDES: which one, and its arguments. UserError in one line."""
    name, given = _call("toy.magnitude", text)
    if name not in MAGNITUDES:
        raise UserError(f"toy.magnitude cannot be {show(text)}{nearest(name, MAGNITUDES)}")
    magnitude = MAGNITUDES[name]
    arguments = [*given, *magnitude.arguments[len(given) :]]
    if len(given) > len(magnitude.arguments) or not magnitude.right(*arguments):
        spelled = ", ".join(f"{argument:g}" for argument in magnitude.arguments)
        raise UserError(f"toy.magnitude={text}: its arguments are out of range or too many (such as {name}({spelled}))")
    return magnitude, arguments


def read_rates(text: str, count: int, generator: torch.Generator | None) -> list[float]:
    """The chance of each feature. UserError in one line.

    `0.05`: of every feature; `0.25, 0.05, 0.05`: of each; `linear(a, b)`: evenly from a to b; `zipf(a, s)`: a/i^s of
    the i-th, from 1; `loguniform(a, b)`: drawn from `generator` (None: only checked, and the middle is returned).
    """
    if re.match(r"\s*[a-z]", text):
        name, given = _call("toy.rates", text)
        if name not in RATES or len(given) != RATES[name]:
            raise UserError(f"toy.rates cannot be {show(text)}: one number, one for each, or {', '.join(RATES)}(a, b)")
        rates = _law(name, given[0], given[1], count, generator)
    else:
        numbers = [_number("toy.rates", word) for word in re.split(r"[\s,]+", text.strip())]
        if len(numbers) not in (1, count):
            raise UserError(f"toy.rates={text}: {len(numbers)} rates for toy.features={count}")
        rates = numbers * count if len(numbers) == 1 else numbers
    if not all(0 < rate <= 1 for rate in rates):
        raise UserError(f"toy.rates={text}: each must be above 0 and at most 1")
    return rates


def _law(name: str, a: float, b: float, count: int, generator: torch.Generator | None) -> list[float]:
    if name == "linear":
        return [a + (b - a) * i / max(1, count - 1) for i in range(count)]
    if name == "zipf":
        return [a * i**-b for i in range(1, count + 1)]
    if not 0 < a <= b <= 1:
        raise UserError(f"toy.rates=loguniform({a:g}, {b:g}): from the lower to the higher, above 0 and at most 1")
    drawn = [0.5] * count
    if generator is not None:
        drawn = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
    return [a * (b / a) ** each for each in drawn]


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
    for word in [] if text.strip() == NOTHING else re.split(r"[\s,]+", text.strip()):
        parent, _, children = word.partition(">")
        start, leader = 0.0, None
        for part in children.split("|"):
            child, _, rate = part.partition(":")
            at = _feature("toy.tree", child, count, word)
            if parents[at] >= 0:
                raise UserError(f"toy.tree={text}: feature {at} has two parents")
            leader = at if leader is None else leader
            parents[at], rates[at] = _feature("toy.tree", parent, count, word), _number("toy.tree", rate)
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


def read_correlations(text: str, tree: Tree, generator: torch.Generator | None) -> Floats | None:
    """The correlations [features, features] float64 of the normal numbers behind the roots; None for `none`.

    `0.3`: of every two roots; `0~1:0.4, 2~*:-0.2`: of those two, and of 2 with every other root; `lowrank(r, s)`: s
    times the cosines of vectors drawn in r numbers from `generator` (None: only checked); `random(a, b)`: `_random`'s.
    UserError in one line.
    """
    if text.strip() == NOTHING:
        return None
    count = len(tree.parents)
    roots = np.array([parent < 0 for parent in tree.parents])
    if "~" in text:
        found = _pairs(text, tree)
    elif re.match(r"\s*[a-z]", text):
        found = _drawn(text, count, generator)
    else:
        found = np.full((count, count), _number("toy.correlations", text.strip()))
    found = np.where(roots[:, None] & roots, found, 0.0)
    np.fill_diagonal(found, 1.0)
    if np.abs(found).max() > 1 or np.linalg.eigvalsh(found)[0] < LEAST_EIGENVALUE:
        raise UserError(f"toy.correlations={text}: no features can be correlated like this (an eigenvalue is negative)")
    return found


def _pairs(text: str, tree: Tree) -> Floats:
    count = len(tree.parents)
    found = np.zeros((count, count))
    for word in re.split(r"[\s,]+", text.strip()):
        pair, _, value = word.partition(":")
        one, _, other = pair.partition("~")
        row = _feature("toy.correlations", one, count, word)
        others = range(count) if other == "*" else [_feature("toy.correlations", other, count, word)]
        named = [row, *(others if other != "*" else ())]
        child = next((feature for feature in named if tree.parents[feature] >= 0), None)
        if child is not None or [row] == list(others):
            what = "itself" if child is None else f"feature {child}, which comes with its parent alone"
            raise UserError(f"toy.correlations={text}: {word} is a correlation with {what}")
        for column in others:
            found[row, column] = found[column, row] = _number("toy.correlations", value)
    return found


def _drawn(text: str, count: int, generator: torch.Generator | None) -> Floats:
    name, given = _call("toy.correlations", text)
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


def both_below(rates: Floats, correlations: Floats) -> Floats:
    """P(u_i < rates_i and u_j < rates_j) [n, n], where u = Φ(g) and normal numbers g have these correlations [n, n].

    p_i·p_j + 1/2π ∫ exp(-(a² + b² - 2ab·sin θ) / (2cos² θ)) dθ from 0 to arcsin ρ, with a and b the quantiles of the
    rates (Plackett 1954).
    """
    from scipy.special import ndtri

    quantiles = ndtri(np.clip(rates, 0.0, 1 - 1e-16))
    a, b = quantiles[:, None, None], quantiles[None, :, None]
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    end = np.arcsin(np.clip(correlations, -1, 1))[..., None]
    theta = end * (nodes + 1) / 2
    inner = np.exp(-(a * a + b * b - 2 * a * b * np.sin(theta)) / (2 * np.cos(theta) ** 2))
    found: Floats = np.outer(rates, rates) + (inner * weights).sum(-1) * end[..., 0] / (4 * np.pi)
    np.fill_diagonal(found, rates)
    return found


def _call(key: str, text: str) -> tuple[str, list[float]]:
    """`name(1, 2)` or `name`."""
    found = re.fullmatch(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*", text)
    if found is None:
        raise UserError(f"{key} cannot be {show(text)}: write a name and its numbers, such as linear(0.3, 0.05)")
    name, inside = found.groups()
    return name, [_number(key, word.strip()) for word in inside.split(",")] if inside else []


def _number(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{key}: {show(text)} is not a number")
    return number


def _feature(key: str, text: str, count: int, word: str) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise UserError(f"{key}: {show(text)} in {word} is no feature from 0 to {count - 1}")
    return int(text)
