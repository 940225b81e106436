"""`sae-sweep variance`: what a code that is constant on a partition's classes can explain, and what it costs."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sae_sweep.config import overrides as config
from sae_sweep.config.settings import Penalty, Point, Sae, Training
from sae_sweep.errors import UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import Store

if TYPE_CHECKING:
    from sae_sweep.metrics.partition_variance import Classes

# Of each partition, by its name.
Shares = dict[str, float | None]

# Every input of 64 tokens and 4 places.
DEFAULTS = ("experiment=null", "penalty=none", "evaluation.inputs=16777216")


def variance(overrides: Sequence[str], json: bool) -> None:
    """Print the share of variance between the classes of every partition, for each toy, site and distribution, and
    the least loss of a latent for each class under each penalty given.

    Toys that differ in their seeds alone share columns: the means over them. Toys not yet in the store are trained.
    """
    sweep = config.load(overrides, DEFAULTS)
    settings: dict[Point, list[Penalty]] = {}
    for point in sweep.points:
        settings.setdefault(_of_inputs(point), []).append(point.penalty)
    planted = sorted({point.toy.name for point in settings if not point.toy.kind.sites})
    if planted:
        raise UserError(f"toy={planted[0]} has no partitions: variance is of toy=max_of_k or toy=bigrams")
    config.check_writable(sweep.output_dir)

    # PyTorch takes seconds to load.
    from sae_sweep.metrics.partition_variance import classes_of
    from sae_sweep.sweep.context import Ground
    from sae_sweep.sweep.local import this_machine

    device = this_machine(sweep.device).device
    rows = []
    for point, penalties in settings.items():
        ground = Ground(point, Store(sweep.output_dir), sweep.evaluation, device, lambda event: None)
        about = {"toy": point.toy.title, "toy_seed": point.toy.seed, "toy_distribution": point.toy.get("distribution")}
        about |= {"site": point.site.name, "distribution": point.distribution.name}
        classes = classes_of(ground.inputs)
        found = {"inputs": ground.inputs.count, "exact": ground.inputs.exact}
        shares = {name: each and each.r2 for name, each in classes.items()}
        rows.append(about | found | {"r2": shares, "least_loss": _least_losses(classes, penalties)})
    if json:
        print(json_module.dumps({"schema": 1, "rows": rows}))
    else:
        by_site = {point.site.name: [row for row in rows if row["site"] == point.site.name] for point in settings}
        tables = [_table(site, of_site) for site, of_site in by_site.items()]
        layout.write(layout.console(sys.stdout), *tables, Text(_caption(rows), "dim"))


def _caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the numbers are."""
    words = (
        "R²: the share of the activations' variance that lies between the classes of a partition, which is what a code "
        "with one latent per class explains at best."
    )
    if any(row["least_loss"] for row in rows):
        words += " Under a penalty and its coefficient: the least loss of such a code."
    exact = all(row["exact"] for row in rows)
    return f"{words} On {max(row['inputs'] for row in rows):,} inputs, {'all there are' if exact else 'drawn'}."


def _of_inputs(point: Point) -> Point:
    """The point as far as its inputs go."""
    return dataclasses.replace(point, sae=Sae(), penalty=Penalty(), training=Training(), seed=0)


def _least_losses(classes: Mapping[str, Classes | None], penalties: Sequence[Penalty]) -> dict[str, Shares]:
    """By penalty and coefficient, then by partition."""
    from sae_sweep.metrics.extra.theory import least_loss_apart

    wanted = [penalty for penalty in dict.fromkeys(penalties) if penalty.name != "none"]
    return {
        _title(penalty): {
            name: None if each is None else least_loss_apart(each, penalty) for name, each in classes.items()
        }
        for penalty in wanted
    }


def _title(penalty: Penalty) -> str:
    return f"{penalty.words} {penalty.coefficient:g}"


def _table(site: str, rows: list[dict[str, Any]]) -> Table:
    """A row per partition; columns per setting, headed by what tells the settings of the site apart."""
    varied = [key for key in ("toy", "toy_distribution", "distribution") if len({row[key] for row in rows}) > 1]
    columns: dict[tuple[str, ...], list[Shares]] = {}
    for row in rows:
        setting = tuple(row[key] for key in varied or ["distribution"])
        for title, shares in {"R²": row["r2"], **row["least_loss"]}.items():
            columns.setdefault((*setting, title), []).append(shares)
    table = Table(box=None, pad_edge=False)
    table.add_column(site)
    for heading in columns:
        table.add_column("\n".join(heading), justify="right")
    for name in rows[0]["r2"]:
        table.add_row(name, *(_mean([shares[name] for shares in column]) for column in columns.values()))
    return table


def _mean(shares: list[float | None]) -> str:
    known = [share for share in shares if share is not None]
    return f"{sum(known) / len(known):.4f}" if known else "–"
