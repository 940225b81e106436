"""Compiles a penalty's formula into a loop over the active latents of each input: value and slopes in one pass."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import sympy as sp

from sae_sweep.kernels.cpu.sparse_step import LATENT
from sae_sweep.saes.formula import Formula, symbols

a, s, p, M, logπ = symbols.a, symbols.s, symbols.p, symbols.M, symbols.logπ
T = symbols.T0, symbols.T1
_jit = functools.partial(numba.njit, nogil=True, fastmath={"contract"}, error_model="numpy")
_float = numba.float64
penalises = _float(
    numba.float32[::1], numba.int32[:, ::1], numba.int64[::1], numba.float32[::1], _float, _float, numba.float32[::1]
)
# Kernels take a penalty as a pointer to its slopes: they are compiled once, for every penalty there will be.
SLOPES = numba.types.FunctionType(penalises)


@functools.cache
def compile_slopes(formula: Formula, at_zero: bool = False) -> Callable[..., float]:
    """`slopes(v, latents, rows, shares, scale, p, out) -> sum of the penalty over inputs`.

    v float32 [entries]: norm-scaled activations a‖d‖, those of input r at rows[r]:rows[r+1]; out float32 [entries]
    receives the slope of that input's penalty in each: 0 where v is 0, unless `at_zero` asks for the slope there, as of
    a latent about to fire beside the others. Where latents compete, latents int32 [entries, LISTED] says whose entries
    are if `at_zero`, or if latents are weighed apart, by log π in shares float32 [width]. Sums run in double precision
    and in order, so bits never vary.
    """
    terms, outer, largest = formula.numeric_expressions()
    if not formula.coupled:
        return _separable(_scalar((a, s, p), terms[0]), _scalar((a, s, p), sp.diff(terms[0], a)), at_zero)
    if formula.largest is not None:
        return _with_largest(terms[0], outer, largest, at_zero)
    # One more (zero) term gives every coupled penalty the same two sums.
    first, second = (*terms, sp.Integer(0))[:2]
    return _coupled(
        *(_scalar((a, s, p), expression) for expression in (first, second, sp.diff(first, a), sp.diff(second, a))),
        *(_scalar((*T, s, p), expression) for expression in (outer, *(sp.diff(outer, t) for t in T))),
        at_zero=at_zero,
    )


def _with_largest(term: sp.Expr, outer: sp.Expr, largest: sp.Expr, at_zero: bool) -> Callable[..., float]:
    """The slopes of a penalty of one sum and one maximum."""
    return _competing(
        _scalar((a, s, p), term),
        _scalar((a, s, p), sp.diff(term, a)),
        _scalar((a, logπ, s, p), largest),
        _scalar((a, s, p), sp.diff(largest, a)),
        tuple(_scalar((T[0], M, s, p), each) for each in (outer, sp.diff(outer, T[0]), sp.diff(outer, M))),
        at_zero=at_zero,
        weighed=largest.has(logπ),
    )


def _scalar(arguments: tuple[sp.Symbol, ...], expression: sp.Expr) -> Callable[..., float]:
    # Called by compiled loops alone; without what Python would need to call it, it is compiled in half the time.
    part = functools.partial(_jit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
    return part(sp.lambdify(arguments, expression.evalf(), modules="math"))


def _separable(value: Callable[..., float], slope: Callable[..., float], at_zero: bool) -> Callable[..., float]:
    @_jit(penalises)
    def slopes(v, latents, rows, shares, scale, p, out):  # type: ignore[no-untyped-def]
        total = 0.0
        for entry in range(rows[0], rows[-1]):
            contribution = float(v[entry])
            if contribution > 0 or (at_zero and contribution == 0):
                total += value(contribution, scale, p)
                out[entry] = slope(contribution, scale, p)
            else:
                out[entry] = 0
        return total

    return slopes


def _coupled(
    first: Callable[..., float],
    second: Callable[..., float],
    first_slope: Callable[..., float],
    second_slope: Callable[..., float],
    outer: Callable[..., float],
    outer_first: Callable[..., float],
    outer_second: Callable[..., float],
    *,
    at_zero: bool,
) -> Callable[..., float]:
    @_jit(penalises)
    def slopes(v, latents, rows, shares, scale, p, out):  # type: ignore[no-untyped-def]
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

    return slopes


def _competing(
    term: Callable[..., float],
    term_slope: Callable[..., float],
    largest: Callable[..., float],
    largest_slope: Callable[..., float],
    outers: tuple[Callable[..., float], ...],
    *,
    at_zero: bool,
    weighed: bool,
) -> Callable[..., float]:
    """outers: the outer function, and its slopes in the sum and in the largest."""
    outer, outer_sum, outer_largest = outers

    @_jit(penalises)
    def slopes(v, latents, rows, shares, scale, p, out):  # type: ignore[no-untyped-def]
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
                    sum0 += term(contribution, scale, p)
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
            slope_sum, slope_largest = outer_sum(sum0, most, scale, p), outer_largest(sum0, most, scale, p)
            for entry in range(rows[row], rows[row + 1]):
                contribution = float(v[entry])
                if contribution > 0 or (at_zero and contribution == 0):
                    out[entry] = slope_sum * term_slope(contribution, scale, p)
                    if entry == winner:
                        out[entry] += slope_largest * largest_slope(contribution, scale, p)
                else:
                    out[entry] = 0
        return total

    return slopes
