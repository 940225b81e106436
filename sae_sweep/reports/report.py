"""The report of a sweep as files: one page to look at, the numbers behind each figure, and pictures on request."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import html
from sae_sweep.reports.claims import Verdict
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.reports.figures import FIGURES
from sae_sweep.reports.latent_dashboard import Dashboard, DashboardBuilder, choose, narrower
from sae_sweep.reports.material import Finished, Material
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store

PAGE, FOLDER = "report.html", "figures"
# SAEs of which a page shows what their latents stand for, as far as they fit.
MOST_LABELLED = 200
# SAEs up to this width are shown latent by latent at the end of a run.
QUICK_WIDTH = 1024
PICTURE_WIDTH = 1000  # pixels, before PICTURE_SCALE
PICTURE_SCALE = 2
FORMATS = ("png", "svg")
NO_CHROME = (
    "PNG and SVG are drawn by Chrome or Chromium, and none was found: install one (`apt install chromium`, or "
    "`plotly_get_chrome`), or leave --images out"
)


def check(results: pd.DataFrame, latents: Sequence[str], images: bool) -> list[str]:
    """What can be known to be wrong before any work; returns the ids of the points whose latents to show: those that
    begin like one of `latents`, or without any those of `latent_dashboard.choose`.

    Raises UserError for a point that is not of the sweep, EnvironmentProblem if there is no browser to draw images.
    """
    if images and not _browser():
        raise EnvironmentProblem(NO_CHROME)
    return [_point(results, start) for start in latents] or choose(results)


def tables(finished: Finished) -> dict[str, pd.DataFrame]:
    """The table behind each figure, by its key; figures of which nothing was measured are left out."""
    found = {figure.key: figure.table(finished) for figure in FIGURES}
    return {key: table for key, table in found.items() if len(table)}


def write(
    store: Store, material: Material, output: Path | None, chosen: Sequence[str], images: bool
) -> tuple[Path, list[str]]:
    """Write the page, and beside it the folder of its figures; returns where the page is, and what it lacks and why.

    Args:
        output: the page's file; None: report.html in the sweep's folder.
        chosen: ids of the points whose latents to show.
        images: write the figures as PNG and SVG too.

    Raises EnvironmentProblem, or OSError, if a file cannot be written.
    """
    name = material.info["name"]
    data = tables(material.finished)
    names = FactorNames.of(material.info)
    drawn = {figure.key: names.figure(figure.draw(data[figure.key])) for figure in FIGURES if figure.key in data}
    dashboards, notes = _dashboards(store, material.finished.results, chosen)
    folder = FOLDER if output is None else f"{output.stem}-{FOLDER}"
    page = html.page(html.Contents(material, data, drawn, dashboards, notes), folder)
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


def gather(
    store: Store,
    sweeps: Sequence[str],
    info: Mapping[str, Any],
    both: tuple[pd.DataFrame, pd.DataFrame],
    verdicts: Sequence[Verdict],
) -> Material:
    """All that the report of a sweep, or of several, needs from the store beside its two tables and its verdicts."""
    records: dict[str, Mapping[str, Any]] = {}
    failures: dict[str, Mapping[str, Any]] = {}
    for name in sweeps:
        measure_id = frame.sweep_info(store, name).get("measure_id")
        records |= {each["id"]: each for each in frame.measured(store, frame.sweep_ids(store, name), measure_id)}
        failures |= store.failures(name)
    if len(sweeps) == 1:
        info = {**info, "written": (store.sweep(sweeps[0]) / "sweep.yaml").stat().st_mtime}
    return Material(info, Finished(*both, records), verdicts, failures)


def choose_few(results: pd.DataFrame) -> list[str]:
    """The points whose latents a run shows at its end: as many as take a moment."""
    narrow = results[results["width"] <= QUICK_WIDTH]
    return choose(narrow) if len(narrow) else []


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


def _dashboards(store: Store, results: pd.DataFrame, chosen: Sequence[str]) -> tuple[dict[str, Dashboard], list[str]]:
    """The dashboards of the chosen points, and a line for each that cannot be opened here; of others the labels."""
    builder, dashboards, notes = DashboardBuilder(store), {}, []
    for id in dict.fromkeys(chosen):
        try:
            found = builder.build(id, narrower(results, id))
            if found.cells is None:
                raise UserError("the features of its toy come and go by themselves, not in cells")
            dashboards[id] = found
        except Exception as error:  # a stranger's files may hold anything: the page goes without them
            notes.append(f"The latents of {id} are not shown: {' '.join(str(error).split())}.")
    for id in results["point_id"].head(MOST_LABELLED):
        if id not in dashboards:
            with suppress(Exception):  # as above
                dashboards[id] = builder.labels(id)
    return dashboards, notes


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
