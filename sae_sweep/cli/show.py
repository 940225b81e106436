"""What is said of sweeps that have run: their tables, reports and views, and the latents of an SAE."""

from __future__ import annotations

import dataclasses
import json as json_module
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from sae_sweep.reports.material import Material


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is to be seen of a table: see `sae-sweep results --help`."""

    columns: str | None = None
    sort: str | None = None
    top: int | None = None
    where: Sequence[str] = ()


def results(sweep: str, format: str, seeds: str, choice: Choice, output_dir: Path) -> None:
    """Print the one table."""
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    table = frame.load(store, sweep)
    warn_of_damage(store)
    if seeds == "mean":
        from sae_sweep.store.seed_agreement import seed_agreement

        # From the weights of every point, so only where it is asked for.
        table["seed_agreement"] = seed_agreement(store, table)
    _print_table(table, format, seeds, choice)


def compare(sweeps: Sequence[str], output: Path | None, json: bool, full: bool, output_dir: Path) -> None:
    """Print sweeps in one table, and write one page of them: see `store.results.together`."""
    from sae_sweep.reports import report as files
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    if len(set(sweeps)) < 2:
        raise UserError("compare takes the names of two sweeps or more")
    results, untrained = frame.together(store, sweeps)
    warn_of_damage(store)
    name = " and ".join(sweeps)
    total = sum(frame.sweep_info(store, each).get("points", 0) for each in sweeps)
    material = files.gather(store, sweeps, {"name": name, "points": total}, (results, untrained), [])
    place = output or Path(f"{'-'.join(sweeps)[:80]}.html")
    files.write(store, material, place, [], images=False)
    if json:
        head = {"schema": 1, "sweeps": [*sweeps], "points": len(results), "report": str(place)}
        print(json_module.dumps(head | {"rows": _rows(results)}))
        return
    _show(material, None, full)
    print(f"report: {place}", file=sys.stderr)


def _print_table(table: pd.DataFrame, format: str, seeds: str, choice: Choice) -> None:
    from sae_sweep.config.columns import COLUMN_OF, is_setting
    from sae_sweep.reports import selection
    from sae_sweep.store.results import aggregate

    # Settings choose among points, metrics among what is left of them once seeds are brought together.
    names = [re.split("[!<>=]", each, maxsplit=1)[0].strip() for each in choice.where]
    of_settings = [is_setting(COLUMN_OF.get(name, name)) for name in names]
    early = [each for each, setting in zip(choice.where, of_settings, strict=True) if setting]
    table = selection.where(table, early)
    if seeds != "none":
        table = aggregate(table, seeds)  # type: ignore[arg-type]
    table = selection.where(table, [each for each in choice.where if each not in early])
    telling = list(selection.telling(table))
    table = selection.ordered(table, choice.sort, choice.top)
    if choice.columns is not None:
        table = selection.named(table, choice.columns)
    if format == "csv":
        table.to_csv(sys.stdout, index=False)
    elif format == "json":
        print(json_module.dumps(_rows(table)))
    elif format == "parquet":
        sys.stdout.buffer.write(table.to_parquet(index=False))
    elif table.empty:
        print("no finished point" + (" meets the conditions" if choice.where else " yet"))
    else:
        console = layout.console(sys.stdout)
        chosen = table if choice.columns is not None else table[telling]
        text, without = selection.as_text(chosen, console.width)
        hint = f"{len(chosen.columns) - len(without)} of {len(table.columns)} columns" if choice.columns is None else ""
        hint = f"no room for {', '.join(without)}" if without and choice.columns is not None else hint
        hint = f"{hint}: --columns A,B names others, --format csv has all" if hint else ""
        layout.write(console, text, *([Text(hint, "dim")] if hint else []))


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as JSON; pandas would round to ten digits."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


@dataclasses.dataclass(frozen=True)
class Page:
    """Where a report's page goes, the points whose latents it shows, and whether its figures are written as images."""

    output: Path | None = None
    latents: Sequence[str] = ()
    images: bool = False


def report(sweep: str, json: bool, full: bool, page: Page, output_dir: Path) -> None:
    """Print the report of a sweep from its records; write report.html, and its tables anew.

    With an output the page goes there, and nothing is written to the store.
    """
    from sae_sweep.reports import report as files
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    both = results, untrained = frame.tables(store, sweep)
    chosen = files.check(results, page.latents, page.images)
    info = frame.sweep_info(store, sweep)
    verdicts = verdicts_of(info, results, untrained)
    warn_of_damage(store)
    material = files.gather(store, [sweep], info, both, verdicts)
    if not json:
        _show(material, store.sweep(sweep), full)
    place, notes = files.write(store, material, page.output, chosen, page.images)
    if page.output is None:
        frame.write(store, sweep, both)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if json:
        head = {"schema": 1, "sweep": sweep, "points": len(results), "report": str(place)}
        print(json_module.dumps({**head, "claims": [dataclasses.asdict(verdict) for verdict in verdicts]}))
    else:
        print(f"report: {place}", file=sys.stderr)


def dashboard(sweep: str, json: bool, output_dir: Path) -> None:
    """Save a sweep's views in W&B, or print them."""
    from sae_sweep.config.logger import Logger
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    info, table = frame.sweep_info(store, sweep), frame.load(store, sweep)
    warn_of_damage(store)
    logger = info.get("logger") or {}
    if logger.get("name") != "wandb":
        raise UserError(f"{sweep} was run with logger=none: run it again with logger=wandb to log its points")
    if table.empty:
        raise UserError(f"{sweep} has no finished point yet: there is nothing to look at")
    place = Logger.of(logger)
    if json:
        from sae_sweep.tracking.workspace import views

        found = views(sweep, table, info, place.entity or "", place.project)
        specs = [{"name": view.name, "spec": view._spec["spec"]} for view in found]
        print(json_module.dumps({"schema": 1, "sweep": sweep, "views": specs}))
        return
    from sae_sweep.tracking.logging import files_folder, unsynced
    from sae_sweep.tracking.workspace import save

    waiting = len(unsynced(files_folder(store.sweep(sweep), place)))
    if waiting:
        print(f"{waiting:,} runs are logged offline: `sae-sweep sync {sweep}` pushes them", file=sys.stderr)
    saved = save(store.sweep(sweep).absolute() / "wandb", sweep, table, info, place)
    for name, url in saved.items():
        print(f"{name}: {url}")


@dataclasses.dataclass(frozen=True)
class Order:
    """The latents of an SAE by a column, and whether all that live are listed."""

    sort: str | None = None
    whole: bool = False


def inspect(point: str, latent: int | None, order: Order, json: bool, output_dir: Path) -> None:
    """Show the latents of a trained SAE, or the card of one of them."""
    from sae_sweep.api import load_trained
    from sae_sweep.reports import latents

    sae = load_trained(point, output_dir)
    width = len(sae.latents)
    if latent is not None and not 0 <= latent < width:
        raise UserError(f"--latent {latent}: {sae.id} has latents 0 to {width - 1}")
    console = layout.console(sys.stdout)
    if latent is None:
        from sae_sweep.reports.selection import ordered

        rows = ordered(sae.latents, order.sort)
        if json:
            rows = json_module.loads(rows.to_json(orient="records", double_precision=15))
            print(json_module.dumps({"schema": 1, "point": sae.id, "metrics": sae.metrics, "latents": rows}))
        else:
            layout.write(
                console, latents.overview(sae.point, sae.metrics, rows, console.width, order.sort is None, order.whole)
            )
        return
    from sae_sweep.reports.latent_dashboard import DashboardBuilder

    found = DashboardBuilder(Store(output_dir)).build(sae.id)
    if json:
        row = json_module.loads(sae.latents.iloc[[latent]].to_json(orient="records", double_precision=15))[0]
        tables = (None if each is None else each[each["latent"] == latent] for each in (found.cells, found.features))
        cells, features = (None if each is None else each.drop(columns="latent").to_dict("records") for each in tables)
        logits = None if found.logits is None else found.logits[latent].tolist()
        card = {**row, "cells": cells, "features": features, "logits": logits}
        print(json_module.dumps({"schema": 1, "point": sae.id, **card}))
    else:
        layout.write(console, latents.latent_dashboard(found, latent, console.width))


def end_of_run(store: Store, name: str, both: tuple[pd.DataFrame, pd.DataFrame], full: bool, new: bool) -> None:
    """What a run says when it ends, from the sweep's two tables; writes the page if there is something new in it.

    The page is no part of the results: where it cannot be written, that is a warning.
    """
    from sae_sweep.store import results as frame

    info, (results, untrained) = frame.sweep_info(store, name), both
    verdicts = verdicts_of(info, results, untrained)
    if new or not (store.sweep(name) / "report.html").exists():
        from sae_sweep.reports import report as files

        material = files.gather(store, [name], info, both, verdicts)
        try:
            files.write(store, material, None, files.choose_few(results), images=False)
        except (OSError, EnvironmentProblem) as error:
            print(f"warning: no report page: {error}", file=sys.stderr)
    else:
        from sae_sweep.reports.material import Finished, Material

        material = Material(info, Finished(results, untrained), verdicts, store.failures(name))
    _show(material, store.sweep(name), full)


def _show(material: Material, directory: Path | None, full: bool) -> None:
    from sae_sweep.reports import terminal

    console = layout.console(sys.stdout)
    (terminal.show_all if full else terminal.show)(console, material, directory)


def verdicts_of(info: Mapping[str, Any], results: pd.DataFrame, untrained: pd.DataFrame) -> list[Any]:
    from sae_sweep.reports.claims import evaluate_all

    return evaluate_all(info, results, untrained)


def warn_of_damage(store: Store) -> None:
    for line in store.damaged:
        print(f"warning: {line}", file=sys.stderr)
