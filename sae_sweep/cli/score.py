"""`sae-sweep score`: any SAE in SAELens's layout, measured on a toy by the columns of the results table."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sae_sweep.config import overrides as config
from sae_sweep.config.columns import METRICS
from sae_sweep.config.settings import Point, Sae, Training
from sae_sweep.errors import UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import Store

# Without a word on the penalty, the loss is the reconstruction's alone.
DEFAULTS = ("experiment=null", "penalty=none")


def score(directory: Path, overrides: Sequence[str], json: bool) -> None:
    """Measure the SAE in `directory`; `overrides` say on which toy, at which site, under which distribution.

    UserError: it is not an SAE that is known here, or not one for those activations.
    """
    sweep = config.load(overrides, DEFAULTS)
    # The SAE is what it is: settings of sae and training, and seeds of SAEs, say nothing here.
    points = {dataclasses.replace(point, sae=Sae(), training=Training(), seed=0) for point in sweep.points}
    if len(points) > 1:
        raise UserError(f"score measures in one setting at a time, got {len(points)} (a penalty needs its coefficient)")
    (point,) = points
    settings, weights = _read(directory)
    config.check_writable(sweep.output_dir)

    # PyTorch takes seconds to load.
    from sae_sweep.saes.formats.saelens_import import from_saelens
    from sae_sweep.sweep import pack
    from sae_sweep.sweep.context import Ground
    from sae_sweep.sweep.cost import activation_size
    from sae_sweep.sweep.local import this_machine

    try:
        sae, parameters = from_saelens(settings, weights)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from error
    point = dataclasses.replace(point, sae=sae)
    d = activation_size(point)
    if parameters.W_dec.shape[1] != d:
        raise UserError(
            f"{directory}: takes activations of length {parameters.W_dec.shape[1]}, but {point.site.name} of this toy "
            f"has {d} (give toy.d_model=…, site=… as it was trained)"
        )
    machine = this_machine(sweep.device)
    ground = Ground(point, Store(sweep.output_dir), sweep.evaluation, machine.device, lambda event: None)
    metrics = pack.with_loss(ground.measure(point, parameters), point)
    _show(directory, str(settings["architecture"]), point, metrics, json)


def _read(directory: Path) -> tuple[dict[str, Any], bytes]:
    """cfg.json and the weights. UserError if they are not there or not what they should be."""
    try:
        settings = json_module.loads((directory / "cfg.json").read_text())
        weights = (directory / "sae_weights.safetensors").read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror} (an SAE of SAELens is cfg.json and weights)") from error
    except ValueError as error:
        raise UserError(f"{directory / 'cfg.json'} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{directory / 'cfg.json'} must hold an object")
    return settings, weights


def _show(directory: Path, architecture: str, point: Point, metrics: dict[str, Any], json: bool) -> None:
    named = [name for name in METRICS if name in metrics]
    ordered = {name: metrics[name] for name in [*named, *sorted(set(metrics) - set(named))]}
    about = {"architecture": architecture, "width": point.sae.width, "site": point.site.name}
    about |= {"distribution": point.distribution.name}
    if json:
        head = {"schema": 1, "directory": str(directory), "toy": point.toy.to_dict(), **about}
        print(json_module.dumps(head | {"metrics": ordered}))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in ordered.items():
        if value is not None:
            table.add_row(name, f"{value:.6g}")
    heading = ", ".join(f"{key} {value}" for key, value in about.items())
    layout.write(layout.console(sys.stdout), f"{directory}: {heading}", table)
