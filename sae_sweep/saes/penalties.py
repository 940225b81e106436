"""The sparsity penalties, each one formula, from which value, slope, listing and compiled kernels all follow.

A penalty maps the contributions aᵢ‖dᵢ‖ ≥ 0 of one input to a number: `outer(T0, T1, M)` with Tᵢ = Σⱼ sumsᵢ(aⱼ) and
M = maxⱼ largest(aⱼ). Every term is 0 at a = 0, so latents that are off cost nothing and kernels may skip them.
Contributions, not activations: otherwise growing the decoder and shrinking the code would evade the penalty.
Priors are read as in maximum a posteriori estimation: penalty = −log p up to constants, λ the coefficient over 2σ².
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_sweep.lazy import lazy
from sae_sweep.registry import Kind, Setting, get, register

if TYPE_CHECKING:
    import sympy as sp
    import torch

    from sae_sweep.config.settings import Penalty
else:
    sp, torch = lazy("sympy"), lazy("torch")

# L_p's slope p(a+ε)^(p-1) stays finite at 0: with ε = 1e-3 and activations of norm √d it is at most 16 for p = 1/2.
EPSILON = 1e-3
# prod1p continues linearly above T = 8, where a dense start would overflow exp and drown the reconstruction.
PRODUCT_CAP = 8
# Under `exclusive` all but the largest have a scale of their own: this fraction of s.
REST = "1/10"


class _Symbols:
    """The symbols of formulas: of a latent's contribution a, of settings, of sums T and of the largest M over latents;
    log π is the logarithm of the share of inputs on which a latent is the largest."""

    @functools.cached_property
    def by_name(self) -> dict[str, Any]:
        positive = {name: sp.Symbol(name, positive=True) for name in ("a", "s", "p", "ε", "T0", "T1")}
        return positive | {name: sp.Symbol(name, real=True) for name in ("M", "logπ")}

    def __getattr__(self, name: str) -> Any:
        return self.by_name[name]


symbols = _Symbols()


def expression(text: str) -> Any:
    """A formula as a SymPy expression."""
    functions = {"where": lambda condition, low, high: sp.Piecewise((low, condition), (high, True))}
    return sp.sympify(text, locals={**symbols.by_name, **functions})


def _as_it_is(penalty: Penalty) -> Penalty:
    return penalty


@dataclass(frozen=True, kw_only=True)
class PenaltyFormula(Kind):
    """A penalty: `outer` of `sums` over latents and of the `largest` among them, all text.

    prior: the density it is −log of, or why none; ladder: coefficients where none is given, a geometric series
    canonical: the penalty that has the same value under another name, if there is one
    counts: it has no slope in what fires, so that only an architecture that gives firing a slope learns from it
    """

    family = "penalty"
    sums: tuple[str, ...]
    outer: str = "T0"
    largest: str = ""
    prior: str
    ladder: tuple[float, ...] = ()
    canonical: Callable[[Penalty], Penalty] = _as_it_is
    counts: bool = False

    @functools.cached_property
    def terms(self) -> tuple[Any, ...]:
        """What is summed over latents, as SymPy expressions of a, s, p and ε."""
        return tuple(expression(text) for text in self.sums)

    @functools.cached_property
    def combined(self) -> Any:
        """`outer` as a SymPy expression of T0, T1 and M."""
        return expression(self.outer)

    @functools.cached_property
    def of_largest(self) -> Any:
        """`largest` as a SymPy expression; None where latents do not compete."""
        return expression(self.largest) if self.largest else None

    @property
    def numeric_terms(self) -> tuple[Any, ...]:
        """The terms with ε put in: what is computed."""
        return tuple(term.subs(symbols.ε, sp.Rational(1, 1000)) for term in self.terms)

    @property
    def numeric_outer(self) -> Any:
        """`outer` with ε put in."""
        return self.combined.subs(symbols.ε, sp.Rational(1, 1000))

    @property
    def weighs(self) -> bool:
        """Whether it asks for log π, which takes a pass over the batch first."""
        return "logπ" in self.largest

    @property
    def formula(self) -> str:
        """The whole penalty in one line, for people."""
        names = zip(("T0", "T1"), self.terms, strict=False)
        sums = {symbols.by_name[name]: sp.Symbol(f"Σ[{spell(term)}]") for name, term in names}
        if self.largest:
            sums[symbols.M] = sp.Symbol(f"max[{spell(self.of_largest)}]")
        outer = self.combined.args[0].expr if isinstance(self.combined, sp.Piecewise) else self.combined
        return spell(outer.subs(sums))

    @property
    def slope_at_zero(self) -> Any:
        """The slope for a latent about to fire on an input where nothing else does."""
        alone = {symbols.by_name[name]: term for name, term in zip(("T0", "T1"), self.terms, strict=False)}
        if self.largest:
            alone[symbols.M] = self.of_largest
        return sp.diff(self.combined.subs(alone), symbols.a).subs(symbols.a, 0)


def formula_of(name: str) -> PenaltyFormula:
    """The formula of a penalty. KeyError if there is none of that name."""
    formula: PenaltyFormula = get("penalty", name)
    return formula


def spell(formula: Any) -> str:
    """An expression as people write it."""
    return str(_speller()().doprint(formula)).replace("**", "^").replace("*", "·").replace("<=", "≤")


@functools.cache
def _speller() -> Any:
    from sympy.printing.str import StrPrinter

    class Speller(StrPrinter):
        def _print_Piecewise(self, piecewise: Any) -> str:
            (below, condition), (above, _) = piecewise.args
            return f"{self._print(below)} where {self._print(condition)}, else {self._print(above)}"

    return Speller


def _named(penalty: Penalty) -> Penalty:
    """L_p by the names that it has at p = 1/2 and p = 1."""
    if penalty.p not in (0.5, 1.0):
        return penalty
    return type(penalty)("sqrt" if penalty.p == 0.5 else "l1", penalty.coefficient)


_SCALE = {"scale": Setting(1.0, "s, in activations of E‖x‖² = d", gt=0)}
_GROSS = "LessWrong comment EkibeZomncsPxfYwu"

register(
    PenaltyFormula(
        name="none",
        description="no penalty",
        sums=("0",),
        prior="none: flat, every code as likely",
        source="no penalty",
        ladder=(0.0,),
    )
)
register(
    PenaltyFormula(
        name="l1",
        description="the sum of contributions",
        sums=("a",),
        prior="exponential (one-sided Laplace), rate λ",
        source="Tibshirani 1996; arXiv 2309.08600",
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="lp",
        description="their p-th powers",
        sums=("(a + ε)**p - ε**p",),
        prior="exponential power, Z = Γ(1/p)/(p·λ^(1/p)) as ε → 0",
        source=f"{_GROSS} (P7)",
        settings={"p": Setting(0.5, "the exponent", gt=0)},
        ladder=(0.25, 0.5, 1.0, 2.0),
        canonical=_named,
    )
)
register(
    PenaltyFormula(
        name="sqrt",
        description="their square roots: L_p at p = 1/2",
        sums=("sqrt(a + ε) - sqrt(ε)",),
        prior="exponential power with p = 1/2: Z = 2/λ² as ε → 0",
        source=f"{_GROSS} (P7)",
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="log1p",
        description="concave, with a slope that falls as 1/a",
        sums=("log(1 + a/s)",),
        prior="Lomax (Pareto II), shape λ-1, scale s; improper for λ ≤ 1",
        source=f"{_GROSS} (P6)",
        settings=_SCALE,
        ladder=(0.3, 0.6, 1.2, 2.4),
    )
)
register(
    PenaltyFormula(
        name="log1p_sq",
        description="quadratic near zero, logarithmic far out",
        sums=("log(1 + a**2/s**2)",),
        prior="Student-t, ν = 2λ-1 (Cauchy at λ = 1; improper for λ ≤ 1/2)",
        source=f"Olshausen & Field 1996; {_GROSS} (P6)",
        settings=_SCALE,
        ladder=(0.2, 0.4, 0.8, 1.6),
    )
)
register(
    PenaltyFormula(
        name="tanh",
        description="a smooth count of what fires",
        sums=("tanh(a/s)",),
        prior="improper: a spike and a flat slab",
        source="transformer-circuits.pub/2024/feb-update",
        settings=_SCALE,
        ladder=(0.15, 0.3, 0.6, 1.2),
    )
)
register(
    PenaltyFormula(
        name="prod1p",
        description="the product of 1 + a/s over latents, less 1",
        sums=("log(1 + a/s)",),
        outer=f"where(T0 <= {PRODUCT_CAP}, exp(T0) - 1, exp({PRODUCT_CAP})*(1 + T0 - {PRODUCT_CAP}) - 1)",
        prior="proper, not factorised: aᵢ given the rest is exponential with rate λ·∏_{j≠i}(1+aⱼ/s)/s",
        source=f"{_GROSS} (P6)",
        settings=_SCALE,
        ladder=(0.003, 0.01, 0.03, 0.1),
    )
)
register(
    PenaltyFormula(
        name="pair",
        description="the sum of products of two",
        sums=("a", "a**2"),
        outer="(T0**2 - T1)/2",
        prior="not factorised: Σ_{i<j} aᵢ·aⱼ, zero iff at most one latent fires; improper for two latents alone, "
        "proper from three on",
        source=f"{_GROSS} (P6)",
        ladder=(0.03, 0.1, 0.3, 1.0),
    )
)
register(
    PenaltyFormula(
        name="lp_annealed",
        description="L_p whose exponent falls while an SAE trains",
        sums=("(a + ε)**p - ε**p",),
        prior="none: p falls from penalty.p to penalty.p_end while it trains, and the objective with it",
        source="Karvonen et al. 2024, arXiv 2408.00113 (p-annealing)",
        settings={"p": Setting(1.0, "the exponent at first", gt=0), "p_end": Setting(0.2, "and at the end", gt=0)},
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="hoyer",
        description="the square of the sum over the sum of squares",
        sums=("a", "a**2"),
        outer="T0**2/(T1 + ε)",
        prior="improper: constant along every ray, so no density; 1 for one latent, L0 for equal ones",
        source="Hoyer 2004; Yang et al. 2020, arXiv 1908.09979 (Hoyer-square)",
        ladder=(0.1, 0.3, 1.0, 3.0),
    )
)
register(
    PenaltyFormula(
        name="mcp",
        description="concave up to s, then flat",
        sums=("where(a <= s, a - a**2/(2*s), s/2)",),
        prior="improper: a truncated bump on a flat slab, the tail never falls",
        source="Zhang 2010, Annals of Statistics 38 (MCP, γλ = s)",
        settings=_SCALE,
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="l0",
        description="how many fire",
        sums=("where(a <= ε, 0, 1)",),
        prior="improper: a spike and a flat slab; sae=jumprelu alone gives it a slope",
        source="Rajamanoharan et al. 2024, arXiv 2407.14435",
        ladder=(0.01, 0.1, 1.0, 10.0),
        counts=True,
    )
)
register(
    PenaltyFormula(
        name="exclusive",
        description="one latent may fire at scale s, the others at a tenth of it",
        sums=("a",),
        outer=f"(T0 - M)/({REST}*s) + M/s",
        largest="a",
        prior="one winner, any latent alike: exponential with mean s; the others exponential with mean s/10 (at λ = 1)",
        source=f"{_GROSS} (P6): the mixture over winners, its largest component",
        settings=_SCALE,
        ladder=(0.01, 0.03, 0.1, 0.3),
    )
)
register(
    PenaltyFormula(
        name="exclusive_pi",
        description="the same, and the winner pays for how seldom it wins",
        sums=("a",),
        outer=f"T0/({REST}*s) - M",
        largest=f"a*(1/({REST}) - 1)/s + logπ",
        prior="the same with winner j drawn with probability πⱼ, its share of the inputs: −log π is what "
        "splitting costs",
        source=f"{_GROSS} (P6): the mixture over winners, its largest component",
        settings=_SCALE,
        ladder=(0.01, 0.03, 0.1, 0.3),
    )
)


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
    formula, a = formula_of(name), symbols.a
    numbers = {symbols.s: scale, symbols.p: exponent}
    terms = [_on_tensors((a,), term.subs(numbers)) for term in formula.numeric_terms]
    arguments, outer = (symbols.T0, symbols.T1)[: len(terms)], formula.numeric_outer.subs(numbers)
    if not formula.largest:
        return terms, None, _on_tensors(arguments, outer)
    largest = _on_tensors((a, symbols.logπ), formula.of_largest.subs(numbers))
    return terms, largest, _on_tensors((*arguments, symbols.M), outer)


def _on_tensors(arguments: tuple[Any, ...], expression: Any) -> Callable[..., torch.Tensor]:
    if expression.is_number:  # a constant would not take its argument's shape
        return lambda first, *_: first * 0 + float(expression)
    # where() evaluates both branches: an overflowing exp in the branch not taken would turn its gradient into NaN.
    if isinstance(expression, sp.Piecewise):
        (below, condition), (above, _) = expression.args
        cap = float(condition.rhs)
        low, high = _on_tensors(arguments, below), _on_tensors(arguments, above)
        return lambda t: torch.where(t <= cap, low(t.clamp(max=cap)), high(t))
    return sp.lambdify(arguments, expression.evalf(), modules=[torch])
