"""The loops over active latents from which penalty_gradients.py makes modules, a formula's functions in them.

In such a module stand the text of one of these loops and, under the names that are declared here, the functions of the
formula that it calls.
"""

# ruff: noqa: F821  What is only declared here is defined where the text is run.
from __future__ import annotations

import functools
from collections.abc import Callable

import numba

from sae_sweep.kernels.cpu.sparse_step import LATENT

_float = numba.float64
penalises = _float(
    numba.float32[::1], numba.int32[:, ::1], numba.int64[::1], numba.float32[::1], _float, _float, numba.float32[::1]
)
jit = functools.partial(numba.njit, nogil=True, fastmath={"contract"}, error_model="numpy")
# Called by compiled loops alone; without what Python would need to call it, it is compiled in half the time.
part = functools.partial(jit, no_cpython_wrapper=True, no_cfunc_wrapper=True)

# Kernels take a penalty as a pointer to its slopes: they are compiled once, for every penalty there will be.
SLOPES = numba.types.FunctionType(penalises)

# Of a, s and p: what is summed over latents, once or twice, and its slope in a.
first: Callable[[float, float, float], float]
first_slope: Callable[[float, float, float], float]
second: Callable[[float, float, float], float]
second_slope: Callable[[float, float, float], float]
# Of a, logπ, s and p: that of which the largest counts. Its slope, of a, s and p.
largest: Callable[[float, float, float, float], float]
largest_slope: Callable[[float, float, float], float]
# Of both sums, or of the sum and the largest, s and p: the penalty of an input, and its slopes in the first two.
outer: Callable[[float, float, float, float], float]
outer_first: Callable[[float, float, float, float], float]
outer_second: Callable[[float, float, float, float], float]
# Whether the slope is asked for at 0 too, and whether latents are weighed apart.
at_zero: bool
weighed: bool


def separable(v, latents, rows, shares, scale, p, out):  # type: ignore[no-untyped-def]
    """Of a sum over latents."""
    total = 0.0
    for entry in range(rows[0], rows[-1]):
        contribution = float(v[entry])
        if contribution > 0 or (at_zero and contribution == 0):
            total += first(contribution, scale, p)
            out[entry] = first_slope(contribution, scale, p)
        else:
            out[entry] = 0
    return total


def coupled(v, latents, rows, shares, scale, p, out):  # type: ignore[no-untyped-def]
    """Of a function of two sums."""
    total = 0.0
    for row in range(len(rows) - 1):
        sum0 = sum1 = 0.0
        for entry in range(rows[row], rows[row + 1]):
            contribution = float(v[entry])
            if contribution > 0:
                sum0 += first(contribution, scale, p)
                sum1 += second(contribution, scale, p)
        if sum0 == 0.0 and sum1 == 0.0 and not at_zero:  # nothing fires: the value is outer(0, 0) = 0
            out[rows[row] : rows[row + 1]] = 0
            continue
        total += outer(sum0, sum1, scale, p)
        slope0, slope1 = outer_first(sum0, sum1, scale, p), outer_second(sum0, sum1, scale, p)
        for entry in range(rows[row], rows[row + 1]):
            contribution = float(v[entry])
            if contribution > 0 or (at_zero and contribution == 0):
                out[entry] = slope0 * first_slope(contribution, scale, p) + slope1 * second_slope(
                    contribution, scale, p
                )
            else:
                out[entry] = 0
    return total


def competing(v, latents, rows, shares, scale, p, out):  # type: ignore[no-untyped-def]
    """Of a function of a sum and a largest one."""
    # Of latents that do not fire the one of largest share, and of equal ones the first, outdoes the others.
    total, silent, least = 0.0, 0, 0.0
    if weighed:
        for latent in range(len(shares)):
            if shares[latent] > shares[silent]:
                silent = latent
        least = largest(0.0, float(shares[silent]), scale, p)
    for row in range(len(rows) - 1):
        sum0, most, winner, listed = 0.0, least, -1, -1
        for entry in range(rows[row], rows[row + 1]):
            contribution = float(v[entry])
            if contribution > 0:
                share = float(shares[latents[entry, LATENT]]) if weighed else 0.0
                sum0 += first(contribution, scale, p)
                candidate = largest(contribution, share, scale, p)
                if candidate > most:
                    most, winner = candidate, entry
            elif at_zero and latents[entry, LATENT] == silent:
                listed = entry
        if winner < 0 and not (at_zero or weighed):  # nothing fires: the value is outer(0, 0) = 0
            out[rows[row] : rows[row + 1]] = 0
            continue
        winner = listed if winner < 0 else winner
        total += outer(sum0, most, scale, p)
        slope_sum, slope_largest = outer_first(sum0, most, scale, p), outer_second(sum0, most, scale, p)
        for entry in range(rows[row], rows[row + 1]):
            contribution = float(v[entry])
            if contribution > 0 or (at_zero and contribution == 0):
                out[entry] = slope_sum * first_slope(contribution, scale, p)
                if entry == winner:
                    out[entry] += slope_largest * largest_slope(contribution, scale, p)
            else:
                out[entry] = 0
    return total
