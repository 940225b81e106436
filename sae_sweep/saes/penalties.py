"""The sparsity penalties, each one formula in text, from which value, slope, listing and compiled kernels all follow.

A penalty maps the contributions a = activation · decoder norm ≥ 0 of an input's latents to a number (saes/formula.py
says how a formula is written). It is 0 where all are off, so that kernels may skip latents that do not fire.
Contributions, not activations: otherwise growing the decoder and shrinking the code would evade the penalty.
Priors are read as in maximum a posteriori estimation: penalty = −log p up to constants, λ the coefficient over 2σ².
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.lazy import lazy
from sae_sweep.registry import Kind, Setting, get, register
from sae_sweep.saes.formula import Formula, check, parse, symbols
from sae_sweep.saes.formula_cache import code_in, kept_text

if TYPE_CHECKING:
    import sympy as sp
    import torch

    from sae_sweep.config.settings import Penalty
else:
    sp, torch = lazy("sympy"), lazy("torch")

_CODE = code_in(Path(__file__).parent)

# prod1p continues linearly above T = 8, where a dense start would overflow exp and drown the reconstruction.
PRODUCT_CAP = 8


def _as_it_is(penalty: Penalty) -> Penalty:
    return penalty


@dataclass(frozen=True, kw_only=True)
class PenaltyFormula(Kind):
    """A penalty: the sum over latents of `formula`, or what `outer` makes of that sum.

    prior: the density it is −log of, or why none; ladder: coefficients where none is given, a geometric series
    canonical: the penalty that has the same value under another name, if there is one
    counts: it has no slope in what fires, so that only an architecture that gives firing a slope learns from it
    """

    family = "penalty"
    formula: str
    outer: str | None = None
    prior: str
    ladder: tuple[float, ...] = ()
    canonical: Callable[[Penalty], Penalty] = _as_it_is
    counts: bool = False

    @property
    def parsed(self) -> Formula:
        """What the formula says."""
        return parse(self.formula, self.outer)

    def title(self, penalty: Penalty) -> str:
        """How tables and figures name a penalty of this kind."""
        return self.name

    def reads(self, penalty: Penalty) -> Iterable[str]:
        """The settings that change what it computes, beside the coefficient and those that its title tells."""
        return self.settings


class OwnFormula(PenaltyFormula):
    """The kind whose formula is a setting: each formula is a penalty of its own."""

    def title(self, penalty: Penalty) -> str:
        """The formula in its canonical text."""
        formula = formula_of(penalty)
        return formula.whole if formula.coupled else formula.text

    def reads(self, penalty: Penalty) -> Iterable[str]:
        """What the formula names."""
        return formula_of(penalty).reads


def formula_of(penalty: Penalty | str) -> Formula:
    """The formula of a penalty, or of the kind of that name: the user's own where the kind is `formula`."""
    if not isinstance(penalty, str) and "formula" in penalty.to_dict():
        return parse(penalty.formula, penalty.outer)
    kind: PenaltyFormula = get("penalty", penalty if isinstance(penalty, str) else penalty.name)
    return kind.parsed


def _named(penalty: Penalty) -> Penalty:
    """L_p by the names that it has at p = 1/2 and p = 1."""
    if penalty.p not in (0.5, 1.0):
        return penalty
    return type(penalty)("sqrt" if penalty.p == 0.5 else "l1", penalty.coefficient)


def _canonical_formula(penalty: Penalty) -> Penalty:
    """A formula of one's own in its canonical text, with settings that it does not name at their defaults."""
    formula = formula_of(penalty)
    unread = {setting: 1.0 for setting in ("scale", "p") if setting not in formula.reads}
    return penalty.replace(formula=formula.text, outer=formula.outer_text or "T", **unread)


def _check_formula(penalty: Penalty) -> None:
    """UserError unless a formula of one's own is a penalty at its settings."""
    check(formula_of(penalty), penalty.scale, penalty.p)


_SCALE = {
    "scale": Setting(
        1.0,
        "s in the formula, the size of contribution at which the penalty bends; inputs are scaled to E‖x‖² = d",
        gt=0,
    )
}
_GROSS = "LessWrong comment EkibeZomncsPxfYwu"

register(
    PenaltyFormula(
        name="none",
        description="no penalty",
        formula="0",
        prior="none: flat, every code as likely",
        source="no penalty",
        ladder=(0.0,),
    )
)
register(
    PenaltyFormula(
        name="l1",
        description="the sum of contributions",
        formula="a",
        prior="exponential (one-sided Laplace), rate λ",
        source="Tibshirani 1996; arXiv 2309.08600",
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="lp",
        description="the sum of the p-th powers of contributions",
        formula="(a + ε)^p - ε^p",
        prior="exponential power, Z = Γ(1/p)/(p·λ^(1/p)) as ε → 0",
        source=f"{_GROSS} (P7)",
        settings={"p": Setting(0.5, "p in the formula, the exponent; 1 is L1", gt=0)},
        ladder=(0.25, 0.5, 1.0, 2.0),
        canonical=_named,
    )
)
register(
    PenaltyFormula(
        name="sqrt",
        description="the sum of the square roots of contributions: L_p at p = 1/2",
        formula="sqrt(a + ε) - sqrt(ε)",
        prior="exponential power with p = 1/2: Z = 2/λ² as ε → 0",
        source=f"{_GROSS} (P7)",
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="log1p",
        description="concave, with a slope that falls as 1/a",
        formula="log(1 + a/s)",
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
        formula="log(1 + a^2/s^2)",
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
        formula="tanh(a/s)",
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
        formula="log(1 + a/s)",
        outer=f"where(T <= {PRODUCT_CAP}, exp(T) - 1, exp({PRODUCT_CAP})*(1 + T - {PRODUCT_CAP}) - 1)",
        prior="proper, not factorised: aᵢ given the rest is exponential with rate λ·∏_{j≠i}(1+aⱼ/s)/s",
        source=f"{_GROSS} (P6)",
        settings=_SCALE,
        ladder=(0.003, 0.01, 0.03, 0.1),
    )
)
register(
    PenaltyFormula(
        name="pair",
        description="the sum of the products of every two contributions",
        formula="a",
        outer="(T^2 - sum(a^2))/2",
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
        formula="(a + ε)^p - ε^p",
        prior="none: p falls from penalty.p to penalty.p_end while it trains, and the objective with it",
        source="Karvonen et al. 2024, arXiv 2408.00113 (p-annealing)",
        settings={
            "p": Setting(1.0, "p in the formula, the exponent, at the first step", gt=0),
            "p_end": Setting(0.2, "the exponent at the last step", gt=0),
        },
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="hoyer",
        description="the square of the sum of contributions over the sum of their squares",
        formula="a",
        outer="T^2/(sum(a^2) + ε)",
        prior="improper: constant along every ray, so no density; 1 for one latent, L0 for equal ones",
        source="Hoyer 2004; Yang et al. 2020, arXiv 1908.09979 (Hoyer-square)",
        ladder=(0.1, 0.3, 1.0, 3.0),
    )
)
register(
    PenaltyFormula(
        name="mcp",
        description="concave up to s, then flat",
        formula="where(a <= s, a - a^2/(2*s), s/2)",
        prior="improper: a truncated bump on a flat slab, the tail never falls",
        source="Zhang 2010, Annals of Statistics 38 (MCP, γλ = s)",
        settings=_SCALE,
        ladder=(0.25, 0.5, 1.0, 2.0),
    )
)
register(
    PenaltyFormula(
        name="l0",
        description="how many latents fire",
        formula="where(a <= ε, 0, 1)",
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
        formula="a",
        outer="(T - max(a))/(s/10) + max(a)/s",
        prior="one winner, any latent alike: exponential with mean s; the others exponential with mean s/10 (at λ = 1)",
        source=f"{_GROSS} (P6): the mixture over winners, its largest component",
        settings=_SCALE,
        ladder=(0.01, 0.03, 0.1, 0.3),
    )
)
register(
    PenaltyFormula(
        name="exclusive_pi",
        description="as exclusive, and the latent that wins pays for how seldom it wins",
        formula="a",
        outer="T/(s/10) - max(9*a/s + logπ)",
        prior="the same with winner j drawn with probability πⱼ, its share of the inputs: −log π is what "
        "splitting costs",
        source=f"{_GROSS} (P6): the mixture over winners, its largest component",
        settings=_SCALE,
        ladder=(0.01, 0.03, 0.1, 0.3),
    )
)


register(
    OwnFormula(
        name="formula",
        description="a formula of your own",
        formula="a/(a + s)",
        prior="that of the formula: sae-sweep prior FORMULA",
        source="yours; by default one that saturates",
        settings={
            "formula": Setting(
                "a/(a + s)",
                "what a latent costs: a formula of its contribution a (activation times decoder norm), s and p; 0 at a "
                "= 0",
                verbatim=True,
            ),
            "outer": Setting(
                "T", "what an input costs: a formula of T, the sum over its latents, such as exp(T) - 1", verbatim=True
            ),
            "scale": Setting(1.0, "s in the formula", gt=0),
            "p": Setting(1.0, "p in the formula", gt=0),
        },
        ladder=(0.3, 0.6, 1.2, 2.4),
        canonical=_canonical_formula,
        check=_check_formula,
    )
)


def penalty_value(
    penalty: str | Formula,
    contributions: torch.Tensor,
    scale: float = 1.0,
    exponent: float = 1.0,
    log_shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Penalty per input, by name or formula: contributions a‖d‖ [..., width], non-negative -> [...]; differentiable.

    log_shares [width]: log π where the formula names it; None stands for 0, which leaves −log π out.
    """
    formula = formula_of(penalty) if isinstance(penalty, str) else penalty
    terms, largest, outer = _torch_functions(formula, scale, exponent)
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


_OnTensors = Callable[..., Any]


@functools.cache
def _torch_functions(
    formula: Formula, scale: float, exponent: float
) -> tuple[list[_OnTensors], _OnTensors | None, _OnTensors]:
    """The functions of a formula: summed over latents, the one of which the largest counts, and of all these."""

    def write() -> str:
        return _write(formula, scale, exponent)

    # An exponent may fall with every block of steps, and each would be kept.
    kept = "p" not in formula.reads
    text = kept_text("tensors", formula, scale, code=_CODE, write=write) if kept else write()
    names = {**vars(import_module("torch")), "constant": _constant, "combined": _combined, "cases": _cases}
    functions: tuple[list[_OnTensors], _OnTensors | None, _OnTensors] = eval(text, names)
    return functions


def _constant(value: float) -> _OnTensors:
    """A number, in its argument's shape."""
    return lambda first, *_: first * 0 + value


def _combined(whole: _OnTensors, parts: list[_OnTensors]) -> _OnTensors:
    """A function that takes the values of others too."""
    return lambda *values: whole(*values, *(part(*values) for part in parts))


def _cases(variable: int, bound: float, strict: bool, low: _OnTensors, high: _OnTensors) -> _OnTensors:
    """One function up to a bound of a variable (below it if strict), another from there on.

    torch.where evaluates both cases, and what overflows in the one not taken would turn its gradient into NaN: each is
    evaluated on its own side of the bound.
    """

    def either(*values: torch.Tensor) -> torch.Tensor:
        at = values[variable]
        small, large = ((*values[:variable], each, *values[variable + 1 :]) for each in (at.clamp(max=bound), at))
        return torch.where(at < bound if strict else at <= bound, low(*small), high(*large))

    return either


# --- The text of these functions: a Python expression of torch's names and the three above


def _write(formula: Formula, scale: float, exponent: float) -> str:
    terms, outer, largest = (
        sp.sympify(each).subs({symbols.s: scale, symbols.p: exponent}) for each in formula.numeric_expressions()
    )
    arguments: tuple[Any, ...] = (symbols.T0, symbols.T1)[: len(terms)]
    sums, most = ", ".join(_spell((symbols.a,), term) for term in terms), "None"
    if formula.largest is not None:
        most, arguments = _spell((symbols.a, symbols.logπ), largest), (*arguments, symbols.M)
    return f"([{sums}], {most}, {_spell(arguments, outer)})"


def _spell(arguments: tuple[Any, ...], expression: Any) -> str:
    if expression.is_number:
        return f"constant({float(expression)!r})"
    if isinstance(expression, sp.Piecewise):
        return _spell_cases(arguments, expression)
    cases = [each for each in _outermost(expression) if each.has(*arguments)]
    names = sp.symbols(f"case:{len(cases)}") if cases else ()
    whole = expression.subs(dict(zip(cases, names, strict=True)))
    written = inspect.getsource(sp.lambdify((*arguments, *names), whole.evalf(), modules=[torch]))
    function = f"(lambda {', '.join(map(str, (*arguments, *names)))}: {written.partition('return ')[2].strip()})"
    return f"combined({function}, [{', '.join(_spell(arguments, case) for case in cases)}])" if cases else function


def _outermost(expression: Any) -> list[Any]:
    """The where() in an expression that stand in no other."""
    if isinstance(expression, sp.Piecewise):
        return [expression]
    return [each for part in expression.args for each in _outermost(part)]


def _spell_cases(arguments: tuple[Any, ...], piecewise: Any) -> str:
    (below, condition), *rest = piecewise.args
    variable, strict = arguments.index(condition.lhs), isinstance(condition, sp.StrictLessThan)
    low, high = _spell(arguments, below), _spell(arguments, sp.Piecewise(*rest))
    return f"cases({variable}, {float(condition.rhs)!r}, {strict}, {low}, {high})"
