"""Structure of decoder rows, on rows put together by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sae_sweep.config.settings import PARTITIONS
from sae_sweep.metrics.extra import structure as module
from sae_sweep.metrics.extra.structure import meta_sae, semi_nmf, split_latents, splitting_cosine, structure, two_way
from sae_sweep.metrics.labels import NOTHING, Latents
from sae_sweep.toys.classes import FeatureCells

PARENTS, MODIFIERS, D = 6, 4, 48
CELLS = FeatureCells(PARENTS, MODIFIERS - 1)


def pairs(interaction: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows parent + √(1 − t)·modifier + √t·own, all orthonormal, for every parent and modifier."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(D, D)))[0]
    parent, modifier = np.divmod(np.arange(PARENTS * MODIFIERS), MODIFIERS)
    own = basis[PARENTS + MODIFIERS + np.arange(PARENTS * MODIFIERS)]
    shared = basis[PARENTS + modifier]
    return basis[parent] + np.sqrt(1 - interaction) * shared + np.sqrt(interaction) * own, parent, modifier


@pytest.mark.parametrize("interaction", [0.0, 0.3, 1.0])
def test_what_is_shared_is_told_from_what_is_not(interaction: float) -> None:
    rows, parent, modifier = pairs(interaction)
    shares = two_way(rows, parent, modifier)
    assert sum(shares) == pytest.approx(1)
    # Degrees of freedom: of the 24 own directions, 5 parts in 24 fall to parents, 3 to modifiers, 15 are left.
    variance = PARENTS * MODIFIERS * np.array([5 / 6, (1 - interaction) * 3 / 4, 0])
    variance += interaction * np.array([5, 3, 15])
    assert shares == pytest.approx(variance / variance.sum(), abs=1e-9)
    assert splitting_cosine(rows, parent, modifier) == pytest.approx(1 - interaction)


def test_a_latent_for_some_pairs_only() -> None:
    rows, parent, modifier = pairs(0.0)
    some = np.flatnonzero((parent + modifier) % 3 != 0)
    shares = two_way(rows[some], parent[some], modifier[some])
    assert shares[2] == pytest.approx(0, abs=1e-9) and shares[1] > 0.2
    assert splitting_cosine(rows[some], parent[some], modifier[some]) == pytest.approx(1)
    assert splitting_cosine(rows[:4], parent[:4], modifier[:4]) is None


def described(label: str, example: np.ndarray) -> Latents:
    n = len(example)
    nothing = np.full(n, np.nan)
    labels = np.full(n, PARTITIONS.index(label))
    zeros, pure = np.zeros(n, int), np.full((len(PARTITIONS), n), -1)
    names = labels, zeros, example, nothing, nothing, zeros
    return Latents(zeros, nothing, np.ones(n, bool), *names, pure, np.zeros(n, bool))


@pytest.mark.parametrize("interaction", [0.0, 1.0])
def test_columns_beside_their_nulls(interaction: float) -> None:
    rows, _, _ = pairs(interaction)
    scale = np.linspace(1, 2, len(rows))
    found = structure(rows / scale[:, None], scale, described("mq", np.arange(len(rows))), CELLS)
    assert all(value is not None for value in found.values())
    # Of 24 unlike vectors, any six groups of four explain 5/23 on average; what modifiers lose is left over.
    assert found["structure_parent_null"] == pytest.approx(5 / 23, abs=0.05)
    left = [found[f"structure_{name}"] for name in ("parent", "modifier_null", "interaction_null")]
    assert sum(filter(None, left)) == pytest.approx(1)
    modifier, null = found["structure_modifier"], found["structure_modifier_null"]
    assert modifier is not None and null is not None
    if interaction == 0:
        assert found["structure_interaction"] == pytest.approx(0, abs=1e-9)
        assert found["structure_cosine"] == pytest.approx(1)
        assert modifier > 2 * null
        assert found["structure_semi_nmf"] > found["structure_semi_nmf_null"] + 0.2  # type: ignore[operator]
        assert found["structure_meta_sae"] > found["structure_meta_sae_null"] + 0.2  # type: ignore[operator]
    else:
        assert found["structure_cosine"] == pytest.approx(0, abs=1e-9)
        assert modifier == pytest.approx(null, abs=1e-9)


def test_the_factor_that_most_are_labelled_by() -> None:
    latents = described("mq", np.array([0, 1, 2, 5, NOTHING]))
    latents.label[3:] = PARTITIONS.index("m"), NOTHING
    chosen, parent, modifier = split_latents(latents, CELLS)
    assert chosen.tolist() == [0, 1, 2]
    assert parent.tolist() == [0, 0, 0] and modifier.tolist() == [-1, 0, 1]


def test_null_where_nothing_splits() -> None:
    rows = np.eye(4)
    assert set(structure(rows, np.ones(4), described("m", np.arange(4)), CELLS).values()) == {None}
    assert set(structure(rows, np.ones(4), described("m", np.arange(4)), None).values()) == {None}


def test_rows_made_of_few_parts_are_explained_by_as_many() -> None:
    rng = np.random.default_rng(1)
    parts = rng.normal(size=(5, 30))
    assert semi_nmf(rng.random((60, 5)) @ parts, 5) > 0.99
    assert semi_nmf(rng.normal(size=(60, 30)), 5) < 0.5
    unit = parts / np.linalg.norm(parts, axis=1, keepdims=True)
    assert meta_sae(unit[np.arange(60) % 5], 5) > 0.99
    two_of_five = unit[np.arange(60) % 5] + unit[(np.arange(60) // 5) % 5]
    assert meta_sae(two_of_five, 5) > 0.8


def test_cosines_are_averaged_over_all_pairs_of_modifiers() -> None:
    """Modifiers 0, 1 and 2 under two parents: the same step from 0 to 1, opposite ones from 0 to 2."""
    steps = {0: ([0.0, 0], [0.0, 0]), 1: ([1, 0], [1, 0]), 2: ([0.5, 0.5], [-0.5, -0.5])}
    vectors = np.array([steps[q][p] for p in range(2) for q in range(3)])
    differences = [vectors[0] - vectors[2], vectors[3] - vectors[5], vectors[1] - vectors[2], vectors[4] - vectors[5]]
    unit = [step / np.linalg.norm(step) for step in differences]
    expected = (1 + unit[0] @ unit[1] + unit[2] @ unit[3]) / 3
    assert splitting_cosine(vectors, np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("parents", "modifiers", "copies", "enough"),
    [(1, 6, 2, False), (6, 1, 2, False), (2, 2, 1, False), (2, 2, 2, True), (2, 3, 1, True), (3, 2, 1, True)],
)
def test_how_many_split_latents_are_enough(parents: int, modifiers: int, copies: int, enough: bool) -> None:
    """Two of either, and more latents than parents and modifiers."""
    cells, n = FeatureCells(parents, modifiers - 1), parents * modifiers
    rows = np.random.default_rng(0).normal(size=(n * copies, 8))
    found = structure(rows, np.ones(len(rows)), described("mq", np.tile(np.arange(n), copies)), cells)
    assert [value is not None for value in found.values()] == [enough] * len(found)


def test_nulls_keep_what_they_must() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 3)) + np.array([0, 10, 100])
    mixed = module._shuffled(rows)
    assert (np.sort(mixed, axis=0) == np.sort(rows, axis=0)).all()
    assert not (mixed == rows).all(1).any() or (mixed != rows).any(0).all()
    group, factor = np.repeat([0, 1], 10), np.arange(20)
    seen = []
    module._null(lambda other: float(seen.append(other.tolist()) or 1), group, factor)
    assert len(seen) == module.PERMUTATIONS and len({tuple(other) for other in seen}) == len(seen)
    assert all(sorted(other[:10]) == list(range(10)) and sorted(other[10:]) == list(range(10, 20)) for other in seen)
