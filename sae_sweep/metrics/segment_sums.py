"""Sums over the rows of each key, compiled: what tables are merged and read by."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from sae_sweep.metrics.partitions import Ints

# Bits of a key that are sorted by in one go: the counts of so many values stay in the nearest cache.
DIGIT = 11


def sum_by(keys: Ints, *values: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """The distinct `keys`, sorted, and for each array [n] of `values` its sums over the rows of each key, in order."""
    order, starts = _runs(np.ascontiguousarray(keys, np.int64))
    return keys[order[starts]], *(_sum_runs(np.ascontiguousarray(value), order, starts) for value in values)


@numba.njit(cache=True, nogil=True)
def sorting(keys: Ints) -> Ints:
    """What sorts `keys` [n] int64, equal ones in the order in which they are: digit by digit, the lowest first."""
    least, most, sorted_before = keys[0], keys[0], True
    for row in range(1, len(keys)):
        sorted_before &= keys[row - 1] <= keys[row]
        least, most = min(least, keys[row]), max(most, keys[row])
    order = np.arange(len(keys))
    if sorted_before:
        return order
    moved, moved_order, sorted_keys = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64), keys - least
    shift = 0
    while shift < 64 and (most - least) >> shift:
        places = np.zeros((1 << DIGIT) + 1, np.int64)
        for key in sorted_keys:
            places[((key >> shift) & ((1 << DIGIT) - 1)) + 1] += 1
        for digit in range(1 << DIGIT):
            places[digit + 1] += places[digit]
        for row in range(len(keys)):
            digit = (sorted_keys[row] >> shift) & ((1 << DIGIT) - 1)
            moved[places[digit]], moved_order[places[digit]] = sorted_keys[row], order[row]
            places[digit] += 1
        sorted_keys, moved = moved, sorted_keys
        order, moved_order = moved_order, order
        shift += DIGIT
    return order


@numba.njit(cache=True, nogil=True)
def _runs(keys: Ints) -> tuple[Ints, Ints]:
    """What sorts `keys` [n], and where in that order each key begins."""
    if len(keys) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order, starts, runs = sorting(keys), np.empty(len(keys), np.int64), 0
    for row in range(len(keys)):
        if row == 0 or keys[order[row]] != keys[order[row - 1]]:
            starts[runs] = row
            runs += 1
    return order, starts[:runs].copy()


@numba.njit(cache=True, nogil=True)
def _sum_runs(values, order, starts):  # type: ignore[no-untyped-def]
    """The sums of `values` [n] over the runs of `order` that begin at `starts`, one value after the other."""
    sums = np.empty(len(starts), values.dtype)
    for run in range(len(starts)):
        end = starts[run + 1] if run + 1 < len(starts) else len(values)
        total = values[order[starts[run]]]
        for row in range(starts[run] + 1, end):
            total += values[order[row]]
        sums[run] = total
    return sums
