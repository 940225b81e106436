"""Columns of decoder rows, on SAEs planted by hand: a tree, a duplicate, an absorbed child, a bias that stands in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics.dictionary import COLUMNS, mean_overlaps
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.toys import model
from sae_sweep.toys.sampling import EvaluationInputs

EVALUATION = Evaluation(inputs=2048, permutations=1)


@dataclass
class ByHand:
    """An SAE of raw activations: relu((x/scale + mean - b) @ encoder.T + b_enc), in the normalised space it sees."""

    W_dec: Tensor
    b_dec: Tensor
    encoder: Tensor
    b_enc: Tensor

    def active(self, x: Tensor) -> Iterator[Active]:
        yield Active.of((x @ self.encoder.T + self.b_enc).relu())


def inputs_of(**settings: object) -> EvaluationInputs:
    toy = Toy(**{"name": "planted", "features": 3, "d_model": 8, **settings})  # type: ignore[arg-type]
    planted = model.load(toy, model.train([toy], "cpu")[0])
    mean = planted.mean.float()  # type: ignore[attr-defined]
    return EvaluationInputs(planted, "", Distribution("uniform"), mean, 2.0, EVALUATION)


def by_hand(inputs: EvaluationInputs, rows: Tensor, encoder: Tensor, b_enc: list[float], bias: Tensor) -> ByHand:
    """`rows`, `encoder` [width, features] and `bias` [features] in features, of raw activations."""
    directions = inputs.model.planted.directions  # type: ignore[union-attr]
    W_enc = encoder @ directions / inputs.scale
    return ByHand(
        inputs.scale * rows @ directions,
        inputs.scale * (bias @ directions - inputs.mean),
        W_enc,
        torch.tensor(b_enc) + encoder @ directions @ inputs.mean,
    )


def measured(inputs: EvaluationInputs, sae: ByHand) -> dict[str, float | int | None]:
    found = measure(sae, inputs, lambda norms: norms.sum(1), EVALUATION, nulls=False).metrics
    return {name: found[name] for name in COLUMNS}


TREE = {"rates": "0.4, 0.1, 0.2", "tree": "0>1:0.3"}
NO_BIAS = torch.zeros(3)


def test_the_true_dictionary() -> None:
    inputs = inputs_of(**TREE)
    found = measured(inputs, by_hand(inputs, torch.eye(3), torch.eye(3), [0.0] * 3, NO_BIAS))
    assert (found["recovered_80"], found["recovered_90"], found["edge_absorption"]) == (3, 3, 0)
    zero = [found[name] for name in ("c_dec", "edge_cosine", "edge_hedging", "bias_on_recovered")]
    assert zero == pytest.approx([0] * 4, abs=1e-5)
    assert found["bias_on_missed"] is None


def test_a_child_that_absorbs_its_parent() -> None:
    """Latent 0 fires on feature 0 without 1, latent 1 is both: every input with the child is absorbed."""
    inputs = inputs_of(**TREE)
    rows = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]])
    encoder = torch.tensor([[1.0, -1, 0], [0, 1, 0], [0, 0, 1]])
    found = measured(inputs, by_hand(inputs, rows, encoder, [-0.001, 0, 0], NO_BIAS))
    assert (found["recovered_80"], found["recovered_90"]) == (2, 2)
    assert found["edge_absorption"] == 1
    assert found["edge_cosine"] == pytest.approx(0.5**0.5, abs=1e-5)
    assert found["c_dec"] == pytest.approx(0.5**0.5 / 3, abs=1e-5)
    # A parent's latent that fires with the child as well is no absorption, whatever the row.
    shared = measured(inputs, by_hand(inputs, rows, torch.eye(3), [0.0] * 3, NO_BIAS))
    assert shared["edge_absorption"] == 0


def test_half_absorbed() -> None:
    """Feature 2 switches the parent's latent on again: it comes with half of the child's inputs."""
    inputs = inputs_of(rates="0.4, 0.1, 0.5", tree="0>1:0.3")
    encoder = torch.tensor([[1.0, -1, 1], [0, 1, 0], [0, 0, 1]])
    found = measured(inputs, by_hand(inputs, torch.eye(3), encoder, [-0.001, 0, 0], NO_BIAS))
    assert found["edge_absorption"] == pytest.approx(0.5, abs=0.05)


def test_a_bias_that_stands_in_for_what_one_latent_cannot_hold() -> None:
    inputs = inputs_of(features=2, rates="0.25, 0.2")
    bias = torch.tensor([0.0, 0.2])
    found = measured(inputs, by_hand(inputs, torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0]]), [0.0], bias))
    assert (found["bias_on_recovered"], found["bias_on_missed"]) == pytest.approx((0, 1), abs=1e-4)
    assert found["c_dec"] is None and found["edge_absorption"] is None
    assert found["recovered_90"] == 1
    # A child without a latent is an edge that cannot be judged.
    tree = inputs_of(features=2, rates="0.25", tree="0>1:0.2")
    narrow = measured(tree, by_hand(tree, torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 0]]), [0.0], bias[:2]))
    assert narrow["edge_absorption"] is None and narrow["edge_cosine"] is None
    assert narrow["edge_hedging"] == pytest.approx(0, abs=1e-6)
    # The row that has the least squared error: of the child, its rate given the parent.
    row = torch.tensor([[1.0, 0.2]])
    hedged = measured(tree, by_hand(tree, row, torch.tensor([[1.0, 0]]), [0.0], bias[:2]))
    assert hedged["edge_hedging"] == pytest.approx(0.2 / 1.04**0.5, abs=1e-6)


def test_recovered_asks_for_the_sign_and_for_the_cosine() -> None:
    inputs = inputs_of()
    rows = torch.tensor([[-1.0, 0, 0], [0, 0.85, (1 - 0.85**2) ** 0.5], [0, 0.1, -1]])
    found = measured(inputs, by_hand(inputs, rows, torch.eye(3), [0.0] * 3, NO_BIAS))
    assert (found["recovered_80"], found["recovered_90"]) == (1, 0)


def test_mean_overlap_is_that_of_all_pairs_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_sweep.metrics.dictionary.CHUNK", 3)
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[4] = 0
    unit = torch.nn.functional.normalize(rows, dim=1)
    pairs = [(unit[i] @ unit[j]).item() for i in range(10) for j in range(i)]
    assert mean_overlaps(rows) == pytest.approx((np.mean(np.abs(pairs)), np.mean(pairs)))
    assert mean_overlaps(rows[:1]) == mean_overlaps(torch.zeros(8193, 1)) == (None, None)


def test_encoder_rows_are_held_against_features_too() -> None:
    inputs = inputs_of()
    sae = by_hand(inputs, torch.eye(3), torch.eye(3), [0.0] * 3, NO_BIAS)
    assert measured(inputs, sae)["encoder_recovered_80"] is None
    directions = inputs.model.planted.directions  # type: ignore[union-attr]
    sae.W_enc = torch.tensor([[3.0, 0, 0], [0, 0.85, 0.53], [0, 0, -1]]) @ directions  # type: ignore[attr-defined]
    found = measured(inputs, sae)
    assert (found["encoder_recovered_80"], found["encoder_recovered_90"]) == (2, 1)


def test_what_is_not_finite_is_not_a_number() -> None:
    inputs = inputs_of(**TREE)
    sae = by_hand(inputs, torch.eye(3), torch.eye(3), [0.0] * 3, NO_BIAS)
    sae.W_dec[0, 0] = float("nan")
    overlap, _ = mean_overlaps(sae.W_dec)
    assert overlap is not None and np.isnan(overlap)
