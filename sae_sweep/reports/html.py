"""One self-contained HTML file of a sweep: it opens from disk, fetches nothing, and prints."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_sweep.config.calibration import chosen
from sae_sweep.reports import figures
from sae_sweep.reports.claims import Verdict
from sae_sweep.reports.fronts import unmoved
from sae_sweep.reports.latent_dashboard import Cards
from sae_sweep.reports.results_table import (
    MOST_ROWS,
    coefficient,
    context,
    context_words,
    penalty_name,
    representatives,
    start_name,
    telling,
)
from sae_sweep.reports.sentences import number, predicted, subject
from sae_sweep.version import __version__

# Key, name in the navigation, heading, and how to read it.
SECTIONS = (
    (
        "front",
        "Front",
        "Reconstruction against sparsity",
        "FVU against L0: lower left is better. Colour is the penalty, the symbol the start, the size the width. A mark "
        "is a setting; where it has several seeds, their mean with bars from the lowest to the highest. Lines join "
        "what no setting of the same penalty, start and width beats; the others are pale.",
    ),
    (
        "split_counts",
        "Splits",
        "Split latents per maximum",
        "Live latents with a label finer than their maximum, over the number of maxima, mean over seeds. Distinct: "
        "those of one class counted once, since a class may be held many times.",
    ),
    (
        "distribution",
        "By maximum",
        "Which maxima are split",
        "Split latents of each maximum, mean over seeds, at the middle coefficient of each penalty: the lowest FVU × "
        "max(L0, 1).",
    ),
    (
        "labels",
        "Labels",
        "What latents stand for",
        "Mean number of latents by label, of the trained SAEs and of their untrained starts.",
    ),
    (
        "information",
        "Factors",
        "Which factor latents split by",
        "How much of the query, the runner-up and the copies the top latent tells, given the maximum and beyond what a "
        "permutation would show. Bars span the points; hollow marks are the untrained starts.",
    ),
    (
        "structure",
        "Structure",
        "What split latents are made of",
        "Of what the split latents of most frequent kind add: the shares of variance that the parent explains, the "
        "modifier beyond it, and neither; whether a modifier points the same way under two parents; what semi-NMF and "
        "a meta-SAE explain. Bars span the points; hollow marks are nulls: the same with modifiers, parents or entries "
        "permuted.",
    ),
    (
        "phases",
        "Phases",
        "Phase diagram",
        "What at least half of the maxima have. Split: two latents or more with a finer label. Found: a latent for the "
        "whole maximum; duplicated: as many copies again; absorbed: those are parents, and no modifier has a latent of "
        "its own. Mixed: half have the one or the other. Unnamed: fewer have. A ring: over all decoders and "
        "activations, the least loss with a latent for each combination is below that with one for each parent and "
        "each modifier.",
    ),
    (
        "curves",
        "Training",
        "Training curves",
        "FVU and L0 on the training batches, and the gradient's norm before it is clipped (the largest since the step "
        "before), at the middle coefficients, median over seeds. Colour is the penalty, the dash the start.",
    ),
)
# The section whose figure shows a measure, by how its name begins; the first that fits.
_SHOWN_IN = {
    "splits_": "split_counts",
    "split_": "distribution",
    "distinct_": "split_counts",
    "duplicates_": "split_counts",
    "label_": "labels",
    "info_": "information",
    "unique_": "information",
    "gradient_": "curves",
    "structure_": "structure",
    **dict.fromkeys(("fvu", "l0", "on_", "owned_", "live_"), "front"),
}
# Letters of a row's name beside which a phone has no room for the chart: it is then scrolled.
LONG_NAME = 12
_MARKS = {"supported": ("✓", "yes"), "not supported": ("✗", "no"), "undecided": ("?", "open")}
# The latents of an SAE too large to fit are left out, so that the page stays easy to send: bytes before base64.
MOST_CARD_BYTES = 1_400_000


def page(
    info: Mapping[str, Any],
    frame: pd.DataFrame,
    verdicts: Sequence[Verdict],
    failures: Mapping[str, Mapping[str, Any]],
    data: Mapping[str, pd.DataFrame],
    drawn: Mapping[str, go.Figure],
    cards: Mapping[str, Cards],
    notes: Sequence[str] = (),
    folder: str = "figures",
) -> str:
    """The page as a string.

    Args:
        info: sweep.yaml; frame: the results table; failures: what is known of failed points, by id.
        data, drawn: the tables and figures by key of SECTIONS.
        cards: of the SAEs to browse, by point id; `notes`: why others are left out.
        folder: where the tables lie, beside the page.
    """
    frame = telling(frame)
    browsed, left_out = _fitting({id: _card(card, frame) for id, card in cards.items()})
    shown = {key: json.loads(_without_title(figure).to_json()) for key, figure in drawn.items()}
    shown["logits"] = json.loads(_without_title(figures.logits()).to_json())
    rows, more = _results(frame)
    lines = chosen(info)
    environment = Environment(
        loader=PackageLoader("sae_sweep.reports", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        sweep=str(info.get("name", "sweep")),
        finished=len(frame),
        total=info.get("points", len(frame)),
        context=_shared(frame),
        failures=[(id, str(failure.get("reason", "no reason was noted"))) for id, failure in failures.items()],
        verdicts=[_verdict(*pair) for pair in zip(info.get("claims") or [], verdicts, strict=True)],
        sections=[_section(section, data, drawn, folder) for section in SECTIONS if section[0] in data],
        warnings=[*unmoved(frame), *(line.warning for line in lines if line.warning)],
        chosen=[line.sentence for line in lines],
        browsed=[card["words"] for card in browsed],
        left_out=[*notes, *left_out],
        columns=COLUMNS,
        table=rows,
        more_rows=more,
        version=__version__,
        provenance=[f"overrides: {' '.join(info['overrides'])}"] if info.get("overrides") else [],
        css=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_packed(get_plotlyjs()),
        payload=_packed(json.dumps({"figures": shown, "cards": browsed}, allow_nan=False)),
    )


def _asset(name: str) -> Markup:
    """A file of our own that is code: nothing in it is data."""
    return Markup((files("sae_sweep.reports") / "page" / name).read_text())


def _packed(text: str) -> str:
    """Compressed, in letters that mean nothing to HTML. The same text gives the same bytes."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _without_title(figure: go.Figure) -> go.Figure:
    return go.Figure(figure).update_layout(title=None, margin={"t": 20})


def _section(
    section: tuple[str, ...], data: Mapping[str, pd.DataFrame], drawn: Mapping[str, go.Figure], folder: str
) -> dict[str, Any]:
    key, short, title, note = section
    there = {"rows": f"{len(data[key]):,}" if len(data[key]) else "", "data": f"{folder}/{key}.csv"}
    return {
        "key": key,
        "short": short,
        "title": title,
        "note": note,
        "wide": key in ("split_counts", "distribution", "phases") or _longest_name(data[key]) > LONG_NAME,
        "height": drawn[key].layout.height,
        **there,
    }


def _longest_name(table: pd.DataFrame) -> int:
    """Letters of the longest name that a figure's rows have; 0 where they have none."""
    if table.empty or "start" not in table or "penalty_name" in table:
        return 0
    return int((table["start"] + " " + table["given"]).str.len().max())


def _shared(frame: pd.DataFrame) -> list[str]:
    given = [frame[column] for column in ("toy", "site", "distribution") if len(frame) and frame[column].notna().all()]
    return [str(values.iloc[0]) for values in given if values.nunique() == 1]


def _verdict(claim: Mapping[str, Any], verdict: Verdict) -> dict[str, str]:
    """A claim as the cells of a row: the number, its interval, and its nulls."""
    mark, kind = _MARKS[verdict.verdict]
    shown = next((key for start, key in _SHOWN_IN.items() if claim["measure"].startswith(start)), "")
    return {
        "mark": mark,
        "kind": kind,
        "verdict": verdict.verdict,
        "prediction": str(claim["prediction"]).strip(),
        "measure": subject(claim).rstrip(","),
        "points": f"{verdict.points:,}" if verdict.points else "",
        "value": number(verdict.value),
        "interval": " to ".join(map(number, verdict.interval)) if verdict.interval else "–",
        "untrained": number(verdict.untrained),
        "shuffled": number(verdict.shuffled),
        "bound": predicted(claim, verdict.margin),
        "shown": shown if verdict.verdict != "supported" and verdict.value is not None else "",
        "figure": next((section[2] for section in SECTIONS if section[0] == shown), ""),
        "why": verdict.sentence.partition("since ")[2].rstrip(".") if verdict.value is None else "",
    }


COUNTS = {
    "owned": "owned_maxes",
    "splits": "splits_per_max",
    "distinct": "distinct_splits_per_max",
    "duplicates": "duplicates_per_max",
    "dead": "dead_latents",
}
COLUMNS = ("setting", "penalty", "coefficient", "seeds", "L0", "FVU", *COUNTS)


def _results(frame: pd.DataFrame) -> tuple[list[list[str]], int]:
    """The cells of the compact results table, and how many rows were left out."""
    if frame.empty:
        return [], 0
    chosen, keys = representatives(frame), context(frame)
    rows = []
    for _, row in chosen.head(MOST_ROWS).iterrows():
        where = " · ".join([f"width {row['width']}", start_name(row), *context_words(row, keys)])
        cells = [f"{row['l0']:.2f}", f"{row['fvu']:.4f}", *(number(row[name]) for name in COUNTS.values())]
        rows.append([where, penalty_name(row), coefficient(row), str(row["n"]), *cells])
    return rows, len(chosen) - len(rows)


def _card(card: Cards, frame: pd.DataFrame) -> dict[str, Any]:
    """An SAE's latents as JSON, a list per column; numbers to what is shown of them."""
    row = frame[frame["point_id"] == card.point.id].iloc[0]
    words = [f"width {row['width']}", start_name(row), f"{penalty_name(row)} {coefficient(row)}"]
    words += [f"seed {row['seed']}", *context_words(row, context(frame)), card.point.id[:8]]
    latents = card.latents
    cells: list[list[Any]] = [[] for _ in range(len(latents))]
    assert card.cells is not None  # report.py leaves out those without
    for latent, cell, share, fires in card.cells.itertuples(index=False):
        cells[latent].append([cell, _short(share), _short(fires)])
    nearest: list[list[Any]] = [[] for _ in range(len(latents))]
    for latent, other, cosine, name in card.nearest.itertuples(index=False):
        nearest[latent].append([int(other), _short(cosine), None if pd.isna(name) else str(name)])
    return {
        "id": card.point.id,
        "words": " · ".join(words),
        "narrower": card.narrower,
        "label": [None if pd.isna(value) else str(value) for value in latents["label"]],
        "class": [None if pd.isna(value) else str(value) for value in latents["label_class"]],
        "owner": [None if pd.isna(value) else int(value) for value in latents["owner"]],
        "live": [int(value) for value in latents["live"]],
        **{key: [_short(value) for value in latents[name]] for key, name in _NUMBERS.items()},
        "cells": cells,
        "nearest": nearest,
        "logits": [] if card.logits is None else [[_short(value) for value in row] for row in card.logits.tolist()],
    }


_NUMBERS = {"f1": "f1", "purity": "purity", "density": "density", "norm": "decoder_norm"}


def _short(value: float) -> float | None:
    return None if pd.isna(value) else float(f"{value:.3g}")


def _fitting(cards: Mapping[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Those that fit into MOST_CARD_BYTES together, and a line for each that does not."""
    found, left_out, size = [], [], 0
    for id, card in cards.items():
        more = len(gzip.compress(json.dumps(card).encode()))
        if size + more > MOST_CARD_BYTES:
            left_out.append(f"{card['words']} is left out for its size: --latents {id[:8]} shows it alone.")
            continue
        size += more
        found.append(card)
    return found, left_out
