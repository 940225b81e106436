"""Ceilings against what perfect codes score when they are measured, and by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted

from sae_sweep.config.settings import PARTITIONS, Distribution, Evaluation, Toy
from sae_sweep.errors import UserError
from sae_sweep.metrics.ceilings import Ceiling, beside_ceilings, ceiling_metrics, ceilings, ceilings_of
from sae_sweep.metrics.evaluation_classes import EvaluationClasses
from sae_sweep.metrics.labels import count, describe, only_one
from sae_sweep.toys.classes import FeatureCells

EV = Evaluation()
shapes = st.sampled_from([(2, 2), (3, 2), (5, 2), (2, 3), (4, 3), (6, 3), (3, 4), (4, 4)])
distributions = st.sampled_from(["uniform", "max_stratified", "cell_stratified", "copies_balanced"])


@given(shapes, distributions, st.sampled_from(PARTITIONS), st.sampled_from([0.5, 0.8, 0.95]), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_perfect_code_scores_its_ceiling(
    shape: tuple[int, int], distribution: str, partition: str, threshold: float, drawn: bool
) -> None:
    planted = Planted(*shape, distribution)
    classes = planted.classes(Evaluation(f1=threshold, purity=threshold), drawn)
    latents = describe(planted.table(planted.one_per(partition)), classes)
    found = only_one(count(latents, classes).metrics)
    ceiling = ceilings(classes)[partition]
    assert latents.live.sum() == ceiling.countable
    assert found["owned_maxes"] == ceiling.owned
    splits = found["splits_per_max"], found["distinct_splits_per_max"]
    assert splits == (pytest.approx(ceiling.splits / shape[0]),) * 2


def test_known_ceilings() -> None:
    found = ceilings_of(Toy(d_vocab=16, k=3), Distribution(), Evaluation())
    assert found is not None
    assert found["mqnc"] == Ceiling(classes=1056, countable=1056, owned=16, splits=1055)
    assert found["mq"] == Ceiling(classes=136, countable=136, owned=16, splits=135)
    assert found["m"] == Ceiling(classes=16, countable=16, owned=16, splits=0)
    assert ceiling_metrics(found, 16, 2_000)["splits_ceiling"] == 1055 / 16
    narrow = ceiling_metrics(found, 16, 8)
    assert narrow == {"owned_ceiling": 8, "splits_ceiling": 0.5, "distinct_splits_ceiling": 0.5}


def test_of_drawn_inputs_few_fine_classes_can_be_counted() -> None:
    """65,536 inputs out of 64⁴ are less than one for most cells: more of them can judge more classes."""
    few, many = (
        ceilings_of(Toy(d_vocab=64, k=4), Distribution(), Evaluation(inputs=inputs)) for inputs in (1 << 16, 1 << 24)
    )
    assert few is not None and many is not None
    assert few["m"].countable == many["m"].countable == 64
    assert many["mqnc"].countable == many["mqnc"].classes == 95_488
    assert few["mqnc"].countable < 1_000 < few["mq"].countable <= few["mq"].classes == 2_080


def test_a_share_is_of_what_the_width_allows() -> None:
    planted = Planted(6, 3)
    classes = planted.classes()
    counts = {"owned_maxes": np.array([3]), "splits_per_max": np.array([1.0])}
    counts["distinct_splits_per_max"] = np.array([0.5])
    found = beside_ceilings(counts, classes, 12)
    assert (found["owned_share"], found["splits_share"], found["distinct_splits_share"]) == (0.5, 0.5, 0.25)
    assert (found["countable_m"], found["countable_mq"], found["countable_mqnc"]) == (6, 21, 86)


def test_ceilings_of_parents_and_modifiers_by_arithmetic() -> None:
    """Four parents, each alone in half of its inputs, else with one of two modifiers; one modifier may be too rare."""
    cells = FeatureCells(4, 2)
    half, quarter = 1 / 2, 1 / 4
    classes = EvaluationClasses(
        cells, _chance(half, quarter, quarter), 4_096 * _chance(half, quarter, quarter), True, EV
    )
    found = ceilings(classes)
    assert found["m"] == Ceiling(classes=4, countable=4, owned=4, splits=0)
    assert found["mq"] == found["mqnc"] == Ceiling(classes=12, countable=12, owned=4, splits=12)
    # Each query comes with every parent: it owns none, and names nothing finer than one.
    assert found["q"] == Ceiling(classes=3, countable=3, owned=0, splits=0)
    rare = _chance(half, 0.499, 0.001)
    found = ceilings(EvaluationClasses(cells, rare, 4_096 * rare, True, EV))
    # 4,096 · 0.001 / 4 is 1 input of a rare modifier with each parent: fewer than 8, and 4 in all.
    assert found["mq"] == Ceiling(classes=12, countable=8, owned=4, splits=8)
    assert found["q"].countable == 2


def test_ceilings_of_exclusive_features_by_arithmetic() -> None:
    """A feature is the whole cell: however many latents there are, none is finer."""
    chance = np.full(5, 1 / 5)
    found = ceilings(EvaluationClasses(FeatureCells(5), chance, 1_000 * chance, True, EV))
    assert found["m"] == found["mqnc"] == Ceiling(classes=5, countable=5, owned=5, splits=0)


def _chance(*of_modifier: float) -> np.ndarray:
    return np.tile(of_modifier, 4) / 4


def test_ceilings_of_a_kind_of_toy_are_those_of_its_cells() -> None:
    asked = Distribution("uniform"), Evaluation()
    of_parents = ceilings_of(Toy("parents", features=4, modifiers=2), *asked)
    assert of_parents and of_parents["mq"] == Ceiling(classes=12, countable=12, owned=4, splits=12)
    for toy, maxima in ((Toy("exclusive", features=5), 5), (Toy("circle", features=7), 7)):
        found = ceilings_of(toy, *asked)
        assert found and found["mqnc"] == Ceiling(classes=maxima, countable=maxima, owned=maxima, splits=0)
    of_bigrams = ceilings_of(Toy("bigrams", d_vocab=6, contexts=3), *asked)
    assert of_bigrams and of_bigrams["mq"] == Ceiling(classes=18, countable=18, owned=6, splits=18)


def test_features_that_come_in_any_combination_have_none() -> None:
    assert ceilings_of(Toy("independent"), Distribution("uniform"), Evaluation()) is None
    with pytest.raises(UserError, match="needs distribution"):
        ceilings_of(Toy(d_vocab=4, k=2), Distribution("weights"), Evaluation())


def test_no_heavy_import() -> None:
    code = "import sys, sae_sweep.metrics.ceilings; print(*{'torch', 'numba', 'pandas', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
