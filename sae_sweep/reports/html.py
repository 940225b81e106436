"""One self-contained HTML file of a sweep: it opens from disk, fetches nothing, and prints."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from sae_sweep.config.calibration import chosen
from sae_sweep.reports import figures, summary
from sae_sweep.reports.claims import Verdict
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.reports.figures import FIGURES, Figure
from sae_sweep.reports.fronts import unmoved
from sae_sweep.reports.latent_dashboard import Dashboard
from sae_sweep.reports.material import Material
from sae_sweep.reports.results_table import (
    MOST_ROWS,
    coefficient,
    context,
    context_words,
    init_words,
    penalty_name,
    recipe_name,
    representatives,
    telling,
)
from sae_sweep.reports.sentences import number, predicted, subject
from sae_sweep.store.kept import kept
from sae_sweep.version import __version__

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
    "revived": "curves",
    "plateau": "plateau",
    "stopped_at": "plateau",
    "structure_": "structure",
    "mcc": "ladder",
    "found_m": "found",
    "inferred_found_m": "found",
    **dict.fromkeys(("fvu", "l0", "on_", "owned_", "live_"), "front"),
}
# Letters of a row's name beside which a phone has no room for the chart: it is then scrolled.
LONG_NAME = 12
_GRIDS = ("split_counts", "phases")
# Pixels of a coefficient's column.
COLUMN = 34
_MARKS = {"supported": ("✓", "yes"), "not supported": ("✗", "no"), "undecided": ("?", "open")}
# The latents of an SAE too large to fit are left out, so that the page stays easy to send: bytes before base64.
MOST_CARD_BYTES = 1_400_000


@dataclass(frozen=True)
class Contents:
    """What a page shows.

    Attributes:
        tables, drawn: the figures' tables and the figures, by key.
        dashboards: of the SAEs to browse, by point id.
        notes: why other SAEs that were asked for are left out.
    """

    material: Material
    tables: Mapping[str, pd.DataFrame]
    drawn: Mapping[str, go.Figure]
    dashboards: Mapping[str, Dashboard]
    notes: Sequence[str] = ()


def page(contents: Contents, folder: str = "figures") -> str:
    """The page as a string. `folder`: where the tables of its figures lie, beside the page."""
    material = contents.material
    info, verdicts, failures = material.info, material.verdicts, material.failures
    data, drawn, cards, notes = contents.tables, contents.drawn, contents.dashboards, contents.notes
    frame = telling(material.finished.results)
    browsed, left_out = _fitting({id: _card(id, card, frame) for id, card in cards.items()})
    shown = {key: _without_title(figure) for key, figure in drawn.items()}
    shown["logits"] = _without_title(figures.logits())
    rows, more = _results(frame)
    names = FactorNames.of(info)
    lines = chosen(info)
    tips = {word: names.say(text) for word, text in summary.FACTS.items()}
    environment = Environment(
        loader=PackageLoader("sae_sweep.reports", "page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["explained"] = _Explained()
    return environment.get_template("report.html").render(
        sweep=str(info.get("name", "sweep")),
        question=summary.question(info),
        answer=[names.say(sentence) for sentence in summary.answer(material, frame)],
        ran=summary.ran(material, frame),
        heads={word: names.say(text) for word, text in summary.HEADS.items()},
        finished=len(frame),
        total=info.get("points", len(frame)),
        context=[*_shared(frame), *filter(None, [names.legend])],
        failures=[(id, str(failure.get("reason", "no reason was noted"))) for id, failure in failures.items()],
        verdicts=[_verdict(*pair, names, drawn) for pair in zip(info.get("claims") or [], verdicts, strict=True)],
        sections=[_section(figure, data, drawn, folder, names) for figure in FIGURES if figure.key in data],
        warnings=[*unmoved(frame), *(line.warning for line in lines if line.warning)],
        chosen=[line.sentence for line in lines],
        browsed=[card["words"] for card in browsed],
        left_out=[*notes, *left_out],
        columns=COLUMNS,
        table=rows,
        more_rows=more,
        version=__version__,
        css=_asset("report.css"),
        script=_asset("report.js"),
        plotly=_packed_plotly(),
        payload=_packed(json.dumps({"figures": shown, "cards": browsed, "tips": tips}, allow_nan=False)),
    )


class _Explained:
    """Text as HTML in which each of WORDS is explained where the page first says it."""

    def __init__(self) -> None:
        self._left = dict(summary.WORDS)

    def __call__(self, text: str) -> Markup:
        pattern = "|".join(rf"(?<![\w-]){re.escape(word)}(?![\w-])" for word in self._left)
        if not pattern:
            return escape(text)
        parts, end = [], 0
        for found in re.finditer(pattern, text):
            if (meaning := self._left.pop(found[0], None)) is not None:
                parts += [escape(text[end : found.start()]), _WORD.format(found[0], meaning)]
                end = found.end()
        return Markup("").join([*parts, escape(text[end:])])


_WORD = Markup('<span class="word" tabindex="0" role="note" aria-label="{0}: {1}" data-tip="{1}">{0}</span>')


def _asset(name: str) -> Markup:
    """A file of our own that is code: nothing in it is data."""
    return Markup((files("sae_sweep.reports") / "page" / name).read_text())


def _packed(text: str) -> str:
    """Compressed, in letters that mean nothing to HTML. The same text gives the same bytes."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _packed_plotly() -> str:
    """Plotly, which takes a quarter of a second to compress."""
    return kept(f"plotly_{version('plotly')}.txt", lambda: _packed(get_plotlyjs()))[0]


def _without_title(figure: go.Figure) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(figure.to_json())
    shown["layout"]["title"] = {}
    shown["layout"]["margin"]["t"] = 20
    return shown


def _section(
    figure: Figure, data: Mapping[str, pd.DataFrame], drawn: Mapping[str, go.Figure], folder: str, names: FactorNames
) -> dict[str, Any]:
    key = figure.key
    return {
        "key": key,
        "short": names.say(figure.short),
        "title": names.say(figure.title),
        "note": names.say(figure.note),
        "wide": key in (*_GRIDS, "distribution", "found")
        or _panels(drawn[key]) > 1
        or _longest_name(data[key]) > LONG_NAME,
        "height": drawn[key].layout.height,
        # Where a penalty's coefficients stand side by side, each has room for its number: the chart is scrolled.
        "least": 260 + COLUMN * len(data[key][["penalty_name", "setting"]].drop_duplicates()) if key in _GRIDS else 0,
        "rows": f"{len(data[key]):,}",
        "data": f"{folder}/{key}.csv",
    }


def _panels(figure: go.Figure) -> int:
    """Axes beside each other."""
    return sum(name.startswith("xaxis") for name in figure.layout.to_plotly_json())


def _longest_name(table: pd.DataFrame) -> int:
    """Letters of the longest name that a figure's rows have; 0 where they have none."""
    if table.empty or "init_name" not in table or "penalty_name" in table:
        return 0
    return int((table["init_name"] + " " + table["given"]).str.len().max())


def _shared(frame: pd.DataFrame) -> list[str]:
    given = [frame[column] for column in ("toy", "site", "distribution") if len(frame) and frame[column].notna().all()]
    return [str(values.iloc[0]) for values in given if values.nunique() == 1]


def _verdict(
    claim: Mapping[str, Any], verdict: Verdict, names: FactorNames, drawn: Mapping[str, go.Figure]
) -> dict[str, str]:
    """A claim as the cells of a row: the number, its interval, its nulls, and the figure that shows it, if drawn."""
    mark, kind = _MARKS[verdict.verdict]
    shown = next((key for start, key in _SHOWN_IN.items() if key in drawn and claim["measure"].startswith(start)), "")
    return {
        "mark": mark,
        "kind": kind,
        "verdict": verdict.verdict,
        "prediction": str(claim["prediction"]).strip(),
        "measure": names.say(subject(claim).rstrip(",")),
        "points": f"{verdict.points:,}" if verdict.points else "",
        "value": number(verdict.value),
        "interval": " to ".join(map(number, verdict.interval)) if verdict.interval else "–",
        "untrained": number(verdict.untrained),
        "shuffled": number(verdict.shuffled),
        "bound": predicted(claim, verdict.margin),
        "shown": shown if verdict.verdict != "supported" and verdict.value is not None else "",
        "figure": names.say(next((figure.title for figure in FIGURES if figure.key == shown), "")),
        "why": verdict.sentence.partition("since ")[2].rstrip(".") if verdict.value is None else "",
        "warning": verdict.warning,
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
        where = " · ".join([f"width {row['width']}", init_words(row), *context_words(row, keys)])
        cells = [f"{row['l0']:.2f}", f"{row['fvu']:.4f}", *(number(row[name]) for name in COUNTS.values())]
        rows.append([where, recipe_name(row), coefficient(row), str(row["n"]), *cells])
    return rows, len(chosen) - len(rows)


def _card(id: str, card: Dashboard, frame: pd.DataFrame) -> dict[str, Any]:
    """An SAE's latents as JSON, a list per column; numbers to what is shown of them.

    id: its folder's. That of the same settings today is another where a kind's version has risen since.
    """
    row = frame[frame["point_id"] == id].iloc[0]
    words = [f"width {row['width']}", init_words(row), f"{penalty_name(row)} {coefficient(row)}"]
    words += [f"seed {row['seed']}", *context_words(row, context(frame)), id[:8]]
    latents = card.latents
    cells: list[list[Any]] = [[] for _ in range(len(latents))]
    for latent, cell, share, fires in () if card.cells is None else card.cells.itertuples(index=False):
        cells[latent].append([cell, _short(share), _short(fires)])
    nearest: list[list[Any]] = [[] for _ in range(len(latents))]
    for latent, other, cosine, name in card.nearest.itertuples(index=False):
        nearest[latent].append([int(other), _short(cosine), None if pd.isna(name) else str(name)])
    return {
        "id": id,
        "words": " · ".join(words),
        "narrower": card.narrower,
        "label": [None if pd.isna(value) else str(value) for value in latents["label"]],
        "class": [None if pd.isna(value) else str(value) for value in latents["label_class"]],
        "owner": [None if pd.isna(value) else int(value) for value in latents["owner"]],
        "live": [int(value) for value in latents["live"]],
        **{key: [_short(value) for value in latents[name]] for key, name in _NUMBERS.items()},
        # Of most SAEs only what their latents stand for is in the page.
        "whole": card.cells is not None,
        "cells": cells,
        "nearest": nearest,
        "logits": [] if card.logits is None else [[_short(value) for value in row] for row in card.logits.tolist()],
    }


_NUMBERS = {"f1": "f1", "purity": "purity", "density": "density", "norm": "decoder_norm"}


def _short(value: float) -> float | None:
    return None if pd.isna(value) else float(f"{value:.3g}")


def _fitting(cards: Mapping[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Those that fit into MOST_CARD_BYTES together, and a line for each whole one that does not."""
    found, left_out, size = [], [], 0
    for id, card in cards.items():
        more = len(gzip.compress(json.dumps(card).encode()))
        if size + more > MOST_CARD_BYTES:
            if card["whole"]:
                left_out.append(f"{card['words']} is left out for its size: --latents {id[:8]} shows it alone.")
            continue
        size += more
        found.append(card)
    return found, left_out
