"""Sums by key against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from sae_sweep.metrics.segment_sums import DIGIT, sorting, sum_by


@pytest.mark.parametrize("span", [1, 5, 1 << DIGIT, (1 << DIGIT) + 1, 1 << 40, 1 << 62])
@pytest.mark.parametrize("count", [0, 1, 2, 3_000])
def test_sums_of_each_key(count: int, span: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(-span // 2, span // 2 + 1, count)
    weights, counts = rng.random(count), rng.integers(0, 9, count)
    found, *sums = sum_by(keys, weights, counts)
    expected, of_row = np.unique(keys, return_inverse=True)
    assert found.tolist() == expected.tolist()
    assert sums[0].tolist() == pytest.approx(np.bincount(of_row, weights, len(expected)).tolist())
    assert sums[1].dtype == np.int64
    assert sums[1].tolist() == np.bincount(of_row, counts, len(expected)).tolist()
    if count:
        assert sorting(keys).tolist() == np.argsort(keys, kind="stable").tolist()
        assert sorting(found).tolist() == list(range(len(found)))


def test_values_of_a_key_are_added_in_their_order() -> None:
    """1e16 + 1 is 1e16, so that what comes first says whether the ones are lost."""
    keys = np.array([7, 3, 7, 7, 3, 3])
    values = np.array([1e16, 1, 1, -1e16, 1e16, -1e16])
    assert sum_by(keys, values)[1].tolist() == [0, 0]
    assert sum_by(keys[[2, 0, 3, 4, 5, 1]], values[[2, 0, 3, 4, 5, 1]])[1].tolist() == [1, 0]
