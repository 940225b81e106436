"""What the counts would be if labels meant nothing: the same rules on a firing table whose inputs are permuted.

Two nulls, each for the measures that it says something of:
- within maxima: query, runner-up and copies are permuted among the inputs of each maximum. A latent that knows its
  maximum knows it still, and nothing finer: for splits, and labels and purity finer than m.
- across maxima: whole labels are permuted among all inputs: for owned maxima, duplicates and labels of one factor.
For information, the top latents of all inputs are permuted (`information.py`). Planted features are permuted among all
inputs, and their directions turned at random, all by one rotation.

Inputs and not cells are permuted: a latent that fires on one cell alone would fire on one cell still. Firing, weights
of inputs and every loss stay what they are, so measures that use no label have no such null. Each null is the mean over
`evaluation.permutations`, beside its standard deviation. What a latent is permuted to follows from where it fires and
from the number of the permutation: the same SAE has the same nulls everywhere, in whatever order its latents are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from zlib import crc32

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.config.columns import shuffled, spread
from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.metrics.class_scores import Fits, Limits, Sums, class_weights, fit_one, layout
from sae_sweep.metrics.evaluation_classes import FINER_THAN_M, ROUNDING, EvaluationClasses
from sae_sweep.metrics.firing import FiringTable
from sae_sweep.metrics.ground_truth import MEASURES, Detection, planted_metrics
from sae_sweep.metrics.hashing import GOLDEN, mixed
from sae_sweep.metrics.labels import ACROSS, WITHIN, count, described
from sae_sweep.metrics.partitions import Floats, Ints
from sae_sweep.metrics.segment_sums import sum_by

# A latent that fires on many inputs is permuted fewer times, as then a permutation is an average in itself: so often
# that so many of its inputs are drawn, at least once. Each permutation then stands for several.
DRAWN_INPUTS = 1 << 9
# Permutations of latents that are fitted at a time; and how many there are at most in all: of very wide SAEs, each of
# which has latents enough for an average, there are fewer than `evaluation.permutations`.
FITTED, PERMUTED_LATENTS = 1 << 17, 1 << 19
# Numbers of the partitions by one factor.
SINGLE = tuple(i for i, name in enumerate(PARTITIONS) if len(name) == 1)

_mixed, _32 = numba.njit(mixed), np.uint64(32)


class Units(NamedTuple):
    """The inputs that are permuted, group by group: `cell` [n] int32 of each, those of group g from starts[g] to
    starts[g + 1]; `weight` [T]: what an input of each cell weighs on average."""

    cell: NDArray[np.int32]
    starts: Ints
    weight: Floats


class Draws(NamedTuple):
    """What is drawn for latents: of latent i, the pairs from starts[i] to starts[i + 1], each so many `inputs`
    [pairs] of a `group` [pairs], on which it fires with mean a‖d‖ `size` [pairs]; seed, times [latents]: of its random
    numbers, and how often they are drawn."""

    starts: Ints
    group: Ints
    inputs: Ints
    size: Floats
    seed: NDArray[np.uint64]
    times: Ints


def shuffled_cells(table: FiringTable, classes: EvaluationClasses) -> dict[str, float | None]:
    """The columns shuffled_* and their spread of counts on a toy with cells."""
    maxima, everything = classes.classes("m").of_cell, np.zeros(table.cells, np.int64)
    found: dict[str, float | None] = {}
    for group, partitions, columns in ((maxima, FINER_THAN_M, WITHIN), (everything, SINGLE, ACROSS)):
        counts = permuted_counts(table, group, partitions, classes)
        found |= summary({name: counts[name] for name in columns})
    return found


def summary(values: Mapping[str, NDArray[Any] | Sequence[float | int | None] | None]) -> dict[str, float | None]:
    """The columns of nulls, from the values of each measure under every permutation: means and standard deviations.

    None where a value is None; the standard deviation of one permutation is None too.
    """
    found: dict[str, float | None] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, of_trials in values.items():
        known = isinstance(of_trials, np.ndarray) or (of_trials is not None and None not in of_trials)
        found[shuffled(name)] = found[spread(name)] = None
        if known and of_trials is not None and len(of_trials):
            arrays[name] = np.asarray(of_trials, np.float64)
    # Those of as many permutations at once: each call takes as long as the numbers of dozens of columns.
    for trials in {len(array) for array in arrays.values()}:
        names = [name for name, array in arrays.items() if len(array) == trials]
        stacked = np.stack([arrays[name] for name in names])
        found |= zip(map(shuffled, names), stacked.mean(1).tolist(), strict=True)
        if trials > 1:
            found |= zip(map(spread, names), stacked.std(1, ddof=1).tolist(), strict=True)
    return found


def permuted_counts(
    table: FiringTable, group: Ints, partitions: Sequence[int], classes: EvaluationClasses
) -> dict[str, NDArray[Any] | None]:
    """`labels.count` of every permutation [permutations] of the inputs of each group of cells, for each latent anew.

    group [T], numbered from 0; partitions: those whose labels and pure latents are asked for, as numbers
    in PARTITIONS. A latent fires on as many inputs of a group as before, by its mean a‖d‖ there. An input weighs what
    those of its cell do on average.
    """
    trials = min(classes.evaluation.permutations, max(1, PERMUTED_LATENTS // table.width))
    units = _units(table, group)
    draws = _draws(table, group, trials)
    draws = draws._replace(times=np.where(_may_fit(draws, units, classes.evaluation), draws.times, 0))
    evaluation, arranged = classes.evaluation, layout(classes)
    scales = (
        arranged,
        class_weights(classes, table.cell_weight),
        Limits(evaluation.f1, evaluation.purity, best_f1=False),
    )
    room = units.cell.copy(), Drawn.room(draws), Sums.room(arranged)
    parts = []
    for part in np.array_split(np.arange(table.width), 1 + trials * table.width // FITTED):
        fits = Fits.room(int(draws.times[part].sum()))
        _fit_permuted(part, draws, units, room, scales, fits)
        parts.append(_all_trials(_fitting(part, draws.times[part], fits, partitions, evaluation), draws.times, trials))
    fits = Fits._make(np.concatenate(values, axis=-1) for values in zip(*(fits for fits, *_ in parts), strict=True))
    latent, trial = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    permuted = described(fits, table.inputs[latent], table.folded[latent], table.total, classes, trial)
    return count(permuted, classes, trial, trials).metrics


def _fitting(
    part: Ints, times: Ints, fits: Fits, partitions: Sequence[int], evaluation: Evaluation
) -> tuple[Fits, Ints, Ints]:
    """The permutations that fit some class of the given partitions: their fits, latents and numbers. Most fit none."""
    f1, purity = evaluation.f1 - ROUNDING, evaluation.purity - ROUNDING
    reach = (fits.share[list(partitions)] >= purity) | (fits.f1[list(partitions)] >= f1)
    kept = np.flatnonzero(reach.any(0))
    number = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return fits.take(kept), np.repeat(part, times)[kept], number[kept]


def _all_trials(found: tuple[Fits, Ints, Ints], times: Ints, trials: int) -> tuple[Fits, Ints, Ints]:
    """The same in every trial: permutation t of a latent that has few stands for t + times, t + 2·times, … as well."""
    fits, latent, number = found
    repeats = (trials - number + times[latent] - 1) // times[latent]
    rows = np.repeat(np.arange(len(latent)), repeats)
    again = np.arange(len(rows)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    return fits.take(rows), latent[rows], number[rows] + again * times[latent[rows]]


def _units(table: FiringTable, group: Ints) -> Units:
    """The inputs of a table by group."""
    counts = np.bincount(table.top_cell, table.top_count, table.cells).astype(np.int64)
    weight = np.divide(table.cell_weight, counts, out=np.zeros(table.cells), where=counts > 0)
    order = np.argsort(group, kind="stable")
    cell = np.repeat(order, counts[order])
    return Units(cell.astype(np.int32), np.searchsorted(group[cell], np.arange(int(group.max()) + 2)), weight)


def _draws(table: FiringTable, group: Ints, trials: int) -> Draws:
    """What each latent of a table draws."""
    groups = int(group.max()) + 1
    key, number, mass, weight = sum_by(table.latent * groups + group[table.cell], table.count, table.mass, table.weight)
    latent, of_group = np.divmod(key, groups)
    starts = np.searchsorted(latent, np.arange(table.width + 1))
    times = np.clip(DRAWN_INPUTS // np.maximum(table.inputs, 1), 1, trials) * (table.inputs > 0)
    return Draws(starts, of_group, number, mass / weight, _seeds(table), times)


def _may_fit(draws: Draws, units: Units, evaluation: Evaluation) -> NDArray[np.bool_]:
    """Which latents [latents] may be pure in, or named by, a class of inputs of one group, however they are permuted.

    For example, a latent with half of its inputs under each of two maxima fits nothing finer than a maximum. What it
    has of a group is at most so many times the heaviest input there, and of each other one so often the lightest.
    """
    weight, full = units.weight[units.cell], np.flatnonzero(np.diff(units.starts))
    lightest, heaviest = np.zeros((2, len(units.starts) - 1))
    lightest[full], heaviest[full] = (bound.reduceat(weight, units.starts[full]) for bound in (np.minimum, np.maximum))
    latent = np.repeat(np.arange(len(draws.times)), np.diff(draws.starts))
    possible = np.zeros(len(draws.times), np.bool_)
    # A class of so large a share of the weight has that F1, if it weighs nothing beside.
    for size, least in (
        (draws.size, evaluation.purity),
        (np.ones_like(draws.size), evaluation.f1 / (2 - evaluation.f1)),
    ):
        low, high = (draws.inputs * size * bound[draws.group] for bound in (lightest, heaviest))
        others = np.bincount(latent, low, len(possible))[latent] - low
        possible[latent[high >= (least - 2 * ROUNDING) * (high + others)]] = True
    return possible


def _seeds(table: FiringTable) -> NDArray[np.uint64]:
    """A number for each latent [width] that follows from the cells on which it fires, and how many inputs of each."""
    rows = mixed(mixed(table.cell.astype(np.uint64)) + GOLDEN * table.count.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(rows, dtype=np.uint64)])
    return sums[table.starts[1:]] - sums[table.starts[:-1]]


class Drawn(NamedTuple):
    """Room for what is drawn for one latent: the cell, weight and mass of every input, and where among the units it
    was: all [n], the inputs of the latent that fires on most."""

    cell: Ints
    weight: Floats
    mass: Floats
    place: Ints

    @classmethod
    def room(cls, draws: Draws) -> Drawn:
        """Room for any latent of these."""
        ends = np.concatenate([[0], np.cumsum(draws.inputs)])
        most = int((ends[draws.starts[1:]] - ends[draws.starts[:-1]]).max(initial=0))
        return cls(np.empty(most, np.int64), np.empty(most), np.empty(most), np.empty(most, np.int64))


@numba.njit(cache=True, nogil=True)
def _fit_permuted(part, draws, units, room, scales, fits):  # type: ignore[no-untyped-def]
    """Draw inputs for each latent of `part` as often as it is to be, and fit them.

    room: of units.cell a copy, a Drawn, and Sums; scales: layout, class weights and limits.
    """
    taken, drawn, sums = room
    place = 0
    for latent in part:
        for number in range(draws.times[latent]):
            end = _draw(latent, number, draws, units, taken, drawn)
            rows = drawn.cell[:end], drawn.weight[:end], drawn.mass[:end]
            fit_one(rows, *scales, sums, fits, place)
            place += 1


@numba.njit(cache=True, nogil=True)
def _draw(latent, number, draws, units, taken, drawn):  # type: ignore[no-untyped-def]
    """Draw inputs for one latent, without replacement within a group; returns how many. `taken` stays what it is."""
    key, end = _mixed(draws.seed[latent] + GOLDEN * np.uint64(number + 1)), 0
    for pair in range(draws.starts[latent], draws.starts[latent + 1]):
        first, last = units.starts[draws.group[pair]], units.starts[draws.group[pair] + 1]
        begin, end = end, end + draws.inputs[pair]
        for row in range(begin, end):
            key += GOLDEN
            here = first + row - begin
            # 32 random bits choose among those that are left.
            other = here + np.int64(((_mixed(key) >> _32) * np.uint64(last - here)) >> _32)
            cell = taken[other]
            taken[here], taken[other] = cell, taken[here]
            drawn.place[row], drawn.cell[row] = other, cell
            drawn.weight[row] = units.weight[cell]
            drawn.mass[row] = units.weight[cell] * draws.size[pair]
        for row in range(begin, end):
            here = first + row - begin
            taken[here], taken[drawn.place[row]] = units.cell[here], units.cell[drawn.place[row]]
    return end


def shuffled_features(
    detection: Detection,
    W_dec: Tensor,
    directions: Tensor,
    live: NDArray[np.bool_],
    evaluation: Evaluation,
) -> dict[str, float | None]:
    """The columns shuffled_* of planted features and their spread, other arguments as of `planted_metrics`."""
    # Sorted, so that the order of latents has no say.
    seed = crc32(np.sort(detection.both, axis=0).tobytes())
    trials = []
    for number in range(evaluation.permutations):
        permuted, turned = _permuted(detection, directions, np.random.default_rng((seed, number)))
        trials.append(planted_metrics(permuted, W_dec, turned, live, evaluation.f1))
    return summary({name: [trial[name] for trial in trials] for name in MEASURES})


def _permuted(detection: Detection, directions: Tensor, rng: np.random.Generator) -> tuple[Detection, Tensor]:
    """A detection whose features come with other inputs, and directions all turned by one rotation."""
    # Latents in an order that does not depend on theirs: equal ones draw in any order alike.
    order = np.lexsort((*detection.both.T, detection.fired))
    absent = detection.total - detection.active
    both = np.empty_like(detection.both)
    both[order] = rng.hypergeometric(detection.active, absent, detection.fired[order, None])
    orthogonal, triangular = np.linalg.qr(rng.normal(size=(directions.shape[1],) * 2))
    # So that every rotation (or reflection) is as likely.
    turn = torch.from_numpy(orthogonal * np.sign(np.diag(triangular))).to(directions)
    return Detection(both, detection.fired, detection.active, detection.total), directions @ turn
