"""The sparsity penalties, each one formula, from which value, slope, listing and compiled kernels all follow.

A penalty maps the contributions aᵢ‖dᵢ‖ ≥ 0 of one input to a number: `outer(T₀, T₁, M)` with Tᵢ = Σⱼ termᵢ(aⱼ) and
M = maxⱼ largest(aⱼ). Every term is 0 at a = 0, so latents that are off cost nothing and kernels may skip them.
Contributions, not activations: otherwise growing the decoder and shrinking the code would evade the penalty.
Priors are read as in maximum a posteriori estimation: penalty = −log p up to constants, λ the coefficient over 2σ².
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp
import torch
from sympy.printing.str import StrPrinter

from sae_sweep.config.settings import PENALTY_KEYS

a, s, p, ε = sp.symbols("a s p ε", positive=True)
T = sp.symbols("T0 T1", positive=True)
# The largest over latents, and log π: the logarithm of the share of inputs on which a latent is the largest.
M, logπ = sp.symbols("M logπ", real=True)

# L_p's slope p(a+ε)^(p-1) stays finite at 0: with ε = 1e-3 and activations of norm √d it is at most 16 for p = 1/2.
EPSILON = sp.Rational(1, 1000)
# prod1p continues linearly above T = 8, where a dense start would overflow exp and drown the reconstruction.
PRODUCT_CAP = 8
# Under `exclusive` all but the largest have a scale of their own: this fraction of s.
REST = sp.Rational(1, 10)


@dataclass(frozen=True)
class PenaltyFormula:
    """`outer` of the sums of `terms` and the maximum of `largest`; `prior`: the density it is −log of, or why none."""

    name: str
    terms: tuple[sp.Expr, ...]
    prior: str
    source: str
    outer: sp.Expr = T[0]
    largest: sp.Expr = sp.S.Zero

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings it reads beside the coefficient."""
        return PENALTY_KEYS[self.name]

    @property
    def numeric_terms(self) -> tuple[sp.Expr, ...]:
        """The terms with ε put in: what is computed."""
        return tuple(term.subs(ε, EPSILON) for term in self.terms)

    @property
    def numeric_outer(self) -> sp.Expr:
        """`outer` with ε put in."""
        return self.outer.subs(ε, EPSILON)

    @property
    def formula(self) -> str:
        """The whole penalty in one line, for people."""
        sums = {symbol: sp.Symbol(f"Σ[{spell(term)}]") for symbol, term in zip(T, self.terms, strict=False)}
        sums[M] = sp.Symbol(f"max[{spell(self.largest)}]")
        outer = self.outer.args[0].expr if isinstance(self.outer, sp.Piecewise) else self.outer
        return spell(outer.subs(sums))

    @property
    def slope_at_zero(self) -> sp.Expr:
        """The slope for a latent about to fire on an input where nothing else does."""
        alone = {**dict(zip(T, self.terms, strict=False)), M: self.largest}
        return sp.diff(self.outer.subs(alone), a).subs(a, 0)


class _Speller(StrPrinter):
    """Formulas as people write them."""

    def _print_Piecewise(self, piecewise: sp.Piecewise) -> str:
        (below, condition), (above, _) = piecewise.args
        return f"{self._print(below)} where {self._print(condition)}, else {self._print(above)}"


def spell(expression: sp.Expr) -> str:
    """An expression as people write it."""
    return str(_Speller().doprint(expression)).replace("**", "^").replace("*", "·").replace("<=", "≤")


_product = sp.Piecewise(
    (sp.exp(T[0]) - 1, T[0] <= PRODUCT_CAP),
    (sp.exp(PRODUCT_CAP) * (1 + T[0] - PRODUCT_CAP) - 1, True),
)

FORMULAS = {
    formula.name: formula
    for formula in (
        PenaltyFormula("none", (sp.Integer(0),), "none: flat, every code as likely", "no penalty"),
        PenaltyFormula("l1", (a,), "exponential (one-sided Laplace), rate λ", "Tibshirani 1996; arXiv 2309.08600"),
        PenaltyFormula(
            "lp",
            ((a + ε) ** p - ε**p,),
            "exponential power, Z = Γ(1/p)/(p·λ^(1/p)) as ε → 0",
            "LessWrong comment EkibeZomncsPxfYwu (P7)",
        ),
        PenaltyFormula(
            "sqrt",
            (sp.sqrt(a + ε) - sp.sqrt(ε),),
            "exponential power with p = 1/2: Z = 2/λ² as ε → 0",
            "LessWrong comment EkibeZomncsPxfYwu (P7)",
        ),
        PenaltyFormula(
            "log1p",
            (sp.log(1 + a / s),),
            "Lomax (Pareto II), shape λ-1, scale s; improper for λ ≤ 1",
            "LessWrong comment EkibeZomncsPxfYwu (P6)",
        ),
        PenaltyFormula(
            "log1p_sq",
            (sp.log(1 + a**2 / s**2),),
            "Student-t, ν = 2λ-1 (Cauchy at λ = 1; improper for λ ≤ 1/2)",
            "Olshausen & Field 1996; LessWrong comment EkibeZomncsPxfYwu (P6)",
        ),
        PenaltyFormula(
            "tanh", (sp.tanh(a / s),), "improper: a spike and a flat slab", "transformer-circuits.pub/2024/feb-update"
        ),
        PenaltyFormula(
            "prod1p",
            (sp.log(1 + a / s),),
            "proper, not factorised: aᵢ given the rest is exponential with rate λ·∏_{j≠i}(1+aⱼ/s)/s",
            "LessWrong comment EkibeZomncsPxfYwu (P6)",
            outer=_product,
        ),
        PenaltyFormula(
            "pair",
            (a, a**2),
            "not factorised: aᵢ given the rest is exponential with rate λ·Σ_{j≠i} aⱼ; improper for two latents alone, "
            "proper from three on; zero iff at most one latent fires",
            "LessWrong comment EkibeZomncsPxfYwu (P6)",
            outer=(T[0] ** 2 - T[1]) / 2,
        ),
        PenaltyFormula(
            "lp_annealed",
            ((a + ε) ** p - ε**p,),
            "none: p falls from penalty.p to penalty.p_end while it trains, and the objective with it",
            "Karvonen et al. 2024, arXiv 2408.00113 (p-annealing)",
        ),
        PenaltyFormula(
            "hoyer",
            (a, a**2),
            "improper: constant along every ray, so no density; 1 for one latent, L0 for equal ones",
            "Hoyer 2004; Yang et al. 2020, arXiv 1908.09979 (Hoyer-square)",
            outer=T[0] ** 2 / (T[1] + ε),
        ),
        PenaltyFormula(
            "mcp",
            (sp.Piecewise((a - a**2 / (2 * s), a <= s), (s / 2, True)),),
            "improper: a truncated bump on a flat slab, the tail never falls",
            "Zhang 2010, Annals of Statistics 38 (MCP, γλ = s)",
        ),
        PenaltyFormula(
            "l0",
            (sp.Piecewise((0, a <= ε), (1, True)),),
            "improper: a spike and a flat slab; sae=jumprelu alone gives it a slope",
            "Rajamanoharan et al. 2024, arXiv 2407.14435",
        ),
        PenaltyFormula(
            "exclusive",
            (a,),
            "one winner, any latent alike: exponential with mean s; the others exponential with mean s/10 (at λ = 1)",
            "LessWrong comment EkibeZomncsPxfYwu (P6): the mixture over winners, its largest component",
            outer=(T[0] - M) / (REST * s) + M / s,
            largest=a,
        ),
        PenaltyFormula(
            "exclusive_pi",
            (a,),
            "the same with winner j drawn with probability πⱼ, its share of the inputs: −log π is what splitting costs",
            "LessWrong comment EkibeZomncsPxfYwu (P6): the mixture over winners, its largest component",
            outer=T[0] / (REST * s) - M,
            largest=a * (1 / REST - 1) / s + logπ,
        ),
    )
}


def penalty_value(
    name: str,
    contributions: torch.Tensor,
    scale: float = 1.0,
    exponent: float = 1.0,
    log_shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Penalty per input: contributions a‖d‖ [..., width], non-negative -> [...]; differentiable.

    log_shares [width]: log π of `exclusive_pi`; None stands for 0, which leaves −log π out.
    Above a product of e⁸ prod1p continues linearly (PRODUCT_CAP); L_p is Σ(a+ε)ᵖ − εᵖ with EPSILON.
    """
    terms, largest, outer = _torch_functions(name, scale, exponent)
    sums = [term(contributions).sum(-1) for term in terms]
    if largest is None:
        return outer(*sums)
    shares = contributions.new_zeros(()) if log_shares is None else log_shares
    # Of equal ones the first counts, as in the compiled slopes.
    return outer(*sums, largest(contributions, shares).max(-1).values)


def log_shares(contributions: torch.Tensor) -> torch.Tensor:
    """log π [..., width]: the share of a batch [..., b, width] on which each latent is the largest.

    One is added to every count (Laplace's rule): a latent that never won is unlikely, not impossible.
    """
    largest, winner = contributions.detach().max(-1)
    counts = torch.ones_like(contributions[..., 0, :], requires_grad=False)
    counts = counts.scatter_add(-1, winner, (largest > 0).to(counts.dtype))
    return (counts / counts.sum(-1, keepdim=True)).log()


@functools.cache
def _torch_functions(
    name: str, scale: float, exponent: float
) -> tuple[list[Callable[..., torch.Tensor]], Callable[..., torch.Tensor] | None, Callable[..., torch.Tensor]]:
    formula = FORMULAS[name]
    numbers = {s: scale, p: exponent}
    terms = [_on_tensors((a,), term.subs(numbers)) for term in formula.numeric_terms]
    arguments, outer = T[: len(terms)], formula.numeric_outer.subs(numbers)
    if not formula.largest:
        return terms, None, _on_tensors(arguments, outer)
    return terms, _on_tensors((a, logπ), formula.largest.subs(numbers)), _on_tensors((*arguments, M), outer)


def _on_tensors(arguments: tuple[sp.Symbol, ...], expression: sp.Expr) -> Callable[..., torch.Tensor]:
    if expression.is_number:  # a constant would not take its argument's shape
        return lambda first, *_: first * 0 + float(expression)
    # where() evaluates both branches: an overflowing exp in the branch not taken would turn its gradient into NaN.
    if isinstance(expression, sp.Piecewise):
        (below, condition), (above, _) = expression.args
        cap = float(condition.rhs)
        low, high = _on_tensors(arguments, below), _on_tensors(arguments, above)
        return lambda t: torch.where(t <= cap, low(t.clamp(max=cap)), high(t))
    return sp.lambdify(arguments, expression.evalf(), modules=[torch])
