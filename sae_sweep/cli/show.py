"""What is said of sweeps that have run: their tables, reports and views, and the latents of an SAE."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.errors import UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from sae_sweep.reports.claims import Verdict


def results(sweep: str, format: str, seeds: str, output_dir: Path) -> None:
    """Print the one table."""
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    table = frame.load(store, sweep)
    warn_of_damage(store)
    if seeds == "mean":
        from sae_sweep.store.seed_agreement import seed_agreement

        # From the weights of every point, so only where it is asked for.
        table["seed_agreement"] = seed_agreement(store, table)
    if seeds != "none":
        table = frame.aggregate(table, seeds)  # type: ignore[arg-type]
    if format == "csv":
        table.to_csv(sys.stdout, index=False)
    elif format == "json":
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        print(json_module.dumps(rows))  # pandas would round to ten digits
    elif format == "parquet":
        sys.stdout.buffer.write(table.to_parquet(index=False))
    else:
        print(table.dropna(axis=1, how="all").to_string(index=False, max_colwidth=20))


def report(
    sweep: str,
    json: bool,
    output_dir: Path,
    output: Path | None = None,
    latents: Sequence[str] = (),
    images: bool = False,
) -> None:
    """Print the report of a sweep from its records; write report.html, and its tables anew.

    With `output` the page goes there, and nothing is written to the store.
    """
    from sae_sweep.reports import report as files
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    both = results, untrained = frame.tables(store, sweep)
    chosen = files.check(results, latents, images)
    verdicts = verdicts_of(frame.sweep_info(store, sweep)["claims"], results, untrained)
    warn_of_damage(store)
    if not json:
        show_report(store, sweep, results, untrained, verdicts)
    look = files.look(store, sweep, results, untrained, verdicts)
    page, notes = files.write(store, look, output, chosen, images)
    if output is None:
        frame.write(store, sweep, both)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if json:
        head = {"schema": 1, "sweep": sweep, "points": len(results), "report": str(page)}
        print(json_module.dumps({**head, "claims": [dataclasses.asdict(verdict) for verdict in verdicts]}))
    else:
        print(f"report: {page}", file=sys.stderr)


def dashboard(sweep: str, json: bool, output_dir: Path) -> None:
    """Save a sweep's views in W&B, or print them."""
    from sae_sweep.store import results as frame

    store = Store(output_dir)
    info, table = frame.sweep_info(store, sweep), frame.load(store, sweep)
    warn_of_damage(store)
    logger = info.get("logger") or {}
    if logger.get("name") != "wandb":
        raise UserError(f"{sweep} was run with logger=none: run it again with logger=wandb to log its points")
    if table.empty:
        raise UserError(f"{sweep} has no finished point yet: there is nothing to look at")
    if json:
        from sae_sweep.tracking.wandb_views import views

        found = views(sweep, table, info["varied"], logger["entity"] or "", logger["project"])
        specs = [{"name": view.name, "spec": view._spec["spec"]} for view in found]
        print(json_module.dumps({"schema": 1, "sweep": sweep, "views": specs}))
        return
    from sae_sweep.tracking.wandb_dashboard import save
    from sae_sweep.tracking.wandb_sync import unsynced

    folder = store.sweep(sweep).absolute() / "wandb"
    waiting = len(unsynced(folder))
    if waiting:
        print(f"{waiting:,} runs are logged offline: `sae-sweep sync {sweep}` pushes them", file=sys.stderr)
    for name, url in save(folder, sweep, table, info["varied"], logger["project"], logger["entity"]).items():
        print(f"{name}: {url}")


def inspect(point: str, latent: int | None, json: bool, output_dir: Path) -> None:
    """Show the latents of a trained SAE, or the card of one of them."""
    from sae_sweep.api import load_sae
    from sae_sweep.reports import latents

    sae = load_sae(point, output_dir)
    width = len(sae.latents)
    if latent is not None and not 0 <= latent < width:
        raise UserError(f"--latent {latent}: {sae.id} has latents 0 to {width - 1}")
    console = layout.console(sys.stdout)
    if latent is None:
        if json:
            rows = json_module.loads(sae.latents.to_json(orient="records", double_precision=15))
            print(json_module.dumps({"schema": 1, "point": sae.id, "metrics": sae.metrics, "latents": rows}))
        else:
            layout.write(console, latents.overview(sae.point, sae.metrics, sae.latents, console.width))
        return
    from sae_sweep.reports.latent_dashboard import Dealer

    cards = Dealer(Store(output_dir)).cards(sae.id)
    if json:
        row = json_module.loads(sae.latents.iloc[[latent]].to_json(orient="records", double_precision=15))[0]
        tables = (None if each is None else each[each["latent"] == latent] for each in (cards.cells, cards.features))
        cells, features = (None if each is None else each.drop(columns="latent").to_dict("records") for each in tables)
        logits = None if cards.logits is None else cards.logits[latent].tolist()
        card = {**row, "cells": cells, "features": features, "logits": logits}
        print(json_module.dumps({"schema": 1, "point": sae.id, **card}))
    else:
        layout.write(console, latents.card(cards, latent, console.width))


def print_report(store: Store, name: str) -> None:
    """The report of a sweep on the terminal, from its records."""
    from sae_sweep.store import results as frame

    show_report(store, name, *frame.tables(store, name))


def show_report(
    store: Store, name: str, results: pd.DataFrame, untrained: pd.DataFrame, verdicts: Sequence[Verdict] | None = None
) -> None:
    """The report of a sweep on the terminal, from its tables, and from its verdicts where they are known."""
    from sae_sweep.reports import terminal
    from sae_sweep.store import results as frame

    info, failures = frame.sweep_info(store, name), store.failures(name)
    if verdicts is None:
        verdicts = verdicts_of(info["claims"], results, untrained)
    console = layout.console(sys.stdout)
    terminal.show(console, results, untrained, info, verdicts, store.sweep(name), failures)


def verdicts_of(claims: list[dict[str, Any]], results: pd.DataFrame, untrained: pd.DataFrame) -> list[Any]:
    from sae_sweep.reports.claims import evaluate_all

    return evaluate_all(claims, results, untrained)


def warn_of_damage(store: Store) -> None:
    for line in store.damaged:
        print(f"warning: {line}", file=sys.stderr)
