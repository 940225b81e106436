"""How well each latent fits a class of each partition: compiled sums over the rows of a firing table.

For every latent and partition: the class with the largest F1, and the class with the largest share of the latent's mass
Σ weight · a‖d‖. A class of a finer partition lies within one of each coarser partition, so that what the latent has of
it is at most what it has of those: where that is too little to count, the finer partition is not summed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from sae_sweep.config.settings import PARTITIONS
from sae_sweep.metrics.evaluation_classes import NOTHING, ROUNDING, EvaluationClasses
from sae_sweep.metrics.firing import FiringTable
from sae_sweep.metrics.partitions import Floats, Ints

# Shares and scores are rounded to so many digits, so that ties do not hang on the order of a sum.
DIGITS = 12


class Layout(NamedTuple):
    """The classes of all partitions, numbered one partition after the other: a record that compiled code reads.

    of_cell [T, partitions] int32: the class of every cell; first [partitions + 1]: where each partition's numbers
    begin; coarser [partitions, partitions] bool: whether the second partition lacks some of the first one's factors;
    cells: the number of the finest partition among them.
    """

    of_cell: NDArray[np.int32]
    first: Ints
    coarser: NDArray[np.bool_]
    singles: int
    cells: int


class Limits(NamedTuple):
    """Below which F1, and which share of mass, a latent's fit to a class need not be known.

    best_f1: whether its best F1 with any class is asked for, even if that is below.
    """

    f1: float
    purity: float
    best_f1: bool


class Fits(NamedTuple):
    """What fits each of n latents, arrays [partitions, n] or [n].

    f1 and f1_class: the largest F1 with a class, and which class of the partition that is, of equal ones the first, 0
    and NOTHING where the partition is one class of all inputs; share and share_class: the same of the share of mass.
    Also 0 and NOTHING where it is below the limits. fired [n]: the weight fired on. held [n]: of the weight of the cell
    with the largest share, the part on which the latent fires.
    """

    f1: Floats
    f1_class: Ints
    share: Floats
    share_class: Ints
    fired: Floats
    held: Floats

    @classmethod
    def room(cls, latents: int) -> Fits:
        """Arrays for so many latents, none of which fits anything."""
        by_partition = len(PARTITIONS), latents
        f1_class, share_class = np.full(by_partition, NOTHING), np.full(by_partition, NOTHING)
        scores, shares = np.zeros(by_partition), np.zeros(by_partition)
        return cls(scores, f1_class, shares, share_class, np.zeros(latents), np.zeros(latents))

    def take(self, latents: NDArray[Any]) -> Fits:
        """Those of some latents, by number or by a mask."""
        return Fits._make(value[..., latents] for value in self)


class Sums(NamedTuple):
    """Room for the sums of one latent: weight and mass of each class [classes, 2], which are zeros between latents; the
    classes touched [partitions by one factor, ·] and how many of each; and the largest share of weight and of mass in a
    class of each partition."""

    of_class: Floats
    touched: Ints
    touches: Ints
    weight_share: Floats
    mass_share: Floats

    @classmethod
    def room(cls, layout: Layout) -> Sums:
        """Room for the classes of a layout."""
        most, partitions = int(np.diff(layout.first).max()), len(layout.coarser)
        touched, touches = np.empty((layout.singles, most), np.int64), np.zeros(layout.singles, np.int64)
        return cls(np.zeros((layout.first[-1], 2)), touched, touches, np.zeros(partitions), np.zeros(partitions))


@lru_cache(maxsize=4)
def layout(classes: EvaluationClasses) -> Layout:
    """The classes of all of PARTITIONS, in their order."""
    of_cell = np.empty((classes.cells.count, len(PARTITIONS)), np.int32)
    first = np.zeros(len(PARTITIONS) + 1, np.int64)
    for i, name in enumerate(PARTITIONS):
        of_cell[:, i] = classes.classes(name).of_cell + first[i]
        first[i + 1] = first[i] + classes.classes(name).count
    coarser = np.array([[set(other) < set(name) for other in PARTITIONS] for name in PARTITIONS])
    return Layout(of_cell, first, coarser, sum(len(name) == 1 for name in PARTITIONS), PARTITIONS.index("mqnc"))


def class_weights(classes: EvaluationClasses, cell_weight: Floats) -> Floats:
    """The evaluation weight of every class of a layout [classes], from that of every cell [T]."""
    parts = [classes.classes(name) for name in PARTITIONS]
    return np.concatenate([np.bincount(part.of_cell, cell_weight, part.count) for part in parts])


def fitted(table: FiringTable, classes: EvaluationClasses) -> Fits:
    """How each latent of a table fits the classes."""
    evaluation, arranged, fits = classes.evaluation, layout(classes), Fits.room(table.width)
    limits, weights = Limits(evaluation.f1, evaluation.purity, best_f1=True), class_weights(classes, table.cell_weight)
    rows = table.cell, table.weight, table.mass
    fit_all(rows, table.starts, arranged, weights, limits, Sums.room(arranged), fits)
    return fits


@numba.njit(cache=True, nogil=True)
def fit_all(rows, starts, layout, weights, limits, sums, fits):  # type: ignore[no-untyped-def]
    """Fit every latent of a firing table: `rows` are its cells, weights and masses, those of latent i from starts[i] to
    starts[i + 1]; `weights` [classes] as of `class_weights`."""
    cells, weight, mass = rows
    for latent in range(len(starts) - 1):
        part = slice(starts[latent], starts[latent + 1])
        fit_one((cells[part], weight[part], mass[part]), layout, weights, limits, sums, fits, latent)


@numba.njit(cache=True, nogil=True)
def fit_one(rows, layout, weights, limits, sums, fits, latent):  # type: ignore[no-untyped-def]
    """Fit one latent from its rows: the cells on which it fires, the weight and the mass there. Written to `fits`."""
    fired, total, best = 0.0, 0.0, 0.0
    _, weight, mass = rows
    for row in range(len(weight)):
        fired += weight[row]
        total += mass[row]
    fits.fired[latent] = fired
    if len(weight) == 0:
        return
    _add(rows, layout.of_cell, 0, layout.singles, sums)
    for p in range(len(layout.coarser)):
        single = p < layout.singles
        if not single:
            weight_share = mass_share = 1.0
            for other in range(p):
                if layout.coarser[p, other]:
                    weight_share = min(weight_share, sums.weight_share[other])
                    mass_share = min(mass_share, sums.mass_share[other])
            sums.weight_share[p], sums.mass_share[p] = weight_share, mass_share
            # The class weighs at least what the latent has of it, hence F1 ≤ 2·share/(1 + share).
            least = min(limits.f1, best) if limits.best_f1 else limits.f1
            if 2 * weight_share / (1 + weight_share) < least - ROUNDING and mass_share < limits.purity - ROUNDING:
                continue
            _add(rows, layout.of_cell, p, 1, sums)
        _fit_partition(p, p if single else 0, (fired, total), layout, weights, limits, sums, fits, latent)
        best = max(best, fits.f1[p, latent])


@numba.njit(cache=True, nogil=True)
def _add(rows, of_cell, p, partitions, sums):  # type: ignore[no-untyped-def]
    """Add up rows by the classes of so many partitions from p on, the first in the first row of `sums.touched`."""
    cells, weight, mass = rows
    sums.touches[:partitions] = 0
    for row in range(len(cells)):
        for i in range(partitions):
            each = of_cell[cells[row], p + i]
            if sums.of_class[each, 0] == 0:
                sums.touched[i, sums.touches[i]] = each
                sums.touches[i] += 1
            sums.of_class[each, 0] += weight[row]
            sums.of_class[each, 1] += mass[row]


@numba.njit(cache=True, nogil=True)
def _fit_partition(p, place, totals, layout, weights, limits, sums, fits, latent):  # type: ignore[no-untyped-def]
    """The best F1 and share of mass among the classes touched, those at `place`, whose sums are set to zero again."""
    fired, total = totals
    first, says_nothing = layout.first[p], layout.first[p + 1] - layout.first[p] == 1
    score, score_class, share, share_class, largest = 0.0, NOTHING, 0.0, NOTHING, 0.0
    if not limits.best_f1:
        score, share = limits.f1 - ROUNDING, limits.purity - ROUNDING
    for i in range(sums.touches[place]):
        each = sums.touched[place, i]
        held, mass, whole = sums.of_class[each, 0], sums.of_class[each, 1], weights[each]
        sums.of_class[each, 0] = sums.of_class[each, 1] = 0
        largest = max(largest, held)
        # More than the class weighs can only come from the merged rows of a dense latent, see `fold_dense`.
        twice = 2 * min(held, whole)
        if twice >= (score - ROUNDING) * (fired + whole) and not says_nothing:
            f1 = _rounded(twice / (fired + whole))
            if f1 > score or (f1 == score and each - first < score_class):
                score, score_class = f1, each - first
        if mass >= (share - ROUNDING) * total:
            of_mass = _rounded(mass / total)
            if of_mass > share or (of_mass == share and each - first < share_class):
                share, share_class = of_mass, each - first
                # The merged rows of a dense latent may stand in a cell of which no input was drawn.
                if p == layout.cells and whole > 0:
                    fits.held[latent] = held / whole
    if score_class != NOTHING:
        fits.f1[p, latent], fits.f1_class[p, latent] = score, score_class
    if share_class == NOTHING:
        share = 0.0
    fits.share[p, latent], fits.share_class[p, latent] = share, share_class
    sums.weight_share[p], sums.mass_share[p] = largest / fired, share


@numba.njit(cache=True, nogil=True)
def _rounded(value: float) -> float:
    return np.rint(value * 10.0**DIGITS) / 10.0**DIGITS
