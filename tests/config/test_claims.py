"""Verdicts on claims over tables planted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import SMALL, point, sweep

from sae_sweep.config.settings import Penalty
from sae_sweep.reports.claims import Verdict, evaluate, evaluate_all, number
from sae_sweep.store.results import tables

CLAIM: dict[str, Any] = {
    "name": "one_per_max",
    "prediction": "At width d_vocab an SAE owns every max.",
    "measure": "owned_maxes",
    "aggregate": "median",
    "where": {"width": 16},
    "at_least": 15,
}


def verdict(tmp_path: Path, owned: dict[tuple[int, int], list[float | None]], **claim: Any) -> Verdict:
    """On a sweep with these owned maxes by (width, seed), one per coefficient; the loss falls with the coefficient."""
    results = [
        (
            point(width=width, seed=seed, penalty=Penalty("l1", c + 1.0)),
            {"owned_maxes": value, "label_mq": 2 * (value or 0), "loss": seed - c, "fvu": 0.1},
        )
        for (width, seed), values in owned.items()
        for c, value in enumerate(values)
    ]
    store = sweep(tmp_path, results)
    return evaluate(
        {key: value for key, value in {**CLAIM, **claim}.items() if value is not None}, *tables(store, "quick")
    )


def test_supported_when_every_seed_keeps_the_bound(tmp_path: Path) -> None:
    found = verdict(tmp_path, {(16, 0): [16, 15], (16, 1): [16, 16], (8, 0): [3, 3]})
    assert (found.verdict, found.value, found.low, found.high) == ("supported", 16, 15.5, 16)
    assert (found.seeds, found.points, found.untrained) == (2, 4, 0)
    assert found.sentence == (
        "At width d_vocab an SAE owns every max: supported, since the median number of owned maxes is 16 "
        "(15.5 to 16 over 2 seeds; untrained 0; labels shuffled 0), as predicted at least 15."
    )


def test_not_supported_when_none_does(tmp_path: Path) -> None:
    found = verdict(tmp_path, {(16, 0): [14], (16, 1): [12]})
    assert (found.verdict, found.value) == ("not supported", 13)
    assert found.sentence.endswith(
        "is 13 (12 to 14 over 2 seeds; untrained 0; labels shuffled 0), not at least 15 as predicted."
    )


def test_undecided_when_the_seeds_disagree(tmp_path: Path) -> None:
    found = verdict(tmp_path, {(16, 0): [16], (16, 1): [16], (16, 2): [12]})
    assert (found.verdict, found.value, found.low, found.high) == ("undecided", 16, 12, 16)
    assert found.sentence.endswith("and the seeds do not agree on at least 15.")


@pytest.mark.parametrize(
    ("owned", "change", "why"),
    [
        ({(8, 0): [16]}, {}, "no finished point matches it"),
        ({}, {}, "no finished point matches it"),
        ({(16, 0): [None]}, {}, "its measure is null there"),
        ({(16, 0): [16]}, {"measure": "owned_max"}, "this sweep has no column owned_max"),
        ({(16, 0): [16]}, {"where": {"training.lr": 1}}, "this sweep has no column training.lr"),
        ({(16, 0): [16]}, {"versus": {"where": {"width": 9}}}, "no finished point matches it"),
    ],
)
def test_undecided_when_nothing_was_measured(tmp_path: Path, owned, change, why: str) -> None:
    found = verdict(tmp_path, owned, **change)
    assert (found.verdict, found.value, found.points) == ("undecided", None, 0)
    assert found.sentence.endswith(f"undecided, since {why}.")


@pytest.mark.parametrize(
    ("change", "value", "expected"),
    [
        ({"aggregate": "mean"}, 13, "not supported"),
        ({"aggregate": "min"}, 10, "not supported"),
        ({"aggregate": "max"}, 16, "supported"),
        ({"aggregate": "share", "threshold": 13, "at_least": 0.6}, 2 / 3, "supported"),
        ({"at_least": None, "at_most": 13}, 13, "supported"),
        ({"at_least": None, "at_most": 12}, 13, "not supported"),
        ({"measure": "label_mq - owned_maxes", "at_least": 13}, 13, "supported"),
        ({"where": {"sae.width": [16, 17], "partition": None}, "at_least": 13}, 13, "supported"),
        ({"where": {"width": 16, "coefficient": [1, 3.0]}, "at_least": 13}, 13, "supported"),
        ({"where": {}, "at_least": 12}, 11.5, "not supported"),
        ({"versus": {"where": {"width": 8}}, "at_least": 9}, 9, "supported"),
    ],
)
def test_every_way_to_state_a_claim(tmp_path: Path, change, value: float, expected: str) -> None:
    found = verdict(tmp_path, {(16, 0): [10, 13, 16], (8, 0): [4]}, **change)
    assert (found.value, found.verdict) == (pytest.approx(value), expected)


def test_a_comparison_is_made_seed_by_seed(tmp_path: Path) -> None:
    owned = {(16, 0): [16], (16, 1): [12], (8, 0): [8], (8, 1): [4], (8, 2): [1]}
    found = verdict(tmp_path, owned, versus={"where": {"width": 8}}, at_least=8)
    assert (found.verdict, found.value, found.low, found.high, found.seeds) == ("supported", 10, 8, 8, 2)
    assert "the median number of owned maxes, less that of the points compared with, is 10" in found.sentence


def test_the_best_of_the_seeds_is_taken_for_each_setting_and_toy(tmp_path: Path) -> None:
    results = []
    for toy_seed, by_seed in enumerate([{0: (2.0, 12), 1: (1.0, 16)}, {0: (5.0, 15), 1: (6.0, 9)}]):
        for seed, (loss, owned) in by_seed.items():
            toy = SMALL.replace(seed=toy_seed)
            results.append((point(toy=toy, width=16, seed=seed), {"loss": loss, "owned_maxes": owned}))
    both = tables(sweep(tmp_path, results), "quick")
    (every, best) = evaluate_all([CLAIM, {**CLAIM, "best_of_seeds": True}], *both)
    assert (every.verdict, every.points, every.seeds) == ("undecided", 4, 4)
    assert (best.verdict, best.value, best.low, best.points, best.seeds) == ("supported", 15.5, 15, 2, 2)


def test_a_measure_is_read_off_each_ladder_at_a_level(tmp_path: Path) -> None:
    ladders = {  # (penalty, seed): (coefficient, fvu, live latents) in whatever order
        ("l1", 0): [(1.0, 0.4, 10), (0.5, 0.1, 40), (2.0, 0.8, 2)],
        ("l1", 1): [(0.5, 0.3, 6), (1.0, 0.5, 4)],
        ("sqrt", 0): [(0.5, 0.2, 8)],  # on the level itself
        ("sqrt", 1): [(0.5, 0.3, 7), (1.0, 0.9, 1)],  # never as low as the level
    }
    results = [
        (point(seed=seed, penalty=Penalty(penalty, c)), {"fvu": fvu, "live_latents": live})
        for (penalty, seed), points in ladders.items()
        for c, fvu, live in points
    ]
    both = tables(sweep(tmp_path, results, varied=["penalty.name", "penalty.coefficient"]), "quick")
    at = {**CLAIM, "measure": "live_latents", "aggregate": "mean", "at": {"fvu": 0.2}}
    (l1,) = evaluate_all([{**at, "where": {"penalty": "l1"}}], *both)
    assert (l1.value, l1.seeds) == (pytest.approx(30), 1)  # a third of the way from 40 to 10; seed 1 starts at .3
    (less,) = evaluate_all([{**at, "where": {"penalty": "sqrt"}, "versus": {"where": {"penalty": "l1"}}}], *both)
    assert (less.value, less.low, less.seeds) == (pytest.approx(-22), pytest.approx(-22), 1)
    assert "the mean number of live latents at FVU 0.2, less that of the points" in less.sentence
    (none,) = evaluate_all([{**at, "at": {"fvu": 0.05}, "where": {}}], *both)
    assert none.sentence.endswith("undecided, since nothing reaches FVU 0.05.")


def test_the_untrained_value_is_the_same_number_on_the_same_points(tmp_path: Path) -> None:
    found = verdict(tmp_path, {(16, 0): [16, 12]}, measure="fvu", aggregate="max", at_least=None, at_most=0.2)
    assert (found.value, found.untrained) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 3),
        ({"where": {"width": [16, 8]}}, 2.5),
        ({"versus": {"where": {"width": 8}}}, 1),
        ({"measure": "owned_maxes - label_mq"}, -4),
        ({"measure": "structure_cosine", "at_least": 0.5}, 0.125),
        ({"measure": "owned_maxes", "at": {"fvu": 0.2}}, 3),
        ({"measure": "loss"}, None),  # knows no labels
        ({"measure": "owned_maxes - loss"}, None),
        ({"measure": "mcc", "at_least": 0.5}, None),  # not measured on this toy
    ],
)
def test_the_shuffled_value_is_the_same_number_of_the_nulls(tmp_path: Path, change, expected: float | None) -> None:
    metrics = {"fvu": 0.2, "owned_maxes": 16, "label_mq": 16, "structure_cosine": 0.75, "structure_cosine_null": 0.125}
    results = [
        (point(width=width), {**metrics, "shuffled_owned_maxes": by_chance, "shuffled_label_mq": 7})
        for width, by_chance in ((16, 3), (8, 2))
    ]
    found = evaluate({**CLAIM, **change}, *tables(sweep(tmp_path, results), "quick"))
    assert found.shuffled == expected
    assert ("labels shuffled" in found.sentence) == (expected is not None)


def test_numbers_are_short() -> None:
    assert [number(x) for x in (16.0, 0.012345, 12345.6, 1.0e7, -0.5, None, float("nan"))] == [
        "16",
        "0.0123",
        "12346",
        "10000000",
        "-0.5",
        "–",
        "–",
    ]
