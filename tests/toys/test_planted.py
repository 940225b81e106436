"""Planted features made of parts: what is drawn against its exact chances, and one line for what cannot be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from commandline import call

from sae_sweep.config.settings import Toy
from sae_sweep.toys import model
from sae_sweep.toys.planted.chances import both_below
from sae_sweep.toys.planted.correlations import read_correlations
from sae_sweep.toys.planted.magnitudes import MAGNITUDES, read_magnitude
from sae_sweep.toys.planted.manifolds import Circle
from sae_sweep.toys.planted.planted import Planted
from sae_sweep.toys.planted.trees import read_tree

COUNT = 100_000
# Five standard deviations of a share of COUNT inputs, at most.
CLOSE = 5 * 0.5 / math.sqrt(COUNT)


def planted(**settings: object) -> Planted:
    toy = Toy(**{"name": "planted", "features": 5, "d_model": 8, **settings})  # type: ignore[arg-type]
    found = model.load(toy, model.train([toy], "cpu")[0])
    assert isinstance(found, Planted)
    return found


def drawn(toy: Planted, count: int = COUNT) -> torch.Tensor:
    return toy.draw(count, torch.Generator().manual_seed(0))


def seen_together(toy: Planted) -> np.ndarray:
    active = (toy.features(drawn(toy)) != 0).double()
    found: np.ndarray = (active.T @ active / COUNT).numpy()
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"rates": "0.3"},
        {"rates": "0.5, 0.4, 0.3, 0.2, 0.1"},
        {"rates": "linear(0.5, 0.1)"},
        {"rates": "zipf(0.6, 1)"},
        {"rates": "loguniform(0.01, 0.5)"},
        {"rates": "0.4", "tree": "0>1:0.2, 1>3:0.5, 0>2:0.7"},
        {"rates": "0.6", "tree": "0>1:0.2|2:0.3|3:0.5 2>4:0.5"},
        {"rates": "0.4", "correlations": "0.6"},
        {"rates": "0.4", "correlations": "0~*:-0.4"},
        {"rates": "linear(0.6, 0.1)", "correlations": "0~1:0.9, 2~3:-0.5"},
        {"rates": "0.3", "correlations": "lowrank(2, 0.8)"},
        {"rates": "0.3", "correlations": "random(0.3, 0.9)"},
        {"rates": "0.4", "correlations": "0~1:0.8 1~2:0.3", "tree": "0>3:0.5 1>4:0.4"},
    ],
)
def test_features_come_together_by_their_exact_chances(settings: dict[str, str]) -> None:
    toy = planted(**settings)
    assert seen_together(toy) == pytest.approx(toy.together, abs=CLOSE)
    assert toy.l0 == pytest.approx(np.trace(toy.together))


def test_chances_written_by_hand() -> None:
    tree = planted(rates="0.5, 0.1, 0.1, 0.1, 0.4", tree="0>1:0.2|2:0.4 2>3:0.5").together
    assert np.diag(tree) == pytest.approx([0.5, 0.1, 0.2, 0.1, 0.4])
    assert (tree[1, 2], tree[1, 3], tree[2, 3], tree[0, 3]) == pytest.approx((0, 0, 0.1, 0.1), abs=1e-8)
    assert tree[3, 4] == pytest.approx(0.04)
    # At rates of a half: 1/4 + arcsin(ρ)/2π.
    pair = both_below(np.array([0.5, 0.5]), np.array([[1, 0.6], [0.6, 1]]))
    assert pair[0, 1] == pytest.approx(0.25 + math.asin(0.6) / (2 * math.pi), abs=1e-9)
    # What is wholly correlated is one thing.
    same = both_below(np.array([0.3, 0.2]), np.ones((2, 2)))
    assert same[0, 1] == pytest.approx(0.2, abs=1e-4)


def test_rates_follow_their_laws() -> None:
    assert planted(rates="linear(0.5, 0.1)").params["rates"].tolist() == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert planted(rates="zipf(0.6, 2)").params["rates"].tolist() == pytest.approx([0.6 / i**2 for i in range(1, 6)])
    many = planted(features=4000, rates="loguniform(0.001, 0.1)").params["rates"].double().log10()
    assert (many.min().item(), many.max().item()) == pytest.approx((-3, -1), abs=0.01)
    assert many.mean().item() == pytest.approx(-2, abs=0.05)
    assert many.std().item() == pytest.approx(2 / math.sqrt(12), abs=0.03)


@pytest.mark.parametrize("text", [*MAGNITUDES, "constant(2)", "lomax(4, 2)", "lognormal(0.3, 0.5)", "folded(0.1, 1)"])
def test_magnitudes_have_the_mean_they_say(text: str) -> None:
    magnitude, arguments = read_magnitude(text)
    values = magnitude.draw(arguments, (400_000,), torch.Generator().manual_seed(0))
    assert (values > 0).all()
    assert values.mean().item() == pytest.approx(magnitude.mean(*arguments), rel=0.01)


def test_magnitudes_have_the_spread_they_are_named_for() -> None:
    def values(text: str) -> torch.Tensor:
        magnitude, arguments = read_magnitude(text)
        return magnitude.draw(arguments, (400_000,), torch.Generator().manual_seed(0)).double()

    assert values("folded(1, 0.15)").std().item() == pytest.approx(0.15, rel=0.01)
    assert values("lognormal(0, 0.25)").log().std().item() == pytest.approx(0.25, rel=0.01)
    assert (values("lomax(3, 1)") > 2).double().mean().item() == pytest.approx((1 + 2 / 2) ** -3, abs=0.003)


def test_activations_are_features_noise_and_offset() -> None:
    toy = planted(rates="0.3", noise=0.25, offset=3.0, magnitude="exponential", tree="0>1:0.5")
    inputs = drawn(toy)
    acts = toy.activations(inputs, "").double()
    clean = toy.features(inputs).double() @ toy.directions.double()
    left = acts - clean
    assert left.mean(0).norm().item() == pytest.approx(3, abs=0.02)
    assert left.var(0).numpy() == pytest.approx(np.full(8, 0.25), rel=0.03)
    assert acts.mean(0).numpy() == pytest.approx(toy.mean.numpy(), abs=0.02)
    # The same inputs are the same activations: noise is part of an input.
    assert torch.equal(toy.activations(inputs, ""), toy.activations(inputs, ""))
    assert toy.features(inputs).shape == (COUNT, 5)


def test_directions() -> None:
    orthonormal = planted(directions="orthonormal").directions
    assert (orthonormal @ orthonormal.T).numpy() == pytest.approx(np.eye(5), abs=1e-6)
    random = planted(directions="random").directions
    assert random.norm(dim=1).numpy() == pytest.approx(np.ones(5), abs=1e-6)
    assert (random @ random.T - torch.eye(5)).abs().max().item() > 0.1
    assert planted(features=30).directions.shape == (30, 8)
    assert torch.equal(orthonormal, planted().directions)


def test_edges_are_those_of_the_tree() -> None:
    assert planted(tree="0>1:0.2, 1>3:0.5").edges == [(0, 1), (1, 3)]
    assert planted().edges == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rates='0.1,0.2'", "2 rates for toy.features=5"),
        ("rates='linear(0.1)'", "toy.rates cannot be"),
        ("rates='zipf(2,1)'", "at most 1"),
        ("rates='loguniform(0.5,0.1)'", "from the lower to the higher"),
        ("rates='a lot'", "write a name and its numbers"),
        ("magnitude=cauchy", "toy.magnitude cannot be 'cauchy'"),
        ("magnitude='lomax(1)'", "out of range"),
        ("magnitude='folded(1,2,3)'", "too many"),
        ("magnitude='shifted(-1)'", "out of range"),
        ("tree='0>9:0.2'", "no feature from 0 to 4"),
        ("tree='0>1:0.2 2>1:0.2'", "two parents"),
        ("tree='0>1:0.2 1>0:0.2'", "only with itself"),
        ("tree='0>1:0.7|2:0.7'", "sum to at most 1"),
        ("tree='0>1'", "is not a number"),
        ("correlations='0.4 0.3'", "is not a number"),
        ("correlations='-0.9'", "an eigenvalue is negative"),
        ("correlations='0~0:0.4'", "correlation with itself"),
        ("correlations='highrank(2,0.5)'", "lowrank(2, 0.5)"),
        ("directions=orthonormal", "9 directions do not fit"),
        ("scales='1,2'", "2 scales for toy.features=5"),
        ("scales=0", "each must be above 0"),
        ("one_of='0-9'", "no feature from 0 to 4"),
        ("one_of='0-2,2-3'", "feature 2 is in two groups"),
        ("one_of='0-2:2'", "its chances from 0 to 1"),
        ("one_of='0-2:0.5,3-4:1:0.5'", "can only follow a first group"),
        ("one_of=some", "toy.one_of cannot be 'some'"),
        ("interaction=0.5", "of two groups of toy.one_of"),
        ("manifolds='0:klein(3)'", "toy.manifolds cannot be"),
        ("manifolds='0:circle(2.5)'", "`circle(places, spread, harmonics)`"),
        ("manifolds='7:circle'", "no feature from 0 to 4"),
    ],
)
def test_one_line_for_what_cannot_be(setting: str, message: str) -> None:
    features = 9 if setting.startswith("directions") else 5
    words = ["toy=planted", f"toy.features={features}", "toy.d_model=8", "penalty.coefficient=1", f"toy.{setting}"]
    end = call("plan", *words)
    assert end.code == 2, end.err
    assert message in end.err and end.err.count("\n") == 1, end.err


def test_a_child_has_no_correlations_of_its_own() -> None:
    end = call("plan", "toy=planted", "toy.tree='0>1:0.2'", "toy.correlations='1~2:0.3'")
    assert end.code == 2 and "comes with its parent alone" in end.err


def test_random_correlations_are_of_seven_pairs_in_ten_and_of_both_signs() -> None:
    tree = read_tree("none", 12)
    found = read_correlations("random(0.2, 0.3)", tree, torch.Generator().manual_seed(0))
    assert found is not None
    pairs = found[np.triu_indices(12, 1)]
    assert np.diag(found) == pytest.approx(1)
    assert np.linalg.eigvalsh(found)[0] > -1e-9
    # Taking negative eigenvalues away moves them a little.
    assert (pairs > 0.12).sum() == pytest.approx(23, abs=2) and (pairs < -0.12).sum() == pytest.approx(24, abs=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"one_of": "all"},
        {"one_of": "all", "rates": "0.4, 0.3, 0.1, 0.1, 0.1"},
        {"one_of": "0-2:0.7", "rates": "0.2"},
        {"one_of": "0-2, 3-4:0.6:0.3"},
        {"one_of": "0-2, 3-4:0.6:0.3", "interaction": 0.5},
        {"one_of": "0-2, 3-4:0.6", "interaction": 1.0},
        {"one_of": "0-1, 2-3:0.5", "tree": "1>4:0.5", "rates": "0.3, 0.6, 0.2, 0.2, 0.2"},
        {"one_of": "0-1", "rates": "0.4", "correlations": "2~3:0.6"},
        {"manifolds": "0:circle(5), 2:sphere(2)", "rates": "0.4", "tree": "0>1:0.5, 1>2:0.8"},
        {"manifolds": "*:torus(2)", "one_of": "all"},
        {"manifolds": "1:circle(4, 0), 3:sphere(3)", "rates": "0.4", "correlations": "0~1:0.6"},
    ],
)
def test_groups_and_manifolds_come_together_by_their_exact_chances(settings: dict[str, object]) -> None:
    toy = planted(d_model=24, **settings)
    assert seen_together(toy) == pytest.approx(toy.together, abs=CLOSE)
    assert toy.activations(drawn(toy), "").double().mean(0).numpy() == pytest.approx(toy.mean.numpy(), abs=0.02)
    if toy.cells is not None:
        assert np.bincount(toy.cell(drawn(toy)), minlength=toy.cells.count) / COUNT == pytest.approx(
            toy.chance, abs=CLOSE
        )


def test_chances_of_groups_and_manifolds_written_by_hand() -> None:
    two = planted(one_of="0-1, 2-4:0.6", rates="0.3, 0.1, 0.2, 0.2, 0.2").together
    assert np.diag(two) == pytest.approx([0.75, 0.25, 0.2, 0.2, 0.2])
    assert (two[0, 1], two[0, 2], two[2, 3]) == pytest.approx((0, 0.15, 0))
    follows = planted(one_of="0-1, 2-4:0.5:1").together
    assert (follows[0, 2], follows[1, 3], follows[0, 3], follows[4, 4]) == pytest.approx((0.25, 0.25, 0, 0))
    circles = planted(features=2, manifolds="*:circle(4)", rates="0.4")
    assert circles.l0 == pytest.approx(0.8)
    assert (circles.together[0, 0], circles.together[0, 1], circles.together[0, 4]) == pytest.approx((0.1, 0, 0.01))


@pytest.mark.parametrize("kind", ["circle(5, 0.5, 2)", "circle(5)", "circle(9, 1, 2)", "sphere(3)", "torus(3)"])
def test_points_of_a_manifold(kind: str) -> None:
    toy = planted(features=1, rates="1", manifolds=f"0:{kind}", magnitude="uniform", d_model=9)
    inputs = drawn(toy, 20_000)
    acts, strength = toy.activations(inputs, "").double(), inputs[:, :1].double()
    assert (acts.norm(dim=1, keepdim=True) / strength).numpy() == pytest.approx(np.ones((len(acts), 1)), rel=1e-4)
    # The place that is said to be nearest is, and each is so equally often; it alone is active.
    nearest = toy.cell(inputs)
    overlaps = acts @ toy.directions.double().T
    assert (overlaps.gather(1, nearest[:, None])[:, 0] > overlaps.amax(1) - 1e-5).all()
    assert np.bincount(nearest) / len(acts) == pytest.approx(toy.chance, abs=0.02)
    assert torch.equal(toy.features(inputs).argmax(1), nearest) and ((toy.features(inputs) != 0).sum(1) <= 1).all()


@pytest.mark.parametrize("circle", [Circle(5), Circle(2, 1, 4), Circle(3, 0.5, 4), Circle(1, 0, 1)])
def test_the_mean_of_a_circle_is_of_harmonics_that_are_alike_at_all_places(circle: Circle) -> None:
    points = circle.points(circle.draw(20_000, torch.Generator().manual_seed(1))).double()
    assert points.mean(0).numpy() == pytest.approx(circle.mean().numpy(), abs=0.03)


def test_a_mixture_of_manifolds_has_their_places_as_classes() -> None:
    toy = planted(features=3, one_of="all", manifolds="*:circle(4)", d_model=6)
    assert toy.cells is not None and toy.cells.count == 12
    assert toy.toy.kind.classes("mq", toy.toy) == 12 and toy.toy.kind.classes("m", toy.toy) == 3
    inputs = drawn(toy, 500)
    # One circle at a time: two numbers, in axes of its own.
    assert ((inputs[:, :3] != 0).sum(1) == 1).all()
    assert torch.equal(toy.features(inputs).argmax(1), toy.cell(inputs))
    assert toy.coordinates(inputs).shape == (500, 6)
    assert ((toy.coordinates(inputs) != 0).sum(1) == 2).all()


def test_scales_multiply_magnitudes() -> None:
    toy = planted(rates="0.5", scales="linear(1, 3)", magnitude="exponential", directions="orthonormal")
    active = toy.features(drawn(toy))
    means = active.sum(0) / (active != 0).sum(0)
    assert means.numpy() == pytest.approx(np.linspace(1, 3, 5), rel=0.05)
    assert toy.activations(drawn(toy), "").double().mean(0).numpy() == pytest.approx(toy.mean.numpy(), abs=0.03)


@pytest.mark.parametrize(("count", "d"), [(30, 8), (300, 20), (9, 8), (6, 8)])
def test_directions_of_least_overlap_reach_the_bound(count: int, d: int) -> None:
    directions = planted(features=count, d_model=d, directions="least_overlap").directions.double()
    overlaps = (directions @ directions.T).fill_diagonal_(0)
    assert directions.norm(dim=1).numpy() == pytest.approx(np.ones(count), abs=1e-6)
    # Of Welch (1974), for so many unit vectors in so few numbers.
    assert overlaps.square().sum().item() == pytest.approx(max(0, count**2 / d - count), rel=0.01, abs=1e-6)


def test_ids_know_nothing_of_parts_that_came_later() -> None:
    assert Toy("planted").identity().keys().isdisjoint({"one_of", "manifolds", "scales", "interaction"})
