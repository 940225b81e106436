"""Writes a penalty's formula as Triton functions: value and slopes, for kernels that take them as a parameter."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy as sp
import triton
import triton.language as tl
from sympy.printing.pycode import PythonCodePrinter

from sae_sweep.kernels import gpu_knows
from sae_sweep.saes.formula import Formula, symbols

a, s, p, T = symbols.a, symbols.s, symbols.p, (symbols.T0, symbols.T1)


@triton.jit
def tanh(value):  # type: ignore[no-untyped-def]
    """tanh, of which Triton has none outside its GPU library; does not overflow."""
    return 1.0 - 2.0 / (tl.exp(2.0 * value) + 1.0)


@dataclass(frozen=True)
class Slopes:
    """A penalty of an input, outer(Σ first(v), Σ second(v)) over its contributions v > 0.

    terms(v, scale, p) -> first, second · term_slopes, their derivatives · outer(sum0, sum1) -> value, both derivatives
    """

    terms: Callable[..., Any]
    term_slopes: Callable[..., Any]
    outer: Callable[..., Any]


@functools.cache
def triton_slopes(formula: Formula) -> Slopes:
    """The functions of a penalty, written from its formula, of which `kernels.gpu_knows` says whether it can be."""
    assert gpu_knows(formula), formula.whole
    terms, outer, _ = formula.numeric_expressions()
    # One more (zero) term gives every penalty the same two sums.
    terms = (*terms, sp.Integer(0))[:2]
    slopes = [sp.diff(term, a) for term in terms]
    name = f"penalty_{hashlib.sha256(formula.whole.encode()).hexdigest()[:12]}"
    return Slopes(
        _function(f"{name}_terms", ("v", "scale", "p"), terms),
        _function(f"{name}_term_slopes", ("v", "scale", "p"), slopes),
        _function(f"{name}_outer", ("sum0", "sum1"), (outer, *(sp.diff(outer, t) for t in T))),
    )


def _function(name: str, arguments: tuple[str, ...], expressions: Any) -> Callable[..., Any]:
    names = {
        a: sp.Symbol("v"),
        s: sp.Symbol("scale"),
        p: sp.Symbol("p"),
        T[0]: sp.Symbol("sum0"),
        T[1]: sp.Symbol("sum1"),
    }
    # A constant takes the shape of the argument.
    results = [
        f"{arguments[0]} * 0.0 + {_Printer().doprint(expression.subs(names).evalf())}" for expression in expressions
    ]
    source = f"def {name}({', '.join(arguments)}):\n    return {', '.join(results)}\n"
    filename = f"<{name}>"
    # Triton reads a function's source through the file it is said to come from.
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope: dict[str, Any] = {"tl": tl, "tanh": tanh, "__name__": __name__}
    exec(compile(source, filename, "exec"), scope)
    return triton.jit(scope[name])


class _Printer(PythonCodePrinter):
    """Formulas as Triton writes them."""

    _calls: ClassVar = {"exp": "tl.exp", "log": "tl.log", "tanh": "tanh"}

    def _print_Function(self, expression: sp.Function) -> str:
        return f"{self._calls[type(expression).__name__]}({self._print(expression.args[0])})"

    _print_exp = _print_log = _print_tanh = _print_Function

    def _print_Pow(self, power: sp.Pow, **_: Any) -> str:
        base, exponent = power.args
        if exponent.is_number and exponent < 0:
            return f"(1.0 / {self._print(sp.Pow(base, -exponent, evaluate=False))})"
        text = f"({self._print(base)})"
        if exponent.is_number and exponent == int(exponent):
            return "(" + " * ".join([text] * int(exponent)) + ")"
        if exponent == 0.5:
            return f"tl.sqrt{text}"
        return f"tl.exp(({self._print(exponent)}) * tl.log{text})"

    def _print_Piecewise(self, piecewise: sp.Piecewise) -> str:
        (below, condition), *rest = piecewise.args
        above = self._print(sp.Piecewise(*rest))
        # Both branches are evaluated: what overflows in the one not taken is not used.
        return f"tl.where({self._print(condition)}, {self._print(below)}, {above})"
