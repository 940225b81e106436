"""The hierarchical bootstrap against a loop that draws by hand, and against scipy where there is one level alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sae_sweep.reports import bootstrap
from sae_sweep.reports.bootstrap import Sample, by_setting, draw, holm_levels, interval, over_all

# Three toys with 2, 3 and 1 seeds, in two settings; one number was not measured.
RAGGED = np.full((3, 3, 2), np.nan)
RAGGED[0, :2] = [[1, 10], [2, np.nan]]
RAGGED[1, :3] = [[3, 30], [4, 40], [5, 50]]
RAGGED[2, :1] = [[6, 60]]


def drawn_by_hand(values: np.ndarray, draws: bootstrap.Draws, resample: int) -> list[list[list[float]]]:
    """[toy drawn][seed drawn] -> its settings, one after the other."""
    found = []
    for slot, toy in enumerate(draws.toys[resample]):
        rows = [row for row in values[toy] if not np.isnan(row).all()]
        found.append([[*rows[int(place * len(rows))]] for place in draws.places[resample, slot][: len(rows)]])
    return found


@pytest.mark.parametrize("numbers", [1, bootstrap.NUMBERS])
@pytest.mark.parametrize(
    ("aggregate", "by_hand"),
    [
        (bootstrap.mean, np.nanmean),
        (bootstrap.median, np.nanmedian),
        (bootstrap.share(5), lambda row: np.mean([x >= 5 for x in row if not np.isnan(x)])),
    ],
)
def test_resamples_are_those_of_a_loop(monkeypatch, numbers: int, aggregate, by_hand) -> None:
    monkeypatch.setattr(bootstrap, "NUMBERS", numbers)
    draws = draw(3, 3, resamples=200)
    found = over_all(Sample(RAGGED), draws, aggregate)
    for i in range(200):
        pooled = [x for toy in drawn_by_hand(RAGGED, draws, i) for row in toy for x in row]
        assert found[i] == pytest.approx(by_hand(pooled), nan_ok=True)
    for i, means in enumerate(by_setting(Sample(RAGGED), draws)):
        rows = [row for toy in drawn_by_hand(RAGGED, draws, i) for row in toy]
        assert [*means] == pytest.approx([*np.nanmean(rows, axis=0)], nan_ok=True)


def test_the_best_seed_is_chosen_anew_in_every_resample() -> None:
    values = np.array([[[16.0], [3.0], [9.0]], [[15.0], [14.0], [2.0]]])
    losses = np.array([[[1.0], [2.0], [3.0]], [[7.0], [5.0], [6.0]]])
    draws = draw(2, 3, resamples=300)
    found = over_all(Sample(values, losses), draws, bootstrap.mean)
    for i in range(300):
        best = []
        for slot, toy in enumerate(draws.toys[i]):
            seeds = [int(3 * place) for place in draws.places[i, slot]]
            best.append(values[toy, min(seeds, key=lambda seed: losses[toy, seed, 0]), 0])
        assert found[i] == pytest.approx(np.mean(best))
    assert over_all(Sample(values, losses), None, bootstrap.mean) == [15.0]


def test_the_sample_itself_counts_every_number_once() -> None:
    assert over_all(Sample(RAGGED), None, bootstrap.mean) == [np.nanmean(RAGGED)]
    assert over_all(Sample(RAGGED), None, bootstrap.median) == [np.nanmedian(RAGGED)]
    assert [*by_setting(Sample(RAGGED), None)[0]] == [3.5, 38.0]


def test_the_same_resamples_in_every_call() -> None:
    first, second = draw(5, 2), draw(5, 2)
    assert np.array_equal(first.toys, second.toys)
    assert np.array_equal(first.places, second.places)
    assert first.toys.shape == (bootstrap.RESAMPLES, 5)


def test_with_one_seed_each_it_is_the_bootstrap_of_scipy() -> None:
    numbers = np.random.default_rng(1).normal(size=12)
    ours = interval(over_all(Sample(numbers[:, None, None]), draw(12, 1), bootstrap.mean))
    scipys = stats.bootstrap((numbers,), np.mean, n_resamples=20_000, method="percentile", rng=0)
    assert ours == pytest.approx([*scipys.confidence_interval], abs=0.03)


def test_seeds_that_agree_within_toys_do_not_narrow_the_interval() -> None:
    """Ten copies of each toy's number say no more than one: the toys are what varies."""
    toys = np.arange(6.0)
    one = interval(over_all(Sample(toys[:, None, None]), draw(6, 1), bootstrap.mean))
    ten = interval(over_all(Sample(np.repeat(toys[:, None, None], 10, axis=1)), draw(6, 10), bootstrap.mean))
    assert one == pytest.approx(ten, abs=0.1)
    pooled = interval(over_all(Sample(np.repeat(toys, 10)[:, None, None]), draw(60, 1), bootstrap.mean))
    assert pooled[1] - pooled[0] < (ten[1] - ten[0]) / 2


def test_numbers_that_all_agree_have_an_interval_of_no_width() -> None:
    same = Sample(np.full((5, 2, 3), 16.0))
    assert interval(over_all(same, draw(5, 2), bootstrap.median)) == (16.0, 16.0)


def test_the_interval_is_the_middle_of_the_resamples() -> None:
    assert interval(np.arange(1001.0), 0.95) == pytest.approx((25, 975))
    assert interval(np.array([np.nan, 3.0, 3.0])) == (3.0, 3.0)
    assert all(map(math.isnan, interval(np.array([np.nan]))))


def test_median_and_mean_of_rows_leave_out_what_is_not_there() -> None:
    rows = np.array([[3, 1, 2, np.nan], [np.nan] * 4, [1, 2, 3, 4], [7, np.nan, np.nan, np.nan]])
    assert [*bootstrap.median(rows)] == pytest.approx([2, np.nan, 2.5, 7], nan_ok=True)
    assert [*bootstrap.mean(rows)] == pytest.approx([2, np.nan, 2.5, 7], nan_ok=True)


def test_holm_gives_the_strongest_rung_the_strictest_level() -> None:
    assert holm_levels([0.2, 0.9, 0.5]) == pytest.approx([0.95, 1 - 0.05 / 3, 1 - 0.05 / 2])
    assert holm_levels([1.0]) == pytest.approx([0.95])


def test_a_ladder_of_nothing_is_rarely_taken_for_something() -> None:
    """Of 8 rungs without an effect the strongest seems to have one at 95% far more often than at Holm's level."""
    generator = np.random.default_rng(0)
    plain = corrected = 0
    draws = draw(20, 1, resamples=500)
    for _ in range(60):
        rungs = by_setting(Sample(generator.normal(size=(20, 1, 8))), draws)
        evidence = (rungs > 0).mean(axis=0)
        best = int(evidence.argmax())
        plain += interval(rungs[:, best])[0] > 0
        corrected += interval(rungs[:, best], holm_levels([*evidence])[best])[0] > 0
    assert plain > 3 * corrected


@pytest.mark.parametrize(
    ("toys", "half_width", "distance", "expected"),
    [(5, 2.0, 1.0, 20), (5, 1.0, 1.0, 6), (5, 3.0, 2.0, 12), (5, 1.0, 0.0, None), (5, 1.0, -1.0, None)],
)
def test_toys_needed(toys: int, half_width: float, distance: float, expected: int | None) -> None:
    assert bootstrap.toys_needed(toys, half_width, distance) == expected
