"""The best codes for a dictionary: against every choice of latents, closed forms, and SAEs whose encoders are blunt."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from planted import LookUp
from scipy.optimize import nnls
from test_planted_saes import inputs_of, perfect

from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.extra.inference import COLUMNS, Objective, best_codes, descend, pursuit
from sae_sweep.registry import kinds
from sae_sweep.saes.penalties import penalty_value

EVALUATION = Evaluation(inference=True, permutations=2)


def problem(width: int = 8, d: int = 5, inputs: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(inputs, d, generator=generator), torch.randn(width, d, generator=generator)


def objective(name: str, coefficient: float) -> Objective:
    return Objective(lambda a: penalty_value(name, a, 1.0, 0.5), coefficient, hard=name == "l0")


def value(x: torch.Tensor, z: torch.Tensor, W: torch.Tensor, of: Objective) -> torch.Tensor:
    return (x - z @ W).square().sum(1) + of.coefficient * of.penalty_value(z * W.norm(dim=1))


def test_without_a_penalty_it_is_non_negative_least_squares() -> None:
    x, W = problem()
    found = descend(x, torch.zeros(12, 8), W, objective("l1", 0.0))
    for each, row in zip(x, found, strict=True):
        assert float((each - row @ W).norm()) == pytest.approx(nnls(W.T.numpy(), each.numpy())[1], abs=1e-3)


def test_of_l1_every_start_ends_alike_and_at_the_optimum() -> None:
    """The optimum of a convex objective: each code is 0 with a slope of at least 0 there, or has none."""
    x, W = problem()
    of = objective("l1", 0.7)
    ends = [descend(x, start, W, of) for start in (torch.zeros(12, 8), torch.rand(12, 8) * 3)]
    assert value(x, ends[0], W, of) == pytest.approx(value(x, ends[1], W, of), rel=1e-4)
    slope = 2 * (ends[0] @ W - x) @ W.T + 0.7 * W.norm(dim=1)
    assert (slope > -0.02).all()
    assert (slope.abs()[ends[0] > 0] < 0.02).all()


def test_with_orthonormal_rows_l1_is_a_soft_threshold() -> None:
    x, _ = problem(d=6)
    found = descend(x, torch.zeros(12, 6), torch.eye(6), objective("l1", 0.5))
    torch.testing.assert_close(found, (x - 0.25).clamp_min(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pursuit_against_every_choice_of_k_latents(k: int) -> None:
    """One latent: the best there is. More: never better than the best, and no worse than fewer."""
    x, W = problem()
    found = (x - pursuit(x, W, k) @ W).norm(dim=1)
    best = [
        min(nnls(W[list(chosen)].T.numpy(), each.numpy())[1] for chosen in itertools.combinations(range(8), k))
        for each in x
    ]
    assert (pursuit(x, W, k) > 0).sum(1).max() <= k
    if k == 1:
        assert found.tolist() == pytest.approx(best, abs=1e-5)
    else:
        assert (found.numpy() >= np.array(best) - 1e-4).all()
        assert (found <= (x - pursuit(x, W, k - 1) @ W).norm(dim=1) + 1e-5).all()


@pytest.mark.parametrize("name", kinds("penalty"))
def test_no_penalty_ends_above_the_codes_that_there_were(name: str) -> None:
    x, W = problem()
    own = torch.rand(12, 8, generator=torch.Generator().manual_seed(1)) * (torch.rand(12, 8) < 0.3)
    of = objective(name, 0.3)
    found = best_codes(x, own, W, torch.zeros(5), of)
    assert (found >= 0).all()
    assert (value(x, found, W, of) <= value(x, own, W, of) + 1e-5).all()
    assert value(x, found, W, of).sum() < value(x, own, W, of).sum() - 1


@pytest.mark.parametrize("k", [1, 2])
def test_of_an_sae_that_counts_no_code_has_more_latents(k: int) -> None:
    x, W = problem()
    own = torch.rand(12, 8)
    of = Objective(lambda a: a.sum(1), 0.0, k=k)
    found = best_codes(x, own, W, torch.zeros(5), of)
    assert (found > 0).sum(1).max() <= k
    own = own * (own >= own.topk(k, dim=1).values[:, -1:])
    found = best_codes(x, own, W, torch.zeros(5), of)
    assert ((x - found @ W).norm(dim=1) <= (x - own @ W).norm(dim=1) + 1e-5).all()


def test_codes_are_as_good_however_long_rows_are() -> None:
    inputs, of = inputs_of(4, 2), Objective(lambda a: a.sum(1), 0.3)
    sae = perfect(inputs, "mq")
    scale = 10.0 ** torch.linspace(-3, 3, len(sae.W_dec))
    long = LookUp(sae.x, sae.codes / scale, sae.W_dec * scale[:, None], sae.b_dec)
    found, scaled = (measure(each, inputs, of.penalty_value, EVALUATION, objective=of).metrics for each in (sae, long))
    for name in ("inferred_loss", "inferred_fvu", "encoder_gap"):
        assert scaled[name] == pytest.approx(found[name], rel=1e-4, abs=1e-5)


def test_a_dictionary_may_hold_more_than_its_encoder_finds() -> None:
    """A row for every (maximum, query), and an encoder that always takes the largest query of the maximum."""
    inputs = inputs_of(6, 3)
    sharp, blunt = perfect(inputs, "mq"), perfect(inputs, "mq")
    assert inputs.cells is not None
    first = inputs.cells.factors["m"][np.unique(inputs.cells.partition("mq").of_cell, return_index=True)[1]]
    for m in range(6):
        latents = torch.from_numpy(np.flatnonzero(first == m))
        blunt.codes[:, latents[-1]] = blunt.codes[:, latents].sum(1)
        blunt.codes[:, latents[:-1]] = 0
    of = Objective(lambda a: a.sum(1), 0.0, k=1)
    found, own = (measure(sae, inputs, of.penalty_value, EVALUATION, objective=of).metrics for sae in (blunt, sharp))
    assert set(COLUMNS) <= set(found)
    assert found["splits_per_max"] == 0 < found["inferred_splits_per_max"]
    assert found["inferred_fvu"] <= own["fvu"] < found["fvu"]
    assert found["inferred_l0"] == 1
    assert found["encoder_gap"] == pytest.approx(found["squared_error"] - found["inferred_loss"])
    assert found["encoder_gap"] > own["encoder_gap"] >= 0
    plain = measure(blunt, inputs, of.penalty_value, Evaluation(permutations=2), objective=of).metrics
    assert not any(name.startswith("inferred_") for name in plain)
    assert all(value is None or not math.isnan(value) for value in found.values())
