"""Compiles a penalty's formula into loops over sixteen and more codes at once, for steps in which many latents fire.

A penalty is `outer(T₀, T₁)` of sums Tᵢ = Σ termᵢ over the latents of an input. The loops run over a tile of codes
[n, INPUTS] (narrow_tile.py) in single precision, without a branch, so that the compiler makes vectors of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from sae_sweep.kernels.cpu import vector_loops
from sae_sweep.kernels.cpu.penalty_gradients import CODE, outer_functions, spelled
from sae_sweep.lazy import lazy
from sae_sweep.saes.formula import Formula, symbols
from sae_sweep.saes.formula_cache import kept_module, kept_text

if TYPE_CHECKING:
    import sympy as sp
else:
    sp = lazy("sympy")

# What compiles each of the loops, with its text as it is when this is imported.
_LOOPS = {
    loop: (signature, inspect.getsource(getattr(vector_loops, loop)))
    for loop, signature in {
        "sum_terms": "sums_terms",
        "weigh_terms": "weighs_terms",
        "slope_codes": "slopes_codes",
    }.items()
}


@functools.cache
def vectorises(formula: Formula) -> bool:
    """Whether a penalty is a function of sums over latents alone, which are spelled in functions written out here.

    Of a largest one it needs to know which that is; what a user's formula calls beside these is left to a library.
    """
    return kept_text("vectorises", formula, code=CODE, write=lambda: str(_vectorises(formula))) == "True"


def _vectorises(formula: Formula) -> bool:
    return formula.largest is None and all(map(_is_known, formula.numeric_expressions()[0]))


def _is_known(term: sp.Expr) -> bool:
    """Whether a term and its slope can be spelled."""
    known = sp.Symbol, sp.Add, sp.Mul, sp.Pow, sp.Piecewise, sp.log, sp.exp, sp.tanh
    parts = [part for each in (term, sp.diff(term, symbols.a)) for part in sp.preorder_traversal(each.evalf())]
    conditions = [part for part in parts if isinstance(part, sp.Piecewise)]
    return all(isinstance(part, known) or part.is_number for part in parts if isinstance(part, sp.Expr)) and all(
        len(each.args) == 2 and isinstance(each.args[0].cond, sp.Le) for each in conditions
    )


@functools.cache
def compile_vectors(formula: Formula) -> tuple[Callable[..., None], Callable[..., float], Callable[..., None]]:
    """`sum_terms(codes, norms, scale, p, sums)`, `weigh_terms(sums, scale, p, weights) -> value`, and
    `slope_codes(codes, norms, scale, p, weights, slopes)` of a penalty that `vectorises`.

    The first adds the terms of the norm-scaled activations codes [n, INPUTS] · norms [n] to sums [2, INPUTS]; the
    second gives the sum of the penalty over the inputs and ∂outer/∂Tᵢ in weights [2, INPUTS]; the third the penalty's
    slope in each norm-scaled activation, slopes [n, INPUTS].
    """
    module = kept_module("vectors", formula, code=CODE, write=lambda: _write(formula))
    return module.sum_terms, module.weigh_terms, module.slope_codes


def _write(formula: Formula) -> str:
    """The text of the module that defines the three."""
    of_latents, outer, _ = formula.numeric_expressions()
    first, second = (*of_latents, sp.Integer(0))[:2]
    terms = {"first": first, "second": second}
    terms |= {f"{name}_slope": sp.diff(term, symbols.a) for name, term in terms.items()}
    return "\n\n".join(
        [
            f"from math import *\nfrom {vector_loops.__name__} import *",
            f"two, apart = {second != 0}, {not formula.coupled}",
            *(f"@part\ndef {name}(a, s, p):\n    return {_spell(term.evalf())}\n" for name, term in terms.items()),
            *spelled(outer_functions(outer, (symbols.T0, symbols.T1))),
            *(source for _, source in _LOOPS.values()),
            *(f"{name} = jit({signature}, cache=keep)({name})" for name, (signature, _) in _LOOPS.items()),
            "",
        ]
    )


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
    return f"{type(expression).__name__}32({', '.join(map(_spell, expression.args))})"


def _spell_power(base: sp.Expr, exponent: sp.Expr) -> str:
    """Powers that are products and roots, as such."""
    if exponent.is_negative:
        return f"(single(1) / {_spell(base**-exponent)})"
    if exponent == 1:
        return _spell(base)
    if exponent == 0.5:
        return f"root32({_spell(base)})"
    if exponent.is_number and float(exponent).is_integer():
        return f"({' * '.join([_spell(base)] * int(exponent))})"
    return f"power32({_spell(base)}, {_spell(exponent)})"
