"""What each latent of a trained SAE stands for, fires on and does: a dashboard for each latent."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.config.columns import is_setting
from sae_sweep.config.settings import PARTITIONS, Evaluation, Point, point_from, toy_id
from sae_sweep.errors import UserError
from sae_sweep.metrics.firing import FiringCounter, FiringTable
from sae_sweep.metrics.ground_truth import Detection, DetectionCounter
from sae_sweep.metrics.labels import class_name
from sae_sweep.reports.figure_data import named
from sae_sweep.saes.folding import unfold
from sae_sweep.saes.formats import saelens
from sae_sweep.store.store import Store
from sae_sweep.sweep.context import Ground, PointSae, load_toy
from sae_sweep.toys.classes import Factored

TOP_CELLS, NEAREST, MOST_SAES = 5, 3, 6


@dataclass(frozen=True)
class Dashboard:
    """One SAE's latents.

    latents: latents.parquet, a row per latent (label, label_class, f1, owner, purity, density, live, …).
    cells: `latent`, `cell` in words, `share` of the latent's activation mass that lies in the cell, `fires`, the share
        of the cell's inputs on which it fires: up to TOP_CELLS rows per latent, the largest share first. None for a
        toy whose features come and go by themselves.
    features: of a toy with planted features the NEAREST to each latent: `latent`, `feature`, the `cosine` of decoder
        row and feature direction, and `f1` as a detector of the feature. Otherwise empty.
    logits: [width, d_vocab] float32, what the latent adds to each logit of the toy at its mean activation where it
        fires, less the mean over tokens, which changes no prediction; None for a toy without logits.
    narrower: the id of the next narrower SAE with the same settings, and `nearest`: `latent`, its `other` there, the
        `cosine` of their decoder rows, and `name`, the other's class; the NEAREST closest of each latent. None and
        empty without one.
    """

    point: Point
    latents: pd.DataFrame
    cells: pd.DataFrame | None
    features: pd.DataFrame
    logits: NDArray[np.float32] | None
    narrower: str | None
    nearest: pd.DataFrame


class DashboardBuilder:
    """Builds the dashboards of points in a store; SAEs with the same data share their evaluation inputs."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._grounds: dict[Any, Ground] = {}

    @torch.no_grad()
    def build(self, id: str, narrower: str | None = None) -> Dashboard:
        """The dashboard of a finished point, beside that of a `narrower` one.

        UserError if there is no such point, or its toy or the file of its distribution's weights is not there.
        """
        record = self.store.read_record("points", id)
        point, evaluation = point_from(record["settings"]), Evaluation(**record["evaluation"])
        ground = self._ground(point, evaluation)
        cells = ground.inputs.cells
        parameters = unfold(self._folded(id), ground.mean, ground.scale)
        sae = PointSae(point, parameters)
        table, detection = _fire(sae, ground, evaluation)
        features = pd.DataFrame(columns=["latent", "feature", "cosine", "f1"])
        if detection is not None and (planted := ground.inputs.model.planted) is not None:
            features = _nearest(sae.W_dec, planted.directions).rename(columns={"other": "feature"})
            features["f1"] = detection.f1[features["latent"], features["feature"]]
        top = None if cells is None else _top_cells(table, cells)
        logits = _logits(sae.W_dec, table, ground, point.site.name)
        nearest = pd.DataFrame(columns=["latent", "other", "cosine", "name"])
        if narrower is not None:
            nearest = _nearest(sae.W_dec, self._folded(narrower).W_dec)
            nearest["name"] = self._latents(narrower)["label_class"].to_numpy()[nearest["other"]]
        return Dashboard(point, self._latents(id), top, features, logits, narrower, nearest)

    def labels(self, id: str) -> Dashboard:
        """What is stored of a finished point's latents, without opening its toy."""
        point = point_from(self.store.read_record("points", id)["settings"])
        none = pd.DataFrame(columns=["latent", "other", "cosine", "name"])
        return Dashboard(point, self._latents(id), None, pd.DataFrame(), None, None, none)

    def _latents(self, id: str) -> pd.DataFrame:
        return pd.read_parquet(io.BytesIO(self.store.read("points", id, "latents.parquet")))

    def _folded(self, id: str) -> Any:
        return saelens.from_files(self.store.read("points", id, saelens.WEIGHTS))

    def _ground(self, point: Point, evaluation: Evaluation) -> Ground:
        key = (point.toy, point.site, point.distribution, point.data_seed, point.training.batch_size, evaluation)
        if key not in self._grounds:
            if toy_id(point.toy) not in self.store.ids("toys"):
                raise UserError(f"the toy of {point.id} is not in {self.store.root}/toys: run its sweep again")
            load_toy(point.toy, self.store)  # one that is damaged is not trained anew for a look
            self._grounds[key] = Ground(point, self.store, evaluation, "cpu", say=None)
        return self._grounds[key]


def choose(frame: pd.DataFrame) -> list[str]:
    """Ids of some SAEs worth a look: the best of each width but for oracle inits, then the best of each init at the
    widest width, by the lowest FVU × max(L0, 1) on the front, MOST_SAES at most; and what these are compared with."""
    table = named(frame[frame["on_front"].fillna(False).astype(bool)])
    table = table.assign(knee=table["fvu"] * table["l0"].clip(lower=1)).dropna(subset=["knee"])
    found = [id for _, id in _best(table[table["init"] != "oracle"], "width")][::-1]
    found += [id for _, id in _best(table[table["width"] == table["width"].max()], "init_name")]
    best = list(dict.fromkeys(found))[:MOST_SAES]
    return list(dict.fromkeys([*best, *filter(None, (narrower(frame, id) for id in best))]))


def narrower(frame: pd.DataFrame, id: str) -> str | None:
    """The id of the widest SAE narrower than this one that shares toy, data, init, penalty, coefficient and seeds."""
    row = frame[frame["point_id"] == id].iloc[0]
    follows = {"width", "steps"}
    same = frame["width"] < row["width"]
    for name in frame.columns:
        if is_setting(str(name)) and "." not in str(name) and name not in follows:
            same &= frame[name].isna() if pd.isna(row[name]) else (frame[name] == row[name]).fillna(False).astype(bool)
    found = frame[same].sort_values("width")
    return None if found.empty else str(found["point_id"].iloc[-1])


def _best(table: pd.DataFrame, by: str) -> Iterator[tuple[Any, str]]:
    for value, rows in table.groupby(by, sort=by == "width"):
        yield value, str(rows.sort_values("knee", kind="stable")["point_id"].iloc[0])


def _fire(sae: PointSae, ground: Ground, evaluation: Evaluation) -> tuple[FiringTable, Detection | None]:
    """On which cells and planted features latents fire. No rows are merged, as a measure may: cells are to be named."""
    norms, inputs = sae.W_dec.norm(dim=1), ground.inputs
    planted, width = inputs.model.planted, len(norms)
    counter = FiringCounter(width, 1 if inputs.cells is None else inputs.cells.count, evaluation.fires_above)
    detections = None
    if planted is not None:
        detections = DetectionCounter(width, len(planted.directions), evaluation.fires_above, norms.device)
    for chunk in inputs:
        parts = (each.split(4096) for each in (chunk.x, chunk.cell, chunk.weight, chunk.inputs))
        for x, cell, weight, drawn in zip(*parts, strict=True):
            contributions = sae.encode(x) * norms
            counter.add(contributions, cell.numpy(), weight.numpy())
            if detections is not None and planted is not None:
                detections.add(contributions, planted.features(drawn))
    return counter.table, detections.detection if detections else None


def _top_cells(table: FiringTable, cells: Factored) -> pd.DataFrame:
    whole = pd.DataFrame({"latent": table.latent, "cell": table.cell, "weight": table.weight, "mass": table.mass})
    whole["share"] = whole["mass"] / whole.groupby("latent")["mass"].transform("sum")
    whole["fires"] = whole["weight"] / table.cell_weight[table.cell]
    # Of equal shares the first cell, so that the order does not hang on the sort.
    ordered = whole.sort_values(["latent", "share", "cell"], ascending=[True, False, True])
    top = ordered.groupby("latent").head(TOP_CELLS).reset_index(drop=True)
    every = PARTITIONS.index("mqnc")
    names = [class_name(cells, every, int(cell)) for cell in top["cell"]]
    return top.assign(cell=names)[["latent", "cell", "share", "fires"]]


def _logits(W_dec: Tensor, table: FiringTable, ground: Ground, site: str) -> NDArray[np.float32] | None:
    mass = np.bincount(table.latent, table.mass, table.width)
    mean = np.divide(mass, table.fired, out=np.zeros(table.width), where=table.fired > 0)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30)
    added = unit * torch.as_tensor(mean / ground.scale, dtype=torch.float32)[:, None]
    found = ground.stream.model.logits(added, site)
    if found is None:
        return None
    logits = found.numpy()
    return logits - logits.mean(axis=1, keepdims=True)


def _nearest(W_dec: Tensor, other: Tensor) -> pd.DataFrame:
    cosines = torch.nn.functional.normalize(W_dec, dim=1) @ torch.nn.functional.normalize(other, dim=1).T
    best = cosines.topk(min(NEAREST, len(other)), dim=1)
    latent = np.repeat(np.arange(len(W_dec)), best.values.shape[1])
    return pd.DataFrame(
        {"latent": latent, "other": best.indices.flatten().numpy(), "cosine": best.values.flatten().numpy()}
    )
