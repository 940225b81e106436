"""What each latent stands for, and how many latents share a maximum: functions of the firing table.

Rules of counting: only live latents count; a latent is named by the predicate on the cell's factors that predicts best
where it fires, and only if it does so with F1 ≥ 0.8; a finer name must be worth it. A latent named finer than its
maximum is a split; several named by the whole of one maximum are duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.metrics.firing import FiringTable, Floats
from sae_sweep.metrics.ground_truth import Detection
from sae_sweep.metrics.partitions import Classes, Ints, partition
from sae_sweep.toys.classes import NONE, Factored

# A live latent fires on at least this many evaluation inputs, or on the weight of as many average ones.
LIVE_INPUTS = 8
# No owner, no label, no class.
NOTHING = -1
# Shares and scores are rounded to so many digits, so that ties do not hang on the order of a sum.
DIGITS = 12
# By so much a number may miss a threshold that it equals but for rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Latents:
    """A row per latent, arrays [width]; NOTHING in the integer columns and nan in the others where undefined.

    `owner`: the maximum with most of the latent's mass, `purity`: its share. `label`: index in PARTITIONS of the
    predicate that names the latent (of live latents only), `example`: a cell of its class. `f1`: the best F1 of any
    predicate (an upper bound for dense latents whose rows are merged: `fold_dense`). `density`: share of the evaluation
    weight on which it fires, `inputs`: on how many inputs.
    """

    owner: Ints
    purity: Floats
    live: NDArray[np.bool_]
    label: Ints
    example: Ints
    f1: Floats
    density: Floats
    inputs: Ints


def describe(table: FiringTable, cells: Factored, evaluation: Evaluation) -> Latents:
    """Owner, purity, life, label and density of every latent."""
    owner, purity = owners(table, cells)
    live = alive(table)
    label, example, f1 = labels(table, cells, evaluation)
    label, example = np.where(live, label, NOTHING), np.where(live, example, NOTHING)
    return Latents(owner, purity, live, label, example, f1, table.fired / table.total, table.inputs)


def owners(table: FiringTable, cells: Factored) -> tuple[Ints, Floats]:
    """Each latent's owner [width], the maximum that holds most of its mass Σ a‖d‖, and that share [width]."""
    maxima = partition(cells, "m")
    return _largest_share(table.latent, table.cell, table.mass, maxima.of_cell, maxima.count, table.width)


@numba.njit(cache=True, nogil=True)
def _largest_share(
    latent: Ints, cell: Ints, mass: Floats, of_cell: Ints, classes: int, width: int
) -> tuple[Ints, Floats]:
    """Each latent's class with most of its mass, of equal ones the first, and its share, rounded to DIGITS.

    Rows [n] in the order of their latents: a cell and the mass there; `of_cell` [T], the class of a cell.
    """
    owner, purity = np.full(width, NOTHING), np.full(width, np.nan)
    held, seen, count, total = np.zeros(classes), np.empty(classes, np.int64), 0, 0.0
    for row in range(len(latent)):
        of_row = of_cell[cell[row]]
        if held[of_row] == 0 and mass[row] > 0:
            seen[count] = of_row
            count += 1
        held[of_row] += mass[row]
        total += mass[row]
        if row + 1 < len(latent) and latent[row + 1] == latent[row]:
            continue
        best = -1.0
        for each in seen[:count]:
            share = np.rint(held[each] / total * 10.0**DIGITS) / 10.0**DIGITS
            held[each] = 0
            if share > best or (share == best and each < owner[latent[row]]):
                owner[latent[row]], purity[latent[row]], best = each, share, share
        count, total = 0, 0.0
    return owner, purity


def alive(table: FiringTable) -> NDArray[np.bool_]:
    """Which latents [width] fire on enough inputs and on enough weight.

    Inputs: LIVE_INPUTS. Where weights differ, the weight of so many average inputs serves as well: the one input of
    maximum 0 may be a sixteenth of the data. Weight: `live_floor`.
    """
    average = table.total / max(int(table.top_count.sum()), 1)
    enough_inputs = (table.inputs >= LIVE_INPUTS) | (table.fired >= LIVE_INPUTS * average * (1 - ROUNDING))
    return enough_inputs & (table.fired >= live_floor(table) * table.total * (1 - ROUNDING))


def live_floor(table: FiringTable) -> float:
    """Half the share of the evaluation weight that the lightest cell seen has: a latent on half of it is not lost."""
    return float(table.cell_weight[table.cell_weight > 0].min() / 2 / table.total)


def detectors(detection: Detection) -> Latents:
    """The latents of a toy without cells, each by the planted feature that it detects with the best F1.

    `owner` is that feature, `purity` the share of the inputs it fires on that have the feature; there are no labels.
    """
    f1, width = detection.f1, len(detection.fired)
    latents, owner = np.arange(width), f1.argmax(1)
    fires, nothing = detection.fired > 0, np.full(width, NOTHING)
    live = (detection.fired >= LIVE_INPUTS) & (detection.fired >= lightest(detection))
    purity, best = (np.where(fires, each, np.nan) for each in (detection.precision(latents, owner), f1.max(1)))
    density = detection.fired / detection.total
    return Latents(np.where(fires, owner, NOTHING), purity, live, nothing, nothing, best, density, detection.fired)


def lightest(detection: Detection) -> float:
    """Half the inputs that have the rarest planted feature that was seen."""
    return float(detection.active[detection.active > 0].min(initial=detection.total) / 2)


def labels(table: FiringTable, cells: Factored, evaluation: Evaluation) -> tuple[Ints, Ints, Floats]:
    """Each latent's label, an example cell of the class and the best F1 of any predicate: three arrays [width].

    A predicate is a class of one of PARTITIONS; F1 = 2·TP/(weight fired on + weight of the class). The label is the
    best predicate that reaches `evaluation.f1` and beats every coarser one that reaches it by `evaluation.f1_gain`;
    of equal ones the coarsest, then the first in PARTITIONS.
    """
    scores, examples = np.empty((len(PARTITIONS), table.width)), np.empty((len(PARTITIONS), table.width), np.int64)
    for i, name in enumerate(PARTITIONS):
        scores[i], examples[i] = _best_class(table, partition(cells, name))
    reaches = scores >= evaluation.f1 - ROUNDING
    admitted = reaches.copy()
    for i, fine in enumerate(PARTITIONS):
        for j, coarse in enumerate(PARTITIONS):
            if set(coarse) < set(fine):
                admitted[i] &= ~reaches[j] | (scores[i] >= scores[j] + evaluation.f1_gain - ROUNDING)
    # The first of the best is the coarsest: PARTITIONS are in the order of their length.
    label = np.where(admitted, scores, -1).argmax(0)
    chosen = examples[label, np.arange(table.width)]
    named = admitted.any(0)
    f1 = np.where(table.fired > 0, scores.max(0), np.nan)
    return np.where(named, label, NOTHING), np.where(named, chosen, NOTHING), f1


def _best_class(table: FiringTable, classes: Classes) -> tuple[Floats, Ints]:
    """Each latent's best F1 over the classes of a partition, and an example cell of that class.

    0 and NOTHING if it never fires, or if the toy has no such factor: one class of all inputs says nothing.
    """
    if classes.count == 1:
        return np.zeros(table.width), np.full(table.width, NOTHING)
    weights = np.bincount(classes.of_cell, table.cell_weight, classes.count)
    score, best = _best_f1(table.latent, table.cell, table.weight, classes.of_cell, table.fired, weights)
    return score, np.where(best == NOTHING, NOTHING, classes.first[best])


@numba.njit(cache=True, nogil=True)
def _best_f1(
    latent: Ints, cell: Ints, weight: Floats, of_cell: Ints, fired: Floats, weights: Floats
) -> tuple[Floats, Ints]:
    """Each latent's largest F1 with a class, rounded to DIGITS, and which class that is, of equal ones the first.

    Rows [n] in the order of their latents: a cell and the weight fired on there. `of_cell` [T], the class of a cell;
    `fired` [width], of every latent; `weights` [classes], of every class.
    """
    score, best = np.zeros(len(fired)), np.full(len(fired), NOTHING)
    held, seen = np.zeros(len(weights)), np.empty(len(weights), np.int64)
    count = 0
    for row in range(len(latent)):
        of_row = of_cell[cell[row]]
        if held[of_row] == 0:
            seen[count] = of_row
            count += 1
        held[of_row] += weight[row]
        if row + 1 < len(latent) and latent[row + 1] == latent[row]:
            continue
        for each in seen[:count]:
            # More than the class weighs can only come from the merged rows of a dense latent, see `fold_dense`.
            f1 = 2 * min(held[each], weights[each]) / (fired[latent[row]] + weights[each])
            held[each] = 0
            if f1 < score[latent[row]] - ROUNDING:
                continue
            f1 = np.rint(f1 * 10.0**DIGITS) / 10.0**DIGITS
            if f1 > score[latent[row]] or (f1 == score[latent[row]] and each < best[latent[row]]):
                score[latent[row]], best[latent[row]] = f1, each
        count = 0
    return score, best


def class_name(cells: Factored, label: int, example: int) -> str:
    """The class of partition PARTITIONS[label] that holds the cell `example`, as in "m=5,q=3" or "m=5,n=none"."""
    values = ((factor, int(cells.factors[factor][example])) for factor in PARTITIONS[label])
    return ",".join(f"{factor}={'none' if value == NONE else value}" for factor, value in values)


@dataclass(frozen=True)
class Splitting:
    """Counts over the live latents of one SAE: `metrics` by column, and [d_vocab] per maximum."""

    metrics: dict[str, float | int]
    splits: Ints
    duplicates: Ints


def count_splits(latents: Latents, cells: Factored, evaluation: Evaluation) -> Splitting:
    """Live latents, owned maxes, splits, duplicates and labels of one SAE.

    Owned: a maximum with a live latent of purity ≥ `evaluation.purity`. Split: a latent labelled finer than m, of the
    maximum that its label names; distinct splits are the classes that so many splits name, since latents may share one.
    Duplicate: one more latent labelled by the whole of a maximum already held.
    """
    live, label, d_vocab = latents.live, latents.label, cells.d_vocab
    pure = live & (np.nan_to_num(latents.purity) >= evaluation.purity - ROUNDING)
    maximum = np.where(label == NOTHING, NOTHING, cells.factors["m"][latents.example])
    finer = np.isin(label, [i for i, name in enumerate(PARTITIONS) if set("m") < set(name)])
    splits = np.bincount(maximum[finer], minlength=d_vocab)
    named = np.unique(np.stack([label[finer], latents.example[finer]]), axis=1)
    wholes = np.bincount(maximum[label == PARTITIONS.index("m")], minlength=d_vocab)
    duplicates = np.maximum(wholes - 1, 0)
    metrics: dict[str, Any] = {
        "live_latents": int(live.sum()),
        "dead_latents": int((~live).sum()),
        "pure_latents": int(pure.sum()),
        "owned_maxes": len(np.unique(latents.owner[pure])),
        "splits_per_max": int(splits.sum()) / d_vocab,
        "distinct_splits_per_max": named.shape[1] / d_vocab,
        "duplicates_per_max": int(duplicates.sum()) / d_vocab,
        "split_maxes": int((splits >= 2).sum()),
        **{f"label_{name}": int((label == i).sum()) for i, name in enumerate(PARTITIONS)},
    }
    return Splitting(metrics, splits, duplicates)
