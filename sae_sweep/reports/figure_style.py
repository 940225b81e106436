"""How figures look: palette, axes of two levels, legends, and what they all share.

Backgrounds are clear and colours are told apart by every kind of colour vision (Okabe and Ito 2008; cividis), so that
a figure can lie on a light page or a dark one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sae_sweep.reports.figure_data import KINDS, NAMES, PHASES

# Okabe and Ito's palette, the palest last; grey in place of black, for dark pages.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
GREY, DARK, PALE = "#8A8F98", "#5B6068", "#C3C7CE"
# Of counts: pale is none.
COUNT_SCALE = ((0.0, "#f4f1e4"), (0.25, "#b9cfd6"), (0.5, "#6f9fc0"), (0.75, "#33689c"), (1.0, "#0f2f5c"))
# Seen on any colour of a phase.
RING = "#111418"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star", "triangle-down", "hexagram")
_KIND_COLOURS = (
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#117733",
    PALE,
    GREY,
    DARK,
)
KIND_COLOURS = dict(zip(KINDS, _KIND_COLOURS, strict=True))
PHASE_COLOURS = dict(zip(PHASES, ("#56B4E9", "#CC79A7", "#E69F00", "#0072B2", "#009E73", PALE), strict=True))
# The height of a row of a heatmap or a bar in pixels, and where there are so many that they would fill MOST_HEIGHT.
ROW, CROWDED_ROW, MOST_HEIGHT = 26, 14, 1400
MOST_LINES = 48
# Panels side by side.
MOST_ACROSS = 3


class Grid:
    """The rows (init, width) and columns (penalty, coefficient) of settings, as the axes of a heatmap.

    Where something else varies (`given`), it is part of a row's name.
    """

    def __init__(self, data: pd.DataFrame) -> None:
        names = pd.Series(_inits(data), data.index)
        rows = _sorted(pd.DataFrame({"block": names, "width": data["width"]}), float)
        columns = _sorted(data[["penalty_name", "setting"]], lambda setting: float(setting.removeprefix("k=")))
        self.y = two_levels(rows["block"], [f"width {width}" for width in rows["width"]])
        self.x = two_levels(columns["penalty_name"], columns["setting"])
        row_of = {key: i for i, key in enumerate(zip(rows["block"], rows["width"], strict=True))}
        column_of = {key: i for i, key in enumerate(zip(columns["penalty_name"], columns["setting"], strict=True))}
        self._row = [row_of[key] for key in zip(names, data["width"], strict=True)]
        self._column = [column_of[key] for key in zip(data["penalty_name"], data["setting"], strict=True)]

    def values(self, series: pd.Series, missing: object = None) -> list[list[object]]:
        """The values of the settings in their places, `missing` where there is no such setting."""
        placed = np.full((len(self.y[0]), len(self.x[0])), missing, dtype=object)
        placed[self._row, self._column] = series.to_numpy()
        return placed.tolist()

    def places(self, chosen: Sequence[bool]) -> tuple[list[list[str]], list[list[str]]]:
        """The coordinates x and y of the chosen settings."""
        found = [(i, j) for i, j, one in zip(self._row, self._column, chosen, strict=True) if one]
        return [[level[j] for _, j in found] for level in self.x], [[level[i] for i, _ in found] for level in self.y]

    def finished(self, figure: go.Figure, title: str) -> go.Figure:
        figure.update_xaxes(title="penalty, coefficient", type="multicategory")
        figure.update_yaxes(autorange="reversed", type="multicategory")
        return finished(figure, title, height(len(self.y[0])))


def two_levels(first: Iterable[str], second: Iterable[str]) -> list[list[str]]:
    """The coordinates of a multicategory axis. Plotly orders the second level by where a name is first seen under any
    of the first, so a name is told from its like under others by spaces of no width."""
    names = list(first)
    order = {block: i for i, block in enumerate(unique(names))}
    return [names, [name + "\u200b" * order[block] for block, name in zip(names, second, strict=True)]]


def blocks(data: pd.DataFrame) -> list[str]:
    return [f"{init}, {width}" for init, width in zip(_inits(data), data["width"], strict=True)]


def penalty_look(i: int) -> dict[str, str]:
    return {"color": colour(i), "dash": DASHES[i // len(COLOURS) % len(DASHES)]}


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def legend(name: str, group: str, **look: object) -> go.Scatter:
    """An entry of the legend that stands for a group of traces."""
    return go.Scatter(x=[None], y=[None], name=name, legendgroup=group, showlegend=True, hoverinfo="skip", **look)


def spread(points: pd.DataFrame, name: str) -> Mapping[str, object] | None:
    """Error bars from `<name>_low` to `<name>_high`; None where there are none."""
    if f"{name}_high" not in points or points[f"{name}_high"].isna().all():
        return None
    array, minus = points[f"{name}_high"] - points[name], points[name] - points[f"{name}_low"]
    return {"type": "data", "array": array.fillna(0), "arrayminus": minus.fillna(0), "thickness": 1, "width": 2}


def colour_bar(title: str) -> dict[str, object]:
    return {"title": {"text": title}, "thickness": 12, "outlinewidth": 0}


def steps(colours: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale of equal steps."""
    n = len(colours)
    return [(edge / n, shade) for i, shade in enumerate(colours) for edge in (i, i + 1)]


def height(rows: int) -> int:
    return 150 + int(min(ROW * max(rows, 3), max(MOST_HEIGHT, CROWDED_ROW * rows)))


def finished(figure: go.Figure, title: str, height: int) -> go.Figure:
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)", "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xanchor": "left", "xref": "container", "font": {"size": 16}},
        height=height,
        margin={"l": 10, "r": 10, "t": 50, "b": 24},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "traceorder": "normal"},
        hoverlabel={"align": "left"},
    )


def unique(values: Iterable[object]) -> list:
    return list(dict.fromkeys(values))


def _inits(data: pd.DataFrame) -> list[str]:
    return [
        ", ".join(filter(None, (init, given))) for init, given in zip(data["init_name"], data["given"], strict=True)
    ]


def _sorted(pairs: pd.DataFrame, number: Callable[[Any], float]) -> pd.DataFrame:
    """The distinct pairs: by their first column in the order given, then by the number that the second stands for."""
    distinct = pairs.drop_duplicates()
    first, second = distinct.columns
    order = {name: i for i, name in enumerate(unique(distinct[first]))}
    keys = pd.DataFrame({"first": distinct[first].map(order), "second": distinct[second].map(number)})
    return distinct.loc[keys.sort_values(["first", "second"]).index]


def switches(names: Sequence[Any]) -> dict[str, str]:
    """By what the report's switches turn a trace on and off: the values of NAMES but the setting, in their order."""
    given, init, width, architecture, penalty = names
    return {"penalty": penalty, "width": str(width), "init": init, "architecture": architecture, "given": given}


def shown_widths(data: pd.DataFrame) -> set[Any]:
    """The widths to show at first: all, or the widest alone where all would be more lines than an eye can follow."""
    widths = set(data["width"])
    return widths if len(data[NAMES[:-1]].drop_duplicates()) <= MOST_LINES else {max(widths)}
