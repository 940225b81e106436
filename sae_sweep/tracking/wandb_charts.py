"""What the sweep's W&B run draws, as plain data: fronts, splits, duplicates, owned maxes and labels by width.

W&B's preset charts have linear axes and name only the horizontal one, so every title names the vertical axis and
the FVU, which spans decades along a front, is drawn as its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sae_sweep.config.columns import LABELS, is_setting
from sae_sweep.reports.figure_data import NAMED
from sae_sweep.reports.results_table import penalty_name
from sae_sweep.store.results import aggregate

_COUNTS = ("splits_per_max", "distinct_splits_per_max", "duplicates_per_max", "owned_maxes")
DRAWN = ("l0", "fvu", *_COUNTS, *(f"label_{label}" for label in LABELS))
MAX_BARS = 40


@dataclass(frozen=True)
class LineChart:
    """`lines`: name → (x, y) in the order of x."""

    key: str
    title: str
    x_name: str
    lines: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class BarChart:
    """`bars`: label → value, in the order to draw."""

    key: str
    title: str
    bars: dict[str, float]


def sweep_charts(frame: pd.DataFrame) -> Iterator[LineChart | BarChart]:
    """Charts of a results table (a row per point, the columns of the results table), six per width.

    A chart without a single finite value is left out.
    """
    for width in sorted(frame["width"].unique()):
        for chart in _width_charts(int(width), _means(frame[frame["width"] == width])):
            if chart.lines if isinstance(chart, LineChart) else chart.bars:
                yield chart


def _width_charts(width: int, means: pd.DataFrame) -> Iterator[LineChart | BarChart]:
    end = f"width_{width}"
    against = "L0 (mean active latents)"
    front = means[means["on_front"]]
    fronts = {
        line: [(x, math.log10(y)) for x, y in points if y > 0] for line, points in _lines(front, "l0", "fvu").items()
    }
    title = f"Front at width {width}: log10 of FVU (vertical) against L0"
    yield LineChart(f"front_{end}", title, against, {line: points for line, points in fronts.items() if points})
    title = f"Split latents per maximum (vertical) against L0, width {width}"
    yield LineChart(f"splits_{end}", title, against, _lines(means, "l0", "splits_per_max"))
    title = f"Distinct splits per maximum (vertical) against L0, width {width}"
    yield LineChart(f"distinct_{end}", title, against, _lines(means, "l0", "distinct_splits_per_max"))
    title = f"Duplicate latents per maximum (vertical) against L0, width {width}"
    yield LineChart(f"duplicates_{end}", title, against, _lines(means, "l0", "duplicates_per_max"))
    owned = means.groupby("line", sort=False)["owned_maxes"].max().dropna()
    title = f"Maxes with a latent of their own, the best coefficient, width {width}"
    yield BarChart(f"owned_{end}", title, {str(line): float(value) for line, value in owned.items()})
    title = f"Latents by what they tell apart, mean over coefficients and seeds, width {width}"
    yield BarChart(f"labels_{end}", title, _label_bars(means))


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, indexed by the `line` a row belongs to: its penalty and what else varies."""
    means = aggregate(rows, "mean")
    means = means.assign(on_front=means["on_front"].fillna(False)).astype(
        {**dict.fromkeys(DRAWN, float), "on_front": bool}
    )
    parts = [means.apply(penalty_name, axis="columns")]
    starts = means["init"].where(means["init"] != "oracle", "oracle-" + means["partition"])
    if starts.nunique() > 1:
        parts.append(starts)
    for column in means.columns:
        if is_setting(column) and column not in NAMED and means[column].nunique(dropna=False) > 1:
            parts.append(means[column].map(lambda value, column=column: _said(column, value)))
    lines = [" ".join(filter(None, said)) for said in zip(*parts, strict=True)]
    return means.set_axis(pd.Index(lines, name="line"))


def _said(column: str, value: Any) -> str:
    """A value that varies; a number is named by its column, a null says nothing."""
    if pd.isna(value):
        return ""
    return value if isinstance(value, str) else f"{column.rpartition('.')[2]}={value:g}"


def _lines(means: pd.DataFrame, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    whole = means.dropna(subset=[x, y]).sort_values(x)
    return {
        str(line): [(float(a), float(b)) for a, b in zip(rows[x], rows[y], strict=True)]
        for line, rows in whole.groupby("line", sort=False)
    }


def _label_bars(means: pd.DataFrame) -> dict[str, float]:
    """Counts above zero by line and label, the largest `MAX_BARS` of them, a line's bars side by side."""
    counts = means.groupby("line", sort=False)[[f"label_{label}" for label in LABELS]].mean()
    bars = {
        f"{line}: {label}": float(row[f"label_{label}"])
        for line, row in counts.iterrows()
        for label in LABELS
        if row[f"label_{label}"] > 0
    }
    shown = sorted(bars, key=lambda label: -bars[label])[:MAX_BARS]
    return {label: value for label, value in bars.items() if label in shown}
