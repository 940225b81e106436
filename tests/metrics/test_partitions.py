"""Classes of cells: kept, in order, and where each begins."""

from __future__ import annotations

import numpy as np
import pytest

from sae_sweep.metrics.partitions import partition, run_starts
from sae_sweep.toys.classes import Cells


@pytest.mark.parametrize("name", ["m", "q", "nc", "mqnc"])
def test_classes_in_their_order(name: str) -> None:
    cells = Cells(5, 3)
    classes, of_cell = partition(cells, name), cells.partition(name).of_cell.tolist()
    assert classes.of_cell.tolist() == of_cell and classes.count == len(set(of_cell))
    assert classes.first.tolist() == [of_cell.index(each) for each in range(classes.count)]
    # Cells class by class, those of one class as they come.
    assert classes.order.tolist() == sorted(range(cells.count), key=lambda cell: of_cell[cell])
    assert classes.starts.tolist() == [sum(each < start for each in of_cell) for start in range(classes.count)]
    assert partition(Cells(5, 3), name) is classes


def test_runs() -> None:
    assert run_starts(np.array([4, 4, 1, 1, 1, 4])).tolist() == [0, 2, 5]
    assert run_starts(np.array([7])).tolist() == [0]
    assert run_starts(np.zeros(0)).tolist() == []
