"""What the sweep's W&B run draws, as plain data: fronts, splits, duplicates, owned maxes and labels by width.

W&B's preset charts have linear axes and name only the horizontal one, so every title names the vertical axis and
the FVU, which spans decades along a front, is drawn as its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from sae_sweep.schema import PARTITIONS

# Columns that tell two lines of one chart apart; the coefficient (or k) runs along a line, seeds are averaged.
LINE_COLUMNS = (
    "toy",
    "site",
    "distribution",
    "architecture",
    "start",
    "penalty",
    "penalty_p",
    "penalty_scale",
    "steps",
)
ALONG_LINE = ("coefficient", "k")
# Swept keys whose value a fixed column already holds, or that are averaged over.
KNOWN_KEYS = frozenset(
    (
        *("toy.name", "toy.seed", "site.name", "distribution.name", "training.steps"),
        *("sae.architecture", "sae.width", "sae.k", "sae.init", "sae.partition"),
        *("penalty.name", "penalty.coefficient", "penalty.p", "penalty.scale"),
    )
)
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
    """Charts of a results table (a row per point, the columns of the results table), five per width.

    A chart without a single finite value is left out.
    """
    for width in sorted(frame["width"].unique()):
        for chart in _width_charts(int(width), _means(frame[frame["width"] == width])):
            if chart.lines if isinstance(chart, LineChart) else chart.bars:
                yield chart


def _width_charts(width: int, means: pd.DataFrame) -> Iterator[LineChart | BarChart]:
    end = f"width_{width}"
    against = "L0 (mean active latents)"
    front = means[means["on_front"] > 0] if (means["on_front"] > 0).any() else means
    fronts = {
        line: [(x, math.log10(y)) for x, y in points if y > 0] for line, points in _lines(front, "l0", "fvu").items()
    }
    title = f"Front at width {width}: log10 of FVU (vertical) against L0"
    yield LineChart(f"front_{end}", title, against, {line: points for line, points in fronts.items() if points})
    title = f"Split latents per maximum (vertical) against L0, width {width}"
    yield LineChart(f"splits_{end}", title, against, _lines(means, "l0", "splits_per_max"))
    title = f"Duplicate latents per maximum (vertical) against L0, width {width}"
    yield LineChart(f"duplicates_{end}", title, against, _lines(means, "l0", "duplicates_per_max"))
    owned = means.groupby("line", sort=False)["owned_maxes"].max().dropna()
    title = f"Maxes with a latent of their own, the best coefficient, width {width}"
    yield BarChart(f"owned_{end}", title, {str(line): float(value) for line, value in owned.items()})
    title = f"Latents by what they tell apart, mean over coefficients and seeds, width {width}"
    yield BarChart(f"labels_{end}", title, _label_bars(means))


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of what is drawn, with a column `line` that names the line a row belongs to."""
    rows = rows.assign(start=_start(rows))
    swept = [key for key in rows.columns if "." in key and key not in KNOWN_KEYS]
    columns = [key for key in (*LINE_COLUMNS, *swept) if key in rows]
    varied = [key for key in columns if rows[key].nunique(dropna=False) > 1] or ["penalty"]
    rows = rows.assign(line=rows[varied].apply(_line_name, axis="columns"))
    drawn = ["l0", "fvu", "splits_per_max", "duplicates_per_max", "owned_maxes", "on_front"]
    drawn += [f"label_{partition}" for partition in PARTITIONS]
    rows[drawn] = rows[drawn].astype(float)
    return rows.groupby(["line", *ALONG_LINE], sort=False, dropna=False)[drawn].mean().reset_index()


def _start(rows: pd.DataFrame) -> pd.Series:
    """The start, with the partition where it has one: an oracle start without it is not named."""
    return rows["init"].where(rows["init"] != "oracle", rows["init"] + "-" + rows["partition"].astype(str))


def _line_name(values: pd.Series) -> str:
    """The values that vary, but for those that say nothing; a number is named by its column."""
    said = []
    for key, value in values.items():
        if value is None or value == "none" or pd.isna(value):
            continue
        said.append(value if isinstance(value, str) else f"{str(key).rpartition('.')[2]}={value:g}")
    return " ".join(said) or "none"


def _lines(means: pd.DataFrame, x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    whole = means.dropna(subset=[x, y]).sort_values(x)
    return {
        str(line): [(float(a), float(b)) for a, b in zip(rows[x], rows[y], strict=True)]
        for line, rows in whole.groupby("line", sort=False)
    }


def _label_bars(means: pd.DataFrame) -> dict[str, float]:
    """Counts above zero by line and label, the largest `MAX_BARS` of them, a line's bars side by side."""
    counts = means.groupby("line", sort=False)[[f"label_{partition}" for partition in PARTITIONS]].mean()
    bars = {
        f"{line}: {partition}": float(row[f"label_{partition}"])
        for line, row in counts.iterrows()
        for partition in PARTITIONS
        if row[f"label_{partition}"] > 0
    }
    shown = sorted(bars, key=lambda label: -bars[label])[:MAX_BARS]
    return {label: value for label, value in bars.items() if label in shown}
