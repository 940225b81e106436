"""`sae-sweep score`: an SAE that any library wrote, measured on a toy by the columns of the results table."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_sweep.config.columns import metric_columns
from sae_sweep.config.settings import Point
from sae_sweep.reports import layout
from sae_sweep.running import measured

if TYPE_CHECKING:
    from sae_sweep.saes.formats.loaded import LoadedSae


def score(path: Path, overrides: Sequence[str], json: bool) -> None:
    """Measure the SAE in the folder or file `path`; `overrides` say on which toy, site and distribution."""
    _show(path, *measured(path, overrides), json)


def _show(path: Path, sae: LoadedSae, point: Point, metrics: dict[str, Any], json: bool) -> None:
    named = [name for name in metric_columns() if name in metrics]
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
