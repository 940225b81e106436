"""Latents against planted features, on codes written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_sweep.metrics.ground_truth import Detection, DetectionCounter, cosines, planted_metrics
from sae_sweep.metrics.labels import NOTHING, detectors, least_inputs

DEVICE = torch.device("cpu")
# Eight inputs; three features, active on four, two and one of them.
FEATURES = torch.tensor([[1, 0, 0]] * 3 + [[2, 0, 1]] + [[0, 0.5, 0]] * 2 + [[0, 0, 0]] * 2, dtype=torch.float32)


def counted(codes: torch.Tensor, batches: int = 1) -> Detection:
    counter = DetectionCounter(codes.shape[1], 3, 0.01, DEVICE)
    for rows in torch.arange(len(codes)).tensor_split(batches):
        counter.add(codes[rows], FEATURES[rows])
    return counter.detection


def found(codes: torch.Tensor, rows: torch.Tensor) -> dict[str, float | int | None]:
    return planted_metrics(counted(codes), rows, torch.eye(3), np.ones(len(rows), bool), 0.8)


def test_one_latent_per_feature_is_perfect() -> None:
    perfect = dict.fromkeys(["mcc", "uniqueness", "feature_precision", "feature_recall", "feature_f1"], 1.0)
    # In another order, at other lengths and signs.
    rows = torch.tensor([[0.0, 0, 7], [0.1, 0, 0], [0, -2, 0]])
    counts = {"found_features": 3, "killed_features": 0, "killed_small_overlap": 0}
    assert found(FEATURES[:, [2, 0, 1]], rows) == pytest.approx(perfect | counts)


def test_two_latents_for_one_feature() -> None:
    """Each fires on half of feature 0; nothing detects features 1 and 2."""
    codes = torch.zeros(8, 2)
    codes[[0, 1], 0], codes[[2, 3], 1] = 1, 1
    metrics = found(codes, torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0]]))
    assert metrics["mcc"] == pytest.approx((1 + 0.8) / 2)
    assert metrics["uniqueness"] == 1
    # The second's best match is feature 1, on whose inputs it never fires.
    assert metrics["feature_precision"] == pytest.approx((1 + 0) / 2)
    assert metrics["feature_recall"] == pytest.approx((0.5 + 0) / 2)
    assert metrics["feature_f1"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["found_features"] == 0
    same = found(codes, torch.tensor([[1.0, 0, 0], [1.0, 0.1, 0]]))
    assert same["uniqueness"] == 0.5
    assert same["feature_f1"] == pytest.approx(2 / 3)


def test_dead_latents_count_and_do_not_find() -> None:
    codes = torch.cat([FEATURES, torch.zeros(8, 1)], 1)
    rows = torch.cat([torch.eye(3), torch.tensor([[0.0, 0, 1]])])
    metrics = found(codes, rows)
    assert metrics["feature_f1"] == pytest.approx(3 / 4)
    assert metrics["uniqueness"] == 3 / 4
    assert metrics["mcc"] == 1
    dead = planted_metrics(counted(codes), rows, torch.eye(3), np.array([True, False, True, True]), 0.8)
    assert dead["found_features"] == 2


def test_killed_is_what_no_live_latent_detects_or_lies_along() -> None:
    """Feature 0 is detected, 1 only pointed at, 2 neither; 1 and 2 overlap a little, 0 nothing."""
    directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.2, 0.98]])
    codes = torch.stack([FEATURES[:, 0], torch.zeros(8), FEATURES[:, 2]], 1)
    rows = torch.tensor([[0.0, 0, -1], [0, 1, 0], [0, 0, 1]])
    rows[0] = torch.tensor([0.9, 0.3, 0.3])
    metrics = planted_metrics(counted(codes), rows, directions, np.array([True, True, False]), 0.8)
    assert (metrics["found_features"], metrics["killed_features"], metrics["killed_small_overlap"]) == (1, 1, 1)
    close = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.6, 0.8]])
    metrics = planted_metrics(counted(codes), rows, close, np.array([True, True, False]), 0.8)
    assert (metrics["killed_features"], metrics["killed_small_overlap"]) == (1, 0)
    whole = planted_metrics(counted(codes), rows, directions, np.ones(3, bool), 0.8)
    assert whole["killed_features"] == 0


def test_matching_is_one_to_one_and_the_best_in_sum() -> None:
    rows = torch.tensor([[0.8, 0.6, 0], [1, 0, 0]])
    assert found(torch.zeros(8, 2), rows)["mcc"] == pytest.approx((0.6 + 1) / 2)


def test_faint_activations_do_not_count_and_batches_do_not_matter() -> None:
    codes = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) * 0.02
    whole, cut = counted(codes), counted(codes, 3)
    assert np.array_equal(whole.both, ((codes > 0.01).float().T @ (FEATURES != 0).float()).numpy())
    for one, other in zip(vars(whole).values(), vars(cut).values(), strict=True):
        assert np.array_equal(one, other)


def test_latents_of_a_toy_without_cells_are_known_by_what_they_detect() -> None:
    codes = torch.zeros(80, 4)
    features = FEATURES.repeat(10, 1)
    codes[:, 0] = features[:, 1]
    codes[:, 1] = (features[:, 0] + features[:, 1] > 0).float()
    codes[:4, 2] = 1
    counter = DetectionCounter(4, 3, 0.01, DEVICE)
    counter.add(codes, features)
    latents = detectors(counter.detection)
    assert latents.owner.tolist() == [1, 0, 0, NOTHING]
    assert latents.purity == pytest.approx([1, 40 / 60, 1, np.nan], nan_ok=True)
    assert latents.f1 == pytest.approx([1, 80 / 100, 8 / 44, np.nan], nan_ok=True)
    # The third fires on 4 inputs, fewer than the 8 and the half of the rarest feature's 10 that it takes to be live.
    assert latents.live.tolist() == [True, True, False, False]
    assert (latents.label == NOTHING).all()
    assert latents.density == pytest.approx([0.25, 0.75, 0.05, 0])


def test_cosines() -> None:
    rows = torch.tensor([[3.0, 0], [0, 0], [1, 1]])
    assert cosines(rows, torch.tensor([[2.0, 0], [0, -1]])).numpy() == pytest.approx(
        np.array([[1, 0], [0, 0], [0.5**0.5, -(0.5**0.5)]])
    )


def test_detectors_of_features_that_nobody_saw_and_latents_that_fired_once() -> None:
    both = np.array([[1, 0], [0, 0]])
    latents = detectors(Detection(both, np.array([1, 0]), np.array([2, 0]), 50))
    assert latents.owner.tolist() == [0, NOTHING] and latents.inputs.tolist() == [1, 0]
    assert latents.purity[0] == 1 and latents.f1[0] == pytest.approx(2 / 3)
    assert least_inputs(Detection(0 * both, np.zeros(2), np.zeros(2), 50)) == 25
