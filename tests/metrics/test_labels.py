"""Owners, labels, life, splits and duplicates, on codes whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted

from sae_sweep.config.settings import PARTITIONS, Distribution, Evaluation
from sae_sweep.metrics.evaluation_classes import EvaluationClasses
from sae_sweep.metrics.firing import FiringTable, Fold, fold_dense
from sae_sweep.metrics.ground_truth import Detection
from sae_sweep.metrics.labels import NOTHING, class_name, count, describe, detectors, only_one
from sae_sweep.toys.classes import Cells
from sae_sweep.toys.sampler import cell_weights

EVALUATION = Evaluation()
# Every class of m, mq, mn and mc with a maximum above 1 has 8 inputs or their weight.
D, K = 6, 4
PLANTED = Planted(D, K)


@dataclass
class Found:
    """Of one SAE: counts by column, and splits and duplicates by maximum."""

    metrics: dict
    splits: np.ndarray
    duplicates: np.ndarray


def counts(norms, planted=PLANTED, fold=None, evaluation=EVALUATION, drawn=False):
    classes = planted.classes(evaluation, drawn)
    latents = describe(planted.table(norms, fold), classes)
    found = count(latents, classes)
    life = {"live_latents": latents.live.sum(), "dead_latents": (~latents.live).sum()}
    return latents, Found(only_one(found.metrics) | life, found.splits[0], found.duplicates[0])


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


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("partition", ["mq", "mn", "mc", "mqn", "mqnc"])
def test_fully_split(partition, drawn):
    """A latent per class is named as that class, unless it is a whole maximum; of drawn inputs it needs eight."""
    classes = PLANTED.cells.partition(partition)
    latents, found = counts(PLANTED.one_per(partition), drawn=drawn)
    of_input = classes.of_cell[PLANTED.cell]
    live = np.bincount(of_input) >= (8 if drawn else 1)
    assert latents.live.tolist() == live.tolist()
    first = np.unique(classes.of_cell, return_index=True)[1]
    maximum = PLANTED.cells.factors["m"][first]
    whole = np.bincount(of_input) == np.bincount(PLANTED.factor("m"))[maximum]
    for latent in np.flatnonzero(live):
        assert PARTITIONS[latents.label[latent]] == ("m" if whole[latent] else partition)
        assert whole[latent] or classes.of_cell[latents.example[latent]] == latent
    per_max = np.bincount(maximum[live & ~whole], minlength=D)
    assert found.splits.tolist() == per_max.tolist()
    assert found.metrics["splits_per_max"] == found.metrics["distinct_splits_per_max"] == per_max.sum() / D
    assert found.metrics["split_maxes"] == (per_max >= 2).sum() >= D - 2
    assert found.metrics[f"label_{partition}"] == per_max.sum() > D
    assert found.metrics[f"pure_{partition}"] == live.sum()
    assert found.metrics[f"found_{partition}"] == 1
    assert found.metrics["owned_maxes"] == len(np.unique(maximum[live]))
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
    for name in ("distinct_splits_per_max", "split_maxes", "found_mq"):
        assert found.metrics[name] == single.metrics[name]
    # Two copies of one split do not make a maximum split.
    _, found = counts(np.repeat(once[:, 8:9], 2, axis=1))
    assert (found.metrics["splits_per_max"], found.metrics["split_maxes"]) == (2 / D, 0)


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
    assert labelled(found.metrics) == {"c": K}
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
    named = _names_by_hand(planted, [inputs for inputs, _ in wanted])
    for j, (label, (_, score)) in enumerate(zip(named, wanted, strict=True)):
        assert latents.f1[j] == pytest.approx(score, nan_ok=True)
        assert latents.label[j] == (PARTITIONS.index(label) if label else NOTHING)
    finer = [label for label in named if label and "m" in label and label != "m"]
    assert found.metrics["splits_per_max"] == pytest.approx(len(finer) / 3)


def _classes_by_hand(planted, name):
    """The classes of a partition, each as the inputs in it [classes, inputs]."""
    values = np.stack([planted.factor(factor) for factor in name], 1)
    return np.stack([(values == value).all(1) for value in np.unique(values, axis=0)])


def _label_by_hand(planted, fires):
    """The inputs of the class that names a latent, or None, and the best F1 of any class of the lattice."""
    if not fires.any():
        return None, np.nan
    weight, best = planted.weight / planted.weight.sum(), {}
    for name in PARTITIONS:
        scores = []
        for true in _classes_by_hand(planted, name):
            f1 = 2 * weight[true & fires].sum() / (weight[true].sum() + weight[fires].sum())
            base = 2 * weight[true].sum() / (weight[true].sum() + 1)
            scores.append((f1, f1 >= 0.8 - 1e-9 and f1 >= (1 + base) / 2 - 1e-9, true))
        best[name] = max(scores, key=lambda each: round(each[0], 9))
    reach = {name: score for name, (score, beats, _) in best.items() if beats}
    allowed = [
        name
        for name, score in reach.items()
        if all(score >= reach[coarse] + 0.02 - 1e-9 for coarse in reach if set(coarse) < set(name))
    ]
    # Equal scores, up to rounding, go to the coarsest.
    label = max(allowed, key=lambda name: (round(best[name][0], 9), -PARTITIONS.index(name)), default=None)
    return None if label is None else best[label][2].tobytes(), max(score for score, _, _ in best.values())


def _names_by_hand(planted, named):
    """The partition that each set of inputs, or None, is called by."""
    can = {name: {true.tobytes() for true in _classes_by_hand(planted, name)} for name in PARTITIONS}
    finer = {inputs for inputs in named if inputs and inputs not in can["m"]}
    votes = {name: len(finer & can[name]) for name in PARTITIONS}
    found = []
    for inputs in named:
        able = [name for name in PARTITIONS if inputs in can[name]]
        found.append("m" if "m" in able else max(able, key=votes.__getitem__, default=None))
    return found


def test_what_is_always_on_has_no_label():
    """At (64, 4) 97% of uniform inputs have one copy of the maximum: being always on has an F1 of .98 with it."""
    cells, evaluation = Cells(64, 4), Evaluation()
    for distribution in ("uniform", "max_stratified"):
        chance = cell_weights(cells, Distribution(distribution))
        classes = EvaluationClasses(cells, chance, cells.sizes, False, evaluation)
        once = cells.factors["c"] == 1
        base = 2 * chance[once].sum() / (1 + chance[once].sum())
        every = np.arange(cells.count)
        tops = every, np.zeros(cells.count, np.int64), chance, cells.sizes.astype(np.int64)
        for cell, label in ((every, NOTHING), (every[once], PARTITIONS.index("c"))):
            rows = np.zeros(len(cell), np.int64), cell, chance[cell], chance[cell], np.ones(len(cell), np.int64)
            latents = describe(FiringTable(1, cells.count, *rows, *tops), classes)
            assert latents.live[0] and latents.label[0] == label
            assert latents.f1[0] == pytest.approx(base if label == NOTHING else 1)
        assert base > 0.94


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
    assert honest.metrics["label_mq"] == 35
    assert found.metrics["owned_maxes"] == honest.metrics["owned_maxes"] == 8
    assert found.metrics["splits_per_max"] <= 3 / 8
    assert np.nanmedian(latents.f1) < 0.5


def test_life_needs_weight_and_where_inputs_are_drawn_eight_of_them():
    planted = Planted(D, K, "uniform")
    norms = np.zeros((len(planted.cell), 4), np.float32)
    norms[100, 0] = norms[100:107, 1] = norms[100:108, 2] = 1
    assert counts(norms, planted)[0].live.tolist() == [True, True, True, False]
    assert counts(norms, planted, drawn=True)[0].live.tolist() == [False, False, True, False]
    assert planted.classes().live_mass == pytest.approx(0.5 / D**K)
    assert (planted.classes().live_inputs, planted.classes(drawn=True).live_inputs) == (0, 8)


def test_weight_floor_is_half_the_lightest_cell():
    """Cells of equal weight: a few inputs of a cell of many are too little."""
    planted = Planted(3, 6, "cell_stratified")
    heavy = np.argmax(planted.cells.sizes)
    rows = np.flatnonzero(planted.cell == heavy)
    norms = np.zeros((len(planted.cell), 2), np.float32)
    half = len(rows) // 2
    norms[rows[: half - 1], 0] = norms[rows[: half + 1], 1] = 1
    assert planted.classes().live_mass == pytest.approx(0.5 / planted.cells.count)
    for drawn in (False, True):
        assert counts(norms, planted, drawn=drawn)[0].live.tolist() == [False, True]


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


def test_a_dense_latent_is_described_where_no_input_of_the_cell_that_its_rows_merge_into_was_drawn():
    planted = Planted(12, 3)
    fold = fold_dense(planted.cells, planted.chance, 0.8)
    drawn = ~np.isin(planted.cell, fold.onto)
    planted.cell, planted.weight = planted.cell[drawn], planted.weight[drawn]
    norms = ((planted.factor("m") == 11) & (planted.factor("c") == 1)).astype(np.float32)[:, None]
    whole, _ = counts(norms, planted, drawn=True)
    latents, _ = counts(norms, planted, Fold(0.01, fold.onto), drawn=True)
    assert latents.live.all() and latents.owner.tolist() == whole.owner.tolist() == [11]
    assert latents.pure_class[PARTITIONS.index("mqnc")].tolist() == [NOTHING] and not latents.below_cell.any()


def test_class_names():
    cells = PLANTED.cells
    example = int(cells.index(np.array([5, 3, 5, 2])))
    assert class_name(cells, PARTITIONS.index("mqnc"), example) == "m=5,q=2,n=3,c=2"
    same = int(cells.index(np.array([4, 4, 4, 4])))
    assert class_name(cells, PARTITIONS.index("mn"), same) == "m=4,n=none"


def test_a_purity_of_the_threshold_is_pure():
    """Four of five inputs of one maximum are a share of 0.8; three of four are less."""
    norms, maximum = np.zeros((len(PLANTED.cell), 2), np.float32), PLANTED.factor("m")
    fours, fives = np.flatnonzero(maximum == 4), np.flatnonzero(maximum == 5)
    ratio = PLANTED.weight[fours[0]] / PLANTED.weight[fives[0]]
    norms[fours[:4], 0], norms[fives[0], 0] = 1, ratio
    norms[fours[:3], 1], norms[fives[0], 1] = 1, ratio
    latents, found = counts(norms)
    assert latents.purity == pytest.approx([0.8, 0.75])
    assert (found.metrics["pure_latents"], found.metrics["owned_maxes"]) == (1, 1)


def test_latents_with_merged_rows_are_pure_in_no_query():
    """Too dense for any class that names a query; where rows are not merged, most of its mass may lie in one."""
    planted = Planted(4, 3)
    norms = np.full((len(planted.cell), 1), 0.02, np.float32)
    norms[(planted.factor("m") == 3) & (planted.factor("q") == 0)] = 50
    fold = fold_dense(planted.cells, planted.chance, 0.8)
    fold = Fold(0.5, fold.onto)
    _, whole = counts(norms, planted)
    _, merged = counts(norms, planted, fold)
    assert (whole.metrics["pure_mq"], whole.metrics["pure_q"], whole.metrics["pure_latents"]) == (1, 1, 1)
    assert (merged.metrics["pure_mq"], merged.metrics["pure_q"], merged.metrics["pure_latents"]) == (0, 0, 1)


def test_a_detector_lives_by_inputs_and_by_the_rarest_feature():
    for active, fired, live in (
        ([10, 50], [7, 8, 9], [False, True, True]),
        ([40, 50], [8, 19, 20], [False, False, True]),
        ([0, 50], [8, 24, 25], [False, False, True]),
    ):
        both = np.zeros((3, 2))
        detection = Detection(both, np.array(fired), np.array(active), 100)
        assert detectors(detection).live.tolist() == live
