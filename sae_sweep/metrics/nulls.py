"""What the counts would be if labels meant nothing: the same rules on a firing table whose inputs were dealt anew.

Two nulls, each for the measures that it says something of:
- within maxima: query, runner-up and copies are shuffled among the inputs of each maximum. A latent that knows its
  maximum knows it still, and nothing finer: for splits, labels finer than m, and information given the maximum.
- across maxima: whole labels are shuffled among all inputs: for owned maxima, duplicates and labels of one factor.
Planted features are shuffled among all inputs, and their directions turned at random, all by one rotation.

Inputs and not cells are shuffled: a latent that fires on one cell alone would fire on one cell still. Firing, weights
of inputs and every loss stay what they are, so measures that use no label have no such null. One deal for each SAE,
seeded by what it was counted to do: the same SAE has the same null everywhere, and unlike SAEs have unlike ones.
"""

from __future__ import annotations

from zlib import crc32

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.config.columns import ACROSS, PLANTED, WITHIN, shuffled
from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.firing import NO_LATENT, FiringTable, Floats, Fold
from sae_sweep.metrics.ground_truth import Detection, planted_metrics
from sae_sweep.metrics.information import information
from sae_sweep.metrics.labels import count_splits, describe
from sae_sweep.metrics.partitions import Ints, partition
from sae_sweep.metrics.segment_sums import sum_by
from sae_sweep.toys.classes import Factored

# Units drawn in one go.
DRAWN = 1 << 10
# Looking at so many cells takes as long as sorting one.
SWEPT = 32


def shuffled_cells(
    table: FiringTable, cells: Factored, evaluation: Evaluation, fold: Fold
) -> dict[str, float | int | None]:
    """The columns shuffled_* of a toy with cells. `fold`: the table's own."""
    within, across = (dealt(table, group, fold) for group in (partition(cells, "m").of_cell, np.zeros_like(fold.onto)))
    finer, whole = (count_splits(describe(each, cells, evaluation), cells, evaluation) for each in (within, across))
    # Corrected by one more deal: what is left has the mean 0.
    of_m = {**finer.metrics, **information(within, cells, permutations=1)}
    return {shuffled(name): of_m[name] for name in WITHIN} | {shuffled(name): whole.metrics[name] for name in ACROSS}


def shuffled_features(
    detection: Detection, W_dec: Tensor, directions: Tensor, live: NDArray[np.bool_], f1: float
) -> dict[str, float | int | None]:
    """The columns shuffled_* of planted features, arguments as of `planted_metrics`."""
    rng = np.random.default_rng(crc32(detection.both.tobytes()))
    absent = detection.total - detection.active
    both = rng.hypergeometric(detection.active, absent, detection.fired[:, None])
    orthogonal, triangular = np.linalg.qr(rng.normal(size=(directions.shape[1],) * 2))
    # So that every rotation (or reflection) is as likely.
    turn = torch.from_numpy(orthogonal * np.sign(np.diag(triangular))).to(directions)
    dealt = Detection(both, detection.fired, detection.active, detection.total)
    found = planted_metrics(dealt, W_dec, directions @ turn, live, f1)
    return {shuffled(name): found[name] for name in PLANTED}


def dealt(table: FiringTable, group: Ints, fold: Fold) -> FiringTable:
    """The table after the inputs of each group of cells exchanged their cells at random, for each latent anew.

    `group` [cells], numbered from 0. A latent fires on as many inputs of a group as before, by its mean a‖d‖ there;
    top latents are on top of as many. An input weighs what those of its cell do on average. Rows of dense latents are
    merged as `fold` says.
    """
    counts = np.bincount(table.top_cell, table.top_count, table.cells).astype(np.int64)
    weight = np.divide(table.cell_weight, counts, out=np.zeros(table.cells), where=counts > 0)
    order = np.argsort(group, kind="stable")
    units, groups = np.repeat(order, counts[order]), int(group.max()) + 1
    starts = np.searchsorted(group[units], np.arange(groups + 1))
    key, *sums = sum_by(table.latent * groups + group[table.cell], table.count, table.mass, table.weight)
    latent, of_group = np.divmod(key, groups)
    most = np.minimum(sums[0], np.bincount(group, minlength=groups)[of_group])
    dense = (table.fired > fold.above)[latent]
    seed = crc32(table.top_latent.tobytes())
    bounds = np.searchsorted(group[order], np.arange(groups + 1))
    cells = order, bounds, weight, fold.onto
    drawn = _draw(seed, of_group, sums[0], int(most.sum()), units, starts, dense, *cells)
    rows, cell, fires, count = drawn
    mass = fires * np.repeat(sums[1] / sums[2], rows)
    top = np.argsort(group[table.top_cell], kind="stable")
    tops = _shuffled(seed, np.repeat(table.top_latent[top], table.top_count[top]), starts)
    keys, top_count = sum_by(*_counted(units, tops, table.width))
    top_cell, top_latent = np.divmod(keys, table.width + 1)
    top_weight = weight[top_cell] * top_count
    top_rows = top_cell, top_latent - 1, top_weight, top_count
    return FiringTable(table.width, table.cells, np.repeat(latent, rows), cell, fires, mass, count, *top_rows)


@numba.njit(cache=True, nogil=True)
def _draw(
    seed: int,
    of_group: Ints,
    draws: Ints,
    most: int,
    units: Ints,
    starts: Ints,
    dense: NDArray[np.bool_],
    order: Ints,
    bounds: Ints,
    weight: Floats,
    onto: Ints,
) -> tuple[Ints, Ints, Floats, Ints]:
    """Of each pair of latent and group, draw so many units without replacement: how many cells came up, then cells,
    weights and counts, those of one pair after the other, at most `most`.

    Units starts[g]:starts[g + 1] are of group g, each a cell of `weight`; a dense pair counts onto[cell] instead. The
    cells themselves are order[bounds[g]:bounds[g + 1]], ascending.
    """
    np.random.seed(seed)
    units, others = units.astype(np.int32), np.empty(DRAWN, np.int64)
    # As small as can be, since memory is slow: what a cell weighs is looked up once its units are counted.
    came_up, onto_weight, onto_count = np.zeros(len(weight), np.int32), np.zeros(len(weight)), np.zeros(len(weight))
    rows, cells = np.zeros(len(draws), np.int64), np.empty(most, np.int64)
    weights, counts = np.empty(most), np.empty(most, np.int64)
    begin = 0
    for pair in range(len(draws)):
        end, last = begin, starts[of_group[pair] + 1]
        stop = starts[of_group[pair]] + draws[pair]
        for first in range(starts[of_group[pair]], stop, len(others)):
            # One loop after the other: what one waits for, memory or a number to draw, holds up no other.
            places = range(first, min(first + len(others), stop))
            for place in places:
                others[place - first] = np.random.randint(place, last)
            for place in places:
                other = others[place - first]
                units[place], units[other] = units[other], units[place]
            for place in places:
                cell = units[place]
                if came_up[cell] == 0:
                    cells[end] = cell
                    end += 1
                came_up[cell] += 1
        group = order[bounds[of_group[pair]] : bounds[of_group[pair] + 1]]
        _ascending(cells, begin, end, came_up, group)
        if dense[pair]:
            end = _merge(cells, begin, end, came_up, weight, onto, onto_weight, onto_count)
        for row in range(begin, end):
            cell = cells[row]
            if dense[pair]:
                weights[row], counts[row] = onto_weight[cell], np.int64(onto_count[cell])
                onto_weight[cell] = onto_count[cell] = 0
            else:
                weights[row], counts[row] = came_up[cell] * weight[cell], came_up[cell]
                came_up[cell] = 0
        rows[pair] = end - begin
        begin = end
    return rows, cells[:begin].copy(), weights[:begin].copy(), counts[:begin].copy()


@numba.njit(cache=True, nogil=True)
def _ascending(cells, begin, end, came_up, group):  # type: ignore[no-untyped-def]
    """Sort the cells from `begin` to `end`: those of the `group`, which is ascending, that `came_up`."""
    if SWEPT * (end - begin) < len(group):
        cells[begin:end].sort()
        return
    place = begin
    for cell in group:
        if came_up[cell]:
            cells[place] = cell
            place += 1


@numba.njit(cache=True, nogil=True)
def _merge(cells, begin, end, came_up, weight, onto, onto_weight, onto_count):  # type: ignore[no-untyped-def]
    """Replace the sorted cells from `begin` to `end` by those `onto` which they are merged, sorted; returns their end.

    Weight and count of these are added up from how often each cell `came_up`, which is set to 0.
    """
    merged = begin
    for row in range(begin, end):
        cell, target = cells[row], onto[cells[row]]
        if onto_count[target] == 0:
            cells[merged] = target
            merged += 1
        onto_weight[target] += came_up[cell] * weight[cell]
        onto_count[target] += came_up[cell]
        came_up[cell] = 0
    cells[begin:merged].sort()
    return merged


@numba.njit(cache=True, nogil=True)
def _shuffled(seed: int, values: Ints, starts: Ints) -> Ints:
    """`values` shuffled in place within each run starts[g]:starts[g + 1]."""
    np.random.seed(seed)
    for group in range(len(starts) - 1):
        np.random.shuffle(values[starts[group] : starts[group + 1]])
    return values


@numba.njit(cache=True, nogil=True)
def _counted(units: Ints, tops: Ints, width: int) -> tuple[Ints, Ints]:
    """Keys cell · (width + 1) + top - NO_LATENT of units [n], those of a cell side by side, and counts."""
    keys, counts = np.empty(len(units), np.int64), np.empty(len(units), np.int64)
    latest, rows = np.full(width + 1, -1, np.int64), 0
    for unit in range(len(units)):
        top = tops[unit] - NO_LATENT
        key, place = units[unit] * (width + 1) + top, latest[top]
        if place < 0 or keys[place] != key:
            latest[top] = place = rows
            keys[place], counts[place] = key, 0
            rows += 1
        counts[place] += 1
    return keys[:rows].copy(), counts[:rows].copy()
