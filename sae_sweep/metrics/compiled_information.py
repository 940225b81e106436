"""The sums of information over top latents, as they are and permuted, compiled."""

from __future__ import annotations

import numba
import numpy as np

from sae_sweep.metrics.firing import NO_LATENT
from sae_sweep.metrics.hashing import GOLDEN, mixed
from sae_sweep.metrics.partitions import Floats, Ints

# Inputs of a group weigh the same if they differ by no more than this share.
ALIKE = 1e-9

_mixed, _32 = numba.njit(mixed), np.uint64(32)


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
    held, seen, counts = np.zeros(latents), np.empty(latents, np.int64), np.zeros(latents, np.int64)
    gain, told, key = _gains(len(units)), np.zeros(times), np.uint64(0)
    for g in range(len(group_start) - 1):
        first, last = group_start[g], group_start[g + 1]
        # A group of one row tells nothing: both sums are the same.
        if last - first == 1:
            continue
        start, end = row_start[first], row_start[last]
        mean = weight[start:end].mean()
        alike = np.abs(weight[start:end] - mean).max() <= ALIKE * mean
        whole = _counted(units, start, end, counts, gain) if alike else 0.0
        for time in range(times):
            key = _shuffle(units, start, end, key)
            if alike:
                rows = -whole
                for row in range(first, last):
                    rows += _counted(units, row_start[row], row_start[row + 1], counts, gain)
                told[time] += mean * rows
                continue
            told[time] -= _held_w_log_w(units, weight, start, end, held, seen)
            for row in range(first, last):
                told[time] += _held_w_log_w(units, weight, row_start[row], row_start[row + 1], held, seen)
    return told


@numba.njit(cache=True, nogil=True)
def _shuffle(units: Ints, start: int, end: int, key: np.uint64) -> np.uint64:
    """Shuffle the units from `start` to `end` in place; returns the key of the next random number."""
    for here in range(start, end - 1):
        key += GOLDEN
        # 32 random bits choose among those that are left.
        other = here + np.int64(((_mixed(key) >> _32) * np.uint64(end - here)) >> _32)
        units[here], units[other] = units[other], units[here]
    return key


@numba.njit(cache=True, nogil=True)
def _gains(most: int) -> Floats:
    """(n + 1)·log(n + 1) − n·log n for n below `most`."""
    values = np.arange(1.0, most + 1)
    values *= np.log(values)
    values[1:] -= values[:-1].copy()
    return values


@numba.njit(cache=True, nogil=True)
def _counted(units: Ints, start: int, end: int, counts: Ints, gain: Floats) -> float:
    """Σ n·log n over the latents of the units from `start` to `end`, of which each has n. `counts` stays zeros.

    Where all weigh w, that is what Σ w·n·log(w·n) has beside a number that no permutation changes.
    """
    total = 0.0
    for unit in range(start, end):
        total += gain[counts[units[unit]]]
        counts[units[unit]] += 1
    for unit in range(start, end):
        counts[units[unit]] = 0
    return total


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
