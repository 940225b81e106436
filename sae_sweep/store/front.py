"""The front: which points no other point beats in both reconstruction and sparsity."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pandas as pd


def front(points: pd.DataFrame) -> pd.Series:
    """Which rows are Pareto-optimal in (`l0`, `fvu`), both the lower the better.

    A row is dominated if another is no worse in both and better in one; of equal rows none dominates the other. A row
    where either is null is never on the front.

    Returns: a bool Series [rows] on the frame's index.
    """
    l0, fvu = (points[column].to_numpy(dtype=float, na_value=np.nan) for column in ("l0", "fvu"))
    optimal = np.zeros(len(points), dtype=bool)
    measured = np.flatnonzero(np.isfinite(l0) & np.isfinite(fvu))
    lowest = np.inf
    for _, ties in groupby(sorted(measured, key=lambda i: l0[i]), key=lambda i: l0[i]):
        rows = list(ties)
        best = min(fvu[i] for i in rows)
        if best < lowest:
            optimal[[i for i in rows if fvu[i] == best]] = True
            lowest = best
    return pd.Series(optimal, index=points.index)
