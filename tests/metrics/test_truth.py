"""Columns of the planted dictionary with the planted codes, on toys whose truth is worked out by hand."""

from __future__ import annotations

import pytest
import torch
from test_dictionary import by_hand, inputs_of

from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.extra.inference import Objective
from sae_sweep.metrics.truth import COLUMNS, largest
from sae_sweep.toys.sampling import EvaluationInputs

Found = dict[str, float | int | None]


def found(inputs: EvaluationInputs, objective: Objective | None) -> Found:
    """Of an SAE that has one latent, for feature 0 alone, and no bias."""
    one = by_hand(inputs, torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]), [0.0], torch.zeros(3))
    evaluation = Evaluation(inputs=2048, permutations=1)
    metrics = measure(one, inputs, lambda norms: norms.sum(1), evaluation, nulls=False, objective=objective).metrics
    return {name: metrics[name] for name in COLUMNS}


def test_the_truth_reconstructs_and_costs_its_penalty() -> None:
    inputs = inputs_of(rates="0.4, 0.1, 0.2")
    columns = found(inputs, Objective(lambda norms: norms.sum(1), 0.5))
    assert columns["truth_error"] == pytest.approx(0, abs=1e-10)
    assert columns["truth_fvu"] == pytest.approx(0, abs=1e-10)
    assert columns["truth_l0"] == pytest.approx(0.7, abs=0.05)
    # Each active feature costs coefficient · scale · magnitude.
    assert columns["truth_loss"] == pytest.approx(0.5 * 2.0 * columns["truth_l0"], rel=1e-6)
    # The SAE misses features 1 and 2: .3 of squared error, whatever the scale.
    assert columns["raw_error"] == pytest.approx(0.3, abs=0.03)


def test_of_noise_the_truth_says_nothing() -> None:
    inputs = inputs_of(rates="0.4, 0.1, 0.2", noise=0.01)
    columns = found(inputs, Objective(lambda norms: norms.sum(1), 0.0))
    assert columns["truth_error"] == pytest.approx(8 * 0.01, rel=0.05)


def test_where_fewer_may_be_active_than_are_the_truth_errs() -> None:
    inputs = inputs_of(rates="1.0", magnitude="folded(1, 0.1)")
    columns = found(inputs, Objective(lambda norms: norms.sum(1), 0.0, k=2))
    assert columns["truth_l0"] == pytest.approx(2, abs=1e-3)
    # The lowest third of N(1, .1²) is left out, of mean square 1 - 2·.1·1.0908 + .01·1.47.
    assert columns["truth_error"] == pytest.approx(0.7965, abs=0.01)
    # Three magnitudes of variance .1² are all that varies.
    assert columns["truth_fvu"] == pytest.approx(0.7965 / 0.03, rel=0.1)
    assert columns["truth_loss"] == pytest.approx(columns["truth_error"] * inputs.scale**2)  # type: ignore[operator]


def test_an_objective_that_says_nothing_is_not_compared() -> None:
    columns = found(inputs_of(), None)
    assert columns["raw_error"] is not None
    assert [columns[name] for name in ("truth_error", "truth_loss", "truth_fvu", "truth_l0")] == [None] * 4


def test_the_largest_of_all_inputs_are_kept() -> None:
    codes = torch.tensor([[3.0, 1, 0], [5, 4, 0]])
    torch.testing.assert_close(largest(codes, 1), torch.tensor([[0.0, 0, 0], [5, 4, 0]]))
    torch.testing.assert_close(largest(codes, 1.5), torch.tensor([[3.0, 0, 0], [5, 4, 0]]))
    # Of equals too: no more than may be.
    assert int((largest(torch.ones(4, 3), 1) > 0).sum()) == 4
