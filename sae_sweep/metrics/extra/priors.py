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

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betaln, gammaln, log_ndtr
from torch import Tensor

# Fitted are latents that fire on so many of the inputs, on at most so many of those, and whose activations vary by so
# much of their mean there: a constant has no density.
FEWEST, MOST, VARY = 100, 2_000, 0.01

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Family:
    """A family of densities: log p(a) of activations [n] at a scale of about 1, for free parameters θ [.] in ℝ.

    `start`: θ from which the fit begins, one fit from each; `penalty`: what θ and the unit of scale imply.
    """

    log_density: Callable[[Floats, Floats], Floats]
    start: Sequence[Sequence[float]]
    penalty: Callable[[Floats, float], str]


def _exponential(a: Floats, theta: Floats) -> Floats:
    return -theta[0] - a * np.exp(-theta[0])


def _half_cauchy(a: Floats, theta: Floats) -> Floats:
    return math.log(2 / math.pi) - theta[0] - np.log1p((a * np.exp(-theta[0])) ** 2)


def _student_t(a: Floats, theta: Floats) -> Floats:
    nu = np.exp(theta[1])
    # Not by a difference of log Γ, which is all rounding where ν is large: activations more even than a half-normal.
    constant = math.log(2) - betaln(nu / 2, 0.5) - 0.5 * np.log(nu) - theta[0]
    return constant - (nu + 1) / 2 * np.log1p((a * np.exp(-theta[0])) ** 2 / nu)


def _lomax(a: Floats, theta: Floats) -> Floats:
    return theta[1] - theta[0] - (np.exp(theta[1]) + 1) * np.log1p(a * np.exp(-theta[0]))


def _exponential_power(a: Floats, theta: Floats) -> Floats:
    p = np.exp(theta[1])
    return theta[1] - theta[0] - gammaln(1 / p) - (a * np.exp(-theta[0])) ** p


def _spike_and_slab(a: Floats, theta: Floats) -> Floats:
    spike_share, scale, mean, spread = -np.logaddexp(0, -theta[0]), theta[1], np.exp(theta[2]), np.exp(theta[3])
    spike = spike_share - scale - a * np.exp(-scale)
    slab_share = -np.logaddexp(0, theta[0])
    gauss = -0.5 * ((a - mean) / spread) ** 2 - np.log(spread) - 0.5 * math.log(2 * math.pi)
    return np.logaddexp(spike, slab_share + gauss - log_ndtr(mean / spread))


FAMILIES: dict[str, Family] = {
    "exponential": Family(_exponential, [[0.0]], lambda theta, unit: "l1"),
    "half_cauchy": Family(_half_cauchy, [[-0.5]], lambda theta, unit: f"log1p_sq scale={unit * np.exp(theta[0]):.2g}"),
    "student_t": Family(
        _student_t,
        [[0.0, 1.0]],
        lambda theta, unit: f"log1p_sq scale={unit * np.exp(theta[0] + theta[1] / 2):.2g}",
    ),
    "lomax": Family(_lomax, [[1.0, 1.0]], lambda theta, unit: f"log1p scale={unit * np.exp(theta[0]):.2g}"),
    "exponential_power": Family(_exponential_power, [[0.0, 0.0]], lambda theta, unit: f"lp p={np.exp(theta[1]):.2g}"),
    "spike_and_slab": Family(
        _spike_and_slab,
        [[-2.0, -3.0, 0.0, -1.5], [0.0, -1.0, 0.5, -0.5]],
        lambda theta, unit: f"tanh scale={unit * np.exp(theta[1]):.2g}",
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
        minimize(
            lambda theta: -np.mean(family.log_density(train, theta)),
            np.array(start),
            method="Nelder-Mead",
            options={"maxiter": 400, "xatol": 1e-3, "fatol": 1e-6},
        )
        for start in family.start
    ]
    best = min(ends, key=lambda end: float(end.fun)).x
    return Fit(best, float(np.mean(family.log_density(test, best))))


def priors(norms: Tensor, fires_above: float) -> tuple[dict[str, float | None], pd.DataFrame]:
    """Columns `prior_<family>`: held-out log-likelihood in nats an activation, mean over activations of all latents.

    norms: contributions a‖d‖ [n, width]. The activations of a latent are put in units of their mean before they are
    fitted and scored, so that numbers compare between SAEs. Also a row per latent: `prior`, its best family, and
    `prior_penalty`, what that implies; null for latents that are not fitted.
    """
    scores: dict[str, list[float]] = {name: [] for name in FAMILIES}
    counts: list[int] = []
    rows: list[tuple[str | None, str | None]] = []
    for codes in norms.T.double().cpu().numpy():
        active = codes[codes > fires_above][:MOST]
        if len(active) < FEWEST or active.std() < VARY * active.mean():
            rows.append((None, None))
            continue
        unit = float(active.mean())
        fits = {name: fit(family, active[::2] / unit, active[1::2] / unit) for name, family in FAMILIES.items()}
        best = max(fits, key=lambda name: fits[name].held_out)
        rows.append((best, FAMILIES[best].penalty(fits[best].theta, unit)))
        counts.append(len(active[1::2]))
        for name, found in fits.items():
            scores[name].append(found.held_out)
    columns = {
        f"prior_{name}": float(np.average(values, weights=counts)) if values else None
        for name, values in scores.items()
    }
    return columns, pd.DataFrame(rows, columns=["prior", "prior_penalty"], dtype="string")
