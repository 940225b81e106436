"""Priors: densities that integrate to one, and samples of each family that are told from the others."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.integrate import quad

from sae_sweep.metrics.extra import priors as module
from sae_sweep.metrics.extra.priors import FAMILIES, fit, identified, priors

RNG = np.random.default_rng(0)
THETA = {
    "exponential": [0.3],
    "half_cauchy": [-0.4],
    "student_t": [0.2, 1.1],
    "lomax": [0.5, 0.9],
    "exponential_power": [0.1, -0.6],
    "spike_and_slab": [-0.5, -2.0, 0.4, -1.0],
}


def samples(name: str, n: int = 4_000) -> np.ndarray:
    """Draws that only the named family is right for."""
    rng = np.random.default_rng(1)
    spike = rng.random(n) < 0.4
    drawn = {
        "exponential": rng.exponential(2.0, n),
        "half_cauchy": np.abs(rng.standard_cauchy(n)),
        "student_t": np.abs(rng.standard_t(5, n)),
        "lomax": rng.pareto(3, n) * 2,
        "exponential_power": stats.gennorm.rvs(3.0, size=n, random_state=rng).__abs__(),
        "spike_and_slab": np.where(spike, rng.exponential(0.05, n), rng.normal(3, 0.4, n)),
    }
    return np.asarray(drawn[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_densities_integrate_to_one(name: str) -> None:
    theta = np.array(THETA[name])
    total = quad(lambda a: math.exp(FAMILIES[name].log_density(np.array([a]), theta)[0]), 0, np.inf, limit=300)[0]
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("log_nu", [20.0, 37.0, 60.0])
def test_student_t_of_many_degrees_of_freedom_is_a_half_normal(log_nu: float) -> None:
    a = np.array([0.1, 1.0, 3.0])
    found = FAMILIES["student_t"].log_density(a, np.array([0.2, log_nu]))
    assert found == pytest.approx(stats.halfnorm.logpdf(a, scale=math.exp(0.2)), abs=1e-6)


def test_densities_are_those_of_scipy() -> None:
    a = np.linspace(0.01, 5, 20)
    scale = math.exp(0.3)
    expected = {
        "exponential": stats.expon.logpdf(a, scale=scale),
        "half_cauchy": stats.halfcauchy.logpdf(a, scale=scale),
        "student_t": math.log(2) + stats.t.logpdf(a, math.exp(1.1), scale=scale),
        "lomax": stats.lomax.logpdf(a, math.exp(1.1), scale=scale),
        "exponential_power": math.log(2) + stats.gennorm.logpdf(a, math.exp(1.1), scale=scale),
    }
    for name, values in expected.items():
        theta = np.array([0.3, 1.1])[: len(THETA[name])]
        assert FAMILIES[name].log_density(a, theta) == pytest.approx(values)
    # Of the slab a third is cut off below 0.
    mean, spread = math.exp(-0.5), math.exp(0.4)
    slab = stats.truncnorm.pdf(a, -mean / spread, np.inf, mean, spread)
    spike = 1 / (1 + math.exp(0.7))
    mixture = spike * stats.expon.pdf(a, scale=math.exp(-1.2)) + (1 - spike) * slab
    found = FAMILIES["spike_and_slab"].log_density(a, np.array([-0.7, -1.2, -0.5, 0.4]))
    assert found == pytest.approx(np.log(mixture))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_right_family_is_found(name: str) -> None:
    drawn = samples(name) / samples(name).mean()
    scores = {other: fit(family, drawn[::2], drawn[1::2]).held_out for other, family in FAMILIES.items()}
    # The exponential is a case of two others, and half-Cauchy one of Student-t: they can only tie.
    assert scores[name] > max(scores.values()) - 0.003
    others = {"exponential": ["half_cauchy"], "half_cauchy": ["exponential", "exponential_power"]}
    for other in others.get(name, ["exponential"]):
        assert scores[name] > scores[other] + 0.005


def test_parameters_are_recovered() -> None:
    drawn = samples("exponential_power", 20_000)
    assert math.exp(fit(FAMILIES["exponential_power"], drawn, drawn).theta[1]) == pytest.approx(3, rel=0.05)
    drawn = samples("lomax", 20_000)
    scale, shape = np.exp(fit(FAMILIES["lomax"], drawn, drawn).theta)
    assert (scale, shape) == (pytest.approx(2, rel=0.15), pytest.approx(3, rel=0.15))


@pytest.mark.parametrize("name", FAMILIES)
def test_enough_activations_say_what_the_penalty_is(name: str) -> None:
    drawn = samples(name) / samples(name).mean()
    assert identified(FAMILIES[name], fit(FAMILIES[name], drawn, drawn).theta, drawn)


@pytest.mark.filterwarnings("error")
def test_a_fit_that_says_nothing_names_no_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even activations have no exponent but infinity, exponential ones no scale of a Lomax, normal ones no spike."""
    rng = np.random.default_rng(0)
    even, exponential, normal = rng.random(2_000) * 2, rng.exponential(1.0, 2_000), rng.normal(1, 0.1, 2_000)
    for name, a in (("exponential_power", even), ("lomax", exponential), ("spike_and_slab", normal)):
        theta = fit(FAMILIES[name], a, a).theta
        assert not identified(FAMILIES[name], theta, a), (name, theta)
    assert not identified(FAMILIES["exponential_power"], np.array([0.7, 34.0]), even)
    assert not identified(FAMILIES["spike_and_slab"], np.array([-30.0, 24.0, 0.0, -2.3]), normal)
    monkeypatch.setattr(module, "FAMILIES", {"exponential_power": FAMILIES["exponential_power"]})
    _, latents = priors(torch.from_numpy(np.stack([even, exponential], 1)), 0.01)
    assert latents["prior"].tolist() == ["exponential_power"] * 2
    assert latents["prior_penalty"].isna().tolist() == [True, False]


def test_columns_and_latents() -> None:
    norms = torch.zeros(3_000, 4)
    norms[:2_000, 0] = torch.from_numpy(samples("exponential", 2_000))
    norms[1_000:, 1] = torch.from_numpy(samples("spike_and_slab", 2_000))
    # Too rarely active, and always the same.
    norms[:50, 2], norms[:, 3] = torch.rand(50), 0.7
    columns, latents = priors(norms, 0.01)
    assert sorted(columns) == sorted(f"prior_{name}" for name in FAMILIES)
    assert latents["prior"].isna().tolist() == [False, False, True, True]
    assert latents["prior"][1] == "spike_and_slab" and latents["prior_penalty"][1].startswith("tanh")
    values = {name: value for name, value in columns.items() if value is not None}
    assert max(values, key=values.__getitem__) == "prior_spike_and_slab"
    # The scale of a latent does not matter.
    again, _ = priors(norms * 7, 0.07)
    assert again == pytest.approx(columns, abs=1e-6)
    assert set(priors(norms[:, 2:], 0.01)[0].values()) == {None}


def test_every_activation_counts_alike_and_only_so_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two latents, of 100 and of 400 activations; one activation less is too few, and more than MOST are cut off."""
    monkeypatch.setattr(module, "MOST", 400)
    monkeypatch.setattr(module, "FAMILIES", {"exponential": FAMILIES["exponential"]})
    drawn = RNG.exponential(2.0, 1_000)
    norms = torch.zeros(1_000, 3, dtype=torch.float64)
    norms[:100, 0], norms[:, 1], norms[:99, 2] = torch.from_numpy(drawn[:100]), torch.from_numpy(drawn), 1
    norms[:99, 2] += torch.arange(99)
    columns, latents = priors(norms, 0.0)
    assert latents["prior"].tolist() == ["exponential", "exponential", pd.NA]
    assert latents.dtypes.astype(str).tolist() == ["string", "string"]
    scores = []
    for active in (drawn[:100], drawn[:400]):
        unit = active / active.mean()
        scale = unit[::2].mean()
        scores.append(-math.log(scale) - unit[1::2].mean() / scale)
    assert columns["prior_exponential"] == pytest.approx((scores[0] * 50 + scores[1] * 200) / 250, abs=1e-5)
