"""Compiles a penalty's formula into loops over sixteen and more codes at once, for steps in which many latents fire.

A penalty is `outer(T₀, T₁)` of sums Tᵢ = Σ termᵢ over the latents of an input. The loops run over a tile of codes
[n, INPUTS] (narrow_tile.py) in single precision, without a branch, so that the compiler makes vectors of them; the
functions that a formula may use are written out as polynomials: a library's would be called for a number at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import sympy as sp
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sae_sweep.kernels.cpu.narrow_tile import INPUTS
from sae_sweep.saes.formula import Formula, symbols

a, s, p, T = symbols.a, symbols.s, symbols.p, (symbols.T0, symbols.T1)
# Products may be fused with sums; a division by a known number is not replaced, and no sum is reordered.
_jit = functools.partial(numba.njit, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
_part = functools.partial(_jit, no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True)
_float = numba.float32
_table, _row = _float[:, ::1], _float[::1]
sums_terms = numba.void(_table, _row, _float, _float, _table)
weighs_terms = numba.float64(_table, numba.float64, numba.float64, _table)
slopes_codes = numba.void(_table, _row, _float, _float, _table, _table)
_KNOWN = (sp.Symbol, sp.Add, sp.Mul, sp.Pow, sp.Piecewise, sp.log, sp.exp, sp.tanh)
SUM_TERMS, WEIGH_TERMS, SLOPE_CODES = (types.FunctionType(each) for each in (sums_terms, weighs_terms, slopes_codes))


@functools.cache
def vectorises(formula: Formula) -> bool:
    """Whether a penalty is a function of sums over latents alone, which are spelled in functions written out here.

    Of a largest one it needs to know which that is; what a user's formula calls beside these is left to a library.
    """
    terms, _, _ = formula.numeric_expressions()
    return formula.largest is None and all(map(_is_known, terms))


def _is_known(term: sp.Expr) -> bool:
    """Whether a term and its slope can be spelled."""
    parts = [part for each in (term, sp.diff(term, a)) for part in sp.preorder_traversal(each.evalf())]
    conditions = [part for part in parts if isinstance(part, sp.Piecewise)]
    return all(isinstance(part, _KNOWN) or part.is_number for part in parts if isinstance(part, sp.Expr)) and all(
        len(each.args) == 2 and isinstance(each.args[0].cond, sp.Le) for each in conditions
    )


@functools.cache
def compile_vectors(formula: Formula) -> tuple[Callable[..., None], Callable[..., float], Callable[..., None]]:
    """`sum_terms(codes, norms, scale, p, sums)`, `weigh_terms(sums, scale, p, weights) -> value`, and
    `slope_codes(codes, norms, scale, p, weights, slopes)` of a penalty.

    The first adds the terms of contributions codes [n, INPUTS] · norms [n] to sums [2, INPUTS]; the second gives the
    sum of the penalty over the inputs and ∂outer/∂Tᵢ in weights [2, INPUTS]; the third the penalty's slope in each
    contribution, slopes [n, INPUTS].
    """
    of_latents, outer, _ = formula.numeric_expressions()
    first, second = (*of_latents, sp.Integer(0))[:2]
    terms = [_single(term) for term in (first, second)]
    slopes = [_single(sp.diff(term, a)) for term in (first, second)]
    return (
        _sum_terms(*terms, two=second != 0),
        _weigh_terms(outer, apart=not formula.coupled),
        _slope_codes(*slopes, two=second != 0),
    )


def _sum_terms(first: Callable[..., Any], second: Callable[..., Any], *, two: bool) -> Callable[..., None]:
    @_jit(sums_terms)
    def sum_terms(codes, norms, scale, p, sums):  # type: ignore[no-untyped-def]
        for latent in range(len(codes)):
            norm = norms[latent]
            for r in range(INPUTS):
                contribution = codes[latent, r] * norm
                sums[0, r] += first(contribution, scale, p)
                if two:
                    sums[1, r] += second(contribution, scale, p)

    return sum_terms


def _weigh_terms(outer: sp.Expr, *, apart: bool) -> Callable[..., float]:
    value, *slopes = (
        _part(sp.lambdify((*T, s, p), expression.evalf(), modules="math"))
        for expression in (outer, *(sp.diff(outer, each) for each in T))
    )
    slope0, slope1 = slopes

    @_jit(weighs_terms)
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
                total += value(sum0, sum1, scale, p)
                weights[0, r], weights[1, r] = slope0(sum0, sum1, scale, p), slope1(sum0, sum1, scale, p)
        return total

    return weigh_terms


def _slope_codes(first: Callable[..., Any], second: Callable[..., Any], *, two: bool) -> Callable[..., None]:
    @_jit(slopes_codes)
    def slope_codes(codes, norms, scale, p, weights, slopes):  # type: ignore[no-untyped-def]
        for latent in range(len(codes)):
            norm = norms[latent]
            for r in range(INPUTS):
                contribution = codes[latent, r] * norm
                slope = weights[0, r] * first(contribution, scale, p)
                if two:
                    slope += weights[1, r] * second(contribution, scale, p)
                slopes[latent, r] = slope

    return slope_codes


def _single(expression: sp.Expr) -> Callable[..., Any]:
    """A function of a, s and p in single precision: Python's numbers would make it a double one."""
    names = {"single": np.float32, "root": _root, "log": _log, "exp": _exp, "tanh": _tanh, "power": _power}
    return _part(eval(f"lambda a, s, p: {_spell(expression.evalf())}", names))


def _spell(expression: sp.Expr) -> str:
    """An expression as numba is to read it."""
    if expression.is_number:
        return f"single({float(expression)!r})"
    if isinstance(expression, sp.Symbol):
        return str(expression)
    if isinstance(expression, sp.Add):
        return f"({' + '.join(map(_spell, expression.args))})"
    if isinstance(expression, sp.Mul):
        return f"({' * '.join(map(_spell, expression.args))})"
    if isinstance(expression, sp.Piecewise):
        (below, condition), (above, _) = expression.args
        least, most = map(_spell, condition.args)
        return f"({_spell(below)} if {least} <= {most} else {_spell(above)})"
    if isinstance(expression, sp.Pow):
        return _spell_power(*expression.args)
    return f"{type(expression).__name__}({', '.join(map(_spell, expression.args))})"


def _spell_power(base: sp.Expr, exponent: sp.Expr) -> str:
    """Powers that are products and roots, as such."""
    if exponent.is_negative:
        return f"(single(1) / {_spell(base**-exponent)})"
    if exponent == 1:
        return _spell(base)
    if exponent == 0.5:
        return f"root({_spell(base)})"
    if exponent.is_number and float(exponent).is_integer():
        return f"({' * '.join([_spell(base)] * int(exponent))})"
    return f"power({_spell(base)}, {_spell(exponent)})"


@intrinsic
def _bits_of(typingctx, x):  # type: ignore[no-untyped-def]
    """The bits of a float32, int32."""
    return types.int32(types.float32), lambda context, builder, _, values: builder.bitcast(values[0], ir.IntType(32))


@intrinsic
def _from_bits(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 of these bits, int32."""
    return types.float32(types.int32), lambda context, builder, _, values: builder.bitcast(values[0], ir.FloatType())


@_part
def _root(x):  # type: ignore[no-untyped-def]
    return math.sqrt(x)


@_part
def _log(x):  # type: ignore[no-untyped-def]
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


@_part
def _exp(x):  # type: ignore[no-untyped-def]
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


@_part
def _tanh(x):  # type: ignore[no-untyped-def]
    """tanh x, to 1e-7."""
    e = _exp(np.float32(-2) * (x if x > np.float32(-40) else np.float32(-40)))
    return (np.float32(1) - e) / (np.float32(1) + e)


@_part
def _power(x, y):  # type: ignore[no-untyped-def]
    """x to the y for 0 < x < ∞."""
    return _exp(y * _log(x))
