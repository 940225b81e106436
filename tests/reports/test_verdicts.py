"""Verdicts on claims over tables planted by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fabricated import SMALL, point, sweep

from sae_sweep.config.settings import Penalty
from sae_sweep.reports import bootstrap
from sae_sweep.reports.claims import Verdict, evaluate, evaluate_all, share_still_moving
from sae_sweep.store.results import tables

CLAIM: dict[str, Any] = {
    "name": "one_per_max",
    "prediction": "At width d_vocab an SAE owns every max.",
    "measure": "owned_maxes",
    "aggregate": "median",
    "where": {"width": 16},
    "at_least": 15,
}
# Three toys, two seeds of each.
SIX = [(toy, seed) for toy in range(3) for seed in range(2)]

Numbers = dict[tuple[int, int, int], list[float | None]]


def verdict(tmp_path: Path, owned: Numbers, more: Mapping[str, Any] = {}, **claim: Any) -> Verdict:
    """On a sweep with these owned maxes by (width, toy, seed), one per coefficient; the loss falls with it. Broken
    numbers are splits per max.

    more: further metrics of every point
    """
    results = [
        (
            point(toy=toy_of(toy), width=width, seed=seed, penalty=Penalty("l1", c + 1.0)),
            {"owned_maxes": value, "label_mq": 2 * (value or 0), "loss": seed - c, "fvu": 0.1, **more}
            if value is None or value == int(value)
            else {"splits_per_max": value},
        )
        for (width, toy, seed), values in owned.items()
        for c, value in enumerate(values)
    ]
    claim = {key: value for key, value in {**CLAIM, **claim}.items() if value is not None}
    return evaluate(claim, *tables(sweep(tmp_path, results), "quick"))


def toy_of(seed: int) -> Any:
    return SMALL.replace(seed=seed)


def six(*numbers: float, width: int = 16) -> Numbers:
    """One number for each of SIX, or the same for all."""
    numbers = numbers * 6 if len(numbers) == 1 else numbers
    return {(width, *at): [number] for at, number in zip(SIX, numbers, strict=True)}


# Supported, not supported, undecided


def test_supported_if_the_interval_keeps_the_bound(tmp_path: Path) -> None:
    found = verdict(tmp_path, six(16, 15, 16, 16, 15, 16) | {(8, 0, 0): [3]})
    assert (found.verdict, found.value, found.low, found.high) == ("supported", 16, 15, 16)
    assert (found.seeds, found.toys, found.points, found.untrained) == (6, 3, 6, 0)
    assert found.interval == (15.0, 16.0)
    assert (found.nulls, found.seeds_needed, found.margin) == ({"untrained": 0, "labels shuffled": 0}, None, None)
    assert found.sentence == (
        "At width d_vocab an SAE owns every max: supported, since the median number of owned maxes is 16 "
        "(95% interval 15 to 16 over 3 toys × 2 seeds; untrained 0; labels shuffled 0), as predicted at least 15."
    )


def test_not_supported_if_all_of_it_is_on_the_other_side(tmp_path: Path) -> None:
    found = verdict(tmp_path, six(14, 12, 13, 13, 14, 14))
    assert (found.verdict, found.value, found.seeds_needed) == ("not supported", 13.5, None)
    assert found.sentence.endswith(
        "is 13.5 (95% interval 12 to 14 over 3 toys × 2 seeds; untrained 0; labels shuffled 0), "
        "not at least 15 as predicted."
    )


def test_undecided_if_it_reaches_to_both_sides(tmp_path: Path) -> None:
    found = verdict(tmp_path, six(16, 16, 16, 16, 12, 12), aggregate="mean")
    assert (found.verdict, found.interval) == ("undecided", (12.0, 16.0))
    # The mean, 14.67, is .33 below the bound, and the interval reaches 1.33 above it: 4² times the toys.
    assert found.value == pytest.approx(44 / 3)
    assert found.seeds_needed == 2 * 3 * 16
    assert found.sentence.endswith(
        "and the interval reaches to both sides of at least 15; about 96 seeds over 48 toys would decide it by the "
        "spread seen."
    )


def test_the_interval_is_that_of_the_bootstrap_over_toys_and_seeds(tmp_path: Path) -> None:
    numbers = [16.0, 14.0, 11.0, 12.0, 15.0, 9.0]
    found = verdict(tmp_path, six(*numbers), aggregate="mean")
    generator = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        drawn = [2 * toy + generator.integers(2) for toy in generator.integers(3, size=3) for _ in range(2)]
        means.append(np.mean([numbers[place] for place in drawn]))
    assert found.interval == pytest.approx([*np.quantile(means, [0.025, 0.975])], abs=0.35)


@pytest.mark.parametrize(
    ("owned", "change", "rests_on", "needed"),
    [
        ({(16, 0, 0): [16], (16, 0, 1): [16]}, {}, "on 1 toy × 2 seeds where the claim asks for 2 toys × 2 seeds", 4),
        ({(16, 0, 0): [16], (16, 1, 0): [16]}, {}, "on 2 toys × 1 seed where the claim asks for 2 toys × 2 seeds", 4),
        (six(16), {"toys": 5}, "on 3 toys × 2 seeds where the claim asks for 5 toys × 2 seeds", 10),
        (six(16), {"seeds": 3}, "on 3 toys × 2 seeds where the claim asks for 2 toys × 3 seeds", 6),
    ],
)
def test_too_few_toys_or_seeds_decide_nothing(tmp_path: Path, owned, change, rests_on: str, needed: int) -> None:
    found = verdict(tmp_path, owned, **change)
    assert (found.verdict, found.value, found.seeds_needed) == ("undecided", 16, needed)
    assert rests_on in found.sentence
    assert (found.interval is None) == (found.toys == 1)


def test_of_an_oracle_one_seed_says_all(tmp_path: Path) -> None:
    results = [
        (point(toy=toy_of(toy), width=16, init="oracle", partition="m"), {"owned_maxes": 16}) for toy in range(3)
    ]
    both = tables(sweep(tmp_path, results), "quick")
    assert evaluate(CLAIM, *both).verdict == "supported"
    results += [
        (point(toy=toy_of(toy), width=16, init="kmeans", seed=seed), {"owned_maxes": 12 + seed}) for toy, seed in SIX
    ]
    both = tables(sweep(tmp_path / "two", results), "quick")
    apart = {**CLAIM, "where": {"init": "oracle"}, "versus": {"where": {"init": "kmeans"}}, "at_least": 2}
    found = evaluate(apart, *both)
    assert (found.verdict, found.value, found.seeds, found.low, found.high) == ("supported", 3.5, 6, 3, 4)


@pytest.mark.parametrize(
    ("owned", "change", "why"),
    [
        ({(8, 0, 0): [16]}, {}, "no finished point matches it"),
        ({}, {}, "no finished point matches it"),
        ({(16, 0, 0): [None]}, {}, "its measure is null there"),
        ({(16, 0, 0): [16]}, {"measure": "owned_max"}, "this sweep has no column owned_max"),
        ({(16, 0, 0): [16]}, {"where": {"training.lr": 1}}, "this sweep has no column training.lr"),
        ({(16, 0, 0): [16]}, {"versus": {"where": {"width": 9}}}, "no finished point matches it"),
        ({(16, 0, 0): [16], (8, 1, 0): [3]}, {"versus": {"where": {"width": 8}}}, "no toy is on both sides"),
    ],
)
def test_undecided_when_nothing_was_measured(tmp_path: Path, owned, change, why: str) -> None:
    found = verdict(tmp_path, owned, **change)
    assert (found.verdict, found.value, found.points, found.interval) == ("undecided", None, 0, None)
    assert found.sentence.endswith(f"undecided, since {why}.")


# What is compared


@pytest.mark.parametrize(
    ("change", "value", "expected"),
    [
        ({"aggregate": "mean"}, 13, "not supported"),
        ({"aggregate": "min"}, 10, "not supported"),
        ({"aggregate": "max"}, 16, "supported"),
        ({"aggregate": "max", "at_least": None, "at_most": 15}, 16, "not supported"),
        ({"aggregate": "share", "threshold": 13, "at_least": 0.6}, 2 / 3, "supported"),
        ({"at_least": None, "at_most": 14, "measure": "label_mq - owned_maxes", "aggregate": "min"}, 10, "supported"),
        ({"at_least": None, "at_most": 12}, 13, "not supported"),
        ({"measure": "label_mq - owned_maxes", "at_least": 13}, 13, "supported"),
        ({"where": {"sae.width": [16, 17], "partition": None}, "at_least": 13}, 13, "supported"),
        ({"where": {"width": 16, "coefficient": [1, 3.0]}, "at_least": 13}, 13, "supported"),
        ({"where": {}, "at_least": 12}, 11.5, "not supported"),
        ({"versus": {"where": {"width": 8}}, "at_least": 9}, 9, "supported"),
    ],
)
def test_every_way_to_state_a_claim(tmp_path: Path, change, value: float, expected: str) -> None:
    owned: Numbers = {(16, *at): [10, 13, 16] for at in SIX} | {(8, *at): [4] for at in SIX}
    found = verdict(tmp_path, owned, **change)
    assert (found.value, found.verdict) == (pytest.approx(value), expected)


def test_a_comparison_is_made_toy_by_toy_and_seed_by_seed(tmp_path: Path) -> None:
    """Toys differ by far more than the two sides do; what is drawn for one side is drawn for the other."""
    high = six(20, 21, 40, 41, 60, 61)
    low = {(8, toy, seed): [number - 8] for (_, toy, seed), (number,) in high.items()}  # type: ignore[operator]
    found = verdict(tmp_path, high | low, versus={"where": {"width": 8}}, at_least=8, aggregate="mean")
    assert (found.verdict, found.value, found.low, found.high, found.seeds) == ("supported", 8, 8, 8, 6)
    assert found.interval == (pytest.approx(8), pytest.approx(8))
    assert "the mean number of owned maxes, less that of the points compared with, is 8" in found.sentence


def test_seeds_that_only_one_side_has_do_not_move_the_interval_of_single_seeds(tmp_path: Path) -> None:
    owned = six(16, 12, 16, 12, 16, 12) | {(8, *at): [n] for at, n in zip(SIX, [8, 4, 8, 4, 8, 4], strict=True)}
    owned |= {(8, toy, 2): [1] for toy in range(3)}
    found = verdict(tmp_path, owned, versus={"where": {"width": 8}}, at_least=8)
    assert (found.value, found.low, found.high, found.seeds) == (10, 8, 8, 6)


def test_the_best_of_the_seeds_is_taken_for_each_setting_and_toy(tmp_path: Path) -> None:
    results = []
    for toy, by_seed in enumerate([{0: (2.0, 12), 1: (1.0, 16)}, {0: (5.0, 15), 1: (6.0, 9)}]):
        for seed, (loss, owned) in by_seed.items():
            results.append((point(toy=toy_of(toy), width=16, seed=seed), {"loss": loss, "owned_maxes": owned}))
    both = tables(sweep(tmp_path, results), "quick")
    (every, best) = evaluate_all({"claims": [CLAIM, {**CLAIM, "best_of_seeds": True}]}, *both)
    assert (every.value, every.points, every.seeds) == (13.5, 4, 4)
    assert (best.value, best.low, best.points, best.seeds) == (15.5, 15, 4, 2)
    # A resample may hold the worse seed of a toy alone, whose best it then is.
    assert best.interval is not None and best.interval[0] < 13


def test_a_measure_is_read_off_each_ladder_at_a_level(tmp_path: Path) -> None:
    ladders = {  # (penalty, seed): (coefficient, fvu, live latents) in whatever order
        ("l1", 0): [(1.0, 0.4, 10), (0.5, 0.1, 40), (2.0, 0.8, 2)],
        ("l1", 1): [(0.5, 0.3, 6), (1.0, 0.5, 4)],
        ("sqrt", 0): [(0.5, 0.2, 8)],  # on the level itself
        ("sqrt", 1): [(0.5, 0.3, 7), (1.0, 0.9, 1)],  # never as low as the level
    }
    results = [
        (point(toy=toy_of(toy), seed=seed, penalty=Penalty(penalty, c)), {"fvu": fvu, "live_latents": live + toy})
        for (penalty, seed), points in ladders.items()
        for c, fvu, live in points
        for toy in range(2)
    ]
    both = tables(sweep(tmp_path, results, varied=["penalty.name", "penalty.coefficient"]), "quick")
    at = {**CLAIM, "measure": "live_latents", "aggregate": "mean", "at": {"fvu": 0.2}}
    (l1,) = evaluate_all({"claims": [{**at, "where": {"penalty": "l1"}}]}, *both)
    assert (l1.value, l1.seeds) == (pytest.approx(30.5), 2)  # a third of the way from 40 to 10; seed 1 starts at .3
    (less,) = evaluate_all(
        {"claims": [{**at, "where": {"penalty": "sqrt"}, "versus": {"where": {"penalty": "l1"}}}]}, *both
    )
    assert (less.value, less.low, less.seeds) == (pytest.approx(-22), pytest.approx(-22), 2)
    assert "the mean number of live latents at FVU 0.2, less that of the points" in less.sentence
    (none,) = evaluate_all({"claims": [{**at, "at": {"fvu": 0.05}, "where": {}}]}, *both)
    assert none.sentence.endswith("undecided, since nothing reaches FVU 0.05.")


# Nulls


def test_what_is_not_beyond_its_nulls_is_not_supported(tmp_path: Path) -> None:
    """The untrained starts have FVU .9 (tests/fabricated.py), and 16 maxima are owned with labels shuffled."""
    found = verdict(tmp_path, six(16), more={"shuffled_owned_maxes": 16})
    assert (found.verdict, found.seeds_needed) == ("undecided", None)
    vain = "not beyond labels shuffled, so that no number of toys would decide it."
    assert found.sentence.endswith(f"at least 15 as predicted, but {vain}")
    above = verdict(tmp_path / "above", six(16), more={"shuffled_owned_maxes": 15.9})
    assert above.verdict == "supported"
    fvu = {"measure": "fvu", "at_least": None}
    assert verdict(tmp_path / "fvu", six(16), at_most=0.2, **fvu).verdict == "supported"
    worse = verdict(tmp_path / "worse", six(16), more={"fvu": 0.9}, at_most=0.95, **fvu)
    assert (worse.verdict, worse.untrained) == ("undecided", 0.9)


def test_seeds_may_bring_it_beyond_a_null(tmp_path: Path) -> None:
    found = verdict(tmp_path, six(16, 16, 18, 18, 20, 20), more={"shuffled_owned_maxes": 17}, aggregate="mean")
    # 18 on average, 1 above the null, and the interval reaches down to 16.67 or lower.
    assert (found.verdict, found.value) == ("undecided", 18)
    assert found.interval is not None and found.seeds_needed is not None
    assert found.seeds_needed == 2 * bootstrap.toys_needed(3, 18 - found.interval[0], 1.0)
    assert "not beyond labels shuffled; about" in found.sentence


def test_losses_of_two_settings_are_not_held_against_their_untrained_difference(tmp_path: Path) -> None:
    results = [
        (point(toy=toy_of(toy), width=width, seed=seed), {"loss": loss, "owned_maxes": 20 - int(loss)})
        for width, loss in ((16, 2.0), (8, 3.0))
        for toy, seed in SIX
    ]
    trained, untrained = tables(sweep(tmp_path, results), "quick")
    untrained["loss"] = untrained["width"] * 100.0 - 3000  # the wider starts 800 above
    untrained["owned_maxes"] = untrained["width"]  # and 8 maxima ahead
    claim = {**CLAIM, "versus": {"where": {"width": 8}}, "measure": "loss", "at_most": -0.5}
    del claim["at_least"]
    assert evaluate(claim, trained, untrained).verdict == "supported"
    more = {**CLAIM, "versus": {"where": {"width": 8}}, "at_least": 1}
    assert evaluate(more, trained, untrained).verdict == "undecided"  # 1 more trained, 8 more before
    untrained["owned_maxes"] = 3
    assert evaluate(more, trained, untrained).verdict == "supported"


def test_a_claim_that_nothing_is_found_need_not_find_less_than_its_nulls(tmp_path: Path) -> None:
    found = verdict(tmp_path, six(1), at_least=None, at_most=4)
    assert (found.verdict, found.nulls) == ("supported", {"untrained": 0, "labels shuffled": 0})


def test_the_untrained_value_is_the_same_number_on_the_same_points(tmp_path: Path) -> None:
    found = verdict(tmp_path, six(16), measure="fvu", aggregate="max", at_least=None, at_most=0.2)
    assert (found.value, found.untrained) == (pytest.approx(0.1), pytest.approx(0.9))


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
    assert found.nulls.get("labels shuffled") == expected
    assert ("labels shuffled" in found.sentence) == (expected is not None)


# Sameness

SAME: dict[str, Any] = {
    "test": "equivalence",
    "measure": "splits_per_max",
    "aggregate": "mean",
    "at_least": None,
    "versus": {"where": {"width": 8}},
}


@pytest.mark.parametrize(
    ("difference", "margin", "expected"),
    [
        ([0.1, -0.1, 0, 0.1, -0.1, 0], 0.5, "supported"),
        ([2, 2, 2, 2, 2.1, 2.1], 0.5, "not supported"),
        ([-2, -2, -2, -2, -2.1, -2.1], 0.5, "not supported"),
        ([2.1, 2, 0.1, 0.1, -2, -2], 0.5, "undecided"),
        ([0.4, 0.4, 0.4, 0.4, 0.4, 0.4], 0.5, "supported"),
        ([0.24, 0.24, 0.24, 0.24, 0.24, 0.24], 0.1, "not supported"),  # steady, and larger than the margin
    ],
)
def test_sameness_is_an_interval_within_the_margin(tmp_path: Path, difference, margin: float, expected: str) -> None:
    owned = six(*(10.25 + d for d in difference)) | six(10.25, width=8)
    found = verdict(tmp_path, owned, **SAME, margin=margin)
    assert (found.verdict, found.margin) == (expected, margin)
    assert f"the same within {margin}" in found.sentence
    assert (found.seeds_needed is None) == (expected != "undecided")


@pytest.mark.parametrize(
    ("published", "margin", "expected"),
    [(10, 0.5, "supported"), (10.4, 0.5, "undecided"), (9, 0.5, "not supported"), (11, 0.5, "not supported")],
)
def test_a_published_number_is_met_within_the_margin(tmp_path: Path, published: float, margin: float, expected: str):
    same = {**SAME, "versus": None, "equals": published, "margin": margin}
    found = verdict(tmp_path, six(9.8, 10.2, 9.9, 10.1, 9.8, 10.2), **same)
    assert (found.verdict, found.margin) == (expected, margin)
    assert found.value == pytest.approx(10)
    assert f"{published} within 0.5" in found.sentence


def test_the_margin_is_twice_the_deviation_over_seeds_if_none_is_stated(tmp_path: Path) -> None:
    difference = [1, -1, 0.5, 0, -0.5, 0]
    found = verdict(tmp_path, six(*(10.25 + d for d in difference)) | six(10.25, width=8), **SAME)
    assert found.margin == pytest.approx(2 * np.std(difference, ddof=1))
    assert found.verdict == "supported"


# The best of a ladder


def test_the_best_of_a_ladder_has_the_strictest_interval(tmp_path: Path) -> None:
    """The same numbers on one rung alone, and as the best of eight: the interval is that of 1 − .05/8."""
    numbers = [10, 12, 3, 5, 20, 17, 9, 15]
    places = [(toy, seed) for toy in range(4) for seed in range(2)]
    alone: Numbers = {(16, *at): [n] for at, n in zip(places, numbers, strict=True)}
    more = {**CLAIM, "aggregate": "max", "at_least": 5}
    one = verdict(tmp_path, alone, **more)
    eight = verdict(tmp_path / "8", {at: [n, *[n - 3] * 7] for at, (n,) in alone.items()}, **more)  # type: ignore[operator]
    assert one.interval is not None and eight.interval is not None
    assert one.value == eight.value == pytest.approx(np.mean(numbers))
    assert eight.interval[0] < one.interval[0] and eight.interval[1] > one.interval[1]
    values = np.array(numbers, dtype=float).reshape(4, 2, 1)
    resampled = bootstrap.by_setting(bootstrap.Sample(values), bootstrap.draw(4, 2))[:, 0]
    assert eight.interval == pytest.approx(bootstrap.interval(resampled, 1 - 0.05 / 8))
    assert "corrected for the choice among 8 settings" in eight.sentence
    assert "corrected" not in one.sentence


def test_a_ladder_supports_if_its_best_does_and_fails_if_all_do(tmp_path: Path) -> None:
    most = {"aggregate": "max"}
    assert verdict(tmp_path / "a", {(16, *at): [3, 16, 5] for at in SIX}, **most).verdict == "supported"
    assert verdict(tmp_path / "b", {(16, *at): [3, 14, 5] for at in SIX}, **most).verdict == "not supported"
    wide = {(16, toy, seed): [3, 14, 8 + 6 * toy] for toy, seed in SIX}
    assert verdict(tmp_path / "c", wide, **most).verdict == "undecided"  # the third has 8, 14 and 20


def test_none_of_a_ladder_asks_it_of_all_of_them(tmp_path: Path) -> None:
    none = {"aggregate": "max", "at_least": None, "measure": "label_mq - owned_maxes"}
    nothing = verdict(tmp_path / "a", {(16, *at): [3, 1, 2] for at in SIX}, **none, at_most=4)
    assert (nothing.value, nothing.interval) == (3, (3, 3))
    assert "corrected" not in nothing.sentence
    assert verdict(tmp_path / "b", {(16, *at): [3, 5, 2] for at in SIX}, **none, at_most=4).verdict == "not supported"


def test_the_best_of_one_ladder_is_compared_with_the_best_of_the_other(tmp_path: Path) -> None:
    owned: Numbers = {(16, *at): [3, 9, 5] for at in SIX} | {(8, *at): [4, 2, 1] for at in SIX}
    sides = {"aggregate": "max", "versus": {"where": {"width": 8}}}
    assert verdict(tmp_path, owned, **sides, at_least=5).value == 5  # 9 − 4
    lowest = verdict(tmp_path / "min", owned, **{**sides, "aggregate": "min"}, at_least=2)
    assert (lowest.value, lowest.verdict) == (2, "supported")  # 3 − 1
    assert "corrected for the choice among 3 settings" in lowest.sentence  # that of the other side favours it


def test_a_setting_that_most_toys_lack_is_not_chosen(tmp_path: Path) -> None:
    owned: Numbers = {(16, *at): [3, None] for at in SIX}
    owned[16, 0, 0] = [3, 16]
    assert verdict(tmp_path, owned, aggregate="max").value == 3


# Still moving


def test_a_verdict_says_how_many_of_its_points_still_move(tmp_path: Path) -> None:
    results = [(point(toy=toy_of(toy), width=16, seed=seed), {"owned_maxes": 16}) for toy, seed in SIX]
    trained, untrained = tables(sweep(tmp_path, results), "quick")
    assert evaluate(CLAIM, trained, untrained).share_still_moving is None
    trained["plateau"] = [0.05, 0.021, 0.019, -0.5, np.nan, np.nan]
    found = evaluate(CLAIM, trained, untrained)
    assert found.share_still_moving == share_still_moving(trained) == 0.5
    assert found.sentence.endswith(
        "as predicted at least 15. Twice the steps would lower the loss of 50% of its SAEs by more than 2%."
    )
    trained["plateau"] = 0.01
    assert evaluate(CLAIM, trained, untrained).sentence.endswith("as predicted at least 15.")
    assert share_still_moving(pd.DataFrame()) is None


# A toy that has not learnt


def test_a_verdict_warns_of_a_toy_that_answers_too_little_right(tmp_path: Path) -> None:
    results = [
        (point(toy=toy_of(toy), width=16, seed=seed), {"owned_maxes": 16, "toy_accuracy": 0.9 + 0.0999 * (toy > 0)})
        for toy, seed in SIX
    ]
    both = tables(sweep(tmp_path, results), "quick")
    (warned,) = evaluate_all({"claims": [CLAIM]}, *both)
    assert (warned.verdict, warned.toy_accuracy) == ("supported", 0.9)
    assert warned.warning == "A toy answers only 90% of its inputs right, less than toy.least_accuracy=0.99."
    assert warned.sentence.endswith(f"as predicted at least 15. {warned.warning}")
    # Its other toys are right on 99.99%.
    (other,) = evaluate_all({"claims": [{**CLAIM, "where": {"width": 16, "toy_seed": [1, 2]}}]}, *both)
    assert (other.toy_accuracy, other.warning) == (pytest.approx(0.9999), "")
    (content,) = evaluate_all({"claims": [CLAIM], "least_accuracy": 0.9}, *both)
    assert content.warning == "" and content.sentence.endswith("as predicted at least 15.")
    (early,) = evaluate_all({"claims": [CLAIM]}, *(each.drop(columns="toy_accuracy", errors="ignore") for each in both))
    assert (early.toy_accuracy, early.warning) == (None, "")


def test_a_verdict_has_the_users_names_but_in_the_prediction(tmp_path: Path) -> None:
    results = [(point(toy=toy_of(toy), width=16, seed=seed), {"owned_maxes": 16}) for toy, seed in SIX]
    both = tables(sweep(tmp_path, results), "quick")
    (found,) = evaluate_all({"claims": [CLAIM], "factors": ["letter"]}, *both)
    assert found.sentence.startswith("At width d_vocab an SAE owns every max: supported, since the median")
    assert "number of owned values of letter is 16" in found.sentence
