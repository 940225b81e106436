"""Sweeps from Python: run one, plan it, measure an SAE, and open again what the store holds.

    import sae_sweep
    results = sae_sweep.run("experiment=splitting", seed=[0, 1])
    results.frame, results.verdicts, results.front(), results.report()

Overrides are those of the command line, as text, as mappings, or as keywords, in which two underscores are a dot:
`run("sae.width=8,16")`, `run({"sae.width": [8, 16]})` and `run(sae__width=[8, 16])` are the same. What is wrong with
them is a UserError with the line that the command line prints.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from sae_sweep import running
from sae_sweep.config import files
from sae_sweep.config import overrides as config
from sae_sweep.config.grid import Sweep
from sae_sweep.config.keys import nearest
from sae_sweep.config.settings import Point, Toy, point_from, toy_id
from sae_sweep.config.words import Override, words
from sae_sweep.errors import UserError
from sae_sweep.metrics.ground_truth import cosines
from sae_sweep.reports import figure_data, figures
from sae_sweep.reports import report as reports
from sae_sweep.reports.claims import evaluate_all
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.formats.index import read_sae
from sae_sweep.saes.formats.loaded import LoadedSae
from sae_sweep.saes.parameters import Parameters, SaeTensors
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store
from sae_sweep.sweep import context
from sae_sweep.sweep import run as runner
from sae_sweep.sweep.plan import Plan
from sae_sweep.sweep.plan import plan as make_plan
from sae_sweep.toys.model import Model

OUTPUTS = Path("outputs")
Folders = str | Path | Sequence[str | Path]
# Points named by an error about an id that begins several.
_NAMED = 4


@dataclass(frozen=True)
class Results:
    """A sweep that was run.

    frame: the results table, a row per finished point; untrained: the same of the SAEs before training
    failed: how many points failed
    """

    sweep: Sweep
    frame: pd.DataFrame
    untrained: pd.DataFrame
    failed: int

    @property
    def name(self) -> str:
        """The sweep's name, as `load_sweep` and the commands take it."""
        return self.sweep.name

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """The verdict on each claim: a row each, with what was predicted and what was found."""
        info = frame.sweep_info(Store(self.sweep.output_dir), self.name)
        found = evaluate_all(info, self.frame, self.untrained)
        return pd.DataFrame([dataclasses.asdict(verdict) for verdict in found])

    def front(self) -> go.Figure:
        """FVU against L0, a line per penalty, width and start."""
        return plot_front(self.frame)

    def report(self, output: Path | str | None = None) -> Path:
        """Write the page of the sweep, by default report.html in its folder; returns where it is."""
        store = Store(self.sweep.output_dir)
        info = frame.sweep_info(store, self.name)
        both = self.frame, self.untrained
        material = reports.gather(store, [self.name], info, both, evaluate_all(info, *both))
        target = None if output is None else Path(output)
        return reports.write(store, material, target, reports.choose_few(self.frame), images=False)[0]

    def __repr__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"Results({self.name}: {len(self.frame)} points{failed}, {len(self.sweep.claims)} claims)"


def run(*overrides: Override, config_dir: Folders = (), yes: bool = False, **settings: Any) -> Results:
    """Train what is missing of a sweep, and measure it; what is finished is kept. Progress goes to stderr.

    Args:
        overrides: text as on the command line, or mappings of keys to values; a list of values is an axis.
        config_dir: folders of options of your own, before ./conf and the package's.
        yes: let grids of more than 100,000 combinations through.
        settings: keys and values, with two underscores for a dot.

    UserError: what the command line would refuse; EnvironmentProblem: the output folder, or a GPU that is not there.
    """
    sweep = _configured(overrides, config_dir, yes, settings)
    config.check_writable(sweep.output_dir)
    runner.check_files(sweep)
    store = Store(sweep.output_dir)
    sweep = running.calibrated(sweep, store)
    outcome, results, untrained = running.train(sweep, runner.look(sweep, store), store, fail_fast=False)
    return Results(sweep, results, untrained, outcome.failed)


def plan(*overrides: Override, config_dir: Folders = (), yes: bool = False, **settings: Any) -> Plan:
    """What `run` would do: its points, those finished, the packs left, seconds and bytes. Nothing is written."""
    sweep = _configured(overrides, config_dir, yes, settings)
    runner.check_files(sweep)
    store = Store(sweep.output_dir)
    return make_plan(running.known(sweep, store), store.ids("points"), trained_toys=store.ids("toys"))


def score(path: Path | str, *overrides: Override, **settings: Any) -> dict[str, Any]:
    """The metrics, by column, of an SAE of any library, by its folder or file, on a toy of the overrides."""
    return running.measured(Path(path), words(overrides, settings))[2]


def compare(*names: str, output_dir: Path | str = OUTPUTS) -> pd.DataFrame:
    """The results tables of several sweeps as one, whose first column `sweep` says which."""
    return frame.together(Store(output_dir), names)[0]


def _configured(overrides: Sequence[Override], config_dir: Folders, yes: bool, settings: Mapping[str, Any]) -> Sweep:
    files.search_first([config_dir] if isinstance(config_dir, str | Path) else config_dir)
    try:
        sweep = config.load(words(overrides, settings), yes=yes)
    finally:
        files.search_first([])
    if sweep.launcher["name"] == "slurm":
        raise UserError("launcher=slurm is for the command line: sae-sweep submit, with the same overrides")
    return sweep


@dataclass(frozen=True)
class TrainedSAE(SaeTensors):
    """A finished point. `metrics`: by column of the results table; `latents`: a row per latent, as in latents.parquet.

    It takes raw activations of its toy at `point.site.name`: centring and scale are folded in.
    """

    point: Point
    metrics: dict[str, Any]
    latents: pd.DataFrame
    sae: context.PointSae

    @property
    def id(self) -> str:
        """The point's id."""
        return self.point.id

    @property
    def parameters(self) -> Parameters:
        """Its numbers, on raw activations."""
        return self.sae.parameters

    @torch.no_grad()
    def encode(self, acts: Tensor) -> Tensor:
        """Codes [b, width] of raw activations [b, d]."""
        return self.sae.encode(acts)

    def stitching(self, narrow: TrainedSAE | LoadedSae) -> Tensor:
        """Each latent's largest decoder cosine with a latent of another SAE [width], float64 (arXiv 2502.04878).

        Near 1 the narrower SAE has the direction already; far below, the latent is new. UserError if the two do not
        read the same number of activations.
        """
        if self.W_dec.shape[1] != narrow.W_dec.shape[1]:
            raise UserError(f"{self} and {narrow} read activations of different length")
        return cosines(self.W_dec, narrow.W_dec).amax(1)

    def __repr__(self) -> str:
        from sae_sweep.reports.live import describe

        return f"TrainedSAE({self.id}: {describe(self.point)})"


def load_sweep(name: str, output_dir: Path | str = OUTPUTS, untrained: bool = False) -> pd.DataFrame:
    """The results table of a sweep: a row per finished point, the columns of the README.

    untrained: the same measures of the untrained starts instead. UserError if there is no such sweep.
    """
    return frame.tables(Store(output_dir), name)[untrained]


def load_sae(id: str | Path, output_dir: Path | str = OUTPUTS) -> TrainedSAE | LoadedSae:
    """A trained SAE by its `point_id`, or by how that begins; or an SAE of another library, by its folder or file.

    What has a separator in it (`./sae`), or is a Path, is a path. UserError if there is none, or more than one.
    """
    if isinstance(id, Path) or os.sep in id:
        return read_sae(id)
    return load_trained(id, output_dir)


def load_trained(id: str, output_dir: Path | str = OUTPUTS) -> TrainedSAE:
    """A trained SAE by its `point_id`, or by how that begins. UserError if there is none, or more than one."""
    store = Store(output_dir)
    id = find(store, "points", id)
    record = store.read_record("points", id)
    point = point_from(record["settings"])
    parameters = store.parse("points", id, saelens.WEIGHTS, saelens.from_files)
    latents = store.parse("points", id, "latents.parquet", lambda content: pd.read_parquet(io.BytesIO(content)))
    return TrainedSAE(point, record["metrics"], latents, context.PointSae(point, parameters))


def load_toy(id: str, output_dir: Path | str = OUTPUTS) -> Model:
    """The toy that a point was trained on, by the point's id, or a toy by its own; or by how either begins.

    `toy.activations(sequences [b, k], site)` are what an SAE of that site takes. UserError if there is none.
    """
    store = Store(output_dir)
    if any(known.startswith(id) for known in store.ids("points")):
        settings = store.read_record("points", find(store, "points", id))["settings"]["toy"]
    else:
        settings = store.read_record("toys", find(store, "toys", id))["settings"]
    toy = Toy(**settings)
    if toy_id(toy) not in store.ids("toys"):
        raise UserError(f"the toy of {id} is not in {store.root}/toys: run its sweep again to train it")
    return context.load_toy(toy, store)


def plot_front(df: pd.DataFrame) -> go.Figure:
    """FVU against L0, a line per penalty, width and start."""
    return figures.front(figure_data.front(df))


def plot_split_counts(df: pd.DataFrame) -> go.Figure:
    """Split latents per maximum over width, start, penalty and coefficient."""
    return figures.split_counts(figure_data.split_counts(df))


def plot_phases(df: pd.DataFrame) -> go.Figure:
    """What an SAE of each setting does: one latent per maximum, splits, duplicates, or neither."""
    return figures.phases(figure_data.phases(df))


def plot_labels(df: pd.DataFrame, untrained: pd.DataFrame) -> go.Figure:
    """What latents stand for, beside what those of the untrained starts do (`load_sweep(name, untrained=True)`)."""
    return figures.labels(figure_data.labels(df, untrained))


def plot_information(df: pd.DataFrame, untrained: pd.DataFrame) -> go.Figure:
    """How much of query, runner-up and copies the top latent tells, beside the untrained starts."""
    return figures.information(figure_data.information(df, untrained))


def find(store: Store, kind: str, start: str) -> str:
    """The one finished id of a kind ("points", "toys") that begins with `start`; UserError names the nearest."""
    known = store.ids(kind)
    found = sorted(id for id in known if id.startswith(start)) if start else []
    if len(found) == 1:
        return found[0]
    if found:
        more = ", …" if len(found) > _NAMED else ""
        raise UserError(f"{len(found)} {kind} begin with {start}: {', '.join(found[:_NAMED])}{more}")
    here = nearest(start, sorted(known)) if known else f": {store.root} holds none yet"
    raise UserError(f"there is no finished {kind.removesuffix('s')} {start!r}{here}")
