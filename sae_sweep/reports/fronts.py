"""Fronts against each other: how much better one is, over the L0 that both reach, and how sure that is over seeds.

A front is a staircase: at an L0, the lowest FVU of the points that have at most that. Areas are in decades of L0 and of
FVU, so that what matters is ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sae_sweep.config.columns import COLUMN_OF, SEEDS
from sae_sweep.reports.figure_data import choices

# What a front is drawn within, and what sets the fronts there apart.
WITHIN = ("toy", "site", "distribution", "width", "init", "partition", "steps")
LINE = ("architecture", "penalty", "penalty_p", "penalty_scale")
# Resamplings of the seeds, and the share of them inside an interval.
RESAMPLED, INSIDE = 1000, 0.95
# A ladder of coefficients over this factor that moves L0 by less than the second factor does not steer it.
LADDER, MOVES = 2.0, 1.1

Floats = NDArray[np.float64]


def within(frame: pd.DataFrame) -> list[str]:
    """WITHIN, and the keys swept beside it that change the data or the training."""
    return [*WITHIN, *_swept(frame, ("toy.", "distribution.", "training."))]


def lines(frame: pd.DataFrame) -> list[str]:
    """LINE, and the keys swept beside it that change the SAE or its penalty."""
    return [*LINE, *_swept(frame, ("sae.", "penalty.")), *(["sweep"] if "sweep" in frame else [])]


def _swept(frame: pd.DataFrame, prefixes: tuple[str, ...]) -> list[str]:
    return [column for column in frame.columns if column.startswith(prefixes) and column not in COLUMN_OF]


@dataclass(frozen=True)
class Ladder:
    """One line of a sweep: `l0` and `fvu` [seeds, settings], nan where a seed has no such setting."""

    l0: Floats
    fvu: Floats
    setting: Floats

    def front(self, seeds: NDArray[np.int64] | slice = slice(None)) -> tuple[Floats, Floats]:
        """L0 and the lowest FVU up to there, of means over some seeds; settings that none of them has are left out."""
        known = ~np.isnan(self.l0[seeds]).all(0)
        l0, fvu = (np.nanmean(each[seeds][:, known], 0) for each in (self.l0, self.fvu))
        order = np.argsort(l0, kind="stable")
        return l0[order], np.minimum.accumulate(fvu[order])


def ladder(rows: pd.DataFrame) -> Ladder | None:
    """The ladder of the rows of one line; None where nothing was measured."""
    sets = "k" if rows["k"].notna().any() else "coefficient"
    measured = rows.dropna(subset=["l0", "fvu", sets])
    measured = measured[(measured["l0"] > 0) & (measured["fvu"] > 0)]
    if measured.empty:
        return None
    l0, fvu = (measured.pivot_table(index=list(SEEDS), columns=sets, values=name) for name in ("l0", "fvu"))
    return Ladder(l0.to_numpy(float), fvu.to_numpy(float), l0.columns.to_numpy(float))


def hypervolume(front: tuple[Floats, Floats], reference: tuple[float, float]) -> float:
    """The area that a front dominates up to a reference (L0, FVU) that is no better than it anywhere, in decades²."""
    l0, fvu = front
    inside = (l0 <= reference[0]) & (fvu <= reference[1])
    edges = np.log10(np.append(l0[inside], reference[0]))
    return float((np.diff(edges) * (np.log10(reference[1]) - np.log10(fvu[inside]))).sum())


def gap(front: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> float | None:
    """Mean log10 of FVU over the other front's FVU, over the log L0 that both reach; None where there is none.

    Below 0 where the front is the better one; −0.3 is half the FVU.
    """
    low, high = max(front[0][0], other[0][0]), min(front[0][-1], other[0][-1])
    if low >= high:
        return None
    edges = np.unique(np.concatenate([[low, high], *(l0[(l0 > low) & (l0 < high)] for l0, _ in (front, other))]))
    heights = [np.log10(fvu[np.searchsorted(l0, edges[:-1], side="right") - 1]) for l0, fvu in (front, other)]
    widths = np.diff(np.log10(edges))
    return float(widths @ (heights[0] - heights[1]) / widths.sum())


def compare(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per front: its hypervolume, and its gap from the first front of the same width, init and data.

    Columns `within` and `lines`, `seeds`, `settings` (coefficients, or k), `hypervolume` and `gap`, each with its
    `_low` and `_high` (nan for one seed), and `l0_low`, `l0_high`, the L0 over which the gap is taken. The reference of
    the hypervolume is the largest L0 and FVU of all fronts compared. Intervals resample the seeds (of SAE, toy and
    data, together), for both fronts alike.
    """
    rows: list[dict[str, Any]] = []
    outer, inner = within(frame), lines(frame)
    for _, group in frame.groupby(outer, dropna=False, sort=False):
        found = [(part.iloc[0], ladder(part)) for _, part in group.groupby(inner, dropna=False, sort=False)]
        ladders = [(row, line) for row, line in found if line is not None]
        fronts = [line.front() for _, line in ladders]
        highest = [max((float(front[i].max()) for front in fronts), default=0.0) for i in (0, 1)]
        reference = highest[0], highest[1]
        for (row, line), front in zip(ladders, fronts, strict=True):
            first, base = ladders[0][1], fronts[0]
            row_of = {name: row[name] for name in (*outer, *inner)} | {
                "seeds": len(line.l0),
                "settings": len(line.setting),
            }
            row_of["hypervolume"] = hypervolume(front, reference)
            row_of |= _interval("hypervolume", line, first, partial(_alone, reference=reference))
            row_of["gap"] = gap(front, base) if line is not first else 0.0
            row_of |= _interval("gap", line, first, gap)
            row_of |= {"l0_low": max(front[0][0], base[0][0]), "l0_high": min(front[0][-1], base[0][-1])}
            rows.append(row_of)
    return pd.DataFrame(rows)


def _alone(front: tuple[Floats, Floats], _: Any, reference: tuple[float, float]) -> float:
    return hypervolume(front, reference)


def _interval(name: str, line: Ladder, first: Ladder, value: Any) -> dict[str, float]:
    """The middle INSIDE of `value` over resampled seeds."""
    seeds, paired = len(line.l0), len(line.l0) == len(first.l0)
    rng, values = np.random.default_rng(0), []
    for _ in range(RESAMPLED if seeds > 1 else 0):
        drawn = rng.integers(seeds, size=seeds)
        other = drawn if paired else rng.integers(len(first.l0), size=len(first.l0))
        values.append(value(line.front(drawn), first.front(other)))
    known = [each for each in values if each is not None]
    outside = (1 - INSIDE) / 2
    low, high = np.quantile(known, [outside, 1 - outside]) if known else (np.nan, np.nan)
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def unmoved(frame: pd.DataFrame) -> list[str]:
    """A warning for every line whose coefficients, or k, do not move L0: over means of seeds, dead SAEs included."""
    found, apart = [], [*within(frame), *lines(frame)]
    shown = ["architecture", "penalty", "width", "init"]
    # Not what follows from those.
    telling = ({*LINE, *WITHIN} - {"steps"}) | {*choices(frame)}
    shown += [name for name in apart if name not in shown and name in telling and frame[name].nunique() > 1]
    for _, rows in frame.groupby(apart, dropna=False, sort=False):
        counted = rows["k"].notna().any()
        l0 = rows.dropna(subset=["l0"]).groupby("k" if counted else "coefficient")["l0"].mean()
        if len(l0) < 2 or l0.index[-1] < LADDER * max(l0.index[0], 1e-300):
            continue
        if l0.max() < MOVES * l0.min() or l0.max() == 0:
            first = rows.iloc[0]
            names = ", ".join(_word(name, first[name]) for name in shown if pd.notna(first[name]))
            what, over = ("k", "k") if counted else ("coefficient", "coefficients")
            found.append(
                f"{names}: {over} from {l0.index[0]:g} to {l0.index[-1]:g} leave L0 between "
                f"{l0.min():.2f} and {l0.max():.2f}: the {what} does not steer sparsity here"
            )
    return found


def _word(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{name} {value:g}"
