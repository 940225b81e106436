"""`sae-sweep variance`: what a code that is constant on a partition's classes can explain of a toy's activations."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sae_sweep import config
from sae_sweep.errors import UserError
from sae_sweep.reports import layout
from sae_sweep.schema import SYNTHETIC, Point
from sae_sweep.store import Store

# Every input of 64 tokens and 4 places.
DEFAULTS = ("experiment=null", "penalty=none", "evaluation.inputs=16777216")


def variance(overrides: Sequence[str], json: bool) -> None:
    """Print the share of variance between the classes of every partition, a column per toy, site and distribution.

    Toys that differ in their seeds alone share a column: the mean over them. Toys not yet in the store are trained.
    """
    sweep = config.load(overrides, DEFAULTS)
    points = list(dict.fromkeys(_of_inputs(point) for point in sweep.points))
    planted = sorted({point.toy.name for point in points if point.toy.name in SYNTHETIC})
    if planted:
        raise UserError(f"toy={planted[0]} has no partitions: variance is of toy=max_of_k or toy=bigrams")
    config.check_writable(sweep.output_dir)

    # PyTorch takes seconds to load.
    from sae_sweep.measures.variance import between_classes
    from sae_sweep.sweep.ground import Ground
    from sae_sweep.sweep.local import this_machine

    device = this_machine(sweep.device).device
    rows = []
    for point in points:
        ground = Ground(point, Store(sweep.output_dir), sweep.evaluation, device, lambda event: None)
        about = {"toy": point.toy.title, "toy_seed": point.toy.seed, "toy_distribution": point.toy.distribution}
        about |= {"site": point.site.name, "distribution": point.distribution.name}
        found = {"inputs": ground.inputs.count, "exact": ground.inputs.exact, "r2": between_classes(ground.inputs)}
        rows.append(about | found)
    if json:
        print(json_module.dumps({"schema": 1, "rows": rows}))
    else:
        by_site = {point.site.name: [row for row in rows if row["site"] == point.site.name] for point in points}
        layout.write(layout.console(sys.stdout), *(_table(site, of_site) for site, of_site in by_site.items()))


def _of_inputs(point: Point) -> Point:
    """The point as far as its inputs go."""
    return dataclasses.replace(point, sae=Point.sae, training=Point.training, seed=0)


def _table(site: str, rows: list[dict[str, Any]]) -> Table:
    """A row per partition; a column per setting, headed by what tells the settings of the site apart."""
    varied = [key for key in ("toy", "toy_distribution", "distribution") if len({row[key] for row in rows}) > 1]
    groups: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in varied or ["distribution"]), []).append(row["r2"])
    table = Table(box=None, pad_edge=False)
    table.add_column(site)
    for group in groups:
        table.add_column("\n".join(group), justify="right")
    for name in rows[0]["r2"]:
        shares = [[r2[name] for r2 in of_setting] for of_setting in groups.values()]
        table.add_row(name, *(_mean(of_setting) for of_setting in shares))
    return table


def _mean(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{sum(known) / len(known):.4f}" if known else "–"
