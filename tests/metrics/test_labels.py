"""Owners, labels, life, splits and duplicates, on codes whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted

from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.metrics.firing import Fold, fold_dense
from sae_sweep.metrics.ground_truth import Detection
from sae_sweep.metrics.labels import (
    NOTHING,
    Latents,
    alive,
    class_name,
    count_splits,
    describe,
    detectors,
    live_floor,
)
from sae_sweep.toys.classes import Cells

EVALUATION = Evaluation()
# Every class of m, mq, mn and mc with a maximum above 1 has 8 inputs or their weight.
D, K = 6, 4
PLANTED = Planted(D, K)


def counts(norms, planted=PLANTED, fold=None):
    latents = describe(planted.table(norms, fold), planted.cells, EVALUATION)
    return latents, count_splits(latents, planted.cells, EVALUATION)


def labelled(metrics):
    """The label counts that are not 0."""
    return {name.removeprefix("label_"): n for name, n in metrics.items() if name.startswith("label_") and n}


def test_one_latent_per_maximum():
    latents, found = counts(PLANTED.one_per("m"))
    assert latents.owner.tolist() == list(range(D))
    assert latents.purity == pytest.approx(np.ones(D))
    assert latents.f1 == pytest.approx(np.ones(D))
    assert latents.density == pytest.approx(np.full(D, 1 / D))
    assert labelled(found.metrics) == {"m": D}
    assert found.metrics["owned_maxes"] == found.metrics["pure_latents"] == found.metrics["live_latents"] == D
    assert found.metrics["dead_latents"] == found.metrics["splits_per_max"] == found.metrics["split_maxes"] == 0
    assert found.metrics["duplicates_per_max"] == 0


def coarsest_names(planted, partition):
    """The first of PARTITIONS that has each class of `partition` as a class: (5, 5) of mq is the whole of query 5."""
    of_cell = planted.cells.partition(partition).of_cell[planted.cell]
    classes = {name: planted.cells.partition(name).of_cell[planted.cell] for name in PARTITIONS}
    names = []
    for value in range(of_cell.max() + 1):
        inputs = of_cell == value
        same = (name for name in PARTITIONS if np.array_equal(inputs, classes[name] == classes[name][inputs.argmax()]))
        names.append(next(same))
    return names


@pytest.mark.parametrize("partition", ["mq", "mn", "mc", "mqn", "mqnc"])
def test_fully_split(partition):
    """A latent per class: named as that class, or coarser where that is the same inputs; tiny classes are not live."""
    classes, names = PLANTED.cells.partition(partition), coarsest_names(PLANTED, partition)
    latents, found = counts(PLANTED.one_per(partition))
    of_input = classes.of_cell[PLANTED.cell]
    inputs, weight = np.bincount(of_input), np.bincount(of_input, PLANTED.weight)
    live = (inputs >= 8) | (weight >= 8 / len(of_input))
    assert latents.live.tolist() == live.tolist()
    for latent in np.flatnonzero(live):
        assert PARTITIONS[latents.label[latent]] == names[latent]
        assert classes.of_cell[latents.example[latent]] == latent
    split = [latent for latent in np.flatnonzero(live) if len(names[latent]) > 1]
    first = np.unique(classes.of_cell, return_index=True)[1]
    per_max = np.bincount(PLANTED.cells.factors["m"][first[split]], minlength=D)
    assert found.splits.tolist() == per_max.tolist()
    assert found.metrics["splits_per_max"] == pytest.approx(len(split) / D)
    assert found.metrics["distinct_splits_per_max"] == found.metrics["splits_per_max"]
    assert found.metrics["split_maxes"] == (per_max >= 2).sum() >= D - 2
    assert found.metrics[f"label_{partition}"] == sum(names[latent] == partition for latent in split) > D
    assert found.metrics["owned_maxes"] == D
    assert found.metrics["duplicates_per_max"] == 0


def test_copies_of_a_maximum_are_duplicates_not_splits():
    norms = PLANTED.one_per("m")
    three = np.concatenate([norms, norms[:, 4:], norms[:, 5:] * 0.5], 1)
    _, found = counts(three)
    assert labelled(found.metrics) == {"m": D + 3}
    assert found.duplicates.tolist() == [0, 0, 0, 0, 1, 2]
    assert found.metrics["duplicates_per_max"] == pytest.approx(3 / D)
    assert found.metrics["splits_per_max"] == found.metrics["split_maxes"] == 0
    assert found.metrics["owned_maxes"] == D


def test_latents_that_share_a_class_are_one_distinct_split():
    once = PLANTED.one_per("mq")
    _, single = counts(once)
    _, found = counts(np.concatenate([once, once * 0.5], 1))
    assert found.metrics["splits_per_max"] == 2 * single.metrics["splits_per_max"] > 0
    assert found.metrics["distinct_splits_per_max"] == single.metrics["distinct_splits_per_max"]


def test_a_latent_for_two_maxima_owns_neither():
    norms = PLANTED.one_per("m")
    merged = np.concatenate([norms[:, :4], norms[:, 4:].sum(1, keepdims=True)], 1)
    latents, found = counts(merged)
    assert latents.purity[4] == pytest.approx(0.5)
    assert latents.label[4] == NOTHING
    assert latents.f1[4] == pytest.approx(2 / 3)
    assert found.metrics["owned_maxes"] == 4
    assert labelled(found.metrics) == {"m": 4}


def test_purity_is_of_mass():
    """Three quarters of the weight fired on, but with 9 times the activation: mass decides."""
    norms = PLANTED.one_per("m")[:, 4:].copy()
    norms[:, 0] = norms[:, 0] * 9 + norms[:, 1]
    latents, found = counts(norms)
    assert latents.owner[0] == 4
    assert latents.purity[0] == pytest.approx(0.9)
    assert found.metrics["pure_latents"] == found.metrics["owned_maxes"] == 2
    assert latents.label[0] == NOTHING


def test_dead_latents_count_for_nothing():
    norms = np.concatenate([PLANTED.one_per("m"), np.zeros((len(PLANTED.cell), 5), np.float32)], 1)
    latents, found = counts(norms)
    assert found.metrics["dead_latents"] == 5
    assert found.metrics["live_latents"] == D
    assert latents.owner[D:].tolist() == [NOTHING] * 5
    assert np.isnan(latents.purity[D:]).all() and np.isnan(latents.f1[D:]).all()
    assert labelled(found.metrics) == {"m": D}


def test_shared_query_latents_are_not_splits():
    """The rival code, a latent per maximum and one per query shared by all: queries are named, nothing is split."""
    norms = np.concatenate([PLANTED.one_per("m"), 0.5 * PLANTED.one_per("q")], 1)
    _, found = counts(norms)
    assert labelled(found.metrics) == {"m": D, "q": D}
    assert found.metrics["splits_per_max"] == found.metrics["duplicates_per_max"] == 0
    assert found.metrics["pure_latents"] == D + 1  # query 5 is maximum 5, so that its latent owns it as well


def test_runner_up_or_copies_alone_are_no_splits():
    _, found = counts(PLANTED.one_per("n"))
    assert labelled(found.metrics) == {"n": D}
    assert found.metrics["splits_per_max"] == 0
    # "No runner-up" and "as many copies as tokens" are the same inputs.
    _, found = counts(PLANTED.one_per("c"))
    assert labelled(found.metrics) == {"n": 1, "c": K - 1}
    assert found.metrics["splits_per_max"] == 0


@pytest.mark.parametrize(("kept", "label"), [(0.99, "m"), (0.95, "mn")])
def test_a_finer_label_must_gain(kept, label):
    """All of maximum 1 but its input of copies, which weighs little: (m=1, n=0) is exact, m=1 nearly so."""
    planted = Planted(3, 4)
    ones, copies = planted.factor("m") == 1, planted.factor("n") == -1
    planted.weight[ones] = np.where(copies[ones], 1 - kept, kept / (ones.sum() - 1)) / 3
    latents, _ = counts((ones & ~copies).astype(np.float32)[:, None], planted)
    assert latents.f1[0] == pytest.approx(1)
    assert PARTITIONS[latents.label[0]] == label


@given(st.integers(0, 2**32 - 1), st.sampled_from(["uniform", "max_stratified", "copies_balanced"]))
@settings(max_examples=40, deadline=None)
def test_labels_against_brute_force(seed, distribution):
    planted = Planted(3, 4, distribution)
    rng = np.random.default_rng(seed)
    partition = PARTITIONS[rng.integers(len(PARTITIONS))]
    # Classes with some firing lost and some added, so that F1 falls on both sides of its threshold.
    norms = planted.one_per(partition)
    norms = norms * (rng.random(norms.shape) > 0.2 * rng.random()) + (rng.random(norms.shape) < 0.05 * rng.random())
    latents, found = counts(norms, planted)
    wanted = [_label_by_hand(planted, norms[:, j] > 0) for j in range(norms.shape[1])]
    for j, (label, score) in enumerate(wanted):
        assert latents.f1[j] == pytest.approx(score, nan_ok=True)
        assert latents.label[j] == (PARTITIONS.index(label) if label and latents.live[j] else NOTHING)
    finer = [j for j, (label, _) in enumerate(wanted) if label and latents.live[j] and "m" in label and label != "m"]
    assert found.metrics["splits_per_max"] == pytest.approx(len(finer) / 3)


def _label_by_hand(planted, fires):
    """The label's letters, or None, and the best F1: every predicate of the lattice scored on every input."""
    if not fires.any():
        return None, np.nan
    best = {}
    for name in PARTITIONS:
        values = np.stack([planted.factor(factor) for factor in name], 1)
        scores = []
        for value in np.unique(values, axis=0):
            true = (values == value).all(1)
            weight = planted.weight
            scores.append(2 * weight[true & fires].sum() / (weight[true].sum() + weight[fires].sum()))
        best[name] = max(scores)
    allowed = [
        name
        for name, score in best.items()
        if score >= 0.8 - 1e-9
        and all(score >= best[c] + 0.02 - 1e-9 for c in best if set(c) < set(name) and best[c] >= 0.8 - 1e-9)
    ]
    # Equal scores, up to rounding, go to the coarsest.
    label = max(allowed, key=lambda name: (round(best[name], 9), -PARTITIONS.index(name)), default=None)
    return label, max(best.values())


def test_permuted_factors_are_seldom_named():
    """With q, n, c permuted within m a query code's best predicate is often m,q still, but hardly with F1 ≥ 0.8."""
    planted = Planted(8, 3)
    rng, norms = np.random.default_rng(0), planted.one_per("mq")
    _, honest = counts(norms, planted)
    cell = planted.cell.copy()
    for m in range(8):
        of_max = planted.factor("m") == m
        cell[of_max] = rng.permutation(cell[of_max])
    shuffled = Planted(8, 3)
    shuffled.cell = cell
    latents, found = counts(norms, shuffled)
    assert honest.metrics["label_mq"] == 34
    assert found.metrics["owned_maxes"] == honest.metrics["owned_maxes"] == 8
    assert found.metrics["splits_per_max"] <= 3 / 8
    assert np.nanmedian(latents.f1) < 0.5


def test_life_needs_inputs_and_weight():
    planted = Planted(D, K, "uniform")
    norms = np.zeros((len(planted.cell), 3), np.float32)
    norms[100:107, 0] = norms[100:108, 1] = norms[100:400, 2] = 1
    assert alive(planted.table(norms)).tolist() == [False, True, True]
    assert live_floor(planted.table(norms)) == pytest.approx(0.5 / D**K)


def test_heavy_inputs_stand_for_many():
    """Maximum 0 has one input, which is a sixth of the stratified data: a latent for it is alive."""
    latents, _ = counts(PLANTED.one_per("m"))
    assert latents.inputs[0] == 1
    assert latents.live[0]
    uniform = Planted(D, K, "uniform")
    assert not counts(uniform.one_per("m"), uniform)[0].live[0]


def test_weight_floor_is_half_the_lightest_cell():
    """Cells of equal weight: 8 inputs of a cell of many are too little."""
    planted = Planted(3, 6, "cell_stratified")
    heavy = np.argmax(planted.cells.sizes)
    rows = np.flatnonzero(planted.cell == heavy)
    norms = np.zeros((len(planted.cell), 2), np.float32)
    half = len(rows) // 2
    norms[rows[: half - 1], 0] = norms[rows[: half + 1], 1] = 1
    assert half - 1 >= 8
    assert live_floor(planted.table(norms)) == pytest.approx(0.5 / planted.cells.count)
    assert alive(planted.table(norms)).tolist() == [False, True]


def test_folding_dense_latents_changes_no_count():
    planted = Planted(12, 3)
    rng = np.random.default_rng(0)
    dense = (rng.random((len(planted.cell), 20)) < rng.random(20)).astype(np.float32)
    # One copy of the maximum, with some noise: dense, and yet has a name.
    named = (planted.factor("c") == 1)[:, None] & (rng.random((len(planted.cell), 2)) < 0.9)
    norms = np.concatenate([planted.one_per("mq"), planted.one_per("q"), dense, named.astype(np.float32)], 1)
    whole, counted = counts(norms, planted)
    fold = fold_dense(planted.cells, planted.chance, 0.8)
    fold = Fold(fold.above / 2, fold.onto)  # the bound itself, without room for drawn inputs
    folded, counted_folded = counts(norms, planted, fold)
    assert len(planted.table(norms, fold).latent) < len(planted.table(norms).latent)
    assert counted.metrics == counted_folded.metrics
    assert counted.metrics["label_c"] >= 2
    assert np.array_equal(whole.label, folded.label)
    assert np.array_equal(whole.owner, folded.owner)
    assert whole.purity == pytest.approx(folded.purity)


def test_class_names():
    cells = PLANTED.cells
    example = int(cells.index(np.array([5, 3, 5, 2])))
    assert class_name(cells, PARTITIONS.index("mqnc"), example) == "m=5,q=2,n=3,c=2"
    same = int(cells.index(np.array([4, 4, 4, 4])))
    assert class_name(cells, PARTITIONS.index("mn"), same) == "m=4,n=none"


def test_a_purity_of_the_threshold_is_pure():
    cells = Cells(3, 2)
    purity = np.array([0.8, 0.8 - 1e-12, 0.8 - 1e-6, 1.0, np.nan])
    nothing = np.full(5, NOTHING)
    live = np.array([True, True, True, False, True])
    latents = Latents(np.array([0, 1, 2, 2, NOTHING]), purity, live, nothing, nothing, purity, purity, nothing)
    found = count_splits(latents, cells, Evaluation(purity=0.8)).metrics
    assert (found["pure_latents"], found["owned_maxes"], found["live_latents"], found["dead_latents"]) == (2, 2, 4, 1)


def test_a_detector_lives_by_inputs_and_by_the_rarest_feature():
    for active, fired, live in (
        ([10, 50], [7, 8, 9], [False, True, True]),
        ([40, 50], [8, 19, 20], [False, False, True]),
        ([0, 50], [8, 24, 25], [False, False, True]),
    ):
        both = np.zeros((3, 2))
        detection = Detection(both, np.array(fired), np.array(active), 100)
        assert detectors(detection).live.tolist() == live
