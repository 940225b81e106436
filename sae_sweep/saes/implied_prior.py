"""The prior over activations that a penalty implies: its density, whether it can be normalised, its mean and its tail.

An SAE's loss ‖x − x̂‖² + coefficient · penalty is 2σ² times −log of a posterior, up to a constant, if reconstruction
errors are normal with variance σ² in each number and codes have the density exp(−λ · penalty)/Z on a ≥ 0, with
λ = coefficient/(2σ²). Source: the maximum a posteriori reading of sparse coding, Olshausen & Field 1996.

Integrals are numeric (scipy.integrate.quad over log a) and come with their error. Whether one exists is read from the
tail: with f the penalty of one latent, −d log density / d log a = λ·a·f′(a). The density can be normalised if that
tends to more than 1, and has a mean if to more than 2. The limit of a·f′(a) is read off at a = 10⁹ and 10¹² times the
scale: what grows by more than a hundredth between them has no bound, and what falls by as much tends to 0.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad

from sae_sweep.saes.formula import Formula

Floats = NDArray[np.float64]
# (value, slope) of a penalty at activations of one latent.
Cost = Callable[[Floats], tuple[Floats, Floats]]

# Where the tail is looked at, in units of the scale, and by how much a limit may change between the two.
_NEAR, _FAR, _LIMIT_CHANGE = 1e9, 1e12, 0.01
# λ·c has to exceed 1 by so much: at the border there is no integral.
_BORDER = 1e-6
# The logarithms of activations between which integrands are looked for; what is e^-45 of the highest point is left out.
_LOWEST, _HIGHEST, _NEGLIGIBLE = -80.0, 345.0, 45.0
# Joint densities: the grid of log activations in units of the scale, and where the tail of a latent's marginal is read.
# Further out the differences that formulas such as (T^2 - sum(a^2))/2 hold would be lost to rounding.
_JOINT_GRID, _JOINT_STEP, _JOINT_TAIL = (-22.0, 14.0), 0.25, (10.0, 14.0)


@dataclass(frozen=True)
class Estimate:
    """A number by numeric integration, and how far off it may be."""

    value: float
    error: float


@dataclass(frozen=True)
class Tail:
    """How f, the penalty of one latent, goes on far out: the limit of a·f′(a), inf if it has no bound.

    near: a·f′(a) where it was read for the first time · growth: it grows as a^growth
    """

    limit: float
    near: float
    growth: float


@dataclass(frozen=True)
class Prior:
    """The density of one latent's activation at one λ. What does not exist is None; the mean of a heavy tail is inf."""

    rate: float  # λ
    normaliser: Estimate | None  # Z
    mean: Estimate | None

    @property
    def proper(self) -> bool:
        """Whether the density can be normalised."""
        return self.normaliser is not None


@dataclass(frozen=True)
class Joint:
    """The density over all activations of an input of several latents, at one λ."""

    latents: int
    normaliser: Estimate | None


@dataclass(frozen=True)
class ImpliedPrior:
    """A penalty at its settings, read as a prior.

    beside: activations of other latents on the same input, where the penalty couples them
    """

    formula: Formula
    scale: float = 1.0
    p: float = 1.0
    beside: tuple[float, ...] = ()

    def cost(self, activations: Floats) -> tuple[Floats, Floats]:
        """Penalty of one latent's activations [...], 0 where it is off, and its slope."""
        value, slope = self.formula.value(activations, self.scale, self.p, beside=self.beside)
        return value - self._off, slope

    @functools.cached_property
    def _off(self) -> float:
        return float(self.formula.value(np.zeros(()), self.scale, self.p, beside=self.beside)[0])

    @property
    def slope_at_zero(self) -> float:
        """How steep the penalty is for a latent about to fire: λ times this is how steeply log p falls at 0."""
        return float(self.cost(np.zeros(()))[1])

    @functools.cached_property
    def tail(self) -> Tail:
        """How the penalty goes on far out."""
        at = np.array([_NEAR, _FAR]) * max(self.scale, 1.0)
        value, slope = self.cost(at)
        with np.errstate(all="ignore"):
            near, far = map(float, at * slope)
        if not np.isfinite([*value, near, far]).all():
            return Tail(math.inf, math.inf, math.inf)
        if far <= 0 or near <= 0:
            return Tail(0.0, 0.0, 0.0)
        growth = math.log(far / near) / math.log(_FAR / _NEAR)
        if abs(far / near - 1) <= _LIMIT_CHANGE:
            return Tail(far, near, growth)
        return Tail(math.inf if growth > 0 else 0.0, near, growth)

    @property
    def proper_above(self) -> float:
        """The λ above which the density can be normalised: 0 for every λ, inf for none."""
        limit = self.tail.limit
        return 0.0 if limit == math.inf else math.inf if limit == 0 else 1 / limit

    def at(self, rate: float) -> Prior:
        """The prior at λ = rate > 0."""
        return _prior(self, rate)

    def _prior(self, rate: float) -> Prior:
        if rate <= self.proper_above * (1 + _BORDER):
            return Prior(rate, None, None)
        normaliser = self._moment(rate, 0)
        if rate <= 2 * self.proper_above * (1 + _BORDER):
            return Prior(rate, normaliser, Estimate(math.inf, 0.0))
        first = self._moment(rate, 1)
        mean = first.value / normaliser.value
        relative = first.error / first.value + normaliser.error / normaliser.value
        return Prior(rate, normaliser, Estimate(mean, mean * relative))

    def density(self, activations: Floats, rate: float) -> Floats:
        """p(a) at λ = rate, or exp(−λ·penalty) where it cannot be normalised."""
        prior = self.at(rate)
        return np.exp(-rate * self.cost(activations)[0]) / (prior.normaliser.value if prior.normaliser else 1.0)

    def _moment(self, rate: float, order: int) -> Estimate:
        """∫ a^order · exp(−λf) da over a ≥ 0, as an integral over u = log a."""

        def exponent(u: Floats) -> Floats:
            return (order + 1) * u - rate * self.cost(np.exp(u))[0]

        # Further out a power law is exact, while differences within a formula may be lost to rounding.
        known_to = math.log(_FAR * max(self.scale, 1.0))
        grid = np.linspace(_LOWEST, _HIGHEST if self.tail.limit == math.inf else known_to, 3401)
        heights = exponent(grid)
        highest = int(heights[grid <= known_to].argmax())
        top = float(heights[highest])
        low = np.flatnonzero(heights < top - _NEGLIGIBLE)
        left = grid[max(low[low < highest], default=0)]
        right = grid[min(low[low > highest], default=len(grid) - 1)]
        # Kinks and jumps are ends of pieces, as is the highest point, which a coarse rule could miss.
        inner = {float(grid[highest]), *self._kinks()}
        bounds = [left, *sorted(u for u in inner if left < u < right), right]
        pieces = [
            quad(lambda u: math.exp(float(exponent(np.asarray(u))) - top), low, high, limit=400, epsabs=0, epsrel=1e-10)
            for low, high in itertools.pairwise(bounds)
        ]
        total, error = (sum(piece[i] for piece in pieces) for i in range(2))
        beyond = self._beyond(rate, order, float(exponent(right)) - top)
        size = math.exp(top)
        return Estimate((total + beyond.value) * size, (error + beyond.error) * size)

    def _beyond(self, rate: float, order: int, height: float) -> Estimate:
        """What a power law leaves beyond the grid, from e^height on: by its exponent as read far out, or nearer."""
        if self.tail.limit == math.inf:
            return Estimate(0.0, 0.0)
        far, near = (rate * each - order - 1 for each in (self.tail.limit, self.tail.near))
        rest = math.exp(height) / far
        return Estimate(rest, abs(math.exp(height) / near - rest) if near > 0 else math.inf)

    def _kinks(self) -> list[float]:
        """log a where the formula passes from one case to another."""
        bounds = [node.args[2] for node in self.formula.term.parts() if node.kind == "where"]
        at = [float(Formula(bound).value(np.zeros(()), self.scale, self.p)[0]) for bound in bounds]
        return [math.log(each) for each in at if each > 0]


@functools.lru_cache(maxsize=256)
def _prior(reading: ImpliedPrior, rate: float) -> Prior:
    return reading._prior(rate)


def joint(formula: Formula, scale: float, p: float, rate: float, latents: int) -> Joint:
    """The density exp(−λ·penalty) over the activations of 2 or 3 latents that a penalty couples.

    It can be normalised if the marginal of one latent, the others integrated out, falls faster than 1/a. Z is a sum
    over a grid of log a; its error is the difference to the sum over every other node, and what lies beyond the grid.
    """
    low, high = _JOINT_GRID
    nodes = np.exp(np.arange(low, high + _JOINT_STEP / 2, _JOINT_STEP)) * scale

    def marginal(activation: float, every: int) -> float:
        shapes = np.eye(latents - 1, dtype=int) * -2 + 1  # [-1, 1] and [1, -1]: an axis of the grid for each latent
        rest = [nodes[::every].reshape(shape) for shape in shapes]
        cost = formula.joint_value([np.asarray(activation), *rest], scale, p)
        weights = functools.reduce(np.multiply, rest) * (_JOINT_STEP * every) ** (latents - 1)
        with np.errstate(all="ignore"):
            return float((np.exp(-rate * cost) * weights).sum())

    near, far = (marginal(math.exp(each) * scale, 1) for each in _JOINT_TAIL)
    steepness = math.log(near / far) / (_JOINT_TAIL[1] - _JOINT_TAIL[0]) if near > 0 and far > 0 else math.inf
    if steepness <= 1 + _LIMIT_CHANGE:
        return Joint(latents, None)
    fine, coarse = (_JOINT_STEP * every * sum(marginal(a, every) * a for a in nodes[::every]) for every in (1, 2))
    beyond = latents * far * math.exp(_JOINT_TAIL[1]) * scale / (steepness - 1)
    return Joint(latents, Estimate(float(fine), float(abs(fine - coarse) + beyond)))
