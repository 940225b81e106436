"""Cells: closed forms against enumeration by hand, and against the figures of the literature."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_sweep.config.settings import PARTITIONS
from sae_sweep.errors import UserError
from sae_sweep.toys.classes import (
    FACTORS,
    NONE,
    Cells,
    FeatureCells,
    cells_per_max,
    count_cells,
    count_classes,
    count_pairs,
)

shapes = st.tuples(st.integers(2, 9), st.integers(2, 6)).filter(lambda shape: shape[0] ** shape[1] <= 5000)


def by_definition(sequence: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(m, q, n, c) of one sequence, from the words of the definition."""
    m = max(sequence)
    below = [token for token in sequence if token < m]
    return m, sequence[-1], max(below) if below else NONE, sequence.count(m)


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_cells_are_those_of_every_sequence(shape: tuple[int, int]) -> None:
    d_vocab, k = shape
    sequences = list(itertools.product(range(d_vocab), repeat=k))
    expected = Counter(map(by_definition, sequences))
    cells = Cells(d_vocab, k)

    listed = list(zip(*(cells.factors[factor].tolist() for factor in FACTORS), strict=True))
    assert listed == sorted(expected)
    assert cells.count == len(expected)
    assert cells.sizes.tolist() == [expected[cell] for cell in listed]
    assert cells.sizes.sum() == d_vocab**k
    rank = {cell: index for index, cell in enumerate(sorted(expected))}
    assert cells.index(np.array(sequences)).tolist() == [rank[by_definition(sequence)] for sequence in sequences]
    per_max = Counter(cell[0] for cell in expected)
    assert [cells_per_max(m, k) for m in range(d_vocab)] == [per_max[m] for m in range(d_vocab)]


@settings(deadline=None, max_examples=25)
@given(shapes, st.sampled_from(["", *("".join(c) for r in (1, 2, 3, 4) for c in itertools.combinations(FACTORS, r))]))
def test_a_partition_tells_its_factors_apart_and_nothing_else(shape: tuple[int, int], name: str) -> None:
    cells = Cells(*shape)
    partition = cells.partition(name)
    keys = list(zip(*(cells.factors[factor].tolist() for factor in name), strict=True)) or [()] * cells.count
    assert len(set(zip(keys, partition.of_cell.tolist(), strict=True))) == len(set(keys)) == partition.count
    assert sorted(set(partition.of_cell.tolist())) == list(range(partition.count))
    assert partition.of_cell.dtype == np.int64


@pytest.mark.parametrize(("d_vocab", "k", "count"), [(8, 3, 176), (8, 4, 288), (64, 4, 95_488), (16, 2, 256)])
def test_number_of_cells(d_vocab: int, k: int, count: int) -> None:
    assert Cells(d_vocab, k).count == count == sum(cells_per_max(m, k) for m in range(d_vocab))


@pytest.mark.parametrize(("d_vocab", "k"), [(2, 2), (5, 2), (6, 3), (4, 5)])
def test_numbers_of_classes_are_those_of_the_partitions(d_vocab: int, k: int) -> None:
    cells = Cells(d_vocab, k)
    found = {name: count_classes(name, d_vocab, k) for name in PARTITIONS}
    assert found == {name: cells.partition(name).count for name in PARTITIONS}
    assert count_classes("rough", d_vocab, k) == d_vocab**3 * k
    with pytest.raises(UserError, match=r"^\$\{cells:mqx\}: no such partition.*did you mean 'mq"):
        count_classes("mqx", d_vocab, k)


def test_numbers_of_classes_of_pairs() -> None:
    found = {name: count_pairs(name, 3, 4) for name in PARTITIONS}
    assert found == {
        "n": 1,
        "c": 1,
        "q": 4,
        **dict.fromkeys(("m", "mn", "mc", "mnc"), 3),
        **dict.fromkeys(("mq", "mqn", "mqc", "mqnc"), 12),
    }
    with pytest.raises(UserError, match=r"^\$\{cells:mqx\}: no such partition.*did you mean 'mq"):
        count_pairs("mqx", 3, 4)


def test_the_published_size() -> None:
    cells = Cells(64, 4)
    assert cells_per_max(63, 4) == 4_285
    counts = {name: cells.partition(name).count for name in ("m", "mc", "mq", "mn", "mqc", "mnc", "mqn", "mqnc")}
    assert list(counts.values()) == [64, 253, 2_080, 2_080, 6_301, 6_112, 45_760, 95_488]
    assert np.array_equal(cells.partition("mqnc").of_cell, np.arange(cells.count))
    assert cells.sizes.sum() == 64**4
    assert np.median(cells.sizes) == 33
    heaviest_first = np.sort(cells.sizes)[::-1].cumsum()
    assert np.searchsorted(heaviest_first, 0.9 * 64**4) + 1 == 32_083


def test_entropies_of_the_factors_under_uniform_inputs() -> None:
    cells = Cells(64, 4)

    def entropy(name: str) -> float:
        p = np.bincount(cells.partition(name).of_cell, cells.sizes) / 64**4
        return float(-(p * np.log(p)).sum())

    of_max = entropy("m")
    assert of_max == pytest.approx(3.523, abs=1e-3)
    given_max = {name: entropy("m" + name) - of_max for name in ("q", "n", "c", "qnc")}
    assert given_max == pytest.approx({"q": 3.464, "n": 3.477, "c": 0.139, "qnc": 6.378}, abs=1e-3)


@pytest.mark.parametrize(("d_vocab", "k"), [(512, 4), (64, 20)])
def test_ranks_follow_the_order_of_the_factors_where_no_table_is_held(d_vocab: int, k: int) -> None:
    cells, rng = Cells(d_vocab, k), np.random.default_rng(0)
    # Few different tokens, so that equal factors and several copies of the maximum are common.
    palette = rng.integers(d_vocab, size=(2000, 3))
    sequences = np.take_along_axis(palette, rng.integers(3, size=(2000, k)), 1)
    factors = [by_definition(tuple(sequence)) for sequence in sequences.tolist()]
    index = cells.index(sequences)
    pairs = sorted(zip(factors, index.tolist(), strict=True))
    for (one, rank), (other, next_rank) in itertools.pairwise(pairs):
        assert (rank == next_rank) if one == other else (rank < next_rank)
    top = [d_vocab - 2] + [d_vocab - 1] * (k - 1)
    assert cells.index(np.array([[0] * k, top])).tolist() == [0, count_cells(d_vocab, k) - 1]


def test_sizes_of_long_sequences_add_up() -> None:
    cells = Cells(12, 20)
    assert cells.sizes.sum() == pytest.approx(12.0**20, rel=1e-12)
    sequences = np.random.default_rng(0).integers(12, size=(3, 50, 20))
    index = cells.index(sequences)
    assert index.shape == (3, 50)
    assert np.array_equal(cells.factors["m"][index], sequences.max(-1))
    assert np.array_equal(cells.factors["q"][index], sequences[..., -1])


def test_what_is_no_partition_or_no_sequence_is_refused() -> None:
    for name in ("qm", "mm", "x"):
        with pytest.raises(ValueError, match="partition"):
            Cells(4, 3).partition(name)
    with pytest.raises(ValueError, match="3 tokens expected, not 4"):
        Cells(4, 3).index(np.zeros((5, 4), int))


def test_counts_are_whole_numbers_and_ranks_do_not_overflow_small_tokens() -> None:
    assert isinstance(cells_per_max(63, 4), int) and isinstance(count_cells(64, 4), int)
    sequences = np.random.default_rng(0).integers(64, size=(500, 4))
    assert np.array_equal(Cells(64, 4).index(sequences.astype(np.uint8)), Cells(64, 4).index(sequences))
    assert Cells(64, 4).index(sequences.tolist()).dtype == np.int64


@pytest.mark.parametrize(("always", "q"), [(False, [-1, 0, 1]), (True, [0, 1])])
def test_cells_of_features_and_modifiers(always: bool, q: list[int]) -> None:
    cells = FeatureCells(3, 2, always)
    assert cells.count == 3 * len(q)
    expected = {"m": [m for m in range(3) for _ in q], "q": 3 * q, "n": [NONE] * cells.count, "c": [1] * cells.count}
    assert {name: values.tolist() for name, values in cells.factors.items()} == expected
    assert {values.dtype for values in cells.factors.values()} == {np.dtype(np.int32)}
    assert cells.partition("m").of_cell.tolist() == expected["m"]
    assert (cells.partition("mqnc").count, cells.partition("nc").count) == (cells.count, 1)
