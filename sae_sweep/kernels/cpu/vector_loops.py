"""The loops over sixteen and more codes at once from which vector_penalty.py makes modules, and the functions that a
formula may call in them, as polynomials: a library's would be called for a number at a time.

In such a module stand the text of the loops and, under the names that are declared here, the functions of the formula.
"""

# ruff: noqa: F821  What is only declared here is defined where the text is run.
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.narrow_tile import INPUTS

single = np.float32
# Products may be fused with sums; a division by a known number is not replaced, and no sum is reordered.
jit = functools.partial(numba.njit, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
part = functools.partial(jit, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
_float = numba.float32
_table, _row = _float[:, ::1], _float[::1]
sums_terms = numba.void(_table, _row, _float, _float, _table)
weighs_terms = numba.float64(_table, numba.float64, numba.float64, _table)
slopes_codes = numba.void(_table, _row, _float, _float, _table, _table)
SUM_TERMS, WEIGH_TERMS, SLOPE_CODES = (types.FunctionType(each) for each in (sums_terms, weighs_terms, slopes_codes))

# What is summed over latents, of a, s and p in single precision, with the slopes in a; whether there are two of these;
# outer of both sums, s and p in double precision, with its slopes; whether it is the first sum itself.
first: Callable[[Any, Any, Any], Any]
second: Callable[[Any, Any, Any], Any]
first_slope: Callable[[Any, Any, Any], Any]
second_slope: Callable[[Any, Any, Any], Any]
two: bool
outer: Callable[[float, float, float, float], float]
outer_first: Callable[[float, float, float, float], float]
outer_second: Callable[[float, float, float, float], float]
apart: bool


def sum_terms(codes, norms, scale, p, sums):  # type: ignore[no-untyped-def]
    for latent in range(len(codes)):
        norm = norms[latent]
        for r in range(INPUTS):
            contribution = codes[latent, r] * norm
            sums[0, r] += first(contribution, scale, p)
            if two:
                sums[1, r] += second(contribution, scale, p)


def weigh_terms(sums, scale, p, weights):  # type: ignore[no-untyped-def]
    total = 0.0
    for r in range(INPUTS):
        sum0, sum1 = float(sums[0, r]), float(sums[1, r])
        if apart:  # also where a sum is too small for single precision
            total += sum0
            weights[0, r], weights[1, r] = 1, 0
        elif sum0 == 0.0:  # nothing fires: the value is outer(0, 0) = 0
            weights[0, r] = weights[1, r] = 0
        else:
            total += outer(sum0, sum1, scale, p)
            weights[0, r], weights[1, r] = outer_first(sum0, sum1, scale, p), outer_second(sum0, sum1, scale, p)
    return total


def slope_codes(codes, norms, scale, p, weights, slopes):  # type: ignore[no-untyped-def]
    for latent in range(len(codes)):
        norm = norms[latent]
        for r in range(INPUTS):
            contribution = codes[latent, r] * norm
            slope = weights[0, r] * first_slope(contribution, scale, p)
            if two:
                slope += weights[1, r] * second_slope(contribution, scale, p)
            slopes[latent, r] = slope


@intrinsic
def _bits_of(typingctx, x):  # type: ignore[no-untyped-def]
    """The bits of a float32, int32."""
    return types.int32(types.float32), lambda context, builder, _, values: builder.bitcast(values[0], ir.IntType(32))


@intrinsic
def _from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 of these bits, int32."""
    return types.float32(types.int32), lambda context, builder, _, values: builder.bitcast(values[0], ir.FloatType())


@part
def root32(x):  # type: ignore[no-untyped-def]
    return math.sqrt(x)


@part
def log32(x):  # type: ignore[no-untyped-def]
    """log x, to 1e-7 of it or of 1: x = m·2ⁿ with √½ ≤ m < √2 (Cephes, logf)."""
    bits = _bits_of(x)
    # Counted from the bits of √½, the upper nine bits are n.
    shifted = np.int32(bits - np.int32(0x3F3504F3))
    exponent = np.float32(shifted >> np.int32(23))
    y = _from_bits(np.int32((shifted & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3))) - np.float32(1)
    z = np.float32(7.0376836292e-2)
    z = z * y + np.float32(-1.1514610310e-1)
    z = z * y + np.float32(1.1676998740e-1)
    z = z * y + np.float32(-1.2420140846e-1)
    z = z * y + np.float32(1.4249322787e-1)
    z = z * y + np.float32(-1.6668057665e-1)
    z = z * y + np.float32(2.0000714765e-1)
    z = z * y + np.float32(-2.4999993993e-1)
    z = z * y + np.float32(3.3333331174e-1)
    square = y * y
    z = z * y * square + exponent * np.float32(-2.12194440e-4) - np.float32(0.5) * square
    result = y + z + exponent * np.float32(0.693359375)
    result = result if x < np.float32(np.inf) else x
    outside = -np.float32(np.inf) if x == np.float32(0) else np.float32(np.nan)
    return result if x > np.float32(0) else outside


@part
def exp32(x):  # type: ignore[no-untyped-def]
    """exp x, to 2e-7 of it; below -87 as of that, and above 88 infinite (Cephes, expf)."""
    most = np.float32(88)
    large = x > most
    x = most if large else x
    x = np.float32(-87) if x < np.float32(-87) else x
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    x = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    z = np.float32(1.9875691500e-4)
    z = z * x + np.float32(1.3981999507e-3)
    z = z * x + np.float32(8.3334519073e-3)
    z = z * x + np.float32(4.1665795894e-2)
    z = z * x + np.float32(1.6666665459e-1)
    z = z * x + np.float32(5.0000001201e-1)
    z = z * x * x + x + np.float32(1)
    result = z * _from_bits(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
    return np.float32(np.inf) if large else result


@part
def tanh32(x):  # type: ignore[no-untyped-def]
    """tanh x, to 1e-7."""
    e = exp32(np.float32(-2) * (x if x > np.float32(-40) else np.float32(-40)))
    return (np.float32(1) - e) / (np.float32(1) + e)


@part
def power32(x, y):  # type: ignore[no-untyped-def]
    """x to the y for 0 < x < ∞."""
    return exp32(y * log32(x))
