"""Measures along the ladder of each penalty: how many features L1 finds at each of its coefficients, say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_sweep.config.settings import counts
from sae_sweep.reports.figure_data import NAMES, named
from sae_sweep.reports.figure_style import (
    GREY,
    MOST_ACROSS,
    SYMBOLS,
    finished,
    legend,
    penalty_look,
    shown_widths,
    spread,
    switches,
    unique,
)
from sae_sweep.reports.layout import log_ticks

# The columns that are looked at, in the order in which they are offered, and what they are called.
MEASURES = {
    "mcc": "found features (MCC)",
    "owned_maxes": "owned maxes",
    "distinct_splits_per_max": "distinct splits per max",
    "found_mq": "share of (maximum, query) found",
    "live_latents": "live latents",
    "l0": "L0",
    "fvu": "FVU",
}
_LOGARITHMIC = ("l0", "fvu")
_PANEL, _LINE = ["given", "init_name", "along"], [*NAMES[:-1], "along"]
# Of more panels only these are drawn, and the figure says so.
MOST_PANELS = 15
# Panels whose names are longer than this, in letters, stand two in a row.
LONG_TITLE = 36
# Pixels: of a panel, and of what stands between two below each other.
_HIGH, _BETWEEN = 220, 70


def ladder(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per setting and `measure`, which is a column of MEASURES: over `seeds` points the mean, `value`, with
    `value_low` and `value_high`.

    `along` is "coefficient", or "k" where the architecture sets that, and `rung` its value. Measures that nowhere
    differ are left out, and so are lines of one rung.
    """
    table = named(frame)
    counted = table["architecture"].map(counts).astype(bool)
    rung = table["coefficient"].astype(float).mask(counted, table["k"].astype(float))
    values = {name: table[name].astype(float) for name in MEASURES}
    whole = table[NAMES].assign(along=counted.map({True: "k", False: "coefficient"}), rung=rung, **values)
    setting = [*NAMES, "along", "rung"]
    # A logarithmic axis has no place for 0.
    long = whole[rung > 0].melt(setting, [*MEASURES], "measure", ignore_index=False).sort_index(kind="stable")
    groups = long.dropna(subset=["value"]).groupby([*setting, "measure"], dropna=False, sort=False)["value"]
    rows = groups.agg(seeds="size", value="mean", value_low="min", value_high="max").reset_index()
    rungs = rows.groupby([*_LINE, "measure"], dropna=False, sort=False)["rung"].transform("nunique")
    rows = rows[rungs > 1]
    return rows[rows.groupby("measure")["value"].transform("nunique") > 1].reset_index(drop=True)


def draw(data: pd.DataFrame) -> go.Figure:
    """One measure at a time against the coefficient, or k: colour is the penalty, the symbol the width.

    A panel for each init and whatever else the sweep varies; SAEs that set k have panels of their own.
    """
    panels = [*data[_PANEL].drop_duplicates().itertuples(index=False, name=None)]
    figure, places = _panels(data, panels[:MOST_PANELS])
    penalties, widths, shown = unique(data["penalty_name"]), sorted(unique(data["width"])), shown_widths(data)
    measures = [name for name in MEASURES if (data["measure"] == name).any()]
    for measure in measures:
        taken = data[data["measure"] == measure]
        for names, rows in taken.groupby(_LINE, dropna=False, sort=False):
            given, init, width, _, penalty, along = names
            if (given, init, along) not in places:
                continue
            said = f"{penalty} at {along} %{{x:.4g}}, width {width}, init {init}{given and f', {given}'}"
            trace = _line(rows, f"{said}<br>{MEASURES[measure]} %{{y:.4g}}")
            trace.update(
                line={**penalty_look(penalties.index(penalty)), "width": 1.5},
                marker={"symbol": SYMBOLS[widths.index(width) % len(SYMBOLS)], "size": 8},
                name=penalty,
                legendgroup=penalty,
                visible=bool(width in shown and measure == measures[0]),
                meta=switches(names[:-1]) | {"count": MEASURES[measure]},
            )
            figure.add_trace(trace, **places[given, init, along])
    for i, penalty in enumerate(penalties):
        figure.add_trace(legend(penalty, penalty, line=penalty_look(i), mode="lines"), row=1, col=1)
    for i, width in enumerate(widths):
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "color": GREY, "size": 8}
        figure.add_trace(legend(f"width {width}", f"width {width}", marker=marker, mode="markers"), row=1, col=1)
    if len(panels) > len(places):
        rest = f"{len(places)} of {len(panels)} panels are drawn; the figure's table has all"
        figure.add_trace(legend(rest, rest, mode="none"), row=1, col=1)
    # By these the page changes the axes with the measure.
    axes = [_axis(data[data["measure"] == measure], measure) for measure in measures]
    figure.update_layout(meta=axes)
    if axes:
        axis = axes[0]
        figure.update_yaxes(type=axis["type"], tickvals=axis["tickvals"], tickformat="~g")
        figure.update_yaxes(title=axis["count"], col=1)
    down = max((place["row"] for place in places.values()), default=1)
    return finished(figure, "Ladder: what each coefficient comes to", 100 + (_HIGH + _BETWEEN) * down)


def _panels(
    data: pd.DataFrame, panels: Sequence[tuple[Any, ...]]
) -> tuple[go.Figure, dict[tuple[Any, ...], dict[str, int]]]:
    """The empty panels, named and with their axes along the ladder, and the row and column of each."""
    several = data["init_name"].nunique() > 1
    titles = [", ".join(filter(None, [f"init {init}" * several, given])) for given, init, _ in panels]
    # Toys often come in pairs.
    in_pairs = len(panels) in (4, 6) or max(map(len, titles), default=0) > LONG_TITLE
    across = min(max(len(panels), 1), 2 if in_pairs else MOST_ACROSS)
    down = max(1, -(-len(panels) // across))
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_yaxes="all",
        subplot_titles=titles if any(titles) else None,
        horizontal_spacing=0.03,
        vertical_spacing=_BETWEEN / (_HIGH * down + _BETWEEN * (down - 1)),
    )
    figure.update_annotations(font_size=13)
    places = {panel: {"row": i // across + 1, "col": i % across + 1} for i, panel in enumerate(panels)}
    for panel, place in places.items():
        rungs = np.unique(data.loc[(data[_PANEL] == list(panel)).all(axis=1), "rung"])
        ticks = rungs if panel[-1] == "k" else log_ticks(0.99 * rungs[0], 1.01 * rungs[-1])
        figure.update_xaxes(type="log", tickformat="~g", tickvals=ticks, **place)
        figure.update_xaxes(title={"text": panel[-1], "standoff": 4}, **place)
    return figure, places


def _line(rows: pd.DataFrame, said: str) -> go.Scatter:
    """One measure of the settings of one line."""
    points = rows.sort_values("rung")
    return go.Scatter(
        x=points["rung"],
        y=points["value"],
        error_y=spread(points, "value"),
        customdata=points[["seeds", "value_low", "value_high"]],
        hovertemplate=f"{said}, mean of %{{customdata[0]}}<br>from %{{customdata[1]:.4g}} to %{{customdata[2]:.4g}}"
        "<extra></extra>",
        mode="lines+markers",
        showlegend=False,
    )


def _axis(rows: pd.DataFrame, measure: str) -> dict[str, Any]:
    """How the vertical axis shows a measure: `count` is what the traces' meta calls it, too."""
    low, high = float(rows["value_low"].min()), float(rows["value_high"].max())
    logarithmic = measure in _LOGARITHMIC and low > 0
    return {
        "count": MEASURES[measure],
        "type": "log" if logarithmic else "linear",
        "tickvals": log_ticks(0.95 * low, 1.05 * high) if logarithmic else None,
    }
