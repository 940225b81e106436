"""Penalties: each formula against numbers worked out by hand, its compiled slopes against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae_sweep.saes.kernels.slopes import compile_slopes
from sae_sweep.saes.penalties import EPSILON, FORMULAS, PRODUCT_CAP, penalty_value
from sae_sweep.schema import PENALTY_KEYS

EPS = float(EPSILON)
BY_HAND = {  # of contributions (1, 2, 0) at scale 2 and p 0.3
    "none": 0.0,
    "l1": 3.0,
    "lp": (1 + EPS) ** 0.3 + (2 + EPS) ** 0.3 - 2 * EPS**0.3,
    "sqrt": math.sqrt(1 + EPS) + math.sqrt(2 + EPS) - 2 * math.sqrt(EPS),
    "log1p": math.log(1.5) + math.log(2),
    "log1p_sq": math.log(1.25) + math.log(2),
    "tanh": math.tanh(0.5) + math.tanh(1),
    "prod1p": 1.5 * 2 - 1,
    "pair": 2.0,
}


def test_every_penalty_is_covered() -> None:
    assert set(FORMULAS) == set(PENALTY_KEYS) == set(BY_HAND)


@pytest.mark.parametrize("name", FORMULAS)
def test_value_by_hand(name: str) -> None:
    value = penalty_value(name, torch.tensor([[1.0, 2.0, 0.0]]), 2.0, 0.3)
    assert value.tolist() == pytest.approx([BY_HAND[name]], rel=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_nothing_fires_nothing_costs(name: str) -> None:
    # (0 + ε)^p is rounded to float32, ε^p is not.
    assert penalty_value(name, torch.zeros(2, 5), 0.7, 0.3).tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("name", FORMULAS)
def test_compiled_slopes_are_the_gradient(name: str) -> None:
    rng = np.random.default_rng(0)
    codes = np.maximum(rng.normal(size=(7, 12)), 0).astype(np.float32) * 2
    codes[3] = 0  # an input on which nothing fires
    leaf = torch.tensor(codes, requires_grad=True)
    value = penalty_value(name, leaf, 0.7, 0.3).sum()
    expected = torch.autograd.grad(value, leaf)[0] * (leaf > 0)

    sparse = [row[row > 0] for row in codes]
    bounds = np.cumsum([0, *map(len, sparse)])
    slopes = np.empty(bounds[-1], np.float32)
    total = compile_slopes(name)(np.concatenate(sparse), bounds, 0.7, 0.3, slopes)
    assert total == pytest.approx(value.item(), rel=1e-5)
    np.testing.assert_allclose(slopes, expected.numpy()[codes > 0], rtol=2e-5, atol=1e-6)

    dense = np.empty(codes.size, np.float32)
    compile_slopes(name)(codes.ravel(), np.arange(0, codes.size + 1, 12), 0.7, 0.3, dense)
    np.testing.assert_array_equal(dense[codes.ravel() > 0], slopes)
    assert not dense[codes.ravel() == 0].any()


@pytest.mark.parametrize(
    ("name", "at_one", "at_ten"),
    [("l1", 0.707, 0.707), ("log1p", 0.636, 0.567), ("log1p_sq", 0.792, 0.575), ("prod1p", 0.471, 0.118)],
)
def test_incentive_to_compose(name: str, at_one: float, at_ten: float) -> None:
    """The cost of one latent at a√2 over two orthonormal ones at a: the table of priors in the literature notes."""
    for size, expected in ((1.0, at_one), (10.0, at_ten)):
        one = penalty_value(name, torch.tensor([size * 2**0.5, 0.0]))
        two = penalty_value(name, torch.tensor([size, size]))
        assert float(one / two) == pytest.approx(expected, abs=1.5e-3)


def test_prod1p_goes_on_linearly_where_it_would_overflow() -> None:
    dense = torch.full((1, 400), 5.0, requires_grad=True)
    value = penalty_value("prod1p", dense)
    (slope,) = torch.autograd.grad(value.sum(), dense)
    exponent = 400 * math.log(6)
    assert value.item() == pytest.approx(math.exp(PRODUCT_CAP) * (1 + exponent - PRODUCT_CAP) - 1, rel=1e-5)
    assert slope.tolist()[0] == pytest.approx([math.exp(PRODUCT_CAP) / 6] * 400, rel=1e-5)


def test_slopes_at_zero() -> None:
    at_zero = {name: formula.slope_at_zero for name, formula in FORMULAS.items()}
    assert (at_zero["l1"], at_zero["log1p_sq"], at_zero["pair"]) == (1, 0, 0)
    assert str(at_zero["log1p"]) == str(at_zero["tanh"]) == str(at_zero["prod1p"]) == "1/s"
    assert str(at_zero["sqrt"]) == "1/(2*sqrt(ε))"
