"""The sums of information over top latents, as they are and permuted, compiled."""

from __future__ import annotations

import numba
import numpy as np

from sae_sweep.metrics.firing import NO_LATENT
from sae_sweep.metrics.partitions import Floats, Ints


@numba.njit(cache=True, nogil=True)
def class_w_log_w(order, class_starts, starts, latents, weights, width):  # type: ignore[no-untyped-def]
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
def units(order, of_row, of_group, mean_weight, starts, latents, counts):  # type: ignore[no-untyped-def]
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
def permute(units: Ints, weight: Floats, row_start: Ints, group_start: Ints, latents: int, times: int) -> Floats:
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
