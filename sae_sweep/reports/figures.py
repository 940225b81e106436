"""The figures of a sweep: a function each from the tables of `figure_data` to a Plotly figure.

    figures.front(figure_data.front(df)).show()

Backgrounds are clear and colours are told apart by every kind of colour vision (Okabe and Ito 2008; cividis), so that
a figure can lie on a light page or a dark one. What the report's switches turn on and off is in `trace.meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_sweep.reports.figure_data import FACTORS, KINDS, NAMES, PHASES

# Okabe and Ito's palette, the palest last; grey in place of black, for dark pages.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
GREY, DARK, PALE = "#8A8F98", "#5B6068", "#C3C7CE"
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
PHASE_COLOURS = dict(zip(PHASES, ("#56B4E9", "#E69F00", "#0072B2", "#009E73", PALE), strict=True))
# Above so many points WebGL draws what would be slow as SVG.
MOST_SVG_POINTS = 1000
ROW = 26  # the height of a row of a heatmap or a bar, in pixels


def front(data: pd.DataFrame) -> go.Figure:
    """FVU against L0, both logarithmic: colour is the penalty, the symbol the start, the size the width.

    A mark is a setting, with its range over seeds; the line joins what no setting of its penalty, start and width
    beats. Each seed by itself is there too, hidden.
    """
    figure = go.Figure()
    kind = go.Scattergl if len(data) > MOST_SVG_POINTS else go.Scatter
    penalties, starts, widths = (_unique(data[name]) for name in ("penalty_name", "start", "width"))
    repeats = _unique(data["repeat"])
    whole = data[(data["l0"] > 0) & (data["fvu"] > 0)]
    for names, rows in whole.groupby([*NAMES[:-1], "repeat"], dropna=False, sort=False):
        given, start, width, architecture, penalty, repeat = names
        look = _penalty_look(penalties.index(penalty))
        points = _front_first(rows)
        figure.add_trace(
            kind(
                x=points["l0"],
                y=points["fvu"],
                error_x=_range(points, "l0"),
                error_y=_range(points, "fvu"),
                customdata=points[["said", "splits_per_max", "duplicates_per_max", "owned_maxes"]],
                hovertemplate="%{customdata[0]}<br>L0 %{x:.3g} · FVU %{y:.3g}<br>splits per max %{customdata[1]:.2f} · "
                "duplicates %{customdata[2]:.2f} · owned %{customdata[3]:.3g}<extra></extra>",
                mode="lines+markers",
                line={**look, "width": 1.5},
                marker={
                    "symbol": SYMBOLS[starts.index(start) % len(SYMBOLS)],
                    "size": _size(widths, width),
                    "opacity": np.where(points["on_front"].fillna(False), 1.0, 0.45),
                },
                legendgroup=penalty,
                showlegend=False,
                visible=bool(repeat == repeats[0]) or "mean" not in repeats,
                name=penalty,
                meta={
                    "penalty": penalty,
                    "width": str(width),
                    "start": start,
                    "architecture": architecture,
                    "seed": repeat,
                    "given": given,
                },
            )
        )
    for i, penalty in enumerate(penalties):
        figure.add_trace(_legend(penalty, penalty, line=_penalty_look(i), mode="lines"))
    for i, start in enumerate(starts):
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "color": GREY, "size": 8}
        figure.add_trace(_legend(f"{start} start", f"start {start}", marker=marker, mode="markers"))
    figure.update_xaxes(type="log", title="L0: mean active latents", dtick="D2", tickformat="~g")
    figure.update_yaxes(type="log", title="FVU: variance left unexplained", dtick="D2", tickformat="~g")
    return _finished(figure, "Reconstruction against sparsity: lower left is better", 520)


def split_counts(data: pd.DataFrame) -> go.Figure:
    """Splits per maximum as a heatmap: a row per start and width, a column per penalty and coefficient."""
    grid = _Grid(data)
    hover = [
        f"{row.start} start, width {row.width}, {row.penalty_name} {row.setting}<br>splits per max "
        f"{row.splits_per_max:.2f} · duplicates {row.duplicates_per_max:.2f} · owned maxes {row.owned_maxes:.3g}"
        for row in data.itertuples()
    ]
    figure = go.Figure(
        go.Heatmap(
            x=grid.x,
            y=grid.y,
            z=grid.values(data["splits_per_max"].astype(float)),
            text=grid.values(pd.Series(hover, data.index)),
            hovertemplate="%{text}<extra></extra>",
            colorscale="Cividis",
            zmin=0,
            xgap=1,
            ygap=1,
            colorbar=_bar("splits<br>per max"),
        )
    )
    return grid.finished(figure, "Split latents per maximum")


def phases(data: pd.DataFrame) -> go.Figure:
    """The phase of every setting, in the grid of `split_counts`; a letter says what the colour says."""
    grid = _Grid(data)
    hover = [
        f"{row.start} start, width {row.width}, {row.penalty_name} {row.setting}<br><b>{row.phase}</b>: of "
        f"{row.maxima:.0f} maxima {row.whole:.3g} have a latent for the whole ({row.copies:.3g} copies), "
        f"{row.split_maxes:.3g} are split"
        for row in data.itertuples()
    ]
    present = [phase for phase in PHASES if (data["phase"] == phase).any()]
    figure = go.Figure(
        go.Heatmap(
            x=grid.x,
            y=grid.y,
            z=grid.values(data["phase"].map(PHASES.index)),
            text=grid.values(data["phase"].str[0].str.upper()),
            customdata=grid.values(pd.Series(hover, data.index)),
            texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=_steps([PHASE_COLOURS[phase] for phase in PHASES]),
            zmin=-0.5,
            zmax=len(PHASES) - 0.5,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    for phase in present:
        marker = {"symbol": "square", "size": 12, "color": PHASE_COLOURS[phase]}
        figure.add_trace(_legend(f"{phase[0].upper()} {phase}", phase, marker=marker, mode="markers"))
    return grid.finished(figure, "What most maxima have: a phase diagram")


def distribution(data: pd.DataFrame) -> go.Figure:
    """Split latents of every maximum: a row per start, width and penalty at its middle coefficient."""
    rows = data.drop_duplicates(NAMES)
    groups = {tuple(names): group for names, group in data.groupby(NAMES, dropna=False, sort=False)}
    maxima = np.arange(int(data["maximum"].max()) + 1 if len(data) else 0)
    z = np.full((len(rows), len(maxima)), np.nan)
    copies = z.copy()
    for i, names in enumerate(groups):
        z[i, groups[names]["maximum"]] = groups[names]["splits"]
        copies[i, groups[names]["maximum"]] = groups[names]["duplicates"]
    figure = go.Figure(
        go.Heatmap(
            x=maxima,
            y=_two_levels(_blocks(rows), [f"{row.penalty_name} {row.setting}" for row in rows.itertuples()]),
            z=z,
            customdata=copies,
            hovertemplate="%{y}<br>maximum %{x}: %{z:.3g} split latents, %{customdata:.3g} duplicates<extra></extra>",
            colorscale="Cividis",
            zmin=0,
            xgap=1,
            ygap=1,
            colorbar=_bar("split<br>latents"),
        )
    )
    figure.update_xaxes(title="maximum (token)")
    figure.update_yaxes(autorange="reversed", type="multicategory")
    return _finished(figure, "Split latents of each maximum, middle coefficients", _height(len(rows)))


def labels(data: pd.DataFrame) -> go.Figure:
    """What latents stand for: a stacked bar per width and start, trained and untrained."""
    figure = go.Figure()
    data = data.sort_values(["width"], kind="stable")
    shown = [kind for kind in KINDS if (data[kind] > 0).any()]
    for kind in shown:
        figure.add_trace(
            go.Bar(
                x=data[kind],
                y=_two_levels(_blocks(data), data["state"]),
                name=KINDS[kind],
                orientation="h",
                marker={"color": KIND_COLOURS[kind], "pattern": {"shape": {"none": "/", "dead": "x"}.get(kind, "")}},
                customdata=data["points"],
                hovertemplate=f"%{{x:.1f}} latents: {KINDS[kind]}<br>%{{y}}, mean of %{{customdata}} points"
                "<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(title="latents, mean over penalties, coefficients and seeds")
    figure.update_yaxes(autorange="reversed", type="multicategory")
    return _finished(figure, "What latents stand for", _height(len(data)))


def information(data: pd.DataFrame) -> go.Figure:
    """How much of each factor the top latent tells given the maximum, beyond chance; bars span the points."""
    figure = go.Figure()
    for i, factor in enumerate(FACTORS.values()):
        for state, rows in data[data["factor"] == factor].groupby("state", sort=False):
            marker = {"color": COLOURS[i], "size": 10, "symbol": SYMBOLS[i] + ("-open" if state == "untrained" else "")}
            figure.add_trace(
                go.Scatter(
                    x=rows["told"],
                    y=_blocks(rows),
                    error_x={
                        "array": rows["told_high"] - rows["told"],
                        "arrayminus": rows["told"] - rows["told_low"],
                        "thickness": 1,
                        "width": 3,
                    },
                    mode="markers",
                    orientation="h",
                    offsetgroup=factor,
                    marker=marker,
                    name=factor if state == "trained" else f"{factor}, untrained",
                    customdata=rows[["alone", "points"]],
                    hovertemplate=f"%{{y}}, {state}<br>{factor}: %{{x:.1%}} told given the maximum, "
                    "%{customdata[0]:.1%} given the others too<br>mean of %{customdata[1]} points<extra></extra>",
                )
            )
    figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_xaxes(title="share of the factor's entropy told by the top latent", tickformat=".0%")
    figure.update_yaxes(autorange="reversed", type="category")
    return _finished(figure, "Which factor the top latent tells", _height(2 * data.groupby(["start", "width"]).ngroups))


def curves(data: pd.DataFrame) -> go.Figure:
    """FVU and L0 through training at the middle coefficients: medians over seeds."""
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06)
    penalties, starts = _unique(data["penalty_name"]), _unique(data["start"])
    kind = go.Scattergl if len(data) > 20 * MOST_SVG_POINTS else go.Scatter
    for (given, start, width, architecture, penalty), rows in data.groupby(NAMES[:-1], dropna=False, sort=False):
        medians = rows.groupby("step")[["fvu", "l0"]].median().reset_index()
        for row, column in ((1, "fvu"), (2, "l0")):
            figure.add_trace(
                kind(
                    x=medians["step"],
                    y=medians[column],
                    mode="lines",
                    line={
                        "color": _colour(penalties.index(penalty)),
                        "dash": DASHES[starts.index(start) % len(DASHES)],
                        "width": 1.5,
                    },
                    showlegend=False,
                    name=penalty,
                    legendgroup=penalty,
                    meta={
                        "penalty": penalty,
                        "width": str(width),
                        "start": start,
                        "architecture": architecture,
                        "given": given,
                    },
                    hovertemplate=f"{penalty} {rows['setting'].iloc[0]}, {start} start, width {width}<br>"
                    f"step %{{x}}: {column.upper()} %{{y:.3g}}<extra></extra>",
                ),
                row=row,
                col=1,
            )
    for i, penalty in enumerate(penalties):
        figure.add_trace(_legend(penalty, penalty, line={"color": _colour(i)}, mode="lines"), row=1, col=1)
    for i, start in enumerate(starts):
        line = {"color": GREY, "dash": DASHES[i % len(DASHES)]}
        figure.add_trace(_legend(f"{start} start", f"start {start}", line=line, mode="lines"), row=1, col=1)
    figure.update_yaxes(type="log", title="FVU", tickformat="~g", row=1, col=1)
    figure.update_yaxes(type="log", title="L0", dtick="D2", tickformat="~g", row=2, col=1)
    figure.update_xaxes(title="training step", row=2, col=1)
    return _finished(figure, "Training, middle coefficients", 560)


class _Grid:
    """The rows (start, width) and columns (penalty, coefficient) of settings, as the axes of a heatmap.

    Where something else varies (`given`), it is part of a row's name.
    """

    def __init__(self, data: pd.DataFrame) -> None:
        blocks = pd.Series(_starts(data), data.index)
        rows = _sorted(pd.DataFrame({"block": blocks, "width": data["width"]}), float)
        columns = _sorted(data[["penalty_name", "setting"]], lambda setting: float(setting.removeprefix("k=")))
        self.y = _two_levels(rows["block"], [f"width {width}" for width in rows["width"]])
        self.x = _two_levels(columns["penalty_name"], columns["setting"])
        row_of = {key: i for i, key in enumerate(zip(rows["block"], rows["width"], strict=True))}
        column_of = {key: i for i, key in enumerate(zip(columns["penalty_name"], columns["setting"], strict=True))}
        self._row = [row_of[key] for key in zip(blocks, data["width"], strict=True)]
        self._column = [column_of[key] for key in zip(data["penalty_name"], data["setting"], strict=True)]

    def values(self, series: pd.Series) -> list[list[object]]:
        """The values of the settings in their places, null where there is no such setting."""
        placed = np.full((len(self.y[0]), len(self.x[0])), None, dtype=object)
        placed[self._row, self._column] = series.to_numpy()
        return placed.tolist()

    def finished(self, figure: go.Figure, title: str) -> go.Figure:
        figure.update_xaxes(title="penalty, coefficient", type="multicategory")
        figure.update_yaxes(autorange="reversed", type="multicategory")
        return _finished(figure, title, _height(len(self.y[0])))


def _sorted(pairs: pd.DataFrame, number: Callable[[Any], float]) -> pd.DataFrame:
    """The distinct pairs: by their first column in the order given, then by the number that the second stands for."""
    distinct = pairs.drop_duplicates()
    first, second = distinct.columns
    order = {name: i for i, name in enumerate(_unique(distinct[first]))}
    keys = pd.DataFrame({"first": distinct[first].map(order), "second": distinct[second].map(number)})
    return distinct.loc[keys.sort_values(["first", "second"]).index]


def _starts(data: pd.DataFrame) -> list[str]:
    return [f"{start} {given}".rstrip() for start, given in zip(data["start"], data["given"], strict=True)]


def _two_levels(first: Iterable[str], second: Iterable[str]) -> list[list[str]]:
    """The coordinates of a multicategory axis. Plotly orders the second level by where a name is first seen under any
    of the first, so a name is told from its like under others by spaces of no width."""
    blocks = list(first)
    order = {block: i for i, block in enumerate(_unique(blocks))}
    return [blocks, [name + "\u200b" * order[block] for block, name in zip(blocks, second, strict=True)]]


def _blocks(data: pd.DataFrame) -> list[str]:
    return [f"{start}, {width}" for start, width in zip(_starts(data), data["width"], strict=True)]


def _front_first(rows: pd.DataFrame) -> pd.DataFrame:
    """The points of a line: those on the front by L0, then the others with gaps between, so that no line joins them."""
    optimal = rows["on_front"].fillna(False).astype(bool)
    others = rows[~optimal]
    gaps = pd.DataFrame(np.nan, index=range(len(others)), columns=["l0", "fvu"])
    apart = pd.concat([gaps, others.reset_index(drop=True)]).sort_index(kind="stable")
    points = pd.concat([rows[optimal].sort_values("l0"), apart], ignore_index=True)
    return points.assign(said=[_said(row) for row in points.itertuples()])


def _said(row: Any) -> str:
    """What a mark of the front says of itself; nothing for a gap."""
    if pd.isna(row.seeds):
        return ""
    mean = pd.isna(row.point_id)
    which = f"mean of {row.seeds:.0f} seeds" if mean else f"<b>{row.point_id[:8]}</b> · seed {row.repeat}"
    given = f", {row.given}" if row.given else ""
    return f"{which}<br>{row.penalty_name} {row.setting}, width {row.width:.0f}, {row.start} start{given}"


def _range(points: pd.DataFrame, name: str) -> Mapping[str, object] | None:
    if f"{name}_high" not in points or points[f"{name}_high"].isna().all():
        return None
    array, minus = points[f"{name}_high"] - points[name], points[name] - points[f"{name}_low"]
    return {"type": "data", "array": array.fillna(0), "arrayminus": minus.fillna(0), "thickness": 1, "width": 2}


def _penalty_look(i: int) -> dict[str, str]:
    return {"color": _colour(i), "dash": DASHES[i // len(COLOURS) % len(DASHES)]}


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _size(widths: Sequence[Any], width: Any) -> float:
    return 7 + 5 * sorted(widths).index(width) / max(len(widths) - 1, 1)


def _legend(name: str, group: str, **look: object) -> go.Scatter:
    """An entry of the legend that stands for a group of traces."""
    return go.Scatter(x=[None], y=[None], name=name, legendgroup=group, showlegend=True, hoverinfo="skip", **look)


def _bar(title: str) -> dict[str, object]:
    return {"title": {"text": title}, "thickness": 12, "outlinewidth": 0}


def _steps(colours: Sequence[str]) -> list[tuple[float, str]]:
    """A colour scale of equal steps."""
    n = len(colours)
    return [(edge / n, colour) for i, colour in enumerate(colours) for edge in (i, i + 1)]


def _height(rows: int) -> int:
    return 150 + ROW * max(rows, 3)


def _unique(values: Iterable[object]) -> list:
    return list(dict.fromkeys(values))


def _finished(figure: go.Figure, title: str, height: int) -> go.Figure:
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zerolinecolor": "rgba(128,128,128,0.4)", "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure.update_layout(
        template="none",
        title={"text": title, "x": 0, "xanchor": "left", "xref": "container", "font": {"size": 16}},
        height=height,
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "traceorder": "normal"},
        hoverlabel={"align": "left"},
    )
