"""Which prior the activations of latents follow where they fire, by held-out likelihood (REFERENCE §5, P6).

A penalty is −log of a prior, so the family that fits best names the penalty that the activations ask for. All densities
are on a ≥ 0, with a scale s (or λ) of their own for every latent:

exponential        e^(−a/s)/s                                → l1
half_cauchy        2/(π s (1 + (a/s)²))                      → log1p_sq, coefficient 1 in units of 2σ²
student_t          ∝ (1 + a²/(ν s²))^(−(ν+1)/2)              → log1p_sq
lomax              (α/s)(1 + a/s)^(−α−1)                     → log1p, scale s
exponential_power  e^(−(a/s)^p)·p/(s Γ(1/p))                 → lp, p
spike_and_slab     π e^(−a/s)/s + (1 − π) N(μ, σ²), a ≥ 0    → tanh: flat beyond the spike
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.limits import PRIOR_INPUTS
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import Setting, register

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from scipy import optimize, special
    from torch import Tensor

    from sae_sweep.metrics.partitions import Floats
else:
    np, pd, optimize, special = (lazy(name) for name in ("numpy", "pandas", "scipy.optimize", "scipy.special"))

# A latent is fitted on at most so many of the inputs on which it fires, and only if its activations vary by so much of
# their mean there: a constant has no density.
MOST, VARY = 2_000, 0.01
# A penalty's scale or exponent is named only where the fit knows it to a factor of 4 either way, at 95%.
KNOWN_TO = 4.0
# Nelder-Mead compares differences: what is not finite is as bad as this.
WORST = 1e12
# The step of second differences in θ, all of whose parts are logarithms of about 1.
STEP = 1e-2


@dataclass(frozen=True)
class Family:
    """A family of densities: log p(a) of activations [n] at a scale of about 1, for free parameters θ [.] in ℝ.

    `start`: θ from which the fit begins, one fit from each; `penalty`: what θ and the unit of scale imply; `named`: the
    parameter that this names has the logarithm named · θ [.] (none where all are 0).
    """

    log_density: Callable[[Floats, Floats], Floats]
    start: Sequence[Sequence[float]]
    penalty: Callable[[Floats, float], str]
    named: Sequence[float]


def _exponential(a: Floats, theta: Floats) -> Floats:
    return -theta[0] - a * np.exp(-theta[0])


def _half_cauchy(a: Floats, theta: Floats) -> Floats:
    return math.log(2 / math.pi) - theta[0] - np.log1p((a * np.exp(-theta[0])) ** 2)


def _student_t(a: Floats, theta: Floats) -> Floats:
    nu = np.exp(theta[1])
    # Not by a difference of log Γ, which is all rounding where ν is large: activations more even than a half-normal.
    constant = math.log(2) - special.betaln(nu / 2, 0.5) - 0.5 * np.log(nu) - theta[0]
    return constant - (nu + 1) / 2 * np.log1p((a * np.exp(-theta[0])) ** 2 / nu)


def _lomax(a: Floats, theta: Floats) -> Floats:
    return theta[1] - theta[0] - (np.exp(theta[1]) + 1) * np.log1p(a * np.exp(-theta[0]))


def _exponential_power(a: Floats, theta: Floats) -> Floats:
    p = np.exp(theta[1])
    return theta[1] - theta[0] - special.gammaln(1 / p) - (a * np.exp(-theta[0])) ** p


def _spike_and_slab(a: Floats, theta: Floats) -> Floats:
    spike_share, scale, mean, spread = -np.logaddexp(0, -theta[0]), theta[1], np.exp(theta[2]), np.exp(theta[3])
    spike = spike_share - scale - a * np.exp(-scale)
    slab_share = -np.logaddexp(0, theta[0])
    gauss = -0.5 * ((a - mean) / spread) ** 2 - np.log(spread) - 0.5 * math.log(2 * math.pi)
    return np.logaddexp(spike, slab_share + gauss - special.log_ndtr(mean / spread))


FAMILIES: dict[str, Family] = {
    "exponential": Family(_exponential, [[0.0]], lambda theta, unit: "l1", [0]),
    "half_cauchy": Family(
        _half_cauchy, [[-0.5]], lambda theta, unit: f"log1p_sq scale={unit * np.exp(theta[0]):.2g}", [1]
    ),
    "student_t": Family(
        _student_t,
        [[0.0, 1.0]],
        lambda theta, unit: f"log1p_sq scale={unit * np.exp(theta[0] + theta[1] / 2):.2g}",
        [1, 0.5],
    ),
    "lomax": Family(_lomax, [[1.0, 1.0]], lambda theta, unit: f"log1p scale={unit * np.exp(theta[0]):.2g}", [1, 0]),
    "exponential_power": Family(
        _exponential_power, [[0.0, 0.0]], lambda theta, unit: f"lp p={np.exp(theta[1]):.2g}", [0, 1]
    ),
    "spike_and_slab": Family(
        _spike_and_slab,
        [[-2.0, -3.0, 0.0, -1.5], [0.0, -1.0, 0.5, -0.5]],
        lambda theta, unit: f"tanh scale={unit * np.exp(theta[1]):.2g}",
        [0, 1, 0, 0],
    ),
}


@dataclass(frozen=True)
class Fit:
    """A family fitted to one latent: θ, and its mean log-likelihood on the other half of the activations, nats."""

    theta: Floats
    held_out: float


def fit(family: Family, train: Floats, test: Floats) -> Fit:
    """Maximum likelihood on `train`, scored on `test`; both positive, of mean about 1."""
    ends = [
        optimize.minimize(
            lambda theta: _loss(family, theta, train),
            np.array(start),
            method="Nelder-Mead",
            options={"maxiter": 400, "xatol": 1e-3, "fatol": 1e-6},
        )
        for start in family.start
    ]
    best = min(ends, key=lambda end: float(end.fun)).x
    return Fit(best, -_loss(family, best, test))


def _loss(family: Family, theta: Floats, a: Floats) -> float:
    """The mean of −log p(a), nats; WORST where it is no number."""
    with np.errstate(all="ignore"):
        value = -float(np.mean(family.log_density(a, theta)))
    return value if np.isfinite(value) else WORST


def identified(family: Family, theta: Floats, a: Floats) -> bool:
    """Whether activations [n] say what parameter the penalty names: to a factor of KNOWN_TO either way, at 95%.

    By the inverse of the likelihood's curvature at its maximum θ. A flat likelihood, as of an exponential power of any
    exponent beyond some hundreds, or of a spike that no activation lies in, says nothing.
    """
    named = np.asarray(family.named, np.float64)
    if not named.any():
        return True
    size = len(theta)
    curvature = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            step = STEP * np.eye(size)
            values = [_loss(family, theta + p * step[i] + q * step[j], a) for p in (1, -1) for q in (1, -1)]
            curvature[i, j] = (values[0] - values[1] - values[2] + values[3]) / (4 * STEP**2)
    eigenvalues, vectors = np.linalg.eigh((curvature + curvature.T) / 2)
    along = vectors.T @ named
    used = np.abs(along) > 1e-9
    # Curvature that second differences cannot tell from none.
    if (eigenvalues[used] <= 1e-9).any():
        return False
    error = math.sqrt(float((along[used] ** 2 / eigenvalues[used]).sum()) / len(a))
    return 1.96 * error <= math.log(KNOWN_TO)


def priors(norms: Tensor, fires_above: float) -> tuple[dict[str, Value], pd.DataFrame]:
    """Columns `prior_<family>`: held-out log-likelihood in nats an activation, mean over activations of all latents.

    norms: contributions a‖d‖ [n, width]. The activations of a latent are put in units of their mean before they are
    fitted and scored, so that numbers compare between SAEs. Also a row per latent: `prior`, its best family, and
    `prior_penalty`, what that implies; null for latents that are not fitted, and the penalty also where the activations
    do not say what its scale or exponent is (`identified`).
    """
    scores: dict[str, list[float]] = {name: [] for name in FAMILIES}
    counts: list[int] = []
    rows: list[tuple[str | None, str | None]] = []
    for codes in norms.T.double().cpu().numpy():
        active = codes[codes > fires_above][:MOST]
        if len(active) < PRIOR_INPUTS or active.std() < VARY * active.mean():
            rows.append((None, None))
            continue
        unit = float(active.mean())
        fits = {name: fit(family, active[::2] / unit, active[1::2] / unit) for name, family in FAMILIES.items()}
        best = max(fits, key=lambda name: fits[name].held_out)
        family, theta = FAMILIES[best], fits[best].theta
        named = family.penalty(theta, unit) if identified(family, theta, active[::2] / unit) else None
        rows.append((best, named))
        counts.append(len(active[1::2]))
        for name, found in fits.items():
            scores[name].append(found.held_out)
    columns = {
        f"prior_{name}": float(np.average(values, weights=counts)) if values else None
        for name, values in scores.items()
    }
    return columns, pd.DataFrame(rows, columns=["prior", "prior_penalty"], dtype="string")


def measure(measured: Measured) -> dict[str, Any]:
    """The columns COLUMNS of an SAE, and `prior` and `prior_penalty` of each latent."""
    columns, rows = priors(measured.contributions(measured.probed[0]), measured.evaluation.fires_above)
    return {**columns, **rows}


COLUMNS = {
    f"prior_{name}": Column(
        f"held-out log-likelihood of activations where latents fire under {name.replace('_', ' ')} fits, nats each",
        since=7,
    )
    for name in FAMILIES
}

register(
    Metric(
        name="priors",
        description="which prior activations follow where they fire",
        settings={
            "priors": Setting(False, "true: also find which penalty's prior the activations of each latent follow best")
        },
        columns=COLUMNS,
        measure=measure,
        of_latents=("prior", "prior_penalty"),
    )
)
