"""Shuffled labels: planted SAEs lose what they had, and what was dealt is dealt fairly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from planted import Planted

from sae_sweep.config.columns import ACROSS, PLANTED, WITHIN, shuffled
from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics import nulls
from sae_sweep.metrics.firing import FiringTable, fold_dense
from sae_sweep.metrics.ground_truth import Detection, planted_metrics
from sae_sweep.metrics.information import information
from sae_sweep.metrics.labels import count_splits, describe
from sae_sweep.metrics.nulls import dealt, shuffled_cells, shuffled_features
from sae_sweep.metrics.partitions import partition

EVALUATION = Evaluation()
TOY = Planted(8, 4)
CELLS = TOY.cells
MAXIMA = partition(CELLS, "m").of_cell
FOLD = fold_dense(CELLS, TOY.chance, EVALUATION.f1)


def measured(table: FiringTable) -> dict[str, float | int | None]:
    counts = count_splits(describe(table, CELLS, EVALUATION), CELLS, EVALUATION).metrics
    return counts | information(table, CELLS, 5) | shuffled_cells(table, CELLS, EVALUATION, FOLD)


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
    assert {name for name in found if name.startswith("shuffled_")} == set(map(shuffled, (*WITHIN, *ACROSS)))


def test_latents_of_whole_maxima_own_none_by_chance_and_copies_are_no_duplicates() -> None:
    found = measured(TOY.table(np.repeat(TOY.one_per("m"), 3, axis=1)))
    assert (found["owned_maxes"], found["duplicates_per_max"]) == (8, 2)
    assert found["shuffled_owned_maxes"] == found["shuffled_duplicates_per_max"] == 0
    assert found["shuffled_pure_latents"] == found["shuffled_label_m"] == 0


def test_a_latent_of_a_query_alone_has_its_name_by_no_chance() -> None:
    found = measured(TOY.table(TOY.one_per("q")))
    assert found["label_q"] == 8 and found["shuffled_label_q"] == 0


def halves() -> np.ndarray:
    """Eight hundred latents on the same third of the inputs of maximum 6, by 2."""
    fires = np.flatnonzero(TOY.factor("m") == 6)[::3]
    codes = np.zeros((len(TOY.cell), 800), np.float32)
    codes[fires] = 2
    return codes


def test_each_input_of_a_maximum_is_as_likely() -> None:
    """Counts by cell are hypergeometric: their means and variances over many latents are as they must be."""
    table = TOY.table(halves())
    found = dealt(table, MAXIMA, FOLD)
    of_max = np.flatnonzero(MAXIMA == 6)
    sizes, n = CELLS.sizes[of_max], int(table.inputs[0])
    total = sizes.sum()
    assert np.isin(found.cell, of_max).all()
    counts = np.zeros((800, CELLS.count))
    counts[found.latent, found.cell] = found.count
    counts = counts[:, of_max]
    assert (counts.sum(1) == n).all() and (counts <= sizes).all()
    mean, variance = n * sizes / total, n * sizes / total * (1 - sizes / total) * (total - n) / (total - 1)
    assert (np.abs(counts.mean(0) - mean) < 5 * np.sqrt(variance / 800)).all()
    assert counts.var(0).sum() == pytest.approx(variance.sum(), rel=0.05)


def test_firing_and_weights_stay() -> None:
    rng = np.random.default_rng(0)
    codes = (rng.random((len(TOY.cell), 20)) * (rng.random((len(TOY.cell), 20)) < 0.1)).astype(np.float32)
    table = TOY.table(codes)
    for group in (MAXIMA, np.zeros_like(MAXIMA)):
        found = dealt(table, group, FOLD)
        assert (found.inputs == table.inputs).all()
        assert found.cell_weight == pytest.approx(table.cell_weight)
        tops = [np.bincount(each.top_latent + 1, each.top_count) for each in (found, table)]
        assert (tops[0] == tops[1]).all()
        order = found.latent * found.cells + found.cell
        assert (np.diff(order) > 0).all()
        pairs = [np.bincount(each.latent * 8 + group[each.cell], each.count, 160).tolist() for each in (found, table)]
        assert pairs[0] == pairs[1]
    # Within a maximum all inputs weigh the same here, so a latent's weight and mass there stay too.
    within = dealt(table, MAXIMA, FOLD)
    assert within.fired == pytest.approx(table.fired) and within.mean_mass == pytest.approx(table.mean_mass)


def test_the_same_table_is_dealt_alike_and_another_is_not() -> None:
    one, other = TOY.table(TOY.one_per("mq")), TOY.table(TOY.one_per("mn"))
    twice = [dealt(one, MAXIMA, FOLD) for _ in range(2)]
    assert (twice[0].cell == twice[1].cell).all() and (twice[0].top_cell == twice[1].top_cell).all()
    # The same latents, and one top latent moved: all is dealt anew.
    moved = dataclasses.replace(one, top_latent=np.where(np.arange(len(one.top_latent)) == 0, -1, one.top_latent))
    assert not np.array_equal(dealt(moved, MAXIMA, FOLD).cell, twice[0].cell)
    assert not np.array_equal(dealt(other, MAXIMA, FOLD).top_latent, twice[0].top_latent)


def test_rows_of_dense_latents_are_merged() -> None:
    codes = np.ones((len(TOY.cell), 1), np.float32)
    codes[::2] = 0
    fold = dataclasses.replace(FOLD, above=0.1)
    found = dealt(TOY.table(codes, fold), MAXIMA, fold)
    assert len(found.cell) <= partition(CELLS, "mc").count
    assert found.inputs[0] == codes.sum()
    assert len(dealt(TOY.table(codes), MAXIMA, dataclasses.replace(fold, above=np.inf)).cell) > 2 * len(found.cell)


def test_an_sae_that_never_fires() -> None:
    found = shuffled_cells(TOY.table(np.zeros((len(TOY.cell), 3), np.float32)), CELLS, EVALUATION, FOLD)
    assert found["shuffled_splits_per_max"] == found["shuffled_owned_maxes"] == 0


def test_planted_features_and_turned_directions() -> None:
    """Twenty features of 1,000 inputs each, found perfectly, along rows that are their directions."""
    features = 20
    detection = Detection(
        1000 * np.eye(features, dtype=np.int64), np.full(features, 1000), np.full(features, 1000), 20_000
    )
    directions = torch.eye(64)[:features]
    arguments = detection, directions.clone(), directions, np.ones(features, bool), 0.8
    true, by_chance = planted_metrics(*arguments), shuffled_features(*arguments)
    assert set(by_chance) == set(map(shuffled, PLANTED))
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
    found = [shuffled_features(detection, torch.eye(8)[:features], torch.eye(8)[:features], live, 0.09) for _ in "ab"]
    assert found[0] == found[1]
    assert found[0]["shuffled_feature_precision"] == pytest.approx(0.75, abs=0.02)
    assert found[0]["shuffled_feature_recall"] == pytest.approx(0.05, abs=0.002)
    assert found[0]["shuffled_found_features"] == features
    dead = shuffled_features(detection, torch.eye(8)[:features], torch.eye(8)[:features], live & False, 0.09)
    assert (dead["shuffled_found_features"], dead["shuffled_killed_features"]) == (0, features)


@pytest.mark.parametrize("touched", [0, 1, 40, 400])
def test_cells_that_came_up_are_put_in_order_by_either_way(touched: int) -> None:
    """Few are sorted, many found by a sweep of their group, which is every other cell."""
    group, rng = np.arange(0, 2_000, 2), np.random.default_rng(0)
    chosen, came_up = rng.permutation(group)[:touched], np.zeros(2_000, np.int32)
    came_up[chosen] = 3
    cells = np.concatenate([[7], chosen, [9]])
    nulls._ascending(cells, 1, touched + 1, came_up, group)
    assert cells.tolist() == [7, *sorted(chosen.tolist()), 9]


def test_shuffled_tops_are_counted_by_cell() -> None:
    units, tops = np.array([4, 4, 4, 1, 1, 0]), np.array([2, -1, 2, -1, -1, 0])
    keys, counts = nulls._counted(units, tops, 3)
    assert dict(zip(keys.tolist(), counts.tolist(), strict=True)) == {19: 2, 16: 1, 4: 2, 1: 1}
