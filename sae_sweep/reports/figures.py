"""The figures of a sweep: FIGURES describes each once, and the page, image files and W&B all draw from that.

A figure is a function here from a table of `figure_data` to a Plotly figure:

    figures.front(figure_data.front(df)).show()

What the report's switches turn on and off is in `trace.meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sae_sweep.reports import figure_data, figure_ladders
from sae_sweep.reports.figure_data import NAMES, PHASES
from sae_sweep.reports.figure_rows import found as found
from sae_sweep.reports.figure_rows import information as information
from sae_sweep.reports.figure_rows import labels as labels
from sae_sweep.reports.figure_rows import structure as structure
from sae_sweep.reports.figure_style import (
    COLOURS,
    COUNT_SCALE,
    GREY,
    MOST_ACROSS,
    PHASE_COLOURS,
    RING,
    SYMBOLS,
    Grid,
    blocks,
    colour_bar,
    finished,
    height,
    legend,
    penalty_look,
    shown_widths,
    spread,
    steps,
    switches,
    two_levels,
    unique,
)
from sae_sweep.reports.figure_training import curves as curves
from sae_sweep.reports.figure_training import plateau as plateau
from sae_sweep.reports.layout import log_ticks, plural
from sae_sweep.reports.material import Finished

_COUNTS = ["splits_per_max", "distinct_splits_per_max", "duplicates_per_max", "owned_maxes"]


def front(data: pd.DataFrame) -> go.Figure:
    """FVU against L0, both logarithmic, a panel for each init: colour is the penalty, the symbol the width.

    A mark is a setting, with its range over seeds; the line joins what no setting of its penalty, init and width
    beats. Each seed by itself is there too, hidden.
    """
    penalties, inits = (unique(data[name]) for name in ("penalty_name", "init_name"))
    widths, repeats, shown = sorted(unique(data["width"])), unique(data["repeat"]), shown_widths(data)
    # Four panels are two by two.
    across = 2 if len(inits) == 4 else min(max(len(inits), 1), MOST_ACROSS)
    down = max(1, -(-len(inits) // across))
    figure = make_subplots(
        rows=down,
        cols=across,
        shared_xaxes="all",
        shared_yaxes="all",
        subplot_titles=[f"init {init}" for init in inits] if len(inits) > 1 else None,
        horizontal_spacing=0.03,
        vertical_spacing=0.12,
    )
    # A mean opens the latents of its first seed.
    first = data.groupby(NAMES, dropna=False)["point_id"].transform("first")
    whole = data.assign(opens=first)[(data["l0"] > 0) & (data["fvu"] > 0)]
    for names, rows in whole.groupby([*NAMES[:-1], "repeat"], dropna=False, sort=False):
        _, init, width, _, penalty, repeat = names
        panel = inits.index(init)
        trace = _front_line(rows, penalty_look(penalties.index(penalty)), SYMBOLS[widths.index(width) % len(SYMBOLS)])
        trace.update(
            legendgroup=penalty,
            visible=bool(width in shown and (repeat == repeats[0] or "mean" not in repeats)),
            name=penalty,
            meta=switches(names[:-1]) | {"seed": repeat},
        )
        figure.add_trace(trace, row=panel // across + 1, col=panel % across + 1)
    for i, penalty in enumerate(penalties):
        figure.add_trace(legend(penalty, penalty, line=penalty_look(i), mode="lines"), row=1, col=1)
    for i, width in enumerate(widths):
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "color": GREY, "size": 9}
        figure.add_trace(legend(f"width {width}", f"width {width}", marker=marker, mode="markers"), row=1, col=1)
    figure.update_xaxes(type="log", tickformat="~g", showticklabels=True, **_ticks(whole["l0"]))
    figure.update_yaxes(type="log", tickformat="~g", **_ticks(whole["fvu"]))
    figure.update_xaxes(title="L0: mean active latents", row=down)
    figure.update_yaxes(title="FVU: variance left unexplained", col=1)
    return finished(figure, "Reconstruction against sparsity: lower left is better", 180 + 340 * down)


def _front_line(rows: pd.DataFrame, look: Mapping[str, str], symbol: str) -> go.Scatter:
    """The settings of one line of the front."""
    points = _front_first(rows)
    return go.Scatter(
        x=points["l0"],
        y=points["fvu"],
        error_x=spread(points, "l0"),
        error_y=spread(points, "fvu"),
        customdata=points[["said", *_COUNTS, "opens"]],
        hovertemplate="%{customdata[0]}<br>L0 %{x:.3g} · FVU %{y:.3g}<br>splits per max %{customdata[1]:.2f}, "
        "distinct %{customdata[2]:.2f}<br>duplicates %{customdata[3]:.2f} · owned %{customdata[4]:.3g}"
        "<extra></extra>",
        mode="lines+markers",
        line={**look, "width": 1.5},
        marker={
            "symbol": symbol,
            "size": 9,
            "opacity": np.where(points["on_front"].fillna(False), 1.0, 0.45),
        },
        showlegend=False,
    )


def _ticks(values: pd.Series) -> dict[str, list[float]]:
    """Ticks of a logarithmic axis over these values; none where there are none."""
    # A little beyond them, as the axes go.
    return {"tickvals": log_ticks(0.95 * float(values.min()), 1.05 * float(values.max()))} if len(values) else {}


def split_counts(data: pd.DataFrame) -> go.Figure:
    """Splits per maximum as a heatmap: a row per init and width, a column per penalty and coefficient.

    Those of one class counted once are there too, hidden.
    """
    grid = Grid(data)
    hover = [
        f"init {row.init_name}, width {row.width}, {row.penalty_name} {row.setting}<br>splits per max "
        f"{row.splits_per_max:.2f}, distinct {row.distinct_splits_per_max:.2f} (labels shuffled "
        f"{row.shuffled_splits_per_max:.2f})<br>duplicates {row.duplicates_per_max:.2f} · owned maxes "
        f"{row.owned_maxes:.3g}"
        for row in data.itertuples()
    ]
    figure = go.Figure()
    # One scale for both counts, so that they compare: up to what a perfect code scores, or more where that was passed.
    most = float(np.nanmax([1.0, *data["splits_per_max"], *data["splits_ceiling"].astype(float)]))
    for name, counted in (("splits_per_max", "all split latents"), ("distinct_splits_per_max", "distinct ones")):
        figure.add_trace(
            go.Heatmap(
                x=grid.x,
                y=grid.y,
                z=grid.values(data[name].astype(float)),
                text=grid.values(pd.Series(hover, data.index)),
                hovertemplate="%{text}<extra></extra>",
                colorscale=COUNT_SCALE,
                zmin=0,
                zmax=most,
                xgap=1,
                ygap=1,
                colorbar=colour_bar("splits<br>per max"),
                visible=name == "splits_per_max",
                meta={"count": counted},
            )
        )
    return grid.finished(figure, "Split latents per maximum")


def phases(data: pd.DataFrame) -> go.Figure:
    """The phase of every setting, in the grid of `split_counts`; a letter says what the colour says.

    A ring marks where the split code costs less than the shared one by theory, where there is one.
    """
    grid = Grid(data)
    hover = [_phase(row) for row in data.itertuples()]
    present = [phase for phase in PHASES if (data["phase"] == phase).any()]
    figure = go.Figure(
        go.Heatmap(
            x=grid.x,
            y=grid.y,
            z=grid.values(data["phase"].map(PHASES.index)),
            text=grid.values(data["phase"].str[0].str.upper(), missing=""),
            customdata=grid.values(pd.Series(hover, data.index)),
            texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>",
            colorscale=steps([PHASE_COLOURS[phase] for phase in PHASES]),
            zmin=-0.5,
            zmax=len(PHASES) - 0.5,
            showscale=False,
            xgap=1,
            ygap=1,
        )
    )
    for phase in present:
        marker = {"symbol": "square", "size": 12, "color": PHASE_COLOURS[phase]}
        figure.add_trace(legend(f"{phase[0].upper()} {phase}", phase, marker=marker, mode="markers"))
    pays = (data["split_code"] < data["shared_code"]).tolist()
    if any(pays):
        ring = {"symbol": "circle-open", "size": 20, "color": RING, "line": {"width": 2}}
        x, y = grid.places(pays)
        theory = "in theory the split code costs less"
        figure.add_trace(
            go.Scatter(x=x, y=y, mode="markers", marker=ring, hoverinfo="skip", legendgroup=theory, showlegend=False)
        )
        # On the page, which may be dark, the ring is grey.
        figure.add_trace(legend(theory, theory, marker=ring | {"color": GREY, "size": 14}, mode="markers"))
    return grid.finished(figure, "What most maxima have: a phase diagram")


def distribution(data: pd.DataFrame) -> go.Figure:
    """Split latents of every maximum: a row per init, width and penalty, at its knee (`figure_data.knees`)."""
    rows = data.drop_duplicates(NAMES)
    # Rows of one block together: a heatmap's cells lie as their places follow each other.
    places = pd.Series(blocks(rows), rows.index)
    rows = rows.loc[places.map(unique(places).index).sort_values(kind="stable").index]
    groups = {tuple(names): group for names, group in data.groupby(NAMES, dropna=False, sort=False)}
    maxima = np.arange(int(data["maximum"].max()) + 1 if len(data) else 0)
    z = np.full((len(rows), len(maxima)), np.nan)
    copies = z.copy()
    for i, names in enumerate(rows[NAMES].itertuples(index=False, name=None)):
        z[i, groups[names]["maximum"]] = groups[names]["splits"]
        copies[i, groups[names]["maximum"]] = groups[names]["duplicates"]
    figure = go.Figure(
        go.Heatmap(
            x=maxima,
            y=two_levels(blocks(rows), [f"{row.penalty_name} {row.setting}" for row in rows.itertuples()]),
            z=z,
            customdata=copies,
            hovertemplate="%{y}<br>maximum %{x}: %{z:.3g} split latents, %{customdata:.3g} duplicates<extra></extra>",
            colorscale=COUNT_SCALE,
            zmin=0,
            zmax=max(1.0, float(data["splits"].max())) if len(data) else 1.0,
            xgap=1,
            ygap=1,
            colorbar=colour_bar("split<br>latents"),
        )
    )
    # Few maxima are not to have halves between them.
    figure.update_xaxes(title="maximum (token)", dtick=1 if len(maxima) <= 10 else None)
    figure.update_yaxes(autorange="reversed", type="multicategory")
    return finished(figure, "Split latents of each maximum", height(len(rows)))


def logits(values: Sequence[float] = ()) -> go.Figure:
    """What a latent adds to each logit [d_vocab]: a bar per token."""
    figure = go.Figure(
        go.Bar(
            x=list(range(len(values))),
            y=list(values),
            marker={"color": COLOURS[0]},
            hovertemplate="token %{x}: %{y:+.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(title="token")
    figure.update_yaxes(title="logit, centred")
    return finished(figure, "What a latent adds to the logits", 240)


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
    which = f"mean of {plural(int(row.seeds), 'seed')}" if mean else f"<b>{row.point_id[:8]}</b> · seed {row.repeat}"
    given = f", {row.given}" if row.given else ""
    return f"{which}<br>{row.penalty_name} {row.setting}, width {row.width:.0f}, init {row.init_name}{given}"


def _phase(row: Any) -> str:
    """What a setting says of its phase."""
    said = f"init {row.init_name}, width {row.width}, {row.penalty_name} {row.setting}<br><b>{row.phase}</b>: of "
    said += f"{row.maxima:.0f} maxima {row.whole:.3g} have a latent for the whole ({row.copies:.3g} duplicates), "
    said += f"{row.split_maxes:.3g} are split"
    theory = f"<br>least loss in theory: split {row.split_code:.3g}, shared {row.shared_code:.3g}"
    return said if pd.isna(row.split_code) else said + theory


@dataclass(frozen=True)
class Figure:
    """One figure: `short` names it in a menu, `note` says how to read it; `draw` makes it of what `table` returns."""

    key: str
    short: str
    title: str
    note: str
    table: Callable[[Finished], pd.DataFrame]
    draw: Callable[[pd.DataFrame], go.Figure]


FIGURES = (
    Figure(
        "front",
        "Front",
        "Reconstruction against sparsity",
        "FVU against L0: lower left is better. Colour is the penalty, the symbol the width; each init has a panel. "
        "A mark is a setting; where it has several seeds, their mean with bars from the lowest to the highest. Lines "
        "join what no setting of the same penalty, init and width beats; the others are pale. A click on a mark shows "
        "that SAE's latents below.",
        lambda sweep: figure_data.front(sweep.named),
        front,
    ),
    Figure(
        "ladder",
        "Ladder",
        "What each coefficient comes to",
        "One measure at a time against the coefficient of the penalty, or against k where the architecture sets that: "
        "the mean over seeds, with bars from the lowest to the highest. Colour is the penalty, the symbol the width; "
        "each init, and whatever else the sweep varies, has a panel, which is empty where the measure was not taken. "
        "Penalties with one coefficient are left out, and so are measures that are the same everywhere. The same "
        "coefficient is not as strong in two penalties: compare the best that each reaches.",
        lambda sweep: figure_ladders.ladder(sweep.named),
        figure_ladders.draw,
    ),
    Figure(
        "split_counts",
        "Splits",
        "Split latents per maximum",
        "Live latents with a label finer than their maximum, over the number of maxima, mean over seeds. Distinct: "
        "those of one class counted once, since a class may be held many times. The palest colour is 0, the darkest "
        "the ceiling: what a perfect code scores under the same rules.",
        lambda sweep: figure_data.split_counts(sweep.results),
        split_counts,
    ),
    Figure(
        "distribution",
        "By maximum",
        "Which maxima are split",
        "Split latents of each maximum, mean over seeds, at the coefficient of each penalty that has the lowest FVU × "
        "max(L0, 1). The palest colour is 0, the darkest the most that any maximum here has.",
        lambda sweep: figure_data.distribution(sweep.named, sweep.per_max),
        distribution,
    ),
    Figure(
        "labels",
        "Labels",
        "What latents stand for",
        "Mean number of latents by label, of the SAEs, trained and untrained.",
        lambda sweep: figure_data.labels(sweep.results, sweep.untrained),
        labels,
    ),
    Figure(
        "found",
        "Found",
        "Which classes have a latent",
        "Of the classes of a part, for example all pairs of maximum and query, the share that has a latent with most "
        "of its mass in that class, at the coefficient of each penalty that has the lowest FVU × max(L0, 1). Hollow: "
        "the untrained SAEs. A stroke: the same latents with labels shuffled within each maximum. A star: with the "
        "best codes for the dictionary, where those were searched. Bars span the points.",
        lambda sweep: figure_data.found(sweep.results, sweep.untrained),
        found,
    ),
    Figure(
        "information",
        "Factors",
        "Which factor latents split by",
        "How much of the query, the runner-up and the copies the top latent explains, given the maximum and beyond "
        "what a permutation would show. Bars span the points; hollow marks are the untrained SAEs.",
        lambda sweep: figure_data.information(sweep.named, sweep.untrained),
        information,
    ),
    Figure(
        "structure",
        "Structure",
        "What split latents are made of",
        "Of what the split latents of most frequent kind add: the shares of variance that the parent explains, the "
        "modifier beyond it, and neither; whether a modifier points the same way under two parents; what semi-NMF and "
        "a meta-SAE explain. Bars span the points; hollow marks are nulls: the same with modifiers, parents or entries "
        "permuted.",
        lambda sweep: figure_data.structure(sweep.named),
        structure,
    ),
    Figure(
        "phases",
        "Phases",
        "Phase diagram",
        "What at least half of the maxima have. Split: two latents or more with a finer label. Found: a latent for the "
        "whole maximum; duplicated: as many duplicates again; absorbed: those are parents, and no modifier has a "
        "latent of its own. Mixed: half have the one or the other. Unnamed: fewer have. A ring: over all decoders and "
        "activations, the least loss with a latent for each combination is below that with one for each parent and "
        "each modifier.",
        lambda sweep: figure_data.phases(sweep.results, sweep.costs),
        phases,
    ),
    Figure(
        "curves",
        "Training",
        "Training curves",
        "FVU and L0 on the training batches, and the gradient's norm before it is clipped (the largest since the step "
        "before), at the coefficient of each penalty that has the lowest FVU × max(L0, 1), median over seeds. Colour "
        "is the penalty, the dash the init. Where L0 is driven to a target, that is dotted. Where dead latents are "
        "revived: how many are dead, and how many were revived since the step before.",
        lambda sweep: figure_data.curves(sweep.named, sweep.curves, sweep.targets),
        curves,
    ),
    Figure(
        "plateau",
        "Plateau",
        "Whether training has settled",
        "By how much twice the steps would lower the loss of each SAE, as its own training curve foretells, against "
        "the steps that it took. Below the dotted line, at 2%, it has settled; with training.until=plateau it stops "
        "there by itself. Above it its counts are of an SAE that is still moving. Colour is the penalty, the symbol "
        "the width.",
        lambda sweep: figure_data.plateau(sweep.named),
        plateau,
    ),
)
