"""R² of the place on a circle, from reconstructions of which it is known what they keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.manifold import affine_r2
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.toys import model
from sae_sweep.toys.sampling import EvaluationInputs

ANGLES = 2 * math.pi * torch.arange(360).double() / 360
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def test_an_affine_map_is_undone() -> None:
    bent = CIRCLE @ torch.tensor([[0.5, 0.1, 0], [0.2, -0.3, 0]]).double() + torch.tensor([1.0, 2, 3])
    assert affine_r2(bent, CIRCLE) == pytest.approx(1)


def test_one_point_for_each_arc_has_lost_the_place_within_it() -> None:
    arcs = torch.arange(360) // 90
    points = torch.stack([CIRCLE[arcs == arc].mean(0) for arc in range(4)])[arcs]
    # The mean of an arc of angle a lies at sin(a/2)/(a/2) of the radius.
    assert affine_r2(points, CIRCLE) == pytest.approx((math.sin(math.pi / 4) / (math.pi / 4)) ** 2, abs=1e-3)


def test_half_of_it_and_nothing() -> None:
    assert affine_r2(CIRCLE[:, :1], CIRCLE) == pytest.approx(0.5)
    assert affine_r2(torch.zeros(360, 5).double(), CIRCLE) == pytest.approx(0)
    assert math.isnan(affine_r2(CIRCLE * torch.nan, CIRCLE))


@dataclass
class Shrunk:
    """Reconstructs x by half: latents 2i and 2i + 1 hold the positive and the negative part of number i."""

    W_dec: Tensor
    b_dec: Tensor

    def active(self, x: Tensor) -> Iterator[Active]:
        yield Active.of(torch.stack([x.relu(), (-x).relu()], 2).flatten(1))


@pytest.mark.parametrize(("name", "expected"), [("circle", 1.0), ("exclusive", None)])
def test_the_column(name: str, expected: float | None) -> None:
    toy = Toy(name, features=8, d_model=2 if name == "circle" else 8)
    toy = toy.replace(spread=1.0) if name == "circle" else toy
    planted = model.load(toy, model.train([toy], "cpu")[0])
    evaluation, d = Evaluation(inputs=512, permutations=1), toy.d_model
    inputs = EvaluationInputs(planted, "", Distribution("uniform"), torch.zeros(d), 1.0, evaluation)
    half = torch.eye(d).repeat_interleave(2, 0) * torch.tensor([0.5, -0.5]).repeat(d)[:, None]
    found = measure(Shrunk(half, torch.zeros(d)), inputs, lambda norms: norms.sum(1), evaluation, nulls=False).metrics
    assert found["manifold_r2"] == (expected if expected is None else pytest.approx(expected, abs=1e-5))
    assert found["fvu"] == pytest.approx(0.25, abs=0.1)
