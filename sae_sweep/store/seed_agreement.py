"""Whether what one SAE finds is found again by SAEs of other seeds: matched cosines of their dictionaries.

The pairwise dictionary mean correlation coefficient (PW-MCC, arXiv 2505.20254): the decoder rows of two SAEs are
matched one to one so that the sum of |cos| is largest, and its mean over the rows is 1 where both found the same
directions. Only live latents are matched, since a dead one's direction is an accident of its init. A latent that is
left over, as the other SAE has fewer, counts as 0: it was not found again.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_sweep.config.columns import is_setting
from sae_sweep.store.store import Store

Floats = NDArray[np.float64]
# What a point's folder holds.
WEIGHTS, LATENTS = "sae_weights.safetensors", "latents.parquet"


def seed_agreement(store: Store, frame: pd.DataFrame) -> pd.Series:
    """For each row of a results table, the mean agreement with the points that differ from it in `seed` alone.

    NaN where there is none. Points of other toys or data seeds are no such: their activations have other directions.
    """
    settings = [str(column) for column in frame.columns if is_setting(str(column)) and str(column) != "seed"]
    agreement = pd.Series(np.nan, index=frame.index, dtype="float64")
    for _, group in frame.groupby(settings, dropna=False, sort=False):
        if len(group) > 1:
            agreement[group.index] = _of_group(group["point_id"], lambda point: live_rows(store, point))
    return agreement


def _of_group(points: Iterable[str], rows_of: Callable[[str], Floats]) -> Floats:
    """Each point's mean agreement with the others [points]."""
    rows = [rows_of(point) for point in points]
    found = np.full((len(rows), len(rows)), np.nan)
    for i, j in combinations(range(len(rows)), 2):
        found[i, j] = found[j, i] = agreement(rows[i], rows[j])
    mean: Floats = np.nanmean(found, axis=1)
    return mean


def agreement(rows: Floats, others: Floats) -> float:
    """Σ|cos| of the best one-to-one matching of rows [a, d] and [b, d], over the larger of a and b; 0 of none."""
    from scipy.optimize import linear_sum_assignment  # half a second, for a column that few ask for

    if not len(rows) or not len(others):
        return 0.0
    left, right = (each / np.linalg.norm(each, axis=1, keepdims=True).clip(min=1e-30) for each in (rows, others))
    cosine = np.abs(left @ right.T)
    matched = linear_sum_assignment(cosine, maximize=True)
    return float(cosine[matched].sum() / max(len(rows), len(others)))


def live_rows(store: Store, point: str) -> Floats:
    """The decoder rows [live latents, d] of a finished point. Raises StoreDamaged."""
    from safetensors.numpy import load

    live = store.parse(
        "points", point, LATENTS, lambda content: pd.read_parquet(io.BytesIO(content), columns=["live"])["live"]
    )
    rows = store.parse("points", point, WEIGHTS, lambda content: load(content)["W_dec"])
    return rows[live.to_numpy(bool)].astype(np.float64)
