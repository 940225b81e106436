"""How much the top latent tells of query, runner-up and copies: a function of the table of top latents.

A code of one latent at a time may know a factor only because it knows the maximum, or another factor that comes with
it, or because it has so many latents that any factor would seem known. So information is taken given the maximum
(`info`), or given the maximum and both other factors (`unique`), and corrected for what a permutation would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numba
import numpy as np

from sae_sweep.metrics.firing import NO_LATENT, FiringTable, Floats
from sae_sweep.metrics.hashing import GOLDEN, mixed
from sae_sweep.metrics.limits import PERMUTED_INPUTS
from sae_sweep.metrics.nulls import summary
from sae_sweep.metrics.partitions import Classes, Ints, partition
from sae_sweep.metrics.segment_sums import sum_by
from sae_sweep.toys.classes import FACTORS, Factored

COLUMNS = {"query": "q", "runner_up": "n", "copies": "c"}
# Entropies below this (nats) are zero; so is what a null leaves of 1.
ZERO = 1e-9


def information(table: FiringTable, cells: Factored, permutations: int) -> dict[str, float | None]:
    """The columns info_* and unique_*: (value - null)/(1 - null), None where the factor is known without the latent.

    Also None where the null is 1: every input has a top latent of its own, so that any factor would seem known. With
    their own nulls shuffled_* and the spread of these: each permutation of the null, corrected by all the others.
    """
    asked: dict[str, tuple[Classes, Classes, Ints]] = {}
    for column, factor in COLUMNS.items():
        others = "".join(name for name in FACTORS if name != factor)
        for kind, given in (("info", "m"), ("unique", others)):
            asked[f"{kind}_{column}"] = _nested(cells, factor, given)
    return shares_told(table, asked, permutations)


def shares_told(
    table: FiringTable, asked: Mapping[str, tuple[Classes, Classes, Ints]], permutations: int
) -> dict[str, float | None]:
    """For each column, the share that the top latent tells of rows given groups, corrected, with its null and spread.

    asked: rows, groups, and the cells in the order of both, by column.
    """
    metrics: dict[str, float | None] = {}
    permuted: dict[str, list[float | None] | None] = {}
    tops = _tops(table)
    for column, of in asked.items():
        value, shares = share_between(table, *of[:2]), null_shares(table, tops, of, permutations)
        metrics[column] = corrected(value, None if shares is None else float(shares.mean()))
        permuted[column] = None if shares is None else _corrected_by_others(shares)
    return metrics | summary(permuted)


def winner_entropy(table: FiringTable) -> float:
    """Entropy (nats) of which latent is on top, none being one of the values: E[−log π] of `exclusive_pi`."""
    latent = table.top_latent + 1
    return float(np.log(table.total)) - _w_log_w(latent, table.top_weight) / table.total


def cofiring(table: FiringTable) -> float | None:
    """How often two latents fire together, over how often they would if each fired by itself.

    Σ P(i and j)/Σ P(i)P(j) over i ≠ j: 1 for independent latents, 0 for a code of one latent at a time. None if at most
    one latent ever fires.
    """
    chance = table.fired / table.total
    expected = float(chance.sum() ** 2 - (chance**2).sum())
    return None if expected < ZERO else table.together / table.total / expected


def corrected(value: float | None, null: float | None) -> float | None:
    """(value - null)/(1 - null), or None if either is, or if the null is 1."""
    if value is None or null is None or 1 - null < ZERO:
        return None
    return (value - null) / (1 - null)


def _corrected_by_others(shares: Floats) -> list[float | None]:
    """Each of several shares [n], by the mean of all others as its null."""
    others = (shares.sum() - shares) / (len(shares) - 1)
    return [corrected(share, null) for share, null in zip(shares.tolist(), others.tolist(), strict=True)]


def share_told(table: FiringTable, cells: Factored, factor: str, given: str) -> float | None:
    """I(top latent; factor | given)/H(factor | given), no latent being one of the values; None if the entropy is 0.

    `given`: the name of a partition without `factor`. Plug-in estimate in evaluation weights.
    """
    return share_between(table, *_nested(cells, factor, given)[:2])


def share_between(table: FiringTable, rows: Classes, groups: Classes) -> float | None:
    """I(top latent; row | group)/H(row | group), each of the `rows` within one of the `groups` of cells."""
    entropy = _entropy(table, rows, groups)
    if entropy < ZERO * table.total:
        return None
    tops = table.top_starts, table.top_latent, table.top_weight, table.width + 1
    joint, by_group = (
        _class_w_log_w(classes.order, np.append(classes.starts, table.cells), *tops) for classes in (rows, groups)
    )
    return (joint - by_group + entropy) / entropy


def _entropy(table: FiringTable, rows: Classes, groups: Classes) -> float:
    """H(rows | groups), times all evaluation weight."""
    by_group, by_row = (_log_sum(np.add.reduceat(table.cell_weight[c.order], c.starts)) for c in (groups, rows))
    return by_group - by_row


@lru_cache(maxsize=4 * len(COLUMNS))
def _nested(cells: Factored, factor: str, given: str) -> tuple[Classes, Classes, Ints]:
    """The classes of `given` and `factor` together, those of `given` alone, and the cells in the order of both.

    Kept, as every SAE of a sweep needs the same.
    """
    both = "".join(name for name in FACTORS if name in given + factor)
    rows, groups = partition(cells, both), partition(cells, given)
    return rows, groups, np.lexsort((rows.of_cell, groups.of_cell))


def _w_log_w(keys: Ints, weights: Floats) -> float:
    """Σ w·log w over the distinct keys, w being the sum of a key's weights."""
    return _log_sum(sum_by(keys, weights)[1])


def _log_sum(total: Floats) -> float:
    """Σ w·log w."""
    return float((total * np.log(total, where=total > 0, out=np.zeros_like(total))).sum())


def _tops(table: FiringTable) -> tuple[Ints, Ints, Ints]:
    """The starts, latents and counts of the rows of top latents, those of each cell in an order of their own.

    That order follows from where each latent is on top, so that latents in another order are permuted alike.
    """
    rows = mixed(mixed(table.top_cell.astype(np.uint64)) + GOLDEN * table.top_count.astype(np.uint64))
    content = np.zeros(table.width + 1, np.uint64)
    np.add.at(content, table.top_latent - NO_LATENT, rows)
    order = np.lexsort((content[table.top_latent - NO_LATENT], table.top_cell))
    return table.top_starts, table.top_latent[order], table.top_count[order]


def null_shares(
    table: FiringTable, tops: tuple[Ints, Ints, Ints], of: tuple[Classes, Classes, Ints], permutations: int
) -> Floats | None:
    """`share_between` of rows and groups when the top latents are permuted among the inputs of each group.

    of: rows, groups, and the cells in the order of both. Of each permutation [permutations]; None if the entropy is 0.
    Inputs keep their cell and their weight (the mean of their cell), so that the entropy stays what it is; each keeps
    to its group, so that the latents of a group stay too. A fixed seed. `tops`: as of `_tops`. There are at least two
    permutations, and fewer than asked for where the inputs are so many that one is an average in itself.
    """
    rows, groups, order = of
    entropy = _entropy(table, rows, groups)
    if entropy < ZERO * table.total:
        return None
    counts = np.bincount(table.top_cell, table.top_count, table.cells)
    mean_weight = np.divide(table.cell_weight, counts, out=np.zeros(table.cells), where=counts > 0)
    units, weight, row_start, group_start = _units(order, rows.of_cell, groups.of_cell, mean_weight, *tops)
    times = max(2, min(permutations, PERMUTED_INPUTS // len(units)))
    return (_permute(units, weight, row_start, group_start, table.width + 1, times) + entropy) / entropy


@numba.njit(cache=True, nogil=True)
def _class_w_log_w(order, class_starts, starts, latents, weights, width):  # type: ignore[no-untyped-def]
    """Σ w·log w over pairs of a class and a top latent, w being the sum of a pair's weights.

    `order`: the cells class by class, those of class i from class_starts[i] to class_starts[i + 1]; `starts`: where the
    rows of a cell begin in `latents` below `width` - 1, NO_LATENT among them, and `weights`.
    """
    held, seen, total = np.zeros(width), np.empty(width, np.int64), 0.0
    for each in range(len(class_starts) - 1):
        count = 0
        for cell in order[class_starts[each] : class_starts[each + 1]]:
            for row in range(starts[cell], starts[cell + 1]):
                latent = latents[row] - NO_LATENT
                if held[latent] == 0 and weights[row] > 0:
                    seen[count] = latent
                    count += 1
                held[latent] += weights[row]
        for latent in seen[:count]:
            total += held[latent] * np.log(held[latent])
            held[latent] = 0
    return total


@numba.njit(cache=True, nogil=True)
def _units(order, of_row, of_group, mean_weight, starts, latents, counts):  # type: ignore[no-untyped-def]
    """One unit per input, cells in their `order`: latent - NO_LATENT and weight [n] of each, and where rows begin among
    the units, and groups among the rows, with the ends of all."""
    n = counts.sum()
    units, weight = np.empty(n, np.int64), np.empty(n)
    row_start, group_start = np.empty(len(order) + 1, np.int64), np.empty(len(order) + 1, np.int64)
    unit, rows, groups, last_row, last_group = 0, 0, 0, -1, -1
    for cell in order:
        if starts[cell] == starts[cell + 1]:
            continue
        if of_group[cell] != last_group:
            group_start[groups], last_group = rows, of_group[cell]
            groups += 1
        if of_row[cell] != last_row:
            row_start[rows], last_row = unit, of_row[cell]
            rows += 1
        for row in range(starts[cell], starts[cell + 1]):
            end = unit + counts[row]
            units[unit:end], weight[unit:end] = latents[row] - NO_LATENT, mean_weight[cell]
            unit = end
    row_start[rows], group_start[groups] = unit, rows
    return units, weight, row_start[: rows + 1].copy(), group_start[: groups + 1].copy()


@numba.njit(cache=True, nogil=True)
def _permute(units: Ints, weight: Floats, row_start: Ints, group_start: Ints, latents: int, times: int) -> Floats:
    """For each permutation [times], Σ w·log w by (row, latent), less the same by (group, latent).

    `units` [n]: the latent of each unit, shuffled in place within its group; `weight` [n]. Row r is the units from
    row_start[r] to row_start[r + 1]; group g is the rows from group_start[g] to group_start[g + 1].
    """
    np.random.seed(0)
    held, seen = np.zeros(latents), np.empty(latents, np.int64)
    # What a row of one unit holds is the same in every permutation.
    alone = np.empty(len(units))
    for unit in range(len(units)):
        alone[unit] = weight[unit] * np.log(weight[unit])
    told = np.zeros(times)
    for time in range(times):
        for g in range(len(group_start) - 1):
            first, last = group_start[g], group_start[g + 1]
            # A group of one row tells nothing: both sums are the same.
            if last - first > 1:
                start, end = row_start[first], row_start[last]
                np.random.shuffle(units[start:end])
                told[time] -= _held_w_log_w(units, weight, start, end, held, seen)
                for row in range(first, last):
                    start, end = row_start[row], row_start[row + 1]
                    if end - start == 1:
                        told[time] += alone[start]
                    else:
                        told[time] += _held_w_log_w(units, weight, start, end, held, seen)
    return told


@numba.njit(cache=True, nogil=True)
def _held_w_log_w(units: Ints, weight: Floats, start: int, end: int, held: Floats, seen: Ints) -> float:
    """Σ w·log w over the latents of the units from `start` to `end`. `held` must be zeros, and is left so."""
    count = 0
    for unit in range(start, end):
        latent = units[unit]
        if held[latent] == 0:
            seen[count] = latent
            count += 1
        held[latent] += weight[unit]
    total = 0.0
    for i in range(count):
        total += held[seen[i]] * np.log(held[seen[i]])
        held[seen[i]] = 0
    return total
