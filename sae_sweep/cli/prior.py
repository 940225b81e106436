"""The prior that a penalty implies, as `sae-sweep prior` and `sae-sweep penalties NAME` print it."""

from __future__ import annotations

import json as json_module
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_sweep import registry
from sae_sweep.config import overrides as config
from sae_sweep.config.keys import nearest, show
from sae_sweep.errors import UserError
from sae_sweep.saes import formula as formulas

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import RenderableType

    from sae_sweep.saes.implied_prior import Estimate, ImpliedPrior, Joint, Prior

# √½: at this noise λ = coefficient/(2σ²) is the coefficient.
SIGMA = math.sqrt(0.5)

# What Jason Gross asks of priors (LessWrong comment EkibeZomncsPxfYwu, P6), and the answers, by penalty.
_EXCLUSIVE = (
    "Does the product hold for mutually exclusive activations? Neither it nor the sum is their prior. That is "
    "-log Σⱼ πⱼ·pⱼ(aⱼ)·∏_{i≠j} δ(aᵢ), a mixture over the latent j that fires. `exclusive_pi` is its largest term, and "
    "`pair` its soft form, which costs nothing while only one latent fires."
)
QUESTIONS = {
    "log1p": "Which prior is log(1+|a|)? As it stands λ is 1, and 1/(1+a) is no density: its integral has no bound. "
    "With λ > 1 "
    "it is a Lomax of shape λ-1.",
    "prod1p": "What of the product of (1+|aᵢ|) in place of the sum of log(1+|aᵢ|)? A sum over latents is -log of a "
    "product of "
    "densities: the latents are independent. The product is the exponential of the sum, so for one input both put "
    "codes in the same order. What the product changes is how reconstruction and sparsity are traded between inputs, "
    "each weighted by its own product, and which latents it couples: aᵢ given the rest is exponential with rate "
    "λ·∏_{j≠i}(1+aⱼ).",
    **dict.fromkeys(("pair", "exclusive", "exclusive_pi"), _EXCLUSIVE),
}


@dataclass(frozen=True)
class Question:
    """What is asked for: a penalty at its settings, and the coefficients under a noise.

    name: of a penalty of the package, None for a formula as typed · closed_form: what is known of its prior
    """

    name: str | None
    formula: formulas.Formula
    scale: float
    p: float
    sigma: float
    coefficients: tuple[float, ...]
    closed_form: str | None = None

    @property
    def rates(self) -> list[float]:
        """λ of each coefficient, without the rounding of √½."""
        return [float(f"{coefficient / (2 * self.sigma**2):.12g}") for coefficient in self.coefficients]

    def readings(self) -> list[ImpliedPrior]:
        """The density of one latent, the others off, and where latents are coupled also beside one of activation s."""
        from sae_sweep.saes.implied_prior import ImpliedPrior

        besides: list[tuple[float, ...]] = [(), (self.scale,)] if self.formula.coupled else [()]
        return [ImpliedPrior(self.formula, self.scale, self.p, beside) for beside in besides]

    def joints(self) -> list[tuple[float, Joint]]:
        """λ and the joint density of 2 and 3 latents, where a penalty couples them."""
        from sae_sweep.saes.implied_prior import joint

        if not self.formula.coupled:
            return []
        return [
            (rate, joint(self.formula, self.scale, self.p, rate, latents)) for latents in (2, 3) for rate in self.rates
        ]


def ask(
    penalty: str,
    coefficients: Sequence[float] = (),
    outer: str | None = None,
    scale: float = 1.0,
    p: float | None = None,
    sigma: float = SIGMA,
) -> Question:
    """What is asked of a penalty's name or a formula; coefficients default to the penalty's ladder, for a formula to 1.

    UserError: no such penalty, no formula, or a size that is not above 0.
    """
    for name, size in (
        ("scale", scale),
        ("p", p or 1.0),
        ("sigma", sigma),
        *(("coefficient", c) for c in coefficients),
    ):
        if not (math.isfinite(size) and size > 0):
            raise UserError(f"{name} must be above 0 and finite, got {size:g}")
    if penalty == "none":
        raise UserError("penalty none has no prior: every code is as likely")
    kinds = registry.kinds("penalty")
    if penalty in kinds:
        if outer is not None:
            raise UserError(f"--outer is for a formula as typed: penalty {penalty} has its own")
        kind = kinds[penalty]
        p = p or (kind.settings["p"].default if "p" in kind.settings else 1.0)
        coefficients = coefficients or config.ladder(penalty)
        return Question(penalty, kind.parsed, scale, p, sigma, tuple(coefficients), kind.prior)
    if penalty.isidentifier() and penalty not in ("a", "T"):
        raise UserError(f"there is no penalty {show(penalty)}{nearest(penalty, kinds)}; a formula is one of a: a/(a+s)")
    formula = formulas.parse(penalty, outer)
    p = p or 1.0
    formulas.check(formula, scale, p)
    return Question(None, formula, scale, p, sigma, tuple(coefficients) or (1.0,))


def prior(question: Question, json: bool) -> None:
    """Print the prior of a penalty."""
    from sae_sweep.reports import layout

    if json:
        print(json_module.dumps(as_json(question)))
        return
    console = layout.console(sys.stdout)
    layout.write(console, *paragraphs(question, console.width))


def as_json(question: Question) -> dict[str, Any]:
    """The prior in JSON: what does not exist or has no bound is null."""
    latents = [
        {
            "beside": list(reading.beside),
            "slope_at_zero": _finite(reading.slope_at_zero),
            "tail": _tail_kind(reading),
            "tail_exponent": _finite(reading.tail.limit),
            "proper_above": _finite(reading.proper_above),
            "priors": [
                {"coefficient": coefficient, **_prior_fields(reading.at(rate))}
                for coefficient, rate in zip(question.coefficients, question.rates, strict=True)
            ],
        }
        for reading in question.readings()
    ]
    joints = [
        {
            "latents": each.latents,
            "lambda": rate,
            "proper": each.normaliser is not None,
            **_estimate("z", each.normaliser),
        }
        for rate, each in question.joints()
    ]
    return {
        "schema": 1,
        "penalty": question.name,
        "formula": question.formula.text,
        "outer": question.formula.outer_text,
        **{key: getattr(question, key) for key in question.formula.reads},
        "sigma": question.sigma,
        "closed_form": question.closed_form,
        "one_latent": latents,
        "joint": joints,
    }


def _prior_fields(found: Prior) -> dict[str, Any]:
    return {
        "lambda": found.rate,
        "proper": found.proper,
        **_estimate("z", found.normaliser),
        "density_at_zero": 1 / found.normaliser.value if found.normaliser else None,
        **_estimate("mean", found.mean),
    }


def _estimate(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    value, error = (estimate.value, estimate.error) if estimate else (math.inf, math.inf)
    return {name: _finite(value), f"{name}_error": _finite(error) if math.isfinite(value) else None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tail_kind(reading: ImpliedPrior) -> str:
    limit = reading.tail.limit
    return "thin" if limit == math.inf else "power" if limit > 0 else "flat"


def paragraphs(question: Question, width: int) -> list[RenderableType]:
    """The prior for people: what it is, whether it is one, numbers by coefficient, and the chart."""
    from rich.text import Text

    formula = question.formula
    sizes = [
        f"{name} = {getattr(question, setting):g}"
        for name, setting in formulas.SETTINGS.items()
        if setting in formula.reads
    ]
    sizes += ["ε = 0.001"] if "ε" in formula.term.names() | formula.outer.names() else []
    whole = f"T = Σ {formula.text}, penalty {formula.outer_text}" if formula.coupled else formula.text
    head = [
        ", ".join([whole, *sizes]),
        "density exp(-λ·penalty)/Z on a ≥ 0",
        f"λ = coefficient/(2σ²); σ = {question.sigma:.4g} is the noise in each number, of activations with E‖x‖² = d",
    ]
    if question.closed_form:
        head.append(f"prior: {question.closed_form}")
    parts: list[RenderableType] = [Text("\n".join(head))]
    readings = question.readings()
    for reading in readings:
        parts += [Text("\n" + "\n".join(_sentences(question, reading))), _table(question, reading)]
    if formula.coupled:
        parts += [Text(""), *_joint_lines(question)]
    parts += [Text(""), *_chart(question, readings[-1], width)]
    return parts


def _sentences(question: Question, reading: ImpliedPrior) -> list[str]:
    limit, growth = reading.tail.limit, reading.tail.growth
    heading = []
    if question.formula.coupled:
        others = f"beside another of activation {reading.beside[0]:g}" if reading.beside else "all others off"
        heading = [f"one latent, {others}:"]
    if limit == 0:
        said = "normalisable for no λ: its tail is flatter than any power of a"
    elif limit < math.inf:
        power = "λ" if f"{limit:.4g}" == "1" else f"{limit:.4g}·λ"
        said = f"normalisable for λ > {reading.proper_above:.4g} only: far out it falls as a^-({power})"
    elif growth <= 0.1:
        said = "normalisable for every λ > 0: far out it falls faster than any power of a"
    else:
        power = "" if f"{growth:.2g}" == "1" else f"^{growth:.2g}"
        said = f"normalisable for every λ > 0: far out -log p grows as a{power}"
    return [*heading, said, f"slope of the penalty at a = 0: {reading.slope_at_zero:.4g}"]


def _table(question: Question, reading: ImpliedPrior) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("coefficient", "λ", "Z", "density at 0", "mean", "tail"):
        table.add_column(column, justify="right")
    limit = reading.tail.limit
    for coefficient, rate in zip(question.coefficients, question.rates, strict=True):
        found = reading.at(rate)
        at_zero = f"{1 / found.normaliser.value:.4g}" if found.normaliser else "–"
        tail = "flat" if limit == 0 else "thin" if limit == math.inf else f"a^-{limit * rate:.4g}"
        table.add_row(
            f"{coefficient:g}", f"{rate:.4g}", _written(found.normaliser), at_zero, _written(found.mean), tail
        )
    return table


def _written(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none"
    if estimate.value == math.inf:
        return "infinite"
    return f"{estimate.value:.6g} ± {estimate.error:.0e}"


def _joint_lines(question: Question) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    joints = question.joints()
    table = Table(box=None, pad_edge=False)
    table.add_column("λ", justify="right")
    for latents in (2, 3):
        table.add_column(f"Z of {latents} latents", justify="right")
    for rate in question.rates:
        table.add_row(f"{rate:.4g}", *(_written(each.normaliser) for at, each in joints if at == rate))
    return [Text("all latents of an input together:"), table]


def _chart(question: Question, reading: ImpliedPrior, width: int) -> list[RenderableType]:
    import numpy as np
    from rich.text import Text

    from sae_sweep.reports.density_chart import density_chart

    a = np.linspace(0, _reach(question, reading), 2 * width)
    curves: dict[str, NDArray[np.float64]] = {}
    for rate in question.rates:
        name = f"λ = {rate:.4g}" + ("" if reading.at(rate).proper else " (no density)")
        curves[name] = np.exp(-rate * reading.cost(a)[0])
    beside = f" beside another of {reading.beside[0]:g}" if reading.beside else ""
    title = f"density over a{beside}, relative to that at a = 0"
    return [Text(title, style="bold"), density_chart(a, curves, width)]


def _reach(question: Question, reading: ImpliedPrior) -> float:
    """The activation to draw up to: where the slowest curve has fallen to a fiftieth, within 1 to 10 scales."""
    import numpy as np

    a = np.geomspace(1e-2, 10, 200) * question.scale
    high = np.exp(-min(question.rates) * reading.cost(a)[0]) > 0.02
    return float(min(max(a[high][-1], question.scale), 10 * question.scale)) if high.any() else question.scale
