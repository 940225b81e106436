"""The front against its definition."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_sweep.store.front import front


def optimal(points: list[tuple[float | None, float | None]]) -> list[bool]:
    return front(pd.DataFrame(points, columns=["l0", "fvu"], dtype="float64")).tolist()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_a_point_is_on_the_front_unless_another_is_no_worse_in_both_and_better_in_one(points) -> None:
    def dominated(p, q) -> bool:
        return q[0] <= p[0] and q[1] <= p[1] and p != q

    assert optimal(points) == [not any(dominated(p, q) for q in points) for p in points]


def test_equal_points_are_on_the_front_together_and_the_unmeasured_never() -> None:
    assert optimal([(1, 0.5), (1, 0.5), (2, 0.5), (np.nan, 0.1), (0.5, np.nan)]) == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", ["float64", "Float64"])
def test_the_index_and_nullable_types_are_kept(dtype: str) -> None:
    points = pd.DataFrame({"l0": [1, None, 2], "fvu": [0.3, 0.1, 0.4]}, index=[7, 5, 3], dtype=dtype)
    assert front(points).to_dict() == {7: True, 5: False, 3: False}
