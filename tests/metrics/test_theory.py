"""What a code costs at best: closed forms, and SAEs trained on from that code, which cannot cost less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import call
from fabricated import point

from sae_sweep.config.settings import Penalty, Toy
from sae_sweep.metrics.extra import theory as codes
from sae_sweep.metrics.partition_variance import Classes

PARENTS = Toy(name="parents", features=2, modifiers=2, d_model=16)


@pytest.mark.parametrize("coefficient", [1.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.25, 3.0))])
def test_a_latent_for_each_class_under_l1(coefficient: float) -> None:
    # Means in opposite pairs: by symmetry, and as the loss is convex in it, the best bias is their centre.
    length = 2.0
    means = length * torch.cat([torch.eye(4), -torch.eye(4)]).double()
    chance = torch.full((8,), 1 / 8, dtype=torch.float64)
    code = torch.eye(8, dtype=torch.bool)
    losses = codes.least_losses(means, chance, code, [0, 8, 12], Penalty(), [coefficient])
    # min over a of (a - r)² + λa, with r - λ/2 > 0; without latents nothing is rebuilt but the mean.
    best = coefficient * length - coefficient**2 / 4
    assert losses[:, 0].tolist() == pytest.approx([length**2, best, best], abs=1e-3)


@pytest.mark.parametrize(
    "penalty",
    [
        Penalty("sqrt", 0.5),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (Penalty("l1", 0.7), Penalty("log1p", 3.0))),
    ],
)
def test_a_latent_apart_for_each_class(penalty: Penalty) -> None:
    """Two ways to one least loss: descent over everything, and over the bias with activations from a table."""
    means, chance = codes.classes(PARENTS)
    (loss,) = codes.least_losses(means, chance, torch.eye(6) > 0, [6], penalty, [penalty.coefficient]).ravel().tolist()
    assert codes.least_loss_apart(Classes(means, chance, 0.25), penalty) == pytest.approx(loss + 0.25, abs=0.02)


def test_the_shared_code_of_two_orthogonal_features() -> None:
    # Four classes and two latents. With the bias where no feature is and each decoder row along its feature, an active
    # one costs λ(1 - λ/2) + (λ/2)². A bias and rows that lean towards what is active save a little of it.
    means = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)
    chance = torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    code = means.bool()
    (loss,) = codes.least_losses(means, chance, code, [2], Penalty(), [0.2]).ravel().tolist()
    upright = 0.4 * (0.2 * 0.9 + 0.01)
    assert 0.95 * upright < loss < upright


def test_classes_are_what_a_toy_draws() -> None:
    means, chance = codes.classes(PARENTS)
    assert chance.tolist() == [0.25, 0.125, 0.125] * 2
    assert torch.allclose(chance @ means, torch.zeros(16, dtype=torch.float64), atol=1e-12)
    assert float(chance @ means.square().sum(1)) == pytest.approx(16)
    # Parents and modifiers of length 1 are orthogonal: from math to physics it is as far as from topology to the other.
    assert float((means[0] - means[3]).norm()) == pytest.approx(float((means[1] - means[2]).norm()), rel=1e-5)


def test_which_points_have_costs() -> None:
    narrow, wide = (point(toy=PARENTS, width=width) for width in (2, 8))
    other_seed = point(toy=Toy(name="parents", features=2, modifiers=2, d_model=16, seed=5), width=8)
    without = [point(), point(toy=PARENTS, penalty=Penalty("none", 0.0))]
    found = codes.compare([narrow, wide, other_seed, *without])
    assert set(found) == {narrow.id, wide.id, other_seed.id}
    assert found[wide.id] == found[other_seed.id]
    # With two latents it is better to have the parents than two of six combinations; with room for all it is not.
    assert found[narrow.id].shared < found[narrow.id].split
    assert found[wide.id].split < found[wide.id].shared


@pytest.mark.slow
def test_no_sae_costs_less(tmp_path: Path) -> None:
    """Trained on from the split code it ends where the theory says; from a shared one, that may split, between both."""
    words = ["toy=parents", "toy.features=2", "toy.modifiers=2", "toy.d_model=16", "penalty.coefficient=1"]
    words += ["sae.width=6", "sae.init=oracle", "sae.partition=mq,m+q"]
    words += ["training.steps=1500", "training.batch_size=256", "logger=none", "name=theory"]
    assert call("run", "--json", *words, f"output_dir={tmp_path}").code == 0
    rows = json.loads(call("results", "theory", "--output-dir", str(tmp_path), "--format", "json").out)
    wide = point(toy=PARENTS, width=6)
    costs = codes.compare([wide])[wide.id]
    losses = {row["partition"]: row["loss"] for row in rows}
    assert losses["mq"] == pytest.approx(costs.split, abs=0.02)
    assert costs.split < losses["m+q"] < costs.shared
