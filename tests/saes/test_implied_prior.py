"""Priors by numeric integration against closed forms: normalisation, its border, means, tails, joint densities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import beta, exp1, gamma

from sae_sweep.saes.formula import parse
from sae_sweep.saes.implied_prior import Estimate, ImpliedPrior, joint


def assert_estimates(found: Estimate | None, exact: float) -> None:
    """Right to eight digits, and within the error that is stated, give or take the last bits."""
    assert found is not None
    assert found.value == pytest.approx(exact, rel=1e-8)
    assert abs(found.value - exact) <= found.error + 1e-14 * exact


@pytest.mark.parametrize("rate", [0.03, 1.0, 40.0])
def test_l1_is_exponential(rate: float) -> None:
    prior = ImpliedPrior(parse("a")).at(rate)
    assert_estimates(prior.normaliser, 1 / rate)
    assert_estimates(prior.mean, 1 / rate)


@pytest.mark.parametrize("p", [0.3, 0.5, 2.0])
@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_lp_is_exponential_power(p: float, rate: float) -> None:
    prior = ImpliedPrior(parse("a^p"), p=p).at(rate)
    z = gamma(1 / p) / (p * rate ** (1 / p))
    assert_estimates(prior.normaliser, z)
    assert_estimates(prior.mean, gamma(2 / p) / (p * rate ** (2 / p)) / z)


@pytest.mark.parametrize("scale", [0.5, 1.0, 7.0])
def test_log1p_is_lomax_above_one(scale: float) -> None:
    reading = ImpliedPrior(parse("log(1 + a/s)"), scale)
    assert reading.proper_above == pytest.approx(1)
    for rate in (0.5, 1.0):
        assert not reading.at(rate).proper
    for rate in (1.05, 1.5, 2.0):
        prior = reading.at(rate)
        assert_estimates(prior.normaliser, scale / (rate - 1))
        assert prior.mean is not None and prior.mean.value == math.inf
    assert_estimates(reading.at(3.5).normaliser, scale / 2.5)
    assert_estimates(reading.at(3.5).mean, scale / 1.5)


def test_near_the_border_the_stated_error_grows_with_the_true_one() -> None:
    found = ImpliedPrior(parse("log(1 + a)")).at(1.001).normaliser
    assert found is not None and abs(found.value - 1000) <= found.error < 0.01


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_log1p_sq_is_student_t_above_a_half(scale: float) -> None:
    reading = ImpliedPrior(parse("log(1 + a^2/s^2)"), scale)
    assert reading.proper_above == pytest.approx(0.5)
    assert not reading.at(0.5).proper
    for rate in (0.75, 1.0, 2.5):  # ν = 2λ - 1; at λ = 1 half a Cauchy, whose Z is πs/2
        assert_estimates(reading.at(rate).normaliser, scale * beta(rate - 0.5, 0.5) / 2)
    mean = reading.at(2.5).mean
    assert_estimates(mean, scale**2 / (2 * 1.5) / (scale * beta(2, 0.5) / 2))
    assert reading.at(1.0).mean == Estimate(math.inf, 0.0)


@pytest.mark.parametrize(
    "text",
    ["tanh(a/s)", "a/(a + s)", "where(a <= s, a - a^2/(2*s), s/2)", "where(a <= ε, 0, 1)", "log(1 + log(1 + a))"],
)
def test_flat_tails_are_improper_for_every_coefficient(text: str) -> None:
    reading = ImpliedPrior(parse(text), scale=2.0)
    assert reading.proper_above == math.inf and reading.tail.limit == 0
    assert not reading.at(1e6).proper


@pytest.mark.parametrize(("text", "growth"), [("a", 1.0), ("(a+ε)^p - ε^p", 0.5), ("a^2", 2.0), ("log(1+a)^2", 0.04)])
def test_tails_that_outgrow_every_power_are_proper_for_every_coefficient(text: str, growth: float) -> None:
    reading = ImpliedPrior(parse(text), p=0.5)
    assert reading.proper_above == 0
    assert reading.tail.growth == pytest.approx(growth, abs=0.01)


def test_a_kink_is_integrated_from_both_sides() -> None:
    # e^-3 at 1 and flat to 2, then down at once: 1/3·(1 - e^-3) + e^-3 + e^-3/300.
    found = ImpliedPrior(parse("where(a <= 1, a, where(a <= 2, 1, 100*a - 199))")).at(3.0).normaliser
    assert_estimates(found, (1 - math.exp(-3)) / 3 + math.exp(-3) + math.exp(-3) / 300)


def test_density_integrates_to_one_and_falls_from_its_value_at_zero() -> None:
    reading = ImpliedPrior(parse("log(1 + a/s)"), scale=2.0)
    assert reading.density(np.array(0.0), 3.0) == pytest.approx(1.0)
    assert quad(lambda a: float(reading.density(np.array(a), 3.0)), 0, np.inf)[0] == pytest.approx(1)
    slope = (reading.density(np.array(1e-6), 3.0) - 1) / 1e-6
    assert slope == pytest.approx(-3.0 * reading.slope_at_zero, rel=1e-4) and reading.slope_at_zero == 0.5


PRODUCT = parse("log(1 + a/s)", "where(T <= 8, exp(T) - 1, exp(8)*(T - 7) - 1)")
PAIR = parse("a", "(T^2 - sum(a^2))/2")
EXCLUSIVE = parse("a", "(T - max(a))/(s/10) + max(a)/s")


def test_the_product_makes_a_latent_exponential_given_the_rest() -> None:
    for beside in ((), (1.0,), (0.5, 2.0)):
        prior = ImpliedPrior(PRODUCT, beside=beside).at(1.5)
        assert_estimates(prior.mean, 1 / (1.5 * math.prod(1 + b for b in beside)))


@pytest.mark.parametrize("rate", [0.5, 1.0, 3.0])
def test_the_product_is_proper_jointly(rate: float) -> None:
    # ∫∫ exp(-λ(xy - 1)) over x, y ≥ 1
    found = joint(PRODUCT, 1.0, 1.0, rate, 2).normaliser
    assert found is not None and found.value == pytest.approx(math.exp(rate) * exp1(rate) / rate, rel=1e-6)
    assert joint(PRODUCT, 1.0, 1.0, rate, 3).normaliser is not None


def test_pair_is_improper_for_one_and_two_latents_and_proper_from_three_on() -> None:
    assert not ImpliedPrior(PAIR).at(1.0).proper
    assert joint(PAIR, 1.0, 1.0, 1.0, 2).normaliser is None
    found = joint(PAIR, 1.0, 1.0, 1.0, 3).normaliser
    exact = math.pi**1.5 / 2
    assert found is not None and abs(found.value - exact) < found.error < 1e-5
    # Beside another of activation b a latent is exponential with rate λ·b.
    assert_estimates(ImpliedPrior(PAIR, beside=(2.0,)).at(0.3).mean, 1 / 0.6)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_exclusive_is_proper_and_a_loser_is_ten_times_as_dear(scale: float) -> None:
    # Twice the half where the first is larger: ∫ e^(-10b/s) ∫_b^∞ e^(-a/s) da db = s²/11.
    found = joint(EXCLUSIVE, scale, 1.0, 1.0, 2).normaliser
    assert found is not None and abs(found.value - scale**2 * 2 / 11) < found.error < 0.01 * scale**2
    assert ImpliedPrior(EXCLUSIVE, beside=(1.0,)).slope_at_zero == pytest.approx(10)


def test_a_ratio_is_improper_however_many_latents() -> None:
    hoyer = parse("a", "T^2/(sum(a^2) + ε)")
    assert ImpliedPrior(hoyer).proper_above == math.inf
    assert joint(hoyer, 1.0, 1.0, 1.0, 2).normaliser is None
