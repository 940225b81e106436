"""What running, planning and checking do, from arguments to what is printed. Data on stdout, progress on stderr."""

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

from sae_sweep.cli import show
from sae_sweep.config import keys
from sae_sweep.config import overrides as config
from sae_sweep.config.calibration import coefficients
from sae_sweep.config.grid import Sweep
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import NotThere, Store, StoreDamaged

if TYPE_CHECKING:
    import pandas as pd

    from sae_sweep.sweep.events import Event
    from sae_sweep.sweep.plan import Work
    from sae_sweep.sweep.run import Outcome
    from sae_sweep.tracking.logging import WandbLog

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

    runner.check_weights(sweep)
    store = Store(sweep.output_dir)
    sweep = calibrated(sweep, store)
    outcome, results, untrained = _work(sweep, runner.look(sweep, store, part), store, fail_fast)
    if output.json:
        print(json_module.dumps(outcome.to_json()))
    else:
        show.end_of_run(store, sweep.name, (results, untrained), output.full, new=outcome.ran > 0)
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
    from sae_sweep.store.results import sweep_info
    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.events import Note
    from sae_sweep.tracking.logging import watch

    with watch(sweep, work, store) as seen:
        outcome = runner.run(sweep, work, store, seen.handle, fail_fast)
        if seen.log is not None and outcome.ran:
            seen.log.start()  # nothing more is trained that it could slow
        results, untrained = _write_tables(sweep, work, outcome, store)
        for line in store.damaged:
            seen.handle(Note(line))
        if seen.log is not None:
            _log_the_sweep(seen.log, sweep_info(store, sweep.name), store, results, untrained)
    return outcome, results, untrained


def _write_tables(sweep: Sweep, work: Work, outcome: Outcome, store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a sweep's tables. EnvironmentProblem if they lack points that the run found or made."""
    from sae_sweep.store import results as frame

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
        _log_the_sweep(log, info, store, results, untrained)
    return log.complete


def plan(overrides: Sequence[str], shard: str | None, yes: bool, json: bool, dry_run: bool = False) -> None:
    """Say what a run would do. `dry_run`: say it of the cluster, if that is where it would run."""
    sweep = config.load(overrides, yes=yes)
    if dry_run and sweep.launcher["name"] == "slurm":
        from sae_sweep.cli import slurm as cluster

        cluster.run(sweep, False, Output(json), dry_run=True)
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
        table.add_row(key, ", ".join(filter(None, [layout.listed(shown), "not known yet" if shown != values else ""])))
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


def parse_shard(shard: str | None) -> tuple[int, int]:
    """`I/N` to (I, N). UserError if it is not that."""
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, re.ASCII)
    if match is None:
        raise UserError(f"--shard {keys.show(shard)}: expected I/N, such as 0/4 for the first of four")
    return int(match[1]), int(match[2])


def _log_the_sweep(
    log: WandbLog, info: Mapping[str, Any], store: Store, results: pd.DataFrame, untrained: pd.DataFrame
) -> None:
    """Log the points that are finished but were not logged, then the sweep's own run. `info`: its sweep.yaml."""
    from sae_sweep.store.results import measured

    wanted = info["measure_id"]
    missing = [id for id in results["point_id"] if not log.logged(id, wanted)]
    for record in measured(store, missing, wanted):
        log.log_point(record)
    verdicts = [dataclasses.asdict(verdict) for verdict in show.verdicts_of(info["claims"], results, untrained)]
    log.log_sweep(results, untrained, verdicts, {"experiment": info["experiment"], "overrides": info["overrides"]})
