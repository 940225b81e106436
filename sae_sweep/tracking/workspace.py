"""The W&B workspace of a sweep as objects of wandb-workspaces, and how `sae-sweep dashboard` saves it.

A saved view for each sweep, of the runs of its group, and with several seeds one more in which W&B groups the runs of a
setting. W&B draws marks of runs, not lines through them: a front is drawn as the running minimum of FVU from left to
right, with a panel for every penalty, since each logs its FVU under a key of its own too (`fvu_by_penalty/l1`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from sae_sweep.config.columns import LABELS, is_seed
from sae_sweep.config.logger import Logger
from sae_sweep.config.settings import counts
from sae_sweep.errors import EnvironmentProblem
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.tracking.content import run_id
from sae_sweep.tracking.keys import FIGURE, TRAINING, front_key, key
from sae_sweep.tracking.process import own_environment, set_up

# Okabe and Ito's colours, told apart by colour-blind eyes too: one for each penalty, in the order of the table.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# Light to dark, as matplotlib's cividis.
_SHADES = ("#fee838", "#bcae6c", "#7d7c78", "#404c6b", "#00204d")
# Beyond so many runs a view lists no colours: it would outgrow what W&B takes.
_MOST_COLOURED = 1000
# Runs that a chart of training curves draws.
_MOST_CURVES = 100
_LABELS = tuple(key(f"label_{label}") for label in LABELS)
_COUNTS = tuple(map(key, ("owned_maxes", "splits_per_max", "distinct_splits_per_max", "duplicates_per_max")))
_OWNED, _SPLITS, _DISTINCT, _DUPLICATES = _COUNTS
_RUN_TABLE = ("l0", "fvu", "loss", *_COUNTS, "dead_latents", key("label_mq"))


def views(sweep: str, frame: pd.DataFrame, info: Mapping[str, Any], entity: str, project: str) -> list[ws.Workspace]:
    """The saved views of a sweep.

    frame: its results table, not empty; info: its sweep.yaml, which says what it varies and the names of factors.
    """
    varied = info["varied"]
    sections = _sections(frame, varied)
    panels: list[Any] = [panel for section in sections for panel in section.panels if getattr(panel, "title", None)]
    for panel in panels:
        panel.title = FactorNames.of(info).say(panel.title)
    settings = ws.WorkspaceSettings(max_runs=_MOST_CURVES, remove_legends_from_panels=len(frame) > _MOST_CURVES)

    def view(name: str, groupby: Sequence[str]) -> ws.Workspace:
        columns = [*map(_column, varied), *(f"summary:{name}" for name in _RUN_TABLE)]
        runs = ws.RunsetSettings(
            filters=[ws.Config("sweep") == sweep],
            order=[ws.Ordering(ws.Summary("fvu"), ascending=True)],
            groupby=[*map(ws.Config, groupby)],
            pinned_columns=columns,
            run_settings=_colours(frame, sweep),
        )
        return ws.Workspace(
            entity=entity, project=project, name=name, sections=sections, settings=settings, runset_settings=runs
        )

    found = [view(sweep, ())]
    settings_alone = [each for each in varied if not is_seed(each)]
    if 0 < len(settings_alone) < len(varied):
        found.append(view(f"{sweep}, means over seeds", settings_alone))
    return found


def _sections(frame: pd.DataFrame, keys: Sequence[str]) -> list[ws.Section]:
    fronts = [
        wr.ScatterPlot(
            title=f"Front of {name}: FVU against L0, running minimum",
            x="l0",
            y=front_key(name),
            log_x=True,
            log_y=True,
            running_ymin=True,
        )
        for name in _penalties(frame)
    ]
    return [
        _section("Answer", [*_answer()], columns=2),
        _section("Front", [*fronts, _scatter("l0", "fvu", "All penalties: FVU against L0", log_y=True)]),
        _section("Splits", [*_splits()]),
        _section("Labels", [*_labels()]),
        _section("Phases", [*_phases()]),
        _section("Grid", [_grid(frame, keys)], columns=1),
        _section("Sweep", [wr.WeavePanelSummaryTable(table_name="results")], columns=1),
        _section("Training", [*_training(frame)], is_open=False),
    ]


def _section(name: str, panels: list[Any], columns: int = 3, is_open: bool = True) -> ws.Section:
    layout = ws.SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
    return ws.Section(name=name, panels=panels, is_open=is_open, layout_settings=layout)


def _scatter(x: Any, y: Any, title: str, log_x: bool = True, **more: Any) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=x, y=y, log_x=log_x, **more)


def _splits() -> Iterator[Any]:
    yield _scatter("l0", _SPLITS, "Split latents per maximum against L0")
    yield _scatter("l0", _DISTINCT, "Distinct splits per maximum against L0")
    yield _scatter("l0", _DUPLICATES, "Duplicate latents per maximum against L0")
    yield _scatter("l0", _OWNED, "Maxima with a latent of their own against L0")
    for name, title in (
        (_DISTINCT, "Distinct splits per maximum, by width"),
        (_DUPLICATES, "Duplicate latents per maximum, by width"),
    ):
        yield _by_width(name, title)


def _by_width(name: str, title: str) -> wr.BarPlot:
    return wr.BarPlot(
        title=title,
        metrics=[name],
        groupby=wr.Config("sae.width"),
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        orientation="v",
    )


def _labels() -> Iterator[Any]:
    for by, words in (("penalty.name", "penalty"), ("sae.init", "init")):
        yield wr.BarPlot(
            title=f"Latents by what they tell apart, mean by {words}",
            metrics=[*_LABELS],
            groupby=wr.Config(by),
            groupby_aggfunc="mean",
            orientation="v",
        )
    yield wr.BarPlot(
        title="Information of the top latent on query, runner-up and copies, given the maximum",
        metrics=[key(f"info_{factor}") for factor in ("query", "runner_up", "copies")],
        groupby=wr.Config("sae.init"),
        groupby_aggfunc="mean",
        orientation="v",
    )


def _phases() -> Iterator[Any]:
    """Width against coefficient, the colour saying what an SAE of that setting does."""
    for name, title in (
        (_OWNED, "maxima with a latent of their own"),
        (_SPLITS, "split latents per maximum"),
        (_DUPLICATES, "duplicate latents per maximum"),
    ):
        yield wr.ScatterPlot(
            title=f"Phases: width against coefficient, colour: {title}",
            x=wr.Config("penalty.coefficient"),
            y=wr.Config("sae.width"),
            z=name,
            log_x=True,
            log_y=True,
            gradient=_gradient(),
        )


def _grid(frame: pd.DataFrame, keys: Sequence[str]) -> wr.ParallelCoordinatesPlot:
    """Every axis of the grid, then what came of it."""
    axes = [wr.ParallelCoordinatesPlotColumn(wr.Config(each), display_name=each) for each in keys if not is_seed(each)]
    results = [
        wr.ParallelCoordinatesPlotColumn(name, log=name in ("l0", "fvu") and bool((frame[name] > 0).all()))
        for name in ("l0", "fvu", *_COUNTS)
    ]
    return wr.ParallelCoordinatesPlot(title="The grid", columns=[*axes, *results], gradient=_gradient())


def _answer() -> Iterator[Any]:
    """The first screen: the verdicts, the front, splits by width, dead latents. What the sweep's own run holds."""
    yield wr.WeavePanelSummaryTable(table_name="verdicts")
    yield wr.MediaBrowser(media_keys=[f"{FIGURE}/front"], num_columns=1)
    yield _by_width(_SPLITS, "Split latents per maximum, by width")
    yield _by_width("dead_latents", "Dead latents, by width")


def _training(frame: pd.DataFrame) -> Iterator[Any]:
    for name, title in (("fvu", "FVU"), ("l0", "L0"), ("loss", "loss"), ("gradient", "Gradient's norm")):
        yield wr.LinePlot(title=f"{title} through training", x="Step", y=[key(name, TRAINING)], log_y=True)
    if frame["revived"].notna().any():
        for name, title in (("dead", "Dead latents"), ("revived", "Latents revived")):
            yield wr.LinePlot(title=f"{title} through training", x="Step", y=[key(name, TRAINING)])
    yield wr.MediaBrowser(media_keys=[f"{FIGURE}/plateau"], num_columns=1)


def _gradient() -> list[wr.GradientPoint]:
    return [wr.GradientPoint(color=colour, offset=25 * i) for i, colour in enumerate(_SHADES)]


def _penalties(frame: pd.DataFrame) -> list[str]:
    """What makes codes sparse, in the order of the table: penalties, and architectures that count."""
    counted = frame["architecture"].map(counts)
    return [str(name) for name in frame["penalty"].mask(counted, frame["architecture"]).unique()]


def _colours(frame: pd.DataFrame, sweep: str) -> dict[str, ws.RunSettings]:
    """A colour for each point's run, by its penalty."""
    if len(frame) > _MOST_COLOURED:
        return {}
    names = _penalties(frame)
    counted = frame["architecture"].map(counts)
    of_point = zip(frame["point_id"], frame["penalty"].mask(counted, frame["architecture"]), strict=True)
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    return {run_id(str(id), sweep): ws.RunSettings(color=colour[str(name)]) for id, name in of_point}


def _column(setting: str) -> str:
    """The runs table's name for a key of the configuration."""
    first, dot, rest = setting.partition(".")
    return f"config:{first}.value{dot}{rest}"


def save(folder: Path, sweep: str, frame: pd.DataFrame, info: Mapping[str, Any], logger: Logger) -> dict[str, str]:
    """Save the views in place of those of an earlier call; returns the URL of each by its name.

    folder: the sweep's `wandb` folder, which remembers where the views are. EnvironmentProblem: no key, or no server.
    """
    known = folder / "views.json"
    with own_environment(folder):
        client = set_up("online")
        try:
            found = views(sweep, frame, info, logger.entity or client.Api().default_entity, logger.project)
            saved = {view.name: _save(view, _read(known).get(view.name)) for view in found}
        except Exception as problem:
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise EnvironmentProblem(
                f"W&B: nothing saved ({reason}); --json prints the views all the same"
            ) from problem
        finally:
            client.teardown()
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(saved, indent=1))
    return {name: place["url"] for name, place in saved.items()}


def _save(view: ws.Workspace, known: dict[str, str] | None) -> dict[str, str]:
    """Save a view, in place of the one known; says where it is."""
    if known is not None:
        # Not by Workspace.from_url: it reads the whole view back, and refuses those that a newer app has written.
        view._internal_name, view._internal_id = known["name"], known["id"]
        with suppress(Exception):  # deleted since, or of another account: a new one then
            view.save()
            return known
        view._internal_name = view._internal_id = ""
    view.save()
    return {"url": view.url, "name": view._internal_name, "id": view._internal_id}


def _read(path: Path) -> dict[str, dict[str, str]]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
