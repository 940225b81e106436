"""What each command does, from arguments to what is printed. Data on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import json as json_module
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sae_sweep import config
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.schema import OWN_INPUTS
from sae_sweep.store import NotThere, Store, StoreDamaged
from sae_sweep.sweep.grid import Sweep
from sae_sweep.sweep.keys import show
from sae_sweep.sweep.ladders import coefficients

if TYPE_CHECKING:
    import pandas as pd

    from sae_sweep.reports.claims import Verdict
    from sae_sweep.reports.wandb import WandbLog
    from sae_sweep.sweep.events import Event
    from sae_sweep.sweep.plan import Work
    from sae_sweep.sweep.run import Outcome

OK, FAILED_POINTS = 0, 3


def run(overrides: Sequence[str], shard: str | None, fail_fast: bool, yes: bool, json: bool) -> int:
    """Plan, train what is missing, report. Returns the exit code."""
    sweep = config.load(overrides, yes=yes)
    part = parse_shard(shard)
    if sweep.launcher["name"] == "slurm":
        from sae_sweep import cluster

        if shard is not None:
            raise UserError("--shard is for job arrays of your own: launcher=slurm divides the grid itself")
        return cluster.run(sweep, fail_fast, json, dry_run=False)
    config.check_writable(sweep.output_dir)

    from sae_sweep.sweep import run as runner

    runner.check_weights(sweep)
    store = Store(sweep.output_dir)
    sweep = calibrated(sweep, store)
    outcome, results, untrained = _work(sweep, runner.look(sweep, store, part), store, fail_fast)
    if json:
        print(json_module.dumps(outcome.to_json()))
    else:
        show_report(store, sweep.name, results, untrained)
    return FAILED_POINTS if outcome.failed else OK


def calibrated(sweep: Sweep, store: Store) -> Sweep:
    """The sweep with the coefficients that grid.calibrate chooses, by trial where they are not known; says so."""
    if sweep.calibration is None:
        return sweep
    from sae_sweep.sweep.calibrate import calibrated as choose

    sweep = choose(sweep, store, _trials)
    for line in sweep.calibration.lines.values() if sweep.calibration else ():
        print(line.sentence, file=sys.stderr)
        if line.warning:
            print(f"warning: {line.warning}", file=sys.stderr)
    return sweep


@contextmanager
def _trials(work: Work) -> Iterator[Callable[[Event], None]]:
    """Shows the runs that choose coefficients."""
    from sae_sweep.reports.live import LiveView
    from sae_sweep.sweep.events import Note

    count = layout.plural(sum(map(len, work.plan.packs)), "SAE")
    with LiveView(len(work.plan.points), len(work.plan.finished), work.plan.seconds) as view:
        view.handle(Note(f"choosing coefficients by L0: {count}, about {layout.duration(work.plan.seconds)}"))
        yield view.handle


def _work(sweep: Sweep, work: Work, store: Store, fail_fast: bool) -> tuple[Outcome, pd.DataFrame, pd.DataFrame]:
    """Run with a live view, log to W&B beside it, and write the sweep's tables, which come back too."""
    from sae_sweep.frame import sweep_info
    from sae_sweep.reports.watch import watch
    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.events import Note

    with watch(sweep, work, store) as seen:
        outcome = runner.run(sweep, work, store, seen.handle, fail_fast)
        results, untrained = _write_tables(sweep, work, outcome, store)
        for line in store.damaged:
            seen.handle(Note(line))
        if seen.log is not None:
            _log_the_sweep(seen.log, sweep_info(store, sweep.name), store, results, untrained)
    return outcome, results, untrained


def _write_tables(sweep: Sweep, work: Work, outcome: Outcome, store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a sweep's tables. EnvironmentProblem if they lack points that the run found or made."""
    from sae_sweep import frame

    if sweep.name not in store.sweeps():
        raise EnvironmentProblem(f"{store.sweep(sweep.name)} was deleted while the sweep ran: run it again")
    results, untrained = frame.write(store, sweep.name, frame.tables(store, sweep.name, work.records))
    there = set(results["point_id"])
    lost = outcome.ran + outcome.skipped - sum(point.id in there for point in work.plan.points)
    if lost:
        raise EnvironmentProblem(f"{lost} finished points were deleted or damaged while the sweep ran: run it again")
    return results, untrained


def verify(json: bool, output_dir: Path) -> int:
    """Check all content in a store against its checksums. Returns the exit code: 4 if something was damaged."""
    store = Store(output_dir)
    whole = {kind: len(store.records(kind, sorted(store.ids(kind)), "everything")) for kind in ("toys", "points")}
    whole["measurements"] = sum(len(store.measures(id, "everything")) for id in sorted(store.ids("points")))
    whole["sweeps"] = 0
    for name in store.sweeps():
        with suppress(StoreDamaged, NotThere):
            store.info(name)
            store.read_sweep_file(name, "points.txt")
            whole["sweeps"] += 1
    if json:
        print(json_module.dumps({"schema": 1, **whole, "damaged": store.damaged}))
    else:
        _warn_of_damage(store)
        print("whole: " + ", ".join(f"{count:,} {kind}" for kind, count in whole.items()))
    return EnvironmentProblem.exit_code if store.damaged else OK


def finish(store: Store, name: str, logger: Mapping[str, Any]) -> None:
    """Write a sweep's tables and log what is not logged yet, once others have trained its points."""
    from sae_sweep import frame

    frame.write(store, name)
    _warn_of_damage(store)
    if logger["name"] != "none":
        log_rest(store, name, logger)


def log_rest(store: Store, name: str, logger: Mapping[str, Any]) -> None:
    """Log to W&B those finished points of a sweep that are not logged, and the sweep's own run."""
    from sae_sweep import frame
    from sae_sweep.reports.live import LiveView
    from sae_sweep.reports.watch import open_log

    info = frame.sweep_info(store, name)
    results, untrained = frame.tables(store, name)
    with LiveView(len(results), len(results), 0.0) as view, open_log(store, name, logger, view.handle) as log:
        _log_the_sweep(log, info, store, results, untrained)


def plan(overrides: Sequence[str], shard: str | None, yes: bool, json: bool, dry_run: bool = False) -> None:
    """Say what a run would do. `dry_run`: say it of the cluster, if that is where it would run."""
    sweep = config.load(overrides, yes=yes)
    if dry_run and sweep.launcher["name"] == "slurm":
        from sae_sweep import cluster

        cluster.run(sweep, False, json, dry_run=True)
        return

    from sae_sweep.sweep.plan import plan as make_plan
    from sae_sweep.sweep.run import check_weights

    check_weights(sweep)
    store = Store(sweep.output_dir)
    sweep = known(sweep, store)
    finished, toys = store.ids("points"), store.ids("toys")
    planned = make_plan(sweep, finished, parse_shard(shard), toys)
    unknown = [] if sweep.calibration is None else coefficients(sweep.calibration.rungs)
    if json:
        found = planned.to_json(sweep)
        if sweep.calibration is not None:
            found["calibration"] = sweep.calibration.request | {"known": not unknown}
        print(json_module.dumps(found))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, values in config.axes_of(sweep):
        shown = values if key != "penalty.coefficient" else [value for value in values if value not in unknown]
        table.add_row(key, ", ".join([*map(str, shown), *(["not known yet"] if shown != values else [])]))
    time = layout.duration(planned.seconds)
    table.add_row("points", f"{len(planned.points):,} ({len(planned.finished):,} finished)")
    table.add_row("packs", f"{len(planned.packs):,}")
    table.add_row("estimate", f"{time}, {planned.peak_memory_bytes / 2**30:.1f} GiB at most")
    if sweep.calibration is not None and unknown:
        from sae_sweep.sweep.calibrate import first_runs

        time = layout.duration(make_plan(first_runs(sweep), finished, trained_toys=toys).seconds)
        table.add_row("calibrate", f"{sweep.calibration.sentence}; about {time} for the first")
    layout.write(layout.console(sys.stdout), f"{sweep.name}", table)


def known(sweep: Sweep, store: Store) -> Sweep:
    """The sweep with the coefficients that grid.calibrate chose before; as it is where they are not known yet."""
    if sweep.calibration is None:
        return sweep
    from sae_sweep.sweep.calibrate import calibrated as choose

    return choose(sweep, store, view=None)


def results(sweep: str, format: str, seeds: str, output_dir: Path) -> None:
    """Print the one table."""
    from sae_sweep import frame

    store = Store(output_dir)
    table = frame.load(store, sweep)
    _warn_of_damage(store)
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
    from sae_sweep import frame
    from sae_sweep.reports import report as files

    store = Store(output_dir)
    both = results, untrained = frame.tables(store, sweep)
    chosen = files.check(results, latents, images)
    verdicts = _verdicts(frame.sweep_info(store, sweep)["claims"], results, untrained)
    _warn_of_damage(store)
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
    from sae_sweep import frame

    store = Store(output_dir)
    info, table = frame.sweep_info(store, sweep), frame.load(store, sweep)
    _warn_of_damage(store)
    logger = info.get("logger") or {}
    if logger.get("name") != "wandb":
        raise UserError(f"{sweep} was run with logger=none: run it again with logger=wandb to log its points")
    if table.empty:
        raise UserError(f"{sweep} has no finished point yet: there is nothing to look at")
    if json:
        from sae_sweep.reports.wandb_views import views

        found = views(sweep, table, info["varied"], logger["entity"] or "", logger["project"])
        specs = [{"name": view.name, "spec": view._spec["spec"]} for view in found]
        print(json_module.dumps({"schema": 1, "sweep": sweep, "views": specs}))
        return
    from sae_sweep.reports.wandb_dashboard import save
    from sae_sweep.reports.wandb_sync import unsynced

    folder = store.sweep(sweep).absolute() / "wandb"
    waiting = len(unsynced(folder))
    if waiting:
        print(f"{waiting:,} runs are logged offline: `sae-sweep sync {sweep}` pushes them", file=sys.stderr)
    for name, url in save(folder, sweep, table, info["varied"], logger["project"], logger["entity"]).items():
        print(f"{name}: {url}")


def inspect(point: str, latent: int | None, json: bool, output_dir: Path) -> None:
    """Show the latents of a trained SAE, or the card of one of them."""
    from sae_sweep.notebook import load_sae
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
    from sae_sweep.reports.cards import Dealer

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


def cells(overrides: Sequence[str], json: bool) -> None:
    """Print the ground truth of a toy."""
    toys = {point.toy for point in config.load(overrides, ["experiment=null"]).points}
    if len(toys) > 1:
        raise UserError(f"cells shows one toy at a time, got {len(toys)}")
    (toy,) = toys
    if toy.name in OWN_INPUTS:
        raise UserError(f"toy={toy.name} has no cells of sequences: they are counted for toy=max_of_k")

    from sae_sweep.schema import PARTITIONS
    from sae_sweep.sweep.grid import count_classes
    from sae_sweep.toys.cells import cells_per_max, count_cells

    per_max = [int(cells_per_max(m, toy.k)) for m in range(toy.d_vocab)]
    partitions = {name: count_classes(name, toy.d_vocab, toy.k) for name in PARTITIONS}
    total = int(count_cells(toy.d_vocab, toy.k))
    if json:
        head = {"schema": 1, "d_vocab": toy.d_vocab, "k": toy.k, "cells": total}
        print(json_module.dumps(head | {"per_max": per_max, "partitions": partitions}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("partition")
    table.add_column("cells", justify="right")
    table.add_column("tells apart")
    spelled = {"m": "maximum", "q": "query", "n": "runner-up", "c": "copies of the maximum"}
    for name, count in partitions.items():
        table.add_row(name, f"{count:,}", ", ".join(spelled[letter] for letter in name))
    sentence = (
        f"max of {toy.k} tokens out of {toy.d_vocab}: {toy.d_vocab**toy.k:,} inputs in {total:,} cells "
        f"(maximum, query, runner-up, copies); from {per_max[0]} for maximum 0 to {per_max[-1]:,} for {toy.d_vocab - 1}"
    )
    layout.write(layout.console(sys.stdout), sentence, table)


def penalties(json: bool) -> None:
    """Print the penalties there are."""
    from sae_sweep.saes.penalties import FORMULAS, spell

    ladders = config.ladders()
    rows = [
        {
            "name": name,
            "formula": formula.formula,
            "slope_at_zero": spell(formula.slope_at_zero),
            "prior": formula.prior,
            "keys": [f"penalty.{key}" for key in formula.keys],
            "ladder": ladders.get(name),
            "source": formula.source,
        }
        for name, formula in FORMULAS.items()
    ]
    _listing(
        rows,
        json,
        "a = activation · decoder norm of a latent; Σ over latents; s = penalty.scale, p = penalty.p, ε = 1/1000",
    )


def architectures(json: bool) -> None:
    """Print the architectures there are."""
    from sae_sweep.saes.architectures import ARCHITECTURES

    rows = [
        {
            "name": name,
            "description": a.description,
            "formula": a.formula,
            "prior": a.prior,
            "keys": list(a.keys),
            "trained_by": a.step,
            "source": a.source,
        }
        for name, a in ARCHITECTURES.items()
    ]
    _listing(rows, json, "all: pre = W_enc·x + b_enc, z by its formula, x̂ = W_dec·z + b_dec")


def parse_shard(shard: str | None) -> tuple[int, int]:
    """`I/N` to (I, N). UserError if it is not that."""
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if match is None:
        raise UserError(f"--shard {show(shard)}: expected I/N, such as 0/4 for the first of four")
    return int(match[1]), int(match[2])


def _warn_of_damage(store: Store) -> None:
    for line in store.damaged:
        print(f"warning: {line}", file=sys.stderr)


def print_report(store: Store, name: str) -> None:
    """The report of a sweep on the terminal, from its records."""
    from sae_sweep import frame

    show_report(store, name, *frame.tables(store, name))


def show_report(
    store: Store, name: str, results: pd.DataFrame, untrained: pd.DataFrame, verdicts: Sequence[Verdict] | None = None
) -> None:
    """The report of a sweep on the terminal, from its tables, and from its verdicts where they are known."""
    from sae_sweep import frame
    from sae_sweep.reports import terminal

    info, failures = frame.sweep_info(store, name), store.failures(name)
    if verdicts is None:
        verdicts = _verdicts(info["claims"], results, untrained)
    console = layout.console(sys.stdout)
    terminal.show(console, results, untrained, info, verdicts, store.sweep(name), failures)


def _verdicts(claims: list[dict[str, Any]], results: pd.DataFrame, untrained: pd.DataFrame) -> list[Any]:
    from sae_sweep.reports.claims import evaluate_all

    return evaluate_all(claims, results, untrained)


def _log_the_sweep(
    log: WandbLog, info: Mapping[str, Any], store: Store, results: pd.DataFrame, untrained: pd.DataFrame
) -> None:
    """Log the points that are finished but were not logged, then the sweep's own run. `info`: its sweep.yaml."""
    from sae_sweep.frame import measured

    wanted = info["measure_id"]
    missing = [id for id in results["point_id"] if not log.logged(id, wanted)]
    for record in measured(store, missing, wanted):
        log.log_point(record)
    verdicts = [dataclasses.asdict(verdict) for verdict in _verdicts(info["claims"], results, untrained)]
    log.log_sweep(results, untrained, verdicts, {"experiment": info["experiment"], "overrides": info["overrides"]})


def _listing(rows: Sequence[Mapping[str, Any]], json: bool, heading: str) -> None:
    """A paragraph per row: its name and what follows from it."""
    if json:
        print(json_module.dumps(rows))
        return
    console = layout.console(sys.stdout)
    parts = [Text(heading)]
    for row in rows:
        name, *rest = row.items()
        parts.append(Text.assemble("\n", (str(name[1]), "bold")))
        for key, value in rest:
            if value not in (None, [], "-"):
                spelled = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                parts.append(Text(f"  {key.replace('_', ' '):<15}{spelled}"))
    layout.write(console, *parts)
