"""The front of reconstruction against L0 as a chart of characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotext
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.text import Text

from sae_sweep.reports import figure_data
from sae_sweep.reports.figure_data import NAMES
from sae_sweep.reports.layout import log_ticks

# Every penalty has a mark and a colour of its own, the same in each chart.
_MARKS = "ox+*#@%&svdw"
_COLOURS = (4, 1, 2, 5, 6, 3, 12, 9, 10, 13, 14, 11)  # of the terminal's own sixteen
_MOST_CHARTS = 4
_SIDE_BY_SIDE = 150
_HEIGHT, _LOW = 16, 12


def front_charts(frame: pd.DataFrame, width: int) -> RenderableType | None:
    """FVU against L0 at the widest width where there is a front, one chart per init, both axes logarithmic and shared;
    None where no penalty has several settings.

    A mark is one setting (mean over seeds); the line joins what no other setting of its penalty beats.
    """
    table = figure_data.front(frame)
    table = table[(table["l0"] > 0) & (table["fvu"] > 0)]
    # Of a setting with several seeds there is a row for their mean, then one for each.
    table = table.drop_duplicates([*NAMES, "coefficient"])
    if table.empty:
        return None
    settings = table.groupby(NAMES[:-1], dropna=False)["l0"].transform("size")
    if settings.max() < 2:
        return None
    table = table[table["width"] == table.loc[settings > 1, "width"].max()]
    names = list(dict.fromkeys(table["penalty_name"]))
    limits = [_limits(table["l0"]), _limits(table["fvu"])]
    charts: list[RenderableType] = []
    groups = list(table.groupby(["given", "init_name"], dropna=False, sort=False))
    beside = width >= _SIDE_BY_SIDE and len(groups) > 1
    size = (width // 2 - 2 if beside else width, _HEIGHT if len(groups) <= 2 else _LOW)
    for (given, init), group in groups[:_MOST_CHARTS]:
        title = " · ".join(filter(None, [f"width {group['width'].iloc[0]}", f"init {init}", given]))
        charts.append(_chart(group, names, limits, title, size))
    left_out = len(groups) - len(charts)
    more = [Text(f"… and {left_out} more inits or data sets in the results table", style="dim")] if left_out > 0 else []
    apart = [part for chart in charts for part in (chart, Text(""))][:-1]
    drawn: RenderableType = Columns(charts, padding=(0, 2, 1, 0)) if beside else Group(*apart)
    return Group(_legend(names), drawn, *more)


def _legend(names: Sequence[str]) -> Text:
    text = Text()
    for i, name in enumerate(names):
        text.append(f"{_mark(i)} {name}   ", style=f"color({_colour(i)})")
    return text


def _mark(i: int) -> str:
    return _MARKS[i % len(_MARKS)]


def _colour(i: int) -> int:
    return _COLOURS[i % len(_COLOURS)]


def _chart(
    group: pd.DataFrame, names: Sequence[str], limits: list[tuple[float, float]], title: str, size: tuple[int, int]
) -> RenderableType:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(*size)
    series = [(names.index(str(name)), points) for name, points in group.groupby("penalty_name", sort=False)]
    for i, points in series:
        best = points[points["on_front"]].sort_values(["l0", "fvu"])
        if len(best) > 1:
            plotext.plot(_log(best["l0"]), _log(best["fvu"]), marker="braille", color=_colour(i))
    for i, points in series:  # after every line, so that no line hides a mark
        plotext.scatter(_log(points["l0"]), _log(points["fvu"]), marker=_mark(i), color=_colour(i))
    for ticks, limit, (low, high) in (
        (plotext.xticks, plotext.xlim, limits[0]),
        (plotext.yticks, plotext.ylim, limits[1]),
    ):
        at = log_ticks(low, high)
        ticks([math.log10(value) for value in at], [f"{value:g}" for value in at])
        limit(math.log10(low), math.log10(high))
    drawn = Text.from_ansi(plotext.build(), no_wrap=True, overflow="crop")
    drawn.rstrip()
    plotext.clear_figure()
    return Group(Text(f"FVU against L0 · {title}", style="bold"), drawn)


def _log(values: pd.Series) -> list[float]:
    return [math.log10(value) for value in values]


def _limits(values: pd.Series) -> tuple[float, float]:
    """A little more than the range of the values, so that no mark lies on the frame."""
    low, high = float(values.min()), float(values.max())
    margin = max((high / low) ** 0.04, 1.05)
    return low / margin, high * margin
