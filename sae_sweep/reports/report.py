"""The report of a sweep as files: one page to look at, the numbers behind each figure, and pictures on request."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sae_sweep.config.settings import point_from
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.metrics.extra import theory as codes
from sae_sweep.reports import figure_data, figures, html
from sae_sweep.reports.claims import Verdict
from sae_sweep.reports.latent_dashboard import Cards, Dealer, choose, narrower
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store

PAGE, FIGURES = "report.html", "figures"
PICTURE_WIDTH = 1000  # pixels, before PICTURE_SCALE
PICTURE_SCALE = 2
FORMATS = ("png", "svg")
NO_CHROME = (
    "PNG and SVG are drawn by Chrome or Chromium, and none was found: install one (`apt install chromium`, or "
    "`plotly_get_chrome`), or leave --images out"
)


@dataclass(frozen=True)
class Look:
    """What a sweep's report is made of: its two tables, its verdicts, and its records by point id."""

    info: Mapping[str, Any]
    results: pd.DataFrame
    untrained: pd.DataFrame
    verdicts: Sequence[Verdict]
    records: Mapping[str, Mapping[str, Any]]


def check(results: pd.DataFrame, latents: Sequence[str], images: bool) -> list[str]:
    """What can be known to be wrong before any work; returns the ids of the points whose latents to show: those that
    begin like one of `latents`, or without any those of `cards.choose`.

    Raises UserError for a point that is not of the sweep, EnvironmentProblem if there is no browser to draw images.
    """
    if images and not _browser():
        raise EnvironmentProblem(NO_CHROME)
    return [_point(results, start) for start in latents] or choose(results)


def tables(look: Look) -> dict[str, pd.DataFrame]:
    """The table behind each figure, by name; that of structure only where it was measured."""
    per_max = {id: record["per_max"] for id, record in look.records.items() if record.get("per_max")}
    curves = {id: record.get("curve") or () for id, record in look.records.items()}
    structure = figure_data.structure(look.results)
    return {
        "front": figure_data.front(look.results),
        "split_counts": figure_data.split_counts(look.results),
        "distribution": figure_data.distribution(look.results, per_max),
        "labels": figure_data.labels(look.results, look.untrained),
        "information": figure_data.information(look.results, look.untrained),
        **({"structure": structure} if len(structure) else {}),
        "phases": figure_data.phases(look.results, _costs(look)),
        "curves": figure_data.curves(look.results, curves),
    }


def write(store: Store, look: Look, output: Path | None, chosen: Sequence[str], images: bool) -> tuple[Path, list[str]]:
    """Write the page, and beside it the folder of its figures; returns where the page is, and what it lacks and why.

    Args:
        output: the page's file; None: report.html in the sweep's folder.
        chosen: ids of the points whose latents to show.
        images: write the figures as PNG and SVG too.

    Raises EnvironmentProblem, or OSError, if a file cannot be written.
    """
    name = look.info["name"]
    data = tables(look)
    drawn = {key: getattr(figures, key)(table) for key, table in data.items()}
    cards, notes = _cards(store, look.results, chosen)
    folder = FIGURES if output is None else f"{output.stem}-{FIGURES}"
    page = html.page(look.info, look.results, look.verdicts, store.failures(name), data, drawn, cards, notes, folder)
    files = {PAGE if output is None else output.name: page.encode()}
    files |= {f"{folder}/{key}.csv": table.to_csv(index=False).encode() for key, table in data.items()}
    files |= {f"{folder}/{key}.parquet": _parquet(table) for key, table in data.items()}
    if images:
        files |= {f"{folder}/{filename}": content for filename, content in pictures(drawn).items()}
    if output is None:
        for filename, content in files.items():
            store.write_sweep_file(name, filename, content)
        return store.sweep(name) / PAGE, notes
    for filename, content in files.items():
        place = output.parent / filename
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return output, notes


def pictures(drawn: Mapping[str, go.Figure]) -> dict[str, bytes]:
    """The figures as PNG and SVG on white, by filename. EnvironmentProblem without Chrome or Chromium."""
    import tempfile

    import kaleido
    from choreographer.browsers.chromium import ChromeNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        wanted = []
        for key, figure in drawn.items():
            white = go.Figure(figure).update_layout(paper_bgcolor="#ffffff", margin={"l": 20, "r": 20, "b": 20})
            size = {"width": PICTURE_WIDTH, "height": figure.layout.height}
            for format in FORMATS:
                options = {**size, "format": format, "scale": PICTURE_SCALE if format == "png" else 1}
                wanted.append({"fig": white, "path": f"{folder}/{key}.{format}", "opts": options})
        try:
            # Without MathJax, which would be fetched.
            kaleido.write_fig_from_object_sync(wanted, kopts={"mathjax": False})
        except ChromeNotFoundError:
            raise EnvironmentProblem(NO_CHROME) from None
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def look(store: Store, name: str, results: pd.DataFrame, untrained: pd.DataFrame, verdicts: Sequence[Verdict]) -> Look:
    """All that the report of a sweep needs from the store, beside its tables and verdicts."""
    info = frame.sweep_info(store, name)
    records = frame.measured(store, frame.sweep_ids(store, name), info.get("measure_id"))
    return Look(info, results, untrained, verdicts, {record["id"]: record for record in records})


def _costs(look: Look) -> dict[str, codes.Costs]:
    """What the split and the shared code cost in theory, by the id of each point of which there is a theory."""
    return codes.compare(point_from(record["settings"]) for record in look.records.values())


def _browser() -> bool:
    from choreographer.browsers.chromium import Chromium

    return Chromium.find_browser(skip_local=False) is not None


def _point(results: pd.DataFrame, start: str) -> str:
    """The one point of the sweep whose id begins so."""
    found = [id for id in results["point_id"] if id.startswith(start)]
    if len(found) == 1:
        return str(found[0])
    what = "no finished point" if not found else f"{len(found)} points"
    raise UserError(f"--latents {start}: {what} of this sweep begin{'s' if not found else ''} so")


def _cards(store: Store, results: pd.DataFrame, chosen: Sequence[str]) -> tuple[dict[str, Cards], list[str]]:
    """The cards of points, and a line for each that cannot be opened here."""
    dealer, cards, notes = Dealer(store), {}, []
    for id in dict.fromkeys(chosen):
        try:
            found = dealer.cards(id, narrower(results, id))
            if found.cells is None:
                raise UserError("the features of its toy come and go by themselves, not in cells")
            cards[id] = found
        except Exception as error:  # a stranger's files may hold anything: the page goes without them
            notes.append(f"The latents of {id} are not shown: {' '.join(str(error).split())}.")
    return cards, notes


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
