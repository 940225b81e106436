"""Shuffled labels: planted SAEs lose what they had, and what was dealt is dealt fairly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import Planted

from sae_sweep.config.columns import shuffled, spread
from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics import nulls
from sae_sweep.metrics.class_scores import Fits
from sae_sweep.metrics.evaluation_classes import FINER_THAN_M
from sae_sweep.metrics.firing import FiringTable
from sae_sweep.metrics.ground_truth import MEASURES, Detection, planted_metrics
from sae_sweep.metrics.information import TOLD, information
from sae_sweep.metrics.labels import ACROSS, WITHIN, count, describe, only_one
from sae_sweep.metrics.nulls import shuffled_cells, shuffled_features, summary
from sae_sweep.metrics.partitions import partition

EVALUATION = Evaluation()
TOY = Planted(8, 4)
CELLS = TOY.cells
MAXIMA = partition(CELLS, "m").of_cell
CLASSES = TOY.classes(EVALUATION)


def measured(table: FiringTable) -> dict[str, float | int | None]:
    counts = only_one(count(describe(table, CLASSES), CLASSES).metrics)
    return counts | information(table, CELLS, 5) | shuffled_cells(table, CLASSES)


@pytest.mark.parametrize(
    ("split", "factor"), [("mq", "query"), ("mn", "runner_up"), ("mqn", "query"), ("mqnc", "runner_up")]
)
def test_a_perfect_split_is_none_by_chance(split: str, factor: str) -> None:
    found = measured(TOY.table(TOY.one_per(split)))
    assert found["splits_per_max"] >= 3 and found[f"info_{factor}"] == pytest.approx(1)
    # Of maxima 0 to 2, with 1, 15 and 65 inputs, some class may be hit.
    assert found["shuffled_distinct_splits_per_max"] <= found["shuffled_splits_per_max"] <= 0.5
    assert found["shuffled_split_maxes"] <= 1
    assert abs(found[f"shuffled_info_{factor}"]) < 0.1
    assert {name for name in found if name.startswith("shuffled_")} == {
        of(name) for of in (shuffled, spread) for name in (*WITHIN, *ACROSS, *TOLD)
    }


def test_latents_of_whole_maxima_own_none_by_chance_and_copies_are_no_duplicates() -> None:
    found = measured(TOY.table(np.repeat(TOY.one_per("m"), 3, axis=1)))
    assert (found["owned_maxes"], found["duplicates_per_max"]) == (8, 2)
    assert found["shuffled_duplicates_per_max"] == found["shuffled_label_m"] == 0
    # Maximum 0 is one input: wherever that comes to lie, its three latents are pure.
    assert (found["shuffled_owned_maxes"], found["shuffled_pure_latents"]) == (1, 3)


def test_a_latent_of_a_query_alone_has_its_name_by_no_chance() -> None:
    found = measured(TOY.table(TOY.one_per("q")))
    assert found["label_q"] == 8 and found["shuffled_label_q"] == 0


@pytest.mark.parametrize("distribution", ["max_stratified", "cell_stratified"])
def test_latents_that_can_fit_nothing_are_left_out_for_speed_alone(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, rng = Planted(6, 3, distribution), np.random.default_rng(0)
    told = np.concatenate([toy.one_per("mq"), toy.one_per("m"), toy.one_per("n")], 1)
    noise = rng.random(told.shape) < rng.choice([0, 0.01, 0.1], told.shape[1])
    table = toy.table(((told + noise) * rng.exponential(1.0, told.shape)).astype(np.float32))
    maxima, classes = toy.cells.factors["m"].astype(np.int64), toy.classes(Evaluation(permutations=5))
    asked = table, maxima, FINER_THAN_M, classes
    may = nulls._may_fit(nulls._draws(table, maxima, 5), nulls._units(table, maxima), classes.evaluation)
    assert 0 < may.sum() < table.width
    found = nulls.permuted_counts(*asked)
    monkeypatch.setattr(nulls, "_may_fit", lambda draws, *_: np.ones(len(draws.times), np.bool_))
    wanted = nulls.permuted_counts(*asked)
    for name in WITHIN:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert np.sum(wanted["splits_per_max"]) > 0


def drawn(table: FiringTable, group: np.ndarray, latent: int, times: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell, weight and mass of every input that a latent is permuted to, permutation by permutation [times, inputs]."""
    units, draws = nulls._units(table, group), nulls._draws(table, group, times)
    taken, room = units.cell.copy(), nulls.Drawn.room(draws)
    rows = []
    for number in range(times):
        end = nulls._draw(latent, number, draws, units, taken, room)
        assert (taken == units.cell).all()
        rows.append([each[:end].copy() for each in (room.cell, room.weight, room.mass)])
    cell, weight, mass = (np.array(values) for values in zip(*rows, strict=True))
    return cell, weight, mass


def test_each_input_of_a_maximum_is_as_likely() -> None:
    """Counts by cell are hypergeometric: their means and variances over many permutations are as they must be."""
    codes = np.zeros((len(TOY.cell), 1), np.float32)
    codes[np.flatnonzero(TOY.factor("m") == 6)[::3]] = 2
    table = TOY.table(codes)
    cells, weight, mass = drawn(table, MAXIMA, 0, 800)
    of_max = np.flatnonzero(MAXIMA == 6)
    sizes, n = CELLS.sizes[of_max], int(table.inputs[0])
    total = sizes.sum()
    assert np.isin(cells, of_max).all() and cells.shape == (800, n)
    counts = np.stack([np.bincount(row, minlength=CELLS.count) for row in cells])[:, of_max]
    assert (counts <= sizes).all()
    mean, variance = n * sizes / total, n * sizes / total * (1 - sizes / total) * (total - n) / (total - 1)
    assert (np.abs(counts.mean(0) - mean) < 5 * np.sqrt(variance / 800)).all()
    assert counts.var(0).sum() == pytest.approx(variance.sum(), rel=0.05)
    assert weight.sum(1) == pytest.approx(table.fired[0]) and (mass == 2 * weight).all()


def test_firing_stays() -> None:
    """A latent fires on as many inputs of each group as it did, by its mean there."""
    rng = np.random.default_rng(0)
    codes = (rng.random((len(TOY.cell), 5)) * (rng.random((len(TOY.cell), 5)) < 0.1)).astype(np.float32)
    table = TOY.table(codes)
    for group in (MAXIMA, np.zeros_like(MAXIMA)):
        for latent in range(5):
            of_latent = table.latent == latent
            inputs = np.bincount(group[table.cell[of_latent]], table.count[of_latent], 8)
            cell, weight, mass = drawn(table, group, latent, 2)
            for each in cell:
                assert np.bincount(group[each], minlength=8).tolist() == inputs.tolist()
            # Within a maximum all inputs weigh the same here, so that weight and mass stay too.
            if group is MAXIMA:
                assert weight.sum(1) == pytest.approx(table.fired[latent])
                assert mass.sum(1) == pytest.approx(table.fired[latent] * table.mean_mass[latent])


def test_what_is_drawn_follows_from_where_a_latent_fires_alone() -> None:
    one, two = TOY.one_per("mq"), TOY.one_per("mq")[:, ::-1].copy()
    width = one.shape[1]
    first, second = drawn(TOY.table(one), MAXIMA, 12, 3)[0], drawn(TOY.table(two), MAXIMA, width - 13, 3)[0]
    assert (first == second).all()
    assert len({tuple(sorted(row)) for row in first.tolist()}) == 3
    other = one.copy()
    other[np.flatnonzero(other[:, 12])[0], 12] = 0
    assert not (drawn(TOY.table(other), MAXIMA, 12, 1)[0][0, :3] == first[0, :3]).all()


def test_a_latent_of_many_inputs_is_permuted_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its permutations stand for several, so that every trial has all latents."""
    table = TOY.table(TOY.one_per("mq"))
    draws = nulls._draws(table, MAXIMA, 20)
    assert draws.times.tolist() == np.clip(512 // table.inputs, 1, 20).tolist()
    assert set(draws.times) > {20} and min(draws.times) < 20
    fits = Fits.room(3)
    fits.fired[:] = [1, 2, 3]
    # Latent 4 has two permutations, of which the second fits; latent 7 has three, of which two do.
    times = np.zeros(8, np.int64)
    times[[4, 7]] = 2, 3
    found, latent, trial = nulls._all_trials((fits, np.array([4, 7, 7]), np.array([1, 0, 2])), times, 7)
    rows = sorted(zip(latent.tolist(), trial.tolist(), found.fired.tolist(), strict=True))
    assert rows == [(4, 1, 1), (4, 3, 1), (4, 5, 1), (7, 0, 2), (7, 2, 3), (7, 3, 2), (7, 5, 3), (7, 6, 2)]
    # Of all latents permuted anew, the null is what it is.
    before = shuffled_cells(table, CLASSES)
    monkeypatch.setattr(nulls, "DRAWN_INPUTS", 1 << 30)
    after = shuffled_cells(table, CLASSES)
    for name in ("pure_mq", "pure_mc", "found_mqn"):
        error = 4 * np.hypot(before[spread(name)], after[spread(name)]) / np.sqrt(20)
        assert abs(before[shuffled(name)] - after[shuffled(name)]) <= error + 1e-9


def test_a_null_is_a_mean_beside_its_spread() -> None:
    found = summary({"label_mq": np.array([1, 2, 6]), "info_query": [0.5, None], "unique_query": None})
    assert found["shuffled_label_mq"] == 3 and found["shuffled_label_mq_sd"] == pytest.approx(7**0.5)
    assert found["shuffled_info_query"] is found["shuffled_unique_query_sd"] is None
    assert summary({"label_m": np.array([4])}) == {"shuffled_label_m": 4, "shuffled_label_m_sd": None}


def test_small_latents_are_pure_by_chance_as_often_as_can_be_counted() -> None:
    """A latent on two inputs of maximum 7 is pure in a query where both have the same one."""
    codes = np.zeros((len(TOY.cell), 200), np.float32)
    inputs = np.flatnonzero(TOY.factor("m") == 7)
    rng = np.random.default_rng(0)
    for latent in range(200):
        codes[rng.choice(inputs, 2, replace=False), latent] = 1
    found = shuffled_cells(TOY.table(codes), CLASSES)
    sizes = np.bincount(TOY.factor("q")[inputs])
    chance = (sizes * (sizes - 1)).sum() / (len(inputs) * (len(inputs) - 1))
    assert found["shuffled_pure_mq"] == pytest.approx(200 * chance, rel=0.1)
    assert found["shuffled_pure_mq_sd"] == pytest.approx((200 * chance * (1 - chance)) ** 0.5, rel=0.5)


def test_an_sae_that_never_fires() -> None:
    found = shuffled_cells(TOY.table(np.zeros((len(TOY.cell), 3), np.float32)), CLASSES)
    assert found["shuffled_splits_per_max"] == found["shuffled_owned_maxes"] == 0


def test_planted_features_and_turned_directions() -> None:
    """Twenty features of 1,000 inputs each, found perfectly, along rows that are their directions."""
    features = 20
    detection = Detection(
        1000 * np.eye(features, dtype=np.int64), np.full(features, 1000), np.full(features, 1000), 20_000
    )
    directions = torch.eye(64)[:features]
    arguments = detection, directions.clone(), directions, np.ones(features, bool)
    true, by_chance = planted_metrics(*arguments, 0.8), shuffled_features(*arguments, EVALUATION)
    assert set(by_chance) == {of(name) for of in (shuffled, spread) for name in MEASURES}
    assert (true["mcc"], true["found_features"], true["killed_features"]) == (pytest.approx(1), features, 0)
    # The mean of the largest |cos| that a matching of random directions in 64 numbers finds.
    assert 0.15 < by_chance["shuffled_mcc"] < 0.4
    assert (by_chance["shuffled_found_features"], by_chance["shuffled_killed_features"]) == (0, features)
    assert by_chance["shuffled_feature_f1"] == pytest.approx(1 / features, abs=0.03)


def test_latents_hit_common_features_as_often_as_chance_has_it() -> None:
    """Features that three quarters of the inputs have, latents on a twentieth of them; the last latent is dead."""
    features = 4
    fired, active = np.full(features, 1_000), np.full(features, 15_000)
    detection = Detection(1_000 * np.eye(features, dtype=np.int64), fired, active, 20_000)
    live = np.arange(features) < 3
    rows, evaluation = torch.eye(8)[:features], Evaluation(f1=0.09)
    found = [shuffled_features(detection, rows, rows, live, evaluation) for _ in "ab"]
    assert found[0] == found[1]
    assert found[0]["shuffled_feature_precision"] == pytest.approx(0.75, abs=0.02)
    assert found[0]["shuffled_feature_recall"] == pytest.approx(0.05, abs=0.002)
    assert found[0]["shuffled_found_features"] == features
    dead = shuffled_features(detection, rows, rows, live & False, evaluation)
    assert (dead["shuffled_found_features"], dead["shuffled_killed_features"]) == (0, features)
