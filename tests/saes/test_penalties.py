"""Penalties: each formula against numbers worked out by hand, its compiled slopes against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae_sweep.kernels.cpu.penalty_gradients import compile_slopes
from sae_sweep.registry import kinds
from sae_sweep.saes.formula import EPSILON, Formula, parse
from sae_sweep.saes.penalties import PRODUCT_CAP, formula_of, log_shares, penalty_value

FORMULAS = kinds("penalty")

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
    "lp_annealed": (1 + EPS) ** 0.3 + (2 + EPS) ** 0.3 - 2 * EPS**0.3,
    "hoyer": 9 / (5 + EPS),
    "mcp": (1 - 1 / 4) + 1,
    "l0": 2.0,
    "exclusive": 1 / 0.2 + 2 / 2,
    "exclusive_pi": 1 / 0.2 + 2 / 2,  # without shares: −log π is left out
    "formula": 1 / 3 + 2 / 4,
}


# Formulas as a user may type them, with what no penalty of the package has: settings in `outer`, cases in cases.
OWN = {
    name: parse(*texts)
    for name, texts in {
        "saturating": ("a/(a + s)", None),
        "cases": ("where(a <= s/2, a, where(a <= 2*s, s/2 + (a - s/2)/3, s))", None),
        "cases in sums": ("tanh(a)*min(a, s) + atan(a*p) + erf(a)", None),
        "outer of settings": ("(a+ε)^p - ε^p + a", "exp(min(T, 2*s)/s) - 1 + T"),
        "flat first": ("where(a <= 1, 0, a - 1)", "T + sum(a^2)*p"),
        "largest": ("a", "T/s + tanh(max(a*p))"),
    }.items()
}
ALL = [*FORMULAS, *OWN]
# One of each way in which formulas are compiled, which takes each most of a second.
EACH_WAY = ("l1", "lp", "prod1p", "exclusive", "exclusive_pi", "cases", "outer of settings", "largest")
AT_ZERO = [pytest.param(name, marks=() if name in EACH_WAY else pytest.mark.slow) for name in ALL]


def formula_named(name: str) -> Formula:
    return OWN[name] if name in OWN else formula_of(name)


def compiled(name: str, lists: list[np.ndarray], width: int, at_zero: bool = False) -> tuple[float, np.ndarray]:
    """Value and slopes of the entries of some inputs, latents × (latent, contribution); shares fall with the latent."""
    entries = np.concatenate(lists)
    latents = np.stack([np.zeros(len(entries)), entries[:, 0]], axis=1).astype(np.int32)
    bounds, out = np.cumsum([0, *map(len, lists)]), np.empty(len(entries), np.float32)
    v = np.ascontiguousarray(entries[:, 1], np.float32)
    value = compile_slopes(formula_named(name), at_zero)(v, latents, bounds, shares_of(width).numpy(), 0.7, 0.3, out)
    return value, out


def shares_of(width: int) -> torch.Tensor:
    shares = torch.arange(width, 0, -1).float()
    return (shares / shares.sum()).log()


def listed(codes: np.ndarray, above: float) -> list[np.ndarray]:
    return [np.stack([np.flatnonzero(row > above), row[row > above]], axis=1) for row in codes]


def test_every_penalty_is_covered() -> None:
    assert set(FORMULAS) == set(BY_HAND)


@pytest.mark.parametrize("name", FORMULAS)
def test_value_by_hand(name: str) -> None:
    value = penalty_value(name, torch.tensor([[1.0, 2.0, 0.0]]), 2.0, 0.3)
    assert value.tolist() == pytest.approx([BY_HAND[name]], rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_nothing_fires_nothing_costs(name: str) -> None:
    # (0 + ε)^p is rounded to float32, ε^p is not.
    assert penalty_value(formula_named(name), torch.zeros(2, 5), 0.7, 0.3).tolist() == pytest.approx(
        [0.0, 0.0], abs=1e-6
    )


@pytest.mark.parametrize("name", ALL)
def test_compiled_slopes_are_the_gradient(name: str) -> None:
    rng = np.random.default_rng(0)
    codes = np.maximum(rng.normal(size=(7, 12)), 0).astype(np.float32) * 2
    codes[3] = 0  # an input on which nothing fires
    leaf = torch.tensor(codes, requires_grad=True)
    value = penalty_value(formula_named(name), leaf, 0.7, 0.3, shares_of(12)).sum()
    expected = torch.autograd.grad(value, leaf)[0] * (leaf > 0)

    total, slopes = compiled(name, listed(codes, 0), 12)
    assert total == pytest.approx(value.item(), rel=1e-5)
    np.testing.assert_allclose(slopes, expected.numpy()[codes > 0], rtol=2e-5, atol=1e-6)

    _, dense = compiled(name, listed(codes, -1), 12)
    np.testing.assert_array_equal(dense[codes.ravel() > 0], slopes)
    assert not dense[codes.ravel() == 0].any()


@pytest.mark.parametrize("name", AT_ZERO)
@pytest.mark.parametrize("silent", [[0, 2, 4], [1, 3, 5]])
def test_compiled_slopes_at_zero_are_the_gradient_too(name: str, silent: list[int]) -> None:
    """What JumpReLU has near a threshold: contributions of 0 that are about to be some, on an input of none as well."""
    codes = np.random.default_rng(1).exponential(2, (5, 6)).astype(np.float32)
    codes[:, silent] = 0
    codes[2] = 0
    codes[1, 1 - silent[0]] = 5e-4  # too little to outdo the one of largest share
    leaf = torch.tensor(codes, requires_grad=True)
    value = penalty_value(formula_named(name), leaf, 0.7, 0.3, shares_of(6)).sum()
    (expected,) = torch.autograd.grad(value, leaf)
    # Not all that is silent is listed.
    lists = [each[each[:, 0] != silent[1]] for each in listed(codes, -1)]
    total, slopes = compiled(name, lists, 6, at_zero=True)
    assert total == pytest.approx(value.item(), rel=1e-5)
    kept = np.concatenate([row[each[:, 0].astype(int)] for row, each in zip(expected.numpy(), lists, strict=True)])
    np.testing.assert_allclose(slopes, kept, rtol=2e-5, atol=1e-6)


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
    expected = {"l1": "1", "log1p_sq": "0", "pair": "0", "mcp": "1", "hoyer": "0", "sqrt": "1/(2*sqrt(ε))"}
    expected |= dict.fromkeys(("log1p", "tanh", "prod1p", "exclusive", "exclusive_pi"), "1/s")
    assert {name: formula_of(name).slope_at_zero for name in expected} == expected


def test_hoyer_counts_equal_activations_and_ignores_their_scale() -> None:
    equal = torch.tensor([[3.0, 3.0, 3.0, 0.0], [3e-1, 3e-1, 3e-1, 0.0]])
    assert penalty_value("hoyer", equal).tolist() == pytest.approx([3, 3], rel=0.01)


def test_mcp_is_flat_beyond_its_scale_and_smooth_there() -> None:
    leaf = torch.tensor([[0.0], [1.0], [1.9999], [2.0001], [50.0]], requires_grad=True)
    value = penalty_value("mcp", leaf, 2.0)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    assert value.tolist() == pytest.approx([0, 0.75, 1, 1, 1], abs=1e-6)
    assert slope.flatten().tolist() == pytest.approx([1, 0.5, 0, 0, 0], abs=1e-4)


@pytest.mark.parametrize("shares", [[0.25, 0.25, 0.25, 0.25], [0.01, 0.89, 0.05, 0.05]])
def test_exclusive_is_the_best_single_winner(shares: list[float]) -> None:
    """Against brute force: minus the log of the mixture's largest component, up to the norms of its exponentials."""
    codes = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) * 3 * (torch.rand(50, 4) > 0.3)
    scale, rest = 1.5, 0.15
    pi = torch.tensor(shares)
    costs = [codes.sum(1) / rest - codes[:, j] / rest + codes[:, j] / scale - pi[j].log() for j in range(4)]
    value = penalty_value("exclusive_pi", codes, scale, log_shares=pi.log())
    torch.testing.assert_close(value, torch.stack(costs).amin(0), rtol=1e-5, atol=1e-5)
    same = torch.full_like(pi, 0.25).log()
    alike = penalty_value("exclusive_pi", codes, scale, log_shares=same) - math.log(4)
    torch.testing.assert_close(penalty_value("exclusive", codes, scale), alike, rtol=1e-5, atol=1e-5)


def test_a_rare_latent_has_to_fire_strongly_to_win() -> None:
    often, rarely = math.log(0.9), math.log(0.1)

    def slopes(codes: list[float]) -> list[float]:
        leaf = torch.tensor([codes], requires_grad=True)
        value = penalty_value("exclusive_pi", leaf, 1.0, log_shares=torch.tensor([often, rarely]))
        return torch.autograd.grad(value.sum(), leaf)[0][0].tolist()

    # 9·a has to exceed log 0.9 − log 0.1 = 2.2: below, the latent pays what a loser pays and is pushed off.
    assert slopes([0.0, 0.2]) == pytest.approx([1, 10])
    assert slopes([0.0, 0.3]) == pytest.approx([10, 1])


def test_shares_are_counts_of_wins_and_one() -> None:
    codes = torch.tensor([[[1.0, 2, 0, 0], [0, 1, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(log_shares(codes).exp(), torch.tensor([[2.0, 3, 1, 1]]) / 7)
