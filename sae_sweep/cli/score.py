"""`sae-sweep score`: an SAE that any library wrote, measured on a toy by the columns of the results table."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_sweep.config import overrides as config
from sae_sweep.config.columns import METRICS
from sae_sweep.config.settings import Point, Sae, Training
from sae_sweep.errors import UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import Store

if TYPE_CHECKING:
    from sae_sweep.saes.formats.loaded import LoadedSae

# Without a word on the penalty, the loss is the reconstruction's alone.
DEFAULTS = ("experiment=null", "penalty=none")


def score(path: Path, overrides: Sequence[str], json: bool) -> None:
    """Measure the SAE in the folder or file `path`; `overrides` say on which toy, site and distribution.

    UserError: it is not an SAE that is known here, or not one for those activations.
    """
    sweep = config.load(overrides, DEFAULTS)
    # The SAE is what it is: settings of sae and training, and seeds of SAEs, say nothing here.
    points = {dataclasses.replace(point, sae=Sae(), training=Training(), seed=0) for point in sweep.points}
    if len(points) > 1:
        raise UserError(f"score measures in one setting at a time, got {len(points)} (a penalty needs its coefficient)")
    (point,) = points
    config.check_writable(sweep.output_dir)

    # PyTorch takes seconds to load.
    from sae_sweep.saes.formats.index import read_sae
    from sae_sweep.sweep import pack
    from sae_sweep.sweep.context import Ground
    from sae_sweep.sweep.cost import activation_size
    from sae_sweep.sweep.local import this_machine

    sae = read_sae(path)
    d, needed = sae.W_dec.shape[1], activation_size(point)
    if d != needed:
        raise UserError(
            f"{path}: takes activations of length {d}, but {point.site.name} of this toy has {needed} "
            "(give toy.d_model=…, site=… as it was trained)"
        )
    machine = this_machine(sweep.device)
    ground = Ground(point, Store(sweep.output_dir), sweep.evaluation, machine.device, lambda event: None)
    _show(path, sae, point, pack.with_loss(ground.measure_loaded(sae, point.penalty), point), json)


def _show(path: Path, sae: LoadedSae, point: Point, metrics: dict[str, Any], json: bool) -> None:
    named = [name for name in METRICS if name in metrics]
    ordered = {name: metrics[name] for name in [*named, *sorted(set(metrics) - set(named))]}
    about = {"library": sae.library, "architecture": sae.kind, "width": len(sae.W_dec), "site": point.site.name}
    about |= {"distribution": point.distribution.name}
    if json:
        head = {"schema": 1, "directory": str(path), "toy": point.toy.to_dict(), **about}
        print(json_module.dumps(head | {"metrics": ordered}))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in ordered.items():
        if value is not None:
            table.add_row(name, f"{value:.6g}")
    heading = ", ".join(f"{key} {value}" for key, value in about.items())
    layout.write(layout.console(sys.stdout), f"{path}: {heading}", table)
