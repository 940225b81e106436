"""A penalty given as text: `a/(a+s)` for one latent, and `outer` where latents are not simply added up.

`formula` is the cost of one latent as a formula of a, its activation times its decoder norm (never negative); s, the
setting `penalty.scale`; p, the setting `penalty.p`; and ε = 1/1000, which keeps slopes finite at a = 0. The penalty of
an input is T, the sum of the formula over latents, or what `outer` makes of it: `exp(T) - 1`. Beside T, `outer` may
name sum(…), the sum over latents of another formula of a, or max(…), the largest over latents:
`T^2/(sum(a^2) + ε)`, `(T - max(a))/(s/10) + max(a)/s`. In max(…), logπ is the logarithm of the share of inputs on which
a latent is the largest.

Nothing heavy is imported at the top: SymPy is imported where an expression is asked for, NumPy where numbers are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NoReturn

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError
from sae_sweep.saes.formula_text import ZERO, Node, add, derivative, multiply, number, read, substitute

if TYPE_CHECKING:
    import numpy as np
    import sympy as sp

EPSILON = Fraction(1, 1000)
FORMULA_KEY, OUTER_KEY = "penalty.formula", "penalty.outer"
# Which settings a name stands for.
SETTINGS = {"s": "scale", "p": "p"}
# Values are looked at from 0 and 1e-6 to 1e3: activations have a norm of √d, so a latent of 1e3 is out of the ordinary.
# A value must fit in single precision, in which SAEs are trained.
SMALLEST, LARGEST, SAMPLES, OVERFLOW = 1e-6, 1e3, 181, 3e38
# An outer formula is looked at with this many latents firing alike.
FIRING_ALIKE = (1, 2, 8)
# What rounding leaves of a difference, relative to 1 and to the value.
_NOISE = 1e-12

_A, _T, _SHARE = (Node("name", (name,)) for name in ("a", "T", "logπ"))


class _Symbols:
    """SymPy's symbols of formulas: a, s, p, ε, the sums T0 and T1 over latents, M the largest among them, and logπ."""

    def __getattr__(self, name: str) -> sp.Symbol:
        import sympy as sp

        made = sp.Symbol(name, real=True) if name in ("M", "logπ") else sp.Symbol(name, positive=True)
        self.__dict__[name] = made
        return made


symbols: Any = _Symbols()


@dataclass(frozen=True)
class Formula:
    """A penalty as read from text: its canonical text, its numbers and, if asked for, SymPy's expressions of it.

    term: the cost of one latent · outer: of T and further sums or the largest, the cost of an input
    """

    term: Node
    outer: Node = _T

    @property
    def text(self) -> str:
        """The canonical text of the formula of one latent."""
        return str(self.term)

    @property
    def outer_text(self) -> str | None:
        """The canonical text of what is made of the sum, None for the sum itself."""
        return None if self.outer == _T else str(self.outer)

    @functools.cached_property
    def second(self) -> Node | None:
        """The formula in sum(…)."""
        return self._over("sum")

    @functools.cached_property
    def largest(self) -> Node | None:
        """The formula in max(…)."""
        return self._over("largest")

    def _over(self, kind: str) -> Node | None:
        return next((node.args[0] for node in self.outer.parts() if node.kind == kind), None)

    @property
    def coupled(self) -> bool:
        """Whether the cost of a latent depends on the others."""
        return self.outer != _T

    @property
    def reads(self) -> tuple[str, ...]:
        """The settings that change its numbers, beside the coefficient: of `scale` and `p`."""
        names = self.term.names() | self.outer.names()
        return tuple(setting for name, setting in SETTINGS.items() if name in names)

    @property
    def weighs(self) -> bool:
        """Whether it names logπ, which takes a pass over the batch first."""
        return self.largest is not None and "logπ" in self.largest.names()

    @property
    def whole(self) -> str:
        """The penalty of an input in one line: Σ[…] is a sum over latents, max[…] the largest among them."""
        text = str(substitute(self.outer, _T, Node("name", (f"Σ[{self.text}]",))))
        for kind, inner in (("sum", self.second), ("max", self.largest)):
            text = text.replace(f"{kind}({inner})", f"{'Σ' if kind == 'sum' else 'max'}[{inner}]")
        return text

    @property
    def slope_at_zero(self) -> str:
        """The slope for a latent about to fire on an input where nothing else does, as text."""
        alone = substitute(self.outer, _T, self.term)
        for kind, inner in (("sum", self.second), ("largest", self.largest)):
            alone = substitute(alone, Node(kind, (inner,)), inner) if inner else alone
        return str(substitute(derivative(alone, _A), _A, ZERO))

    def expressions(self) -> tuple[tuple[sp.Expr, ...], sp.Expr, sp.Expr]:
        """SymPy's (terms, outer, largest) in `symbols`: terms of a, s, p and ε; outer of their sums T0 and T1 and of
        M, the largest over latents; largest of a and logπ too, 0 where the formula has none."""
        import sympy as sp

        known = {Node("name", (name,)): getattr(symbols, name) for name in ("a", "s", "p", "ε", "logπ")}
        terms = [self.term] if self.second is None else [self.term, self.second]
        largest = sp.S.Zero if self.largest is None else _expression(self.largest, known)
        sums = {_T: symbols.T0}
        if self.second is not None:
            sums[Node("sum", (self.second,))] = symbols.T1
        if self.largest is not None:
            sums[Node("largest", (self.largest,))] = symbols.M
        return tuple(_expression(term, known) for term in terms), _expression(self.outer, known | sums), largest

    def numeric_expressions(self) -> tuple[sp.Tuple, sp.Expr, sp.Expr]:
        """The same with ε put in: what is computed."""
        import sympy as sp

        terms, outer, largest = self.expressions()
        size = {symbols.ε: sp.Rational(EPSILON.numerator, EPSILON.denominator)}
        return sp.Tuple(*(term.subs(size) for term in terms)), outer.subs(size), largest.subs(size)

    def value(
        self,
        activations: np.ndarray,
        scale: float,
        p: float,
        alike: int = 1,
        beside: Sequence[float] = (),
        log_share: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The cost of an input on which `alike` latents have the activation a each, and its derivative in that a.

        activations [...]: a · beside: activations of further latents, which do not change with a · log_share: log π
        both results have the shape of the activations
        """
        import numpy as np

        a = np.asarray(activations, float)
        latents = [(a, np.ones_like(a))] * alike + [_constant(each) for each in beside]
        value, slope = self._cost(latents, scale, p, log_share)
        return value + np.zeros_like(a), slope + np.zeros_like(a)

    def joint_value(self, activations: Sequence[np.ndarray], scale: float, p: float) -> np.ndarray:
        """The cost of inputs on which each latent has its own activation: arrays that broadcast together."""
        import numpy as np

        latents = [(np.asarray(each, float), np.float64(0)) for each in activations]
        return np.asarray(self._cost(latents, scale, p, 0.0)[0])

    def _cost(self, latents: Sequence[_Dual], scale: float, p: float, log_share: float) -> _Dual:
        import numpy as np

        settings = (("s", scale), ("p", p), ("ε", EPSILON), ("logπ", log_share))
        known = {Node("name", (name,)): _constant(size) for name, size in settings}

        def over_latents(term: Node) -> list[_Dual]:
            return [_dual(term, {**known, _A: latent}) for latent in latents]

        with np.errstate(all="ignore"):
            sums = {_T: _sum(over_latents(self.term))}
            if self.second is not None:
                sums[Node("sum", (self.second,))] = _sum(over_latents(self.second))
            if self.largest is not None:
                sums[Node("largest", (self.largest,))] = _largest(over_latents(self.largest))
            return _dual(self.outer, known | sums)


@functools.lru_cache(maxsize=1024)
def parse(text: str, outer: str | None = None) -> Formula:
    """The formula that a text stands for; UserError, one line, if it stands for none. Its values are not looked at."""
    term = read(text, FORMULA_KEY)
    if not term.varies and term.names():
        raise UserError(f"{FORMULA_KEY}={show(text)} has no a, the activation that it is to penalise")
    if outer is None:
        return Formula(term)
    formula = Formula(term, read(outer, OUTER_KEY, over_latents=True))
    named = f"{OUTER_KEY}={show(outer)}"
    if "T" not in formula.outer.names():
        raise UserError(f"{named} has no T, the sum of {FORMULA_KEY} over latents")
    over = {node for node in formula.outer.parts() if node.kind in ("sum", "largest")}
    if len(over) > 1:
        found = " and ".join(sorted(map(str, over)))
        raise UserError(f"{named}: beside T there can be one sum(…) or one max(…), got {found}")
    return formula


@functools.lru_cache(maxsize=1024)
def check(formula: Formula, scale: float, p: float) -> None:
    """UserError, one line, unless the penalty is 0 at a = 0, finite with a finite slope, and never falls.

    It is looked at for these settings at SAMPLES activations from 0 to LARGEST, with 1, 2 and 8 latents firing alike.
    """
    import numpy as np

    a = np.concatenate([[0.0], np.geomspace(SMALLEST, LARGEST, SAMPLES)])
    if formula.weighs:
        raise UserError(f"{OUTER_KEY}={show(formula.outer_text)}: logπ is known to penalty=exclusive_pi alone")
    if formula.largest is not None:
        _check_largest(formula.largest, a, scale, p)
    highest = 0.0
    for alike in FIRING_ALIKE if formula.coupled else (1,):
        value, slope = formula.value(a, scale, p, alike)
        situation = _situation(formula, scale, p, alike)
        if np.isfinite(value[0]) and abs(value[0]) > _NOISE * (1 + np.abs(value[1])):
            _refuse(formula, f"is {value[0]:.4g} at a = 0{situation}, where it must be 0: {_mended_at_zero(formula)}")
        _check_finite(formula, a, value, slope, situation)
        falls = np.flatnonzero(np.diff(value) < -_NOISE * (1 + np.abs(value[1:])))
        if falls.size:
            at = int(falls[0])
            ends = f"from {value[at]:.4g} at a = {a[at]:.4g} to {value[at + 1]:.4g} at a = {a[at + 1]:.4g}"
            _refuse(formula, f"falls {ends}{situation}: a penalty must never reward a larger activation")
        highest = max(highest, float(value.max()))
    if highest <= 0:
        _refuse(formula, "is 0 for every activation: it penalises nothing (did you mean penalty=none?)")


def _refuse(formula: Formula, problem: str) -> NoReturn:
    outer = f" with {OUTER_KEY}={show(formula.outer_text)}" if formula.coupled else ""
    raise UserError(f"{FORMULA_KEY}={show(formula.text)}{outer} {problem}")


def _situation(formula: Formula, scale: float, p: float, alike: int) -> str:
    sizes = {"scale": f"penalty.scale={scale:g}", "p": f"penalty.p={p:g}"}
    words = [sizes[setting] for setting in formula.reads]
    words += [f"{alike} latents firing alike"] if alike > 1 else []
    return f" ({', '.join(words)})" if words else ""


def _check_finite(formula: Formula, a: np.ndarray, value: np.ndarray, slope: np.ndarray, situation: str) -> None:
    import numpy as np

    wrong = np.flatnonzero(~(np.abs(value) < OVERFLOW))
    if wrong.size:
        at = int(wrong[0])
        mend = (
            "add ε to what is divided by or taken the logarithm of"
            if at == 0
            else "continue it linearly, as where({0} <= 8, exp({0}) - 1, exp(8)*({0} - 7) - 1)".format(
                "T" if formula.coupled else "a"
            )
        )
        _refuse(formula, f"is not finite at a = {a[at]:.4g}{situation}: {mend}")
    wrong = np.flatnonzero(~(np.abs(slope) < OVERFLOW))
    if wrong.size:
        _refuse(
            formula,
            f"has no finite slope at a = {a[wrong[0]]:.4g}{situation}: write a + ε there, as in sqrt(a + ε) - sqrt(ε)",
        )


def _mended_at_zero(formula: Formula) -> str:
    if formula.coupled or any(node.kind == "where" for node in formula.term.parts()):
        return "subtract its value there, as in exp(a) - 1"
    at_zero = substitute(formula.term, _A, ZERO)
    return f"write {add([formula.term, multiply([number(-1), at_zero])])}"


def _check_largest(largest: Node, a: np.ndarray, scale: float, p: float) -> None:
    """UserError unless max(…) is as kernels take it to be: latents that are off reach 0 in it, and others more."""
    import numpy as np

    values, _ = Formula(largest).value(a, scale, p)
    if abs(values[0]) > _NOISE or (np.diff(values) < 0).any():
        raise UserError(f"{OUTER_KEY}: max({largest}) must be 0 at a = 0 and never fall with a")


# --- SymPy


def _expression(node: Node, symbols: Mapping[Node, sp.Expr]) -> sp.Expr:
    import sympy as sp

    if node in symbols:
        return symbols[node]
    if node.kind == "number":
        return sp.Rational(node.args[0].numerator, node.args[0].denominator)
    if node.kind == "where":
        sign, *parts = node.args
        left, right, holds, otherwise = (_expression(part, symbols) for part in parts)
        return sp.Piecewise((holds, (sp.Le if sign == "<=" else sp.Lt)(left, right)), (otherwise, True))
    made = {"+": sp.Add, "*": sp.Mul, "^": sp.Pow}.get(node.kind) or getattr(sp, node.kind)
    return made(*(_expression(part, symbols) for part in node.args))


# --- Values and derivatives together, in double precision

# A value and its derivative in a.
_Dual = tuple[Any, Any]


def _constant(size: float | Fraction) -> _Dual:
    import numpy as np

    return np.float64(size), np.float64(0)


def _sum(duals: Sequence[_Dual]) -> _Dual:
    return sum(value for value, _ in duals), sum(slope for _, slope in duals)


def _largest(duals: Sequence[_Dual]) -> _Dual:
    import numpy as np

    value, slope = duals[0]
    for other, other_slope in duals[1:]:
        value, slope = np.maximum(value, other), np.where(other > value, other_slope, slope)
    return value, slope


@functools.cache
def _functions() -> dict[str, Callable[[Any], _Dual]]:
    """Function → its value and its derivative."""
    import numpy as np
    from scipy.special import erf

    return {
        "exp": lambda x: (np.exp(x), np.exp(x)),
        "log": lambda x: (np.log(x), 1 / x),
        "tanh": lambda x: (np.tanh(x), 1 - np.tanh(x) ** 2),
        "atan": lambda x: (np.arctan(x), 1 / (1 + x**2)),
        "erf": lambda x: (erf(x), 2 / np.sqrt(np.pi) * np.exp(-(x**2))),
    }


def _dual(node: Node, known: Mapping[Node, _Dual]) -> _Dual:
    if node in known:
        return known[node]
    if node.kind == "number":
        return _constant(node.args[0])
    if node.kind == "where":
        return _dual_where(node, known)
    parts = [_dual(part, known) for part in node.args]
    value, slope = parts[0]
    if node.kind == "+":
        return _sum(parts)
    if node.kind == "*":
        for other, other_slope in parts[1:]:
            value, slope = value * other, slope * other + value * other_slope
        return value, slope
    if node.kind == "^":
        return _dual_power(parts[0], parts[1], node.args[1].varies)
    value, factor = _functions()[node.kind](value)
    return value, factor * slope


def _dual_power(base: _Dual, exponent: _Dual, varies: bool) -> _Dual:
    import numpy as np

    value = base[0] ** exponent[0]
    slope = exponent[0] * base[0] ** (exponent[0] - 1) * base[1]
    return value, slope + (value * np.log(base[0]) * exponent[1] if varies else 0)


def _dual_where(node: Node, known: Mapping[Node, _Dual]) -> _Dual:
    """Each case is worked out on its own side of the bound alone, so that it may overflow on the other."""
    import numpy as np

    sign, variable, bound, holds, otherwise = node.args
    (value, slope), (limit, _) = known[variable], _dual(bound, known)
    below = _dual(holds, {**known, variable: (np.minimum(value, limit), slope)})
    above = _dual(otherwise, {**known, variable: (np.maximum(value, limit), slope)})
    chosen = value <= limit if sign == "<=" else value < limit
    return np.where(chosen, below[0], above[0]), np.where(chosen, below[1], above[1])
