"""The firing table against sums written out, however the inputs are cut, ordered and merged."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CUT, Planted

from sae_sweep.metrics import firing
from sae_sweep.metrics.firing import NO_LATENT, FiringCounter, FiringTable, Fold, fold_dense

CELLS = 5


def count(norms, cell, weight, batches=1, fold=None) -> FiringTable:
    counter = FiringCounter(norms.shape[1], CELLS, CUT, fold)
    for part in np.array_split(np.arange(len(cell)), batches):
        counter.add(torch.from_numpy(norms[part]), cell[part], weight[part])
    return counter.table


def by_hand(norms, cell, weight):
    """The two tables as dictionaries, input by input."""
    pairs, tops = defaultdict(lambda: np.zeros(3)), defaultdict(lambda: np.zeros(2))
    for row, c, w in zip(norms, cell, weight, strict=True):
        if w == 0:
            continue
        best = NO_LATENT
        for latent, norm in enumerate(row):
            if norm > np.float32(CUT):
                pairs[latent, c] += w, w * norm, 1
                if best == NO_LATENT or norm > row[best]:
                    best = latent
        tops[c, best] += w, 1
    return pairs, tops


@st.composite
def batches_of_inputs(draw):
    inputs, width = draw(st.integers(0, 30)), draw(st.integers(1, 4))
    levels = st.sampled_from([0.0, float(np.float32(CUT)), 0.02, 1.0, 1.0, 3.0])
    norms = draw(st.lists(levels, min_size=inputs * width, max_size=inputs * width))
    cell = draw(st.lists(st.integers(0, CELLS - 1), min_size=inputs, max_size=inputs))
    weight = draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 2.0]), min_size=inputs, max_size=inputs))
    return np.array(norms, np.float32).reshape(inputs, width), np.array(cell, np.int64), np.array(weight, np.float64)


@given(batches_of_inputs(), st.integers(1, 4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_table_is_the_sum_over_inputs(inputs, batches, merge_often):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(firing, "ROWS_HELD", 1 if merge_often else 1 << 21)
        table = count(*inputs, batches=batches)
    pairs, tops = by_hand(*inputs)
    assert list(zip(table.latent, table.cell, strict=True)) == sorted(pairs)
    assert list(zip(table.top_cell, table.top_latent, strict=True)) == sorted(tops)
    for i, key in enumerate(sorted(pairs)):
        assert [table.weight[i], table.mass[i], table.count[i]] == pytest.approx(pairs[key])
    for i, key in enumerate(sorted(tops)):
        assert [table.top_weight[i], table.top_count[i]] == pytest.approx(tops[key])


def test_totals_come_from_the_rows():
    norms = np.array([[0, 2], [1, 2], [0, 0], [3, 0]], np.float32)
    table = count(np.pad(norms, ((0, 0), (0, 1))), np.array([1, 1, 4, 0]), np.array([0.1, 0.2, 0.3, 0.4]))
    assert table.cell_weight == pytest.approx([0.4, 0.3, 0, 0, 0.3])
    assert table.total == pytest.approx(1)
    # The last latent never fires.
    assert table.fired == pytest.approx([0.6, 0.3, 0])
    assert table.inputs.tolist() == [2, 2, 0]
    assert table.mean_mass == pytest.approx([(0.2 + 3 * 0.4) / 0.6, 2, 0])
    # The input of cell 4 has no latent on top; the tie-free ones have the larger.
    assert list(zip(table.top_cell, table.top_latent, strict=True)) == [(0, 0), (1, 1), (4, NO_LATENT)]


def test_of_equal_latents_the_first_is_on_top():
    table = count(np.array([[0, 1, 1]], np.float32), np.array([2]), np.array([1.0]))
    assert table.top_latent.tolist() == [1]


def test_broken_codes_fire_nowhere():
    table = count(np.full((3, 2), np.nan, np.float32), np.array([0, 1, 2]), np.full(3, 1 / 3))
    assert len(table.latent) == 0
    assert table.top_latent.tolist() == [NO_LATENT] * 3


def test_only_dense_latents_are_folded():
    norms = np.array([[1, 1], [1, 0], [1, 0], [1, 0]], np.float32)
    cell, weight = np.array([0, 1, 2, 4]), np.full(4, 0.25)
    table = count(norms, cell, weight, fold=Fold(0.5, np.array([0, 0, 2, 2, 2])))
    assert list(zip(table.latent, table.cell, strict=True)) == [(0, 0), (0, 2), (1, 0)]
    assert table.weight == pytest.approx([0.5, 0.5, 0.25])
    # The table of top latents keeps the cells as they are.
    assert table.top_cell.tolist() == [0, 1, 2, 4]


def test_dense_is_what_fires_on_more_weight_not_more_mass_than_the_fold_allows():
    norms = np.array([[0.1, 9], [0.1, 0], [0.1, 9]], np.float32)
    cell, weight = np.array([1, 2, 4]), np.array([0.25, 0.25, 0.5])
    table = count(norms, cell, weight, fold=Fold(0.75, np.zeros(CELLS, np.int64)))
    # The second fires on just 0.75, with a mass of 6.75.
    assert list(zip(table.latent, table.cell, strict=True)) == [(0, 0), (1, 1), (1, 4)]


def test_rows_are_merged_once_they_have_grown(monkeypatch):
    monkeypatch.setattr(firing, "ROWS_HELD", 4)
    counter = FiringCounter(2, CELLS, CUT)
    for _ in range(50):
        counter.add(torch.ones(2, 2), np.array([0, 1]), np.ones(2))
        held = [sum(len(piece[0]) for piece in rows._pieces) for rows in (counter._pairs, counter._tops)]
        # Four and two rows a batch, on top of those merged before: one batch more than twice as many, at most.
        assert held[0] <= 12 and held[1] <= 6
    assert counter.table.count.tolist() == [50] * 4


def test_fold_keeps_maximum_and_copies():
    planted = Planted(5, 3)
    cells, fold = planted.cells, fold_dense(planted.cells, planted.chance, 0.8)
    assert fold.above == pytest.approx(
        2 * 1.5 * max(np.bincount(planted.factor(f) + 1, planted.weight).max() for f in "mqn")
    )
    for factor in "mc":
        assert np.array_equal(cells.factors[factor][fold.onto], cells.factors[factor])
    assert len(np.unique(fold.onto)) == cells.partition("mc").count
