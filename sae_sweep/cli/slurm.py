"""What the commands about a cluster do: submit, status, cancel, logs; and `run launcher=slurm`, which waits."""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sae_sweep import running
from sae_sweep.cli import run as commands
from sae_sweep.cli import show
from sae_sweep.config import overrides as config
from sae_sweep.config.grid import Sweep
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.signals import Interrupted
from sae_sweep.store.store import NotThere, Store, StoreDamaged

if TYPE_CHECKING:
    from sae_sweep.slurm.status import Status
    from sae_sweep.slurm.submit import Prepared
    from sae_sweep.slurm.tasks import Task

SLURM = ["launcher=slurm"]
# Seconds between two questions to the queue and the store.
INTERVAL = 10.0


@dataclasses.dataclass(frozen=True)
class Sent:
    """What was submitted: tasks in jobs; `held` are the tasks that Slurm does not take now, and why."""

    tasks: list[Task] = dataclasses.field(default_factory=list)
    jobs: list[str] = dataclasses.field(default_factory=list)
    held: list[Task] = dataclasses.field(default_factory=list)
    reason: str = ""


def submit(overrides: Sequence[str], dry_run: bool, fail_fast: bool, yes: bool, json: bool) -> int:
    """Plan, cut into tasks, submit what is missing and not on its way. Returns the exit code."""
    from sae_sweep.cli.slurm_status import submitted
    from sae_sweep.slurm.submit import prepare

    asked = config.load(overrides, SLURM, yes=yes)
    if asked.launcher["name"] != "slurm":
        raise UserError(f"submit sends to Slurm: launcher={asked.launcher['name']} is for `sae-sweep run`")
    prepared = prepare(_with_coefficients(asked, dry_run))
    if dry_run:
        _show_dry_run(prepared, json)
        return commands.OK
    sent = _send(prepared, fail_fast)
    name, plan = prepared.sweep.name, prepared.plan
    if json:
        head = {"schema": 1, "sweep": name, "points": len(plan.points), "finished": len(plan.finished)}
        counts = {"tasks": len(sent.tasks), "held": len(sent.held), "jobs": sent.jobs}
        print(json_module.dumps(head | counts | {"directory": str(prepared.store.sweep(name))}))
    elif sent.tasks:
        shown = submitted(name, sent.tasks, sent.jobs, prepared.launcher.parallelism)
        layout.write(layout.console(sys.stdout), shown)
    elif not sent.held:
        print(f"{name}: nothing to submit: all points are finished or on their way")
    _say_held(sent, "submit again when some are over")
    return commands.OK


def _with_coefficients(sweep: Sweep, dry_run: bool) -> Sweep:
    """The sweep with the coefficients that grid.calibrate chooses: by trial, here, before anything is sent."""
    if sweep.calibration is None:
        return sweep
    from sae_sweep.sweep.attainable import check_attainable
    from sae_sweep.sweep.run import check_files

    config.check_writable(sweep.output_dir)
    check_files(sweep)
    check_attainable(sweep)
    store = Store(sweep.output_dir)
    if not dry_run:
        # Trials take what this machine has, whatever the nodes have.
        chosen = running.calibrated(dataclasses.replace(sweep, device="auto"), store)
        return dataclasses.replace(chosen, device=sweep.device)
    sweep = running.known(sweep, store)
    if sweep.calibration is not None and sweep.calibration.rungs:
        print(sweep.calibration.sentence.replace("the run", "submit, on this machine"), file=sys.stderr)
    return sweep


def run(sweep: Sweep, fail_fast: bool, output: commands.Output, dry_run: bool) -> int:
    """`run launcher=slurm`: submit, wait for the end, report as a local run does. Ctrl-C leaves the jobs at work."""
    from sae_sweep.slurm.submit import prepare

    prepared = prepare(_with_coefficients(sweep, dry_run))
    if dry_run:
        _show_dry_run(prepared, output.json)
        return commands.OK
    store, name, skipped = prepared.store, sweep.name, len(prepared.plan.finished)
    end = _send_and_watch(prepared, fail_fast)
    both = commands.finish(store, name, sweep.logger)
    failed, lost = end.count("failed"), end.count("lost")
    if output.json:
        counts = {"ran": end.finished - skipped, "skipped": skipped, "failed": failed, "lost": lost}
        head = {"schema": 1, "sweep": name, "points": end.points, **counts}
        print(json_module.dumps(head | {"directory": str(store.sweep(name))}))
    else:
        show.end_of_run(store, name, both, output.full, new=end.finished > skipped)
    if lost:
        raise EnvironmentProblem(f"{lost} of {end.points} points are lost with their jobs; run again to submit them")
    return commands.FAILED_POINTS if failed else commands.OK


def status(sweep: str | None, watch: bool, json: bool, output_dir: Path) -> None:
    """How far a sweep is, or all of them."""
    from sae_sweep.cli import slurm_status
    from sae_sweep.slurm.status import status as status_of

    store = Store(output_dir)
    if sweep is None and watch:
        raise UserError("status --watch needs the name of a sweep")
    if sweep is None:
        found = []
        for name in store.sweeps():
            with suppress(StoreDamaged, NotThere):  # the others are there all the same
                found.append(status_of(store, name))
        show.warn_of_damage(store)
        if json:
            print(json_module.dumps([each.to_json() for each in found]))
        elif found:
            layout.write(layout.console(sys.stdout), slurm_status.all_sweeps(found))
        else:
            print(f"no sweep in {output_dir}")
    elif watch:
        with suppress(Interrupted):  # whoever looked has seen enough
            _watch_on_screen(store, sweep, json)
    elif json:
        print(json_module.dumps(status_of(store, sweep).to_json()))
    else:
        console = layout.console(sys.stdout)
        layout.write(console, slurm_status.overview(status_of(store, sweep), console.width))


def cancel(sweep: str, output_dir: Path) -> None:
    """Cancel every job of a sweep that is queued or running."""
    from sae_sweep.slurm import queue
    from sae_sweep.slurm.status import LIVE, tasks_of
    from sae_sweep.store.results import sweep_info

    store = Store(output_dir)
    sweep_info(store, sweep)
    live = {task.job: None for task in tasks_of(store, sweep, set()) if task.state.phase in LIVE}
    problem = queue.cancel(live)
    if problem:
        raise EnvironmentProblem(f"not everything was cancelled: {problem}")
    print(f"{sweep}: cancelled {layout.plural(len(live), 'job')}" if live else f"{sweep}: no job is queued or running")


def logs(sweep: str, point: str | None, output_dir: Path) -> None:
    """Print what the tasks of a sweep wrote: the last one to hold the point, or every task."""
    from sae_sweep.cli.slurm_status import log_heading
    from sae_sweep.slurm.status import tasks_of
    from sae_sweep.store.results import sweep_info

    store = Store(output_dir)
    sweep_info(store, sweep)
    tasks = [task for task in tasks_of(store, sweep, set()) if point is None or task.holds(point)]
    if not tasks:
        what = "no task of it was submitted" if point is None else f"no task holds a point {point}"
        raise UserError(f"{sweep}: {what}")
    console = layout.console(sys.stdout)
    for task in tasks if point is None else tasks[-1:]:
        folder = store.sweep(sweep) / "jobs" / task.submission.id
        layout.write(console, log_heading(task, folder))
        rank = task.number % task.submission.per_job
        paths = sorted(folder.glob(f"{task.job}_{rank}_log.*"))
        for path in paths:
            with path.open(errors="replace") as lines:
                sys.stdout.writelines(line for line in lines if not line.startswith("submitit INFO"))
        if not paths:
            print("(nothing yet)" if os.access(folder, os.R_OK) else f"(only {task.submission.user} may read it)")


def sync(sweep: str, json: bool, output_dir: Path) -> None:
    """Push to W&B what was logged offline; log first what was finished but never logged."""
    from sae_sweep.config.logger import Logger
    from sae_sweep.store.results import sweep_info
    from sae_sweep.tracking import logging

    store = Store(output_dir)
    logger = sweep_info(store, sweep).get("logger") or {}
    if logger.get("name") != "wandb":
        raise UserError(f"{sweep} was run with logger=none: run it again with logger=wandb to log its points")
    complete = commands.log_rest(store, sweep, {**logger, "mode": "offline"})
    folder = logging.files_folder(store.sweep(sweep), Logger.of(logger))
    pushed = logging.push(folder, lambda line: print(line, file=sys.stderr))
    if not complete:
        raise EnvironmentProblem(f"pushed {pushed:,} runs, but not every point could be logged first: sync again")
    if json:
        print(json_module.dumps({"schema": 1, "sweep": sweep, "pushed": pushed}))
    else:
        print(f"{sweep}: pushed {pushed:,} runs" if pushed else f"{sweep}: everything is pushed")


def doctor(json: bool, output_dir: Path) -> None:
    """What works here, and what to do about the rest."""
    from sae_sweep.cli.doctor import examine

    findings = examine(output_dir)
    if json:
        print(json_module.dumps({"schema": 1, "findings": [dataclasses.asdict(each) for each in findings]}))
        return
    from sae_sweep.cli.slurm_status import checkup

    layout.write(layout.console(sys.stdout), checkup(findings))


def _send_and_watch(prepared: Prepared, fail_fast: bool) -> Status:
    """Submit and wait for the end; what Slurm did not take at first is sent when the rest is over."""
    store, name = prepared.store, prepared.sweep.name
    try:
        while True:
            sent = _send(prepared, fail_fast)
            _say_held(sent, "they follow when these are over")
            end = _watch(store, name, _Lines(sys.stderr))
            if not sent.held or end.lost_tasks or (fail_fast and end.failures):
                return end
            prepared = dataclasses.replace(prepared, tasks=sent.held)
    except Interrupted:
        print(f"the jobs go on; `sae-sweep cancel {name}` stops them", file=sys.stderr, flush=True)
        raise


def _send(prepared: Prepared, fail_fast: bool) -> Sent:
    """Freeze the grid and submit the tasks, or as many of them as Slurm takes."""
    from sae_sweep.slurm import submit as slurm
    from sae_sweep.sweep import run as runner

    store, name, tasks = prepared.store, prepared.sweep.name, prepared.tasks
    if tasks:
        tasks = prepared.fitted(slurm.capacity(prepared.sweep, len(tasks)))
    runner.freeze(prepared.sweep, store)
    if not tasks:
        return Sent()
    for id in store.failures(name).keys() & {point.id for task in tasks for point in task.points}:
        store.clear_failure(name, id)
    submission, reason = slurm.submit(prepared.sweep, tasks, store, fail_fast)
    jobs = [str(array["job"]) for array in submission.arrays]
    return Sent(tasks[: submission.sent], jobs, tasks[submission.sent :], reason)


def _say_held(sent: Sent, then: str) -> None:
    if sent.held:
        total = len(sent.tasks) + len(sent.held)
        line = f"{len(sent.held):,} of {total:,} tasks are held back: Slurm takes no more now ({sent.reason}); {then}"
        print(line, file=sys.stderr, flush=True)


def _watch(store: Store, sweep: str, display: Callable[[Status], None]) -> Status:
    """Ask again and again until nothing is queued or running, here or in a job."""
    from sae_sweep.slurm.status import status as status_of
    from sae_sweep.sweep import heartbeat

    seen: set[str] = set()
    while True:
        now = status_of(store, sweep, seen)
        display(now)
        if not (now.live or now.runs):
            return now
        time.sleep(heartbeat.EVERY if now.runs else INTERVAL)


def _watch_on_screen(store: Store, sweep: str, json: bool) -> None:
    """Drawn anew at each look on a terminal; elsewhere a line, or a JSON object, when there is news."""
    from rich.live import Live

    from sae_sweep.cli.slurm_status import overview

    if json:
        _watch(store, sweep, lambda now: print(json_module.dumps(now.to_json()), flush=True))
        return
    console = layout.console(sys.stdout)
    if not console.is_terminal:
        _watch(store, sweep, _Lines(sys.stdout))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        _watch(store, sweep, lambda now: live.update(overview(now, console.width, clock=True), refresh=True))


class _Lines:
    """Says how far a sweep is, when that has changed, and what failed or was lost as soon as it is known."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said: set[str] = set()
        self._line = ""

    def __call__(self, now: Status) -> None:
        from sae_sweep.cli import slurm_status

        failed = {id: info for id, info in now.failures.items() if id not in self._said}
        lost = [task for task in now.lost_tasks if task.path not in self._said]
        self._said |= {*failed, *(task.path for task in lost)}
        line = slurm_status.sentence(now)
        lines = [text.plain for text in (*slurm_status.failures(failed), *slurm_status.losses(lost))]
        if line != self._line:
            self._line = line
            lines.append(line)
        for each in lines:
            print(each, file=self._stream, flush=True)


def _show_dry_run(prepared: Prepared, json: bool) -> None:
    """The script, and the packs of each task."""
    from sae_sweep.cli.slurm_status import tasks_table
    from sae_sweep.slurm.submit import script

    sweep, plan, tasks = prepared.sweep, prepared.plan, prepared.tasks
    text = script(sweep, len(tasks)) if tasks else ""
    if json:
        rows = [
            {"points": len(t.points), "packs": [len(p) for p in t.packs], "seconds": round(t.seconds, 1)} for t in tasks
        ]
        head = {"schema": 1, "sweep": sweep.name, "points": len(plan.points), "finished": len(plan.finished)}
        print(json_module.dumps(head | {"tasks": rows, "script": text}))
    elif tasks:
        print(text)
        layout.write(layout.console(sys.stdout), tasks_table(prepared))
    else:
        print(f"{sweep.name}: nothing to submit: all points are finished or on their way")
