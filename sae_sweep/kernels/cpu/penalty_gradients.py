"""Compiles a penalty's formula into a loop over the active latents of each input: value and slopes in one pass."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.kernels.cpu import penalty_loops
from sae_sweep.lazy import lazy
from sae_sweep.saes.formula import Formula, symbols
from sae_sweep.saes.formula_cache import code_in, kept_module

if TYPE_CHECKING:
    import sympy as sp
else:
    sp = lazy("sympy")

# As they are when this is imported: their files may change under a process that runs.
CODE = code_in(Path(__file__).parent)
_SOURCES = {
    loop: inspect.getsource(loop) for loop in (penalty_loops.separable, penalty_loops.coupled, penalty_loops.competing)
}


@functools.cache
def compile_slopes(formula: Formula, at_zero: bool = False) -> Callable[..., float]:
    """`slopes(v, latents, rows, shares, scale, p, out) -> sum of the penalty over inputs`.

    v float32 [entries]: norm-scaled activations a‖d‖, those of input r at rows[r]:rows[r+1]; out float32 [entries]
    receives the slope of that input's penalty in each: 0 where v is 0, unless `at_zero` asks for the slope there, as of
    a latent about to fire beside the others. Where latents compete, latents int32 [entries, LISTED] says whose entries
    are if `at_zero`, or if latents are weighed apart, by log π in shares float32 [width]. Sums run in double precision
    and in order, so bits never vary.
    """
    write = functools.partial(_write, formula, at_zero)
    slopes: Callable[..., float] = kept_module("slopes", formula, at_zero, code=CODE, write=write).slopes
    return slopes


def _write(formula: Formula, at_zero: bool) -> str:
    """The text of the module that defines `slopes`."""
    a, s, p, (T0, T1), M, logπ = symbols.a, symbols.s, symbols.p, (symbols.T0, symbols.T1), symbols.M, symbols.logπ
    terms, outer, largest = formula.numeric_expressions()
    # One more (zero) term gives every coupled penalty the same two sums.
    first, second = (*terms, sp.Integer(0))[:2]
    functions: list[Function] = [("first", (a, s, p), first), ("first_slope", (a, s, p), sp.diff(first, a))]
    loop: Callable[..., float] = penalty_loops.separable
    if formula.largest is not None:
        loop, sums = penalty_loops.competing, (T0, M)
        functions.append(("largest", (a, logπ, s, p), largest))
        functions.append(("largest_slope", (a, s, p), sp.diff(largest, a)))
    elif formula.coupled:
        loop, sums = penalty_loops.coupled, (T0, T1)
        functions.append(("second", (a, s, p), second))
        functions.append(("second_slope", (a, s, p), sp.diff(second, a)))
    if formula.coupled:
        functions += outer_functions(outer, sums)
    return "\n\n".join(
        [
            f"from math import *\nfrom {penalty_loops.__name__} import *",
            f"at_zero, weighed = {at_zero}, {formula.weighs}",
            *spelled(functions),
            _SOURCES[loop],
            f"slopes = jit(penalises, cache=keep)({loop.__name__})\n",
        ]
    )


# A name, its arguments, and what it computes of them.
Function = tuple[str, tuple[Any, ...], Any]


def outer_functions(outer: sp.Expr, sums: tuple[sp.Symbol, sp.Symbol]) -> list[Function]:
    """What is made of two sums, and its slopes in them."""
    expressions = outer, *(sp.diff(outer, each) for each in sums)
    names = "outer", "outer_first", "outer_second"
    return [(name, (*sums, symbols.s, symbols.p), each) for name, each in zip(names, expressions, strict=True)]


def spelled(functions: Iterable[Function]) -> list[str]:
    """The text of each function, for a module that imports what is in `math`."""
    texts = []
    for name, arguments, expression in functions:
        text = inspect.getsource(sp.lambdify(arguments, expression.evalf(), modules="math"))
        texts.append("@part\n" + text.replace("_lambdifygenerated", name, 1))
    return texts
