"""The sparsity penalties, each one formula, from which value, slope, listing and compiled kernels all follow.

A penalty maps the contributions aᵢ‖dᵢ‖ ≥ 0 of one input to a number: `outer(T₀, T₁, …)` with Tᵢ = Σⱼ termᵢ(aⱼ).
Every term is 0 at a = 0, so latents that are off cost nothing and kernels may skip them.
Contributions, not activations: otherwise growing the decoder and shrinking the code would evade the penalty.
Priors are read as in maximum a posteriori estimation: penalty = −log p up to constants, λ the coefficient over 2σ².
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp
import torch

from sae_sweep.schema import PENALTY_KEYS

a, s, p, ε = sp.symbols("a s p ε", positive=True)
T = sp.symbols("T0 T1", positive=True)

# L_p's slope p(a+ε)^(p-1) stays finite at 0: with ε = 1e-3 and activations of norm √d it is at most 16 for p = 1/2.
EPSILON = sp.Rational(1, 1000)
# prod1p continues linearly above T = 8, where a dense start would overflow exp and drown the reconstruction.
PRODUCT_CAP = 8


@dataclass(frozen=True)
class PenaltyFormula:
    """`outer` of the sums of `terms`; `prior` is the density it is −log of, or why there is none."""

    name: str
    terms: tuple[sp.Expr, ...]
    prior: str
    source: str
    outer: sp.Expr = T[0]

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings it reads beside the coefficient."""
        return PENALTY_KEYS[self.name]

    @property
    def numeric_terms(self) -> tuple[sp.Expr, ...]:
        """The terms with ε put in: what is computed."""
        return tuple(term.subs(ε, EPSILON) for term in self.terms)

    @property
    def formula(self) -> str:
        """The whole penalty in one line, for people."""
        sums = {symbol: sp.Symbol(f"Σ[{_spell(term)}]") for symbol, term in zip(T, self.terms, strict=False)}
        outer = self.outer.args[0].expr if isinstance(self.outer, sp.Piecewise) else self.outer
        return _spell(outer.subs(sums))

    @property
    def slope_at_zero(self) -> sp.Expr:
        """The slope for a latent about to fire on an input where nothing else does."""
        alone = dict(zip(T, self.terms, strict=False))
        return sp.diff(self.outer.subs(alone), a).subs(a, 0)


def _spell(expression: sp.Expr) -> str:
    return str(expression).replace("**", "^").replace("*", "·")


_product = sp.Piecewise(
    (sp.exp(T[0]) - 1, T[0] <= PRODUCT_CAP),
    (sp.exp(PRODUCT_CAP) * (1 + T[0] - PRODUCT_CAP) - 1, True),
)

FORMULAS = {
    formula.name: formula
    for formula in (
        PenaltyFormula("none", (sp.Integer(0),), "flat", "-"),
        PenaltyFormula("l1", (a,), "exponential (one-sided Laplace), rate λ", "Tibshirani 1996; arXiv 2309.08600"),
        PenaltyFormula(
            "lp",
            ((a + ε) ** p - ε**p,),
            "exponential power, Z = Γ(1/p)/(p·λ^(1/p)) as ε → 0",
            "EkibeZomncsPxfYwu (P7)",
        ),
        PenaltyFormula(
            "sqrt",
            (sp.sqrt(a + ε) - sp.sqrt(ε),),
            "exponential power with p = 1/2: Z = 2/λ² as ε → 0",
            "EkibeZomncsPxfYwu (P7)",
        ),
        PenaltyFormula(
            "log1p",
            (sp.log(1 + a / s),),
            "Lomax (Pareto II), shape λ-1, scale s; improper for λ ≤ 1",
            "EkibeZomncsPxfYwu (P6)",
        ),
        PenaltyFormula(
            "log1p_sq",
            (sp.log(1 + a**2 / s**2),),
            "Student-t, ν = 2λ-1 (Cauchy at λ = 1; improper for λ ≤ 1/2)",
            "Olshausen & Field 1996; EkibeZomncsPxfYwu (P6)",
        ),
        PenaltyFormula(
            "tanh", (sp.tanh(a / s),), "improper: a spike and a flat slab", "transformer-circuits.pub/2024/feb-update"
        ),
        PenaltyFormula(
            "prod1p",
            (sp.log(1 + a / s),),
            "proper, not factorised: aᵢ given the rest is exponential with rate λ·∏_{j≠i}(1+aⱼ/s)/s",
            "EkibeZomncsPxfYwu (P6)",
            outer=_product,
        ),
        PenaltyFormula(
            "pair",
            (a, a**2),
            "not factorised: Σ_{i<j} aᵢ·aⱼ, zero iff at most one latent fires; improper",
            "EkibeZomncsPxfYwu (P6)",
            outer=(T[0] ** 2 - T[1]) / 2,
        ),
    )
}


def penalty_value(name: str, contributions: torch.Tensor, scale: float = 1.0, exponent: float = 1.0) -> torch.Tensor:
    """Penalty per input: contributions a‖d‖ [..., width], non-negative -> [...]; differentiable.

    Above a product of e⁸ prod1p continues linearly (PRODUCT_CAP); L_p is Σ(a+ε)ᵖ − εᵖ with EPSILON.
    """
    terms, outer = _torch_functions(name, scale, exponent)
    return outer(*(term(contributions).sum(-1) for term in terms))


@functools.cache
def _torch_functions(
    name: str, scale: float, exponent: float
) -> tuple[list[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    formula = FORMULAS[name]
    terms = [_on_tensors((a,), term.subs({s: scale, p: exponent})) for term in formula.numeric_terms]
    return terms, _on_tensors(T[: len(terms)], formula.outer)


def _on_tensors(arguments: tuple[sp.Symbol, ...], expression: sp.Expr) -> Callable[..., torch.Tensor]:
    if expression.is_number:  # a constant would not take its argument's shape
        return lambda first, *_: first * float(expression)
    # where() evaluates both branches: an overflowing exp in the branch not taken would turn its gradient into NaN.
    if isinstance(expression, sp.Piecewise):
        (below, condition), (above, _) = expression.args
        cap = float(condition.rhs)
        low, high = _on_tensors(arguments, below), _on_tensors(arguments, above)
        return lambda t: torch.where(t <= cap, low(t.clamp(max=cap)), high(t))
    return sp.lambdify(arguments, expression.evalf(), modules=[torch])
