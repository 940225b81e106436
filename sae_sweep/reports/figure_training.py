"""Figures of training: how its curves run, and whether it has settled."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_sweep.reports.figure_data import NAMES
from sae_sweep.reports.figure_style import (
    DASHES,
    GREY,
    SYMBOLS,
    colour,
    finished,
    legend,
    shown_widths,
    switches,
    unique,
)
from sae_sweep.store.plateau import STILL_MOVING

# What of a training curve not every sweep has, and what of it may be 0, so that no axis is logarithmic.
_COUNTED = {"dead": "dead latents", "revived": "revived"}
_KNOWN = {"gradient": "gradient's norm", **_COUNTED}


def curves(data: pd.DataFrame) -> go.Figure:
    """FVU, L0, the gradient's norm, dead latents and revived ones, where there are any, at the knees
    (`figure_data.knees`): medians over seeds; and the L0 that is aimed at."""
    drawn = {"fvu": "FVU", "l0": "L0"} | {key: title for key, title in _KNOWN.items() if data[key].fillna(0).any()}
    figure = make_subplots(rows=len(drawn), shared_xaxes=True, vertical_spacing=0.06)
    penalties, inits, shown = unique(data["penalty_name"]), unique(data["init_name"]), shown_widths(data)
    for names, rows in data.groupby(NAMES[:-1], dropna=False, sort=False):
        given, init, width, _, penalty = names
        visible = bool(width in shown)
        medians = rows.groupby("step")[[*drawn]].median().reset_index()
        look = {"color": colour(penalties.index(penalty)), "width": 1.5}
        common = {
            "showlegend": False,
            "name": penalty,
            "legendgroup": penalty,
            "visible": visible,
            "meta": switches(names),
        }
        said = f"{penalty} {rows['setting'].iloc[0]}, init {init}, width {width}{given and f', {given}'}"
        for row, (column, title) in enumerate(drawn.items(), start=1):
            if medians[column].isna().all():
                continue
            line = go.Scatter(
                x=medians["step"],
                y=medians[column],
                mode="lines",
                line={**look, "dash": DASHES[inits.index(init) % len(DASHES)]},
                hovertemplate=f"{said}<br>step %{{x}}: {title} %{{y:.3g}}<extra></extra>",
                **common,
            )
            figure.add_trace(line, row=row, col=1)
        for target in rows["target"].dropna().unique():
            aim = go.Scatter(
                x=[medians["step"].min(), medians["step"].max()],
                y=[target, target],
                mode="lines",
                line={**look, "dash": "dot", "width": 1},
                hovertemplate=f"{said}<br>L0 aimed at: {target:g}<extra></extra>",
                **common,
            )
            figure.add_trace(aim, row=2, col=1)
    for i, penalty in enumerate(penalties):
        figure.add_trace(legend(penalty, penalty, line={"color": colour(i)}, mode="lines"), row=1, col=1)
    for i, init in enumerate(inits):
        line = {"color": GREY, "dash": DASHES[i % len(DASHES)]}
        figure.add_trace(legend(f"init {init}", f"init {init}", line=line, mode="lines"), row=1, col=1)
    for row, (column, title) in enumerate(drawn.items(), start=1):
        axis = {"rangemode": "tozero"} if column in _COUNTED else {"type": "log", "tickformat": "~g"}
        figure.update_yaxes(title=title, dtick="D2" if column == "l0" else None, **axis, row=row, col=1)
    figure.update_xaxes(title="training step", row=len(drawn), col=1)
    return finished(figure, "Training", 280 * len(drawn))


def plateau(data: pd.DataFrame) -> go.Figure:
    """What twice the steps would still lower the loss by, against the steps that were taken: a mark per SAE."""
    penalties, widths, shown = unique(data["penalty_name"]), sorted(unique(data["width"])), shown_widths(data)
    figure = go.Figure()
    for names, rows in data.groupby(NAMES[:-1], dropna=False, sort=False):
        given, init, width, _, penalty = names
        state = rows["settled"].map({True: "settled", False: "still moving"})
        ends = rows["setting"] + ", " + rows["repeat"] + "<br>" + state.mask(rows["stopped"], "settled and stopped")
        figure.add_trace(
            go.Scatter(
                x=rows["trained"],
                y=rows["plateau"],
                customdata=ends,
                mode="markers",
                marker={
                    "color": colour(penalties.index(penalty)),
                    "symbol": SYMBOLS[widths.index(width) % len(SYMBOLS)],
                    "size": 8,
                    "opacity": 0.7,
                },
                showlegend=False,
                name=penalty,
                legendgroup=penalty,
                visible=bool(width in shown),
                meta=switches(names),
                hovertemplate=f"init {init}, width {width}{given and f', {given}'}<br>{penalty} %{{customdata}} "
                "after %{x:,} steps<br>twice as many: loss lower by %{y:.2%}<extra></extra>",
            )
        )
    for i, penalty in enumerate(penalties):
        figure.add_trace(legend(penalty, penalty, marker={"color": colour(i), "size": 8}, mode="markers"))
    for i, width in enumerate(widths):
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "color": GREY, "size": 8}
        figure.add_trace(legend(f"width {width}", f"width {width}", marker=marker, mode="markers"))
    figure.add_hline(y=STILL_MOVING, line={"color": GREY, "dash": "dot", "width": 1.5})
    figure.update_xaxes(type="log", title="training steps taken", dtick="D2", tickformat="~s")
    figure.update_yaxes(title="twice the steps would save", tickformat="~%")
    return finished(figure, "Whether training has settled", 380)
