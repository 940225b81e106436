"""What running, planning and checking do, from arguments to what is printed. Data on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import json as json_module
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_sweep import running
from sae_sweep.cli import show
from sae_sweep.config import keys
from sae_sweep.config import overrides as config
from sae_sweep.config.calibration import coefficients
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import NotThere, Store, StoreDamaged

if TYPE_CHECKING:
    import pandas as pd


OK, FAILED_POINTS = 0, 3


@dataclasses.dataclass(frozen=True)
class Output:
    """What a run prints when it ends: a report, short or full, or one JSON object."""

    json: bool = False
    full: bool = False


def run(overrides: Sequence[str], shard: str | None, fail_fast: bool, yes: bool, output: Output) -> int:
    """Plan, train what is missing, report. Returns the exit code."""
    sweep = config.load(overrides, yes=yes)
    part = parse_shard(shard)
    if sweep.launcher["name"] == "slurm":
        from sae_sweep.cli import slurm as cluster

        if shard is not None:
            raise UserError("--shard is for job arrays of your own: launcher=slurm divides the grid itself")
        return cluster.run(sweep, fail_fast, output, dry_run=False)
    config.check_writable(sweep.output_dir)

    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.attainable import check_attainable

    runner.check_files(sweep)
    check_attainable(sweep)
    store = Store(sweep.output_dir)
    sweep = running.calibrated(sweep, store)
    outcome, results, untrained = running.train(sweep, runner.look(sweep, store, part), store, fail_fast)
    if output.json:
        print(json_module.dumps(outcome.to_json()))
    else:
        show.end_of_run(store, sweep.name, (results, untrained), output.full, new=outcome.ran > 0)
    return FAILED_POINTS if outcome.failed else OK


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
        show.warn_of_damage(store)
        print("whole: " + ", ".join(f"{count:,} {kind}" for kind, count in whole.items()))
    return EnvironmentProblem.exit_code if store.damaged else OK


def finish(store: Store, name: str, logger: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a sweep's tables, and return them, and log what is not logged yet, once others have trained its points."""
    from sae_sweep.store import results as frame

    both = frame.write(store, name)
    show.warn_of_damage(store)
    if logger["name"] != "none":
        log_rest(store, name, logger)
    return both


def log_rest(store: Store, name: str, logger: Mapping[str, Any]) -> bool:
    """Log to W&B those finished points of a sweep that are not logged, and the sweep's own run; whether all are."""
    from sae_sweep.reports.live import LiveView
    from sae_sweep.store import results as frame
    from sae_sweep.tracking.logging import open_log

    info = frame.sweep_info(store, name)
    results, untrained = frame.tables(store, name)
    with LiveView(len(results), len(results), 0.0) as view, open_log(store, name, logger, view.handle) as log:
        running.log_sweep(log, info, store, results, untrained)
    return log.complete


def plan(overrides: Sequence[str], shard: str | None, yes: bool, json: bool, dry_run: bool = False) -> None:
    """Say what a run would do. `dry_run`: say it of the cluster, if that is where it would run."""
    sweep = config.load(overrides, yes=yes)
    if dry_run and sweep.launcher["name"] == "slurm":
        from sae_sweep.cli import slurm as cluster

        cluster.run(sweep, False, Output(json), dry_run=True)
        return

    from sae_sweep.sweep.attainable import check_attainable
    from sae_sweep.sweep.plan import plan as make_plan
    from sae_sweep.sweep.run import check_files

    check_files(sweep)
    check_attainable(sweep)
    store = Store(sweep.output_dir)
    sweep = running.known(sweep, store)
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
        table.add_row(key, ", ".join(filter(None, [layout.listed(shown), "not known yet" if shown != values else ""])))
    time = layout.duration(planned.seconds)
    table.add_row("points", f"{len(planned.points):,} ({len(planned.finished):,} finished)")
    table.add_row("packs", f"{len(planned.packs):,}")
    table.add_row("estimate", f"{time}, {planned.peak_memory_bytes / 2**30:.1f} GiB at most")
    if early := sum(point.training.until == "plateau" for point in planned.points):
        table.add_row("", f"with all steps: {early:,} of the points stop earlier if their loss settles")
    if sweep.calibration is not None and unknown:
        from sae_sweep.sweep.calibrate import first_runs

        time = layout.duration(make_plan(first_runs(sweep), finished, trained_toys=toys).seconds)
        table.add_row("calibrate", f"{sweep.calibration.sentence}; about {time} for the first")
    layout.write(layout.console(sys.stdout), f"{sweep.name}", table)


def parse_shard(shard: str | None) -> tuple[int, int]:
    """`I/N` to (I, N). UserError if it is not that."""
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if match is None:
        raise UserError(f"--shard {keys.show(shard)}: expected I/N, such as 0/4 for the first of four")
    return int(match[1]), int(match[2])
