"""Figures with a row for each init and width: what latents stand for, what the top one tells, what splits add."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from sae_sweep.reports.figure_data import FACTORS, FOUND, KINDS, NAMES, STRUCTURES
from sae_sweep.reports.figure_style import (
    COLOURS,
    GREY,
    KIND_COLOURS,
    SYMBOLS,
    blocks,
    colour,
    finished,
    height,
    legend,
    spread,
    two_levels,
)

# How a share found is marked: an SAE's own, its nulls, and what its dictionary could do.
FOUND_SYMBOLS = {"trained": "circle", "untrained": "circle-open", "labels shuffled": "line-ns", "best codes": "star"}
# Widths further apart than this are shown by shares, since the counts of the narrow ones would not be seen.
FAR_APART = 20


def labels(data: pd.DataFrame) -> go.Figure:
    """What latents stand for: a stacked bar per width and init, trained and untrained."""
    figure = go.Figure()
    data = data.sort_values(["width"], kind="stable")
    shown = [kind for kind in KINDS if (data[kind] > 0).any()]
    for kind in shown:
        figure.add_trace(
            go.Bar(
                x=data[kind],
                y=two_levels(blocks(data), data["state"]),
                name=KINDS[kind],
                orientation="h",
                marker={"color": KIND_COLOURS[kind], "pattern": {"shape": {"none": "/", "dead": "x"}.get(kind, "")}},
                customdata=data[["points", kind]],
                hovertemplate=f"%{{customdata[1]:.1f}} latents: {KINDS[kind]}<br>%{{y}}, mean of "
                "%{customdata[0]} points<extra></extra>",
            )
        )
    shares = len(data) and data["width"].max() > FAR_APART * data["width"].min()
    figure.update_layout(barmode="stack", bargap=0.25, barnorm="percent" if shares else None)
    figure.update_xaxes(title="latents, % of the width" if shares else "latents (mean)")
    figure.update_yaxes(autorange="reversed", type="multicategory")
    return finished(figure, "What latents stand for", height(len(data)))


def information(data: pd.DataFrame) -> go.Figure:
    """How much of each factor the top latent tells given the maximum, beyond chance; bars span the points."""
    figure = go.Figure()
    for i, factor in enumerate(FACTORS.values()):
        for state, rows in data[data["factor"] == factor].groupby("state", sort=False):
            marker = {"color": COLOURS[i], "size": 10, "symbol": SYMBOLS[i] + ("-open" if state == "untrained" else "")}
            figure.add_trace(
                go.Scatter(
                    x=rows["explained"],
                    y=blocks(rows),
                    error_x=spread(rows, "explained"),
                    mode="markers",
                    orientation="h",
                    offsetgroup=factor,
                    marker=marker,
                    name=factor if state == "trained" else f"{factor}, untrained",
                    customdata=rows[["alone", "points"]],
                    hovertemplate=f"%{{y}}, {state}<br>{factor}: %{{x:.1%}} explained given the maximum, "
                    "%{customdata[0]:.1%} given the others too<br>mean of %{customdata[1]} points<extra></extra>",
                )
            )
    figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_xaxes(title="share of the factor's entropy", tickformat=".0%")
    figure.update_yaxes(autorange="reversed", type="category")
    return finished(figure, "Which factor the top latent tells", height(2 * len(set(blocks(data)))))


def found(data: pd.DataFrame) -> go.Figure:
    """Which share of the classes of a part have a latent, beside the nulls and what the dictionary could; bars span the
    points."""
    figure = go.Figure()
    data = data.sort_values("width", kind="stable")
    for i, part in enumerate(FOUND):
        for state, symbol in FOUND_SYMBOLS.items():
            rows = data[(data["part"] == part) & (data["state"] == state)]
            if rows.empty:
                continue
            figure.add_trace(
                go.Scatter(
                    x=rows["value"],
                    y=[f"{block}, {name}" for block, name in zip(blocks(rows), rows["penalty_name"], strict=True)],
                    error_x=spread(rows, "value") if state == "trained" else None,
                    mode="markers",
                    orientation="h",
                    offsetgroup=part,
                    marker={"color": colour(i), "size": 9, "symbol": symbol, "line": {"width": 2, "color": colour(i)}},
                    name=KINDS[part],
                    legendgroup=part,
                    showlegend=state == "trained",
                    customdata=rows["points"],
                    hovertemplate=f"%{{y}}<br>{KINDS[part]}, {state}: %{{x:.1%}} of the classes<br>mean of "
                    "%{customdata} points<extra></extra>",
                )
            )
    for state, symbol in FOUND_SYMBOLS.items():
        if state != "trained" and (data["state"] == state).any():
            marker = {"color": GREY, "size": 9, "symbol": symbol, "line": {"width": 2, "color": GREY}}
            figure.add_trace(legend(state, state, marker=marker, mode="markers"))
    figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_xaxes(title="share of the classes that have a latent", tickformat=".0%")
    figure.update_yaxes(autorange="reversed", type="category")
    return finished(figure, "Which classes have a latent", height(2 * data[NAMES].drop_duplicates().shape[0]))


def structure(data: pd.DataFrame) -> go.Figure:
    """What split latents are made of, by every measure of it, each beside its null; bars span the points."""
    figure = go.Figure()
    for null in ("", "-open"):
        for i, part in enumerate(STRUCTURES.values()):
            rows = data[(data["part"] == part) & (data["state"] == ("permuted" if null else "found"))]
            if rows.empty:
                continue
            figure.add_trace(
                go.Scatter(
                    x=rows["value"],
                    y=blocks(rows),
                    error_x=spread(rows, "value"),
                    mode="markers",
                    orientation="h",
                    offsetgroup=part,
                    marker={"color": colour(i), "size": 9, "symbol": SYMBOLS[i] + null},
                    name="null (hollow)" if null else part,
                    legendgroup="null" if null else part,
                    showlegend=not null or i == 0,
                    customdata=rows["points"],
                    hovertemplate=f"%{{y}}<br>{part}: %{{x:.2f}}{', permuted' if null else ''}<br>mean of "
                    "%{customdata} points<extra></extra>",
                )
            )
    figure.update_layout(scattermode="group", scattergap=0.4)
    figure.update_xaxes(title="share of variance, or cosine")
    figure.update_yaxes(autorange="reversed", type="category")
    return finished(figure, "What split latents are made of", height(3 * len(set(blocks(data)))))
