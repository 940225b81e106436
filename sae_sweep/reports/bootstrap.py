"""Intervals by a hierarchical bootstrap, and what follows from them; numpy and nothing else.

An example: five toys were trained, and two SAEs of different seeds on each. Two SAEs of one toy are more alike than two
SAEs of different toys, so the ten numbers are not ten independent ones. A resample therefore draws five toys with
replacement, and for each of them two of its seeds with replacement; the middle 95% of the statistic over 10,000 such
resamples is its interval (Saravanan, Berman & Sober 2020, "Application of the hierarchical bootstrap to multi-level
data in neuroscience"; Davison & Hinkley 1997, section 3.8).

An interval from few toys is too narrow, since toys drawn with replacement vary less than new ones would: of the mean of
normal numbers it held the truth in 84 to 94 of 100 samples with five toys of two seeds (most where toys hardly differ),
in 89 to 97 with ten, and in 95 or more with twenty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
# Numbers in the largest array held at once.
NUMBERS = 1 << 22

Array = npt.NDArray[np.float64]
# Rows of numbers [resamples, n], NaN where there is none, to one number a row, NaN where the row has none.
Aggregate = Callable[[Array], Array]


@dataclass(frozen=True)
class Sample:
    """Numbers as they are nested.

    Attributes:
        values: [toys, seeds, settings], NaN where nothing was measured. Toys with fewer seeds than others have theirs
            first, then rows of NaN.
        losses: of the same shape, if only the seed of lowest loss of each toy and setting is to count.
    """

    values: Array
    losses: Array | None = None

    @property
    def seeds(self) -> npt.NDArray[np.int64]:
        """How many seeds each toy has: [toys]."""
        return (~np.isnan(self.values)).any(axis=2).sum(axis=1)


@dataclass(frozen=True)
class Draws:
    """What all sides of a comparison share, so that they are compared on the same toys and, where they have the same
    seeds, on the same seeds.

    Attributes:
        toys: [resamples, toys], which toys were drawn.
        places: [resamples, toys, seeds] in [0, 1): which of a toy's seeds were drawn, as a share of how many it has.
    """

    toys: npt.NDArray[np.int64]
    places: Array


@functools.lru_cache(maxsize=4)
def draw(toys: int, seeds: int, resamples: int = RESAMPLES) -> Draws:
    """The resamples of so many toys with at most so many seeds each; the same ones in every call."""
    generator = np.random.default_rng(0)
    return Draws(generator.integers(toys, size=(resamples, toys)), generator.random((resamples, toys, seeds)))


def over_all(sample: Sample, draws: Draws | None, aggregate: Aggregate) -> Array:
    """The aggregate over all numbers of each resample: [resamples]; without draws, of the sample as it is: [1]."""
    return _over_resamples(sample, draws, lambda drawn: aggregate(drawn.reshape(len(drawn), -1)))


def by_setting(sample: Sample, draws: Draws | None) -> Array:
    """The mean over toys and seeds of each resample, for each setting: [resamples, settings], or [1, settings]."""

    def means(drawn: Array) -> Array:
        return mean(drawn.reshape(len(drawn), -1, drawn.shape[-1]).transpose(0, 2, 1))

    return _over_resamples(sample, draws, means)


def _over_resamples(sample: Sample, draws: Draws | None, statistic: Callable[[Array], Array]) -> Array:
    """The statistic of the drawn numbers [resamples, toys, seeds, settings], a part of the resamples at a time."""
    if draws is None:
        return statistic(_best(sample.values[None], sample.losses))
    part = max(1, NUMBERS // (draws.places[0].size * sample.values.shape[2]))
    counts = sample.seeds
    done = []
    for first in range(0, len(draws.toys), part):
        toys, places = draws.toys[first : first + part, :, None], draws.places[first : first + part]
        seeds = (places * counts[toys]).astype(np.int64)
        drawn = sample.values[toys, seeds]
        drawn[np.arange(places.shape[2]) >= counts[toys]] = np.nan  # as many are drawn as the toy has
        done.append(statistic(_best(drawn, None if sample.losses is None else sample.losses[toys, seeds])))
    return np.concatenate(done)


def _best(drawn: Array, losses: Array | None) -> Array:
    """If losses are given, of each toy's seeds the one of lowest loss: [resamples, toys, 1, settings]."""
    if losses is None:
        return drawn
    lowest = np.where(np.isnan(drawn), np.inf, losses).argmin(axis=2, keepdims=True)
    return np.take_along_axis(drawn, lowest, axis=2)


def mean(numbers: Array) -> Array:
    """The mean of each row: [..., n] -> [...]; NaN do not count."""
    there = ~np.isnan(numbers)
    with np.errstate(invalid="ignore"):
        return np.where(there, numbers, 0.0).sum(axis=-1) / there.sum(axis=-1)


def median(numbers: Array) -> Array:
    """The median of each row: [..., n] -> [...]; NaN do not count."""
    ordered = np.sort(numbers, axis=-1)  # NaN come last
    count = (~np.isnan(numbers)).sum(axis=-1)
    middle = np.stack([np.maximum(count - 1, 0) // 2, count // 2], axis=-1).clip(max=numbers.shape[-1] - 1)
    return np.where(count > 0, np.take_along_axis(ordered, middle, axis=-1).mean(axis=-1), np.nan)


def share(threshold: float) -> Aggregate:
    """The share of each row that is at least `threshold`."""
    return lambda numbers: mean(np.where(np.isnan(numbers), np.nan, (numbers >= threshold).astype(np.float64)))


def interval(statistics: Array, level: float = LEVEL) -> tuple[float, float]:
    """The middle `level` of the statistics of the resamples (percentile bootstrap)."""
    there = statistics[~np.isnan(statistics)]
    if not there.size:
        return math.nan, math.nan
    low, high = np.quantile(there, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm_levels(evidence: Sequence[float], level: float = LEVEL) -> list[float]:
    """The level of each interval of a ladder so that, of all of them, one is wrong with the chance 1 − `level` at most.

    evidence: how strongly each rung speaks for the claim; the strongest of m has the level 1 − (1 − level)/m, the next
    1 − (1 − level)/(m − 1), and so on (Holm 1979).
    """
    order = sorted(range(len(evidence)), key=lambda rung: -evidence[rung])
    levels = [0.0] * len(evidence)
    for rank, rung in enumerate(order):
        levels[rung] = 1 - (1 - level) / (len(evidence) - rank)
    return levels


def toys_needed(toys: int, half_width: float, distance: float) -> int | None:
    """How many toys it would take for an interval to end within `distance` of its estimate, if that stays where it is.

    An interval of so many toys reaches `half_width` to that side, and it shrinks with the root of their number. None if
    the estimate is not on the right side at all.
    """
    if not distance > 0 or not math.isfinite(half_width):
        return None
    return max(toys + 1, math.ceil(toys * (half_width / distance) ** 2 * (1 - 1e-12)))
