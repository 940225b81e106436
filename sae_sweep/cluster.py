"""What the commands about a cluster do: submit, status, cancel, logs; and `run launcher=slurm`, which waits."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_sweep import commands, config
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.store import Store
from sae_sweep.sweep.grid import Sweep
from sae_sweep.sweep.slurm.launcher import Launcher

if TYPE_CHECKING:
    from sae_sweep.sweep.plan import Plan
    from sae_sweep.sweep.slurm.status import Status
    from sae_sweep.sweep.slurm.tasks import Task

SLURM = ["launcher=slurm"]
# Seconds between two looks at the queue and the store.
INTERVAL = 10.0
# Tasks that a dry run, and problems that `status`, list one by one.
LISTED = 10
# Lines of a remote traceback that are shown; `logs` has the rest.
TRACE_LINES = 6


def submit(overrides: Sequence[str], dry_run: bool, fail_fast: bool, yes: bool, json: bool) -> int:
    """Plan, cut into tasks, submit what is missing and not on its way. Returns the exit code."""
    asked = config.load(overrides, SLURM, yes=yes)
    if asked.launcher["name"] != "slurm":
        raise UserError(f"submit sends to Slurm: launcher={asked.launcher['name']} is for `sae-sweep run`")
    sweep, store, planned, tasks = _prepare(asked)
    if dry_run:
        _show_dry_run(sweep, planned, tasks, json)
        return commands.OK
    jobs = _send(sweep, store, planned, tasks, fail_fast)
    folder = store.sweep(sweep.name)
    if json:
        head = {"schema": 1, "sweep": sweep.name, "points": len(planned.points), "finished": len(planned.finished)}
        print(json_module.dumps(head | {"tasks": len(tasks), "jobs": jobs, "directory": str(folder)}))
    elif tasks:
        points = sum(len(task.points) for task in tasks)
        print(f"{sweep.name}: {points:,} points in {len(tasks):,} tasks, jobs {', '.join(jobs)}")
        print(f"sae-sweep status {sweep.name} --watch   how far it is")
    else:
        print(f"{sweep.name}: nothing to submit: all points are finished or on their way")
    return commands.OK


def run(sweep: Sweep, fail_fast: bool, json: bool, dry_run: bool) -> int:
    """`run launcher=slurm`: submit, wait for the end, report as a local run does. Ctrl-C leaves the jobs at work."""
    sweep, store, planned, tasks = _prepare(sweep)
    if dry_run:
        _show_dry_run(sweep, planned, tasks, json)
        return commands.OK
    _send(sweep, store, planned, tasks, fail_fast)
    end = _watch(store, sweep.name, _Lines())
    commands.finish(store, sweep.name, sweep.logger)
    if json:
        counts = {"ran": end.finished - len(planned.finished), "skipped": len(planned.finished), "failed": end.failed}
        head = {"schema": 1, "sweep": sweep.name, "points": end.points, **counts, "lost": end.lost}
        print(json_module.dumps(head | {"directory": str(store.sweep(sweep.name))}))
    else:
        commands.print_report(store, sweep.name)
    if end.lost:
        raise EnvironmentProblem(
            f"{end.lost} of {end.points} points are lost with their jobs; run again to submit them"
        )
    return commands.FAILED_POINTS if end.failed else commands.OK


def status(sweep: str | None, watch: bool, json: bool, output_dir: Path) -> None:
    """How far a sweep is, or all of them."""
    from sae_sweep.sweep.slurm.status import status as look

    store = Store(output_dir)
    if sweep is None:
        found = [look(store, name) for name in store.sweeps()]
        if json:
            print(json_module.dumps([each.to_json() for each in found]))
        else:
            layout.write(layout.console(sys.stdout), _counts(found))
        return
    if watch:
        _watch(store, sweep, lambda now: _redraw(now, json))
    elif json:
        print(json_module.dumps(look(store, sweep).to_json()))
    else:
        _show(look(store, sweep))


def cancel(sweep: str, output_dir: Path) -> None:
    """Cancel every job of a sweep that is queued or running."""
    from sae_sweep.frame import sweep_info
    from sae_sweep.sweep.slurm import queue
    from sae_sweep.sweep.slurm.status import LIVE, tasks_of

    store = Store(output_dir)
    sweep_info(store, sweep)
    alive = [task.job for task in tasks_of(store, sweep, set()) if task.state.phase in LIVE]
    problem = queue.cancel(alive)
    if problem:
        raise EnvironmentProblem(f"not everything was cancelled: {problem}")
    print(f"{sweep}: cancelled {len(alive)} jobs" if alive else f"{sweep}: no job is queued or running")


def logs(sweep: str, point: str | None, output_dir: Path) -> None:
    """Print what the tasks of a sweep wrote: the last one to hold the point, or every task."""
    from sae_sweep.frame import sweep_info
    from sae_sweep.sweep.slurm.submit import submissions

    store = Store(output_dir)
    sweep_info(store, sweep)
    wanted = [
        (submission, number)
        for submission in submissions(store, sweep)
        for number, task in enumerate(submission.tasks)
        if point is None or any(id.startswith(point) for id in task["points"])
    ]
    if not wanted:
        what = "no task of it was submitted" if point is None else f"no task holds a point {point}"
        raise UserError(f"{sweep}: {what}")
    for submission, number in wanted if point is None else wanted[-1:]:
        job = submission.job_of(number)
        folder = store.sweep(sweep) / "jobs" / submission.id
        print(f"== job {job}, task {number} of {folder}")
        for path in sorted(folder.glob(f"{job}_0_log.*")):
            sys.stdout.write(path.read_text(errors="replace"))


def sync(sweep: str, json: bool, output_dir: Path) -> None:
    """Push to W&B what was logged offline; log first what was finished but never logged."""
    from sae_sweep.frame import sweep_info
    from sae_sweep.reports import wandb_sync

    store = Store(output_dir)
    logger = sweep_info(store, sweep).get("logger") or {}
    if logger.get("name") != "wandb":
        raise UserError(f"{sweep} was run with logger=none: run it again with logger=wandb to log its points")
    commands.log_rest(store, sweep, {**logger, "mode": "offline"})
    pushed = wandb_sync.push(store.sweep(sweep).absolute() / "wandb", lambda line: print(line, file=sys.stderr))
    if json:
        print(json_module.dumps({"schema": 1, "sweep": sweep, "pushed": pushed}))
    else:
        print(f"{sweep}: pushed {pushed:,} runs" if pushed else f"{sweep}: everything is pushed")


def doctor(json: bool, output_dir: Path) -> None:
    """What works here, and what to do about the rest."""
    from sae_sweep.doctor import examine

    findings = examine(output_dir)
    if json:
        print(json_module.dumps({"schema": 1, "findings": [dataclasses.asdict(each) for each in findings]}))
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for each in findings:
        table.add_row("✓" if each.usable else "✗", each.name, each.found)
        if each.advice:
            table.add_row("", "", each.advice)
    layout.write(layout.console(sys.stdout), table)


def _prepare(sweep: Sweep) -> tuple[Sweep, Store, Plan, list[Task]]:
    """The sweep for the nodes, what there is to do, and the tasks of what is not on its way."""
    from sae_sweep.schema import toy_id
    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.plan import stacks
    from sae_sweep.sweep.slurm.status import live_points
    from sae_sweep.sweep.slurm.tasks import make_tasks

    launcher = Launcher.of(sweep.launcher)
    if sweep.device == "auto":
        # What is here says nothing about the nodes.
        sweep = dataclasses.replace(sweep, device="cuda" if launcher.gpus else "cpu")
    if sweep.device == "cuda" and not launcher.gpus:
        raise UserError("device=cuda needs launcher.gpus=1")
    config.check_writable(sweep.output_dir)
    runner.check_weights(sweep)
    store = Store(sweep.output_dir)
    work = runner.look(sweep, store)
    alive = live_points(store, sweep.name)
    packs = [tuple(point for point in pack if point.id not in alive) for pack in work.plan.packs]
    packs += stacks(point for point in work.stale if point.id not in alive)
    trained = {toy_id(point.toy) for point in sweep.points} - {toy_id(toy) for toy in work.toys}
    target = 60 * launcher.target_minutes
    workers = launcher.cpus if sweep.device == "cpu" else 1
    some = filter(None, packs)
    tasks = make_tasks(some, sweep.evaluation, sweep.device, target, launcher.max_tasks, trained, workers)
    most = max((task.bytes for task in tasks), default=0)
    if sweep.device == "cpu" and most > launcher.megabytes() * 2**20:
        needed = most / 2**30
        raise UserError(f"launcher.memory={launcher.memory} is less than a task needs: {needed:.1f} GiB")
    return sweep, store, work.plan, tasks


def _send(sweep: Sweep, store: Store, planned: Plan, tasks: list[Task], fail_fast: bool) -> list[str]:
    """Freeze the grid and submit the tasks; returns the ids of the arrays."""
    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.slurm.submit import submit as send

    runner.freeze(sweep, store)
    if not tasks:
        return []
    for id in store.failures(sweep.name).keys() & {point.id for task in tasks for point in task.points}:
        store.clear_failure(sweep.name, id)
    return [str(array["job"]) for array in send(sweep, tasks, store, fail_fast).arrays]


def _watch(store: Store, sweep: str, show: Callable[[Status], None]) -> Status:
    """Look again and again until nothing is queued or running."""
    from sae_sweep.sweep.slurm.status import LIVE
    from sae_sweep.sweep.slurm.status import status as look

    known: set[str] = set()
    while True:
        now = look(store, sweep, known)
        show(now)
        if not any(task.state.phase in LIVE for task in now.tasks):
            return now
        time.sleep(INTERVAL)


class _Lines:
    """Says on stderr how far a sweep is, when that has changed, and each failure as soon as it is known."""

    def __init__(self) -> None:
        self._failures: set[str] = set()
        self._line = ""

    def __call__(self, now: Status) -> None:
        for id, info in now.failures.items():
            if id not in self._failures:
                self._failures.add(id)
                print(f"FAILED {id}: {_failure(info)}", file=sys.stderr, flush=True)
        line = _sentence(now)
        if line != self._line:
            self._line = line
            print(line, file=sys.stderr, flush=True)


def _redraw(now: Status, json: bool) -> None:
    if json:
        print(json_module.dumps(now.to_json()), flush=True)
        return
    if sys.stdout.isatty():
        sys.stdout.write("\033[H\033[J")
    _show(now)


def _sentence(now: Status) -> str:
    parts = [f"{now.finished:,} of {now.points:,} finished"]
    parts += [f"{getattr(now, key):,} {key}" for key in ("running", "pending", "failed", "lost") if getattr(now, key)]
    if now.running or now.pending:
        parts.append(f"about {commands.duration(now.seconds)} left")
    if now.unknown:
        parts.append("Slurm does not answer")
    return ", ".join(parts)


def _show(now: Status) -> None:
    """Counts, a line per task that is not over, what failed and what was lost."""
    from sae_sweep.sweep.slurm.queue import Phase

    table = Table(box=None, pad_edge=False)
    for column in ("job", "state", "node", "points", "left", "starts"):
        table.add_column(column, justify="right" if column in ("points", "left", "starts") else "left")
    shown = sorted(now.tasks, key=lambda task: list(Phase).index(task.state.phase) if task.state else 9)
    for task in [each for each in shown if each.state.phase is not Phase.ended][: 2 * LISTED]:
        starts = str(task.note.get("starts", 0))
        table.add_row(task.job, task.state.word.lower(), task.state.node, str(task.points), str(task.left), starts)
    lines = [f"failed {id}: {_failure(info)}" for id, info in list(now.failures.items())[:LISTED]]
    lines += [
        f"lost with job {task.job} ({task.state.word.lower()}): {task.left} points{_why(task.note)}"
        for task in [each for each in now.tasks if each.state.phase is Phase.ended and now.lost][:LISTED]
    ]
    if now.failed or now.lost:
        lines.append("the same command again submits what is missing; `sae-sweep logs` shows what the tasks wrote")
    head = f"{now.sweep}: {_sentence(now)}"
    layout.write(layout.console(sys.stdout), head, *([table] if table.row_count else []), *lines)


def _failure(info: dict[str, Any]) -> str:
    at = f" at step {info['step']}" if info.get("step") is not None else ""
    trace = "".join(f"\n    {line}" for line in str(info.get("traceback", "")).rstrip().splitlines()[-TRACE_LINES:])
    return f"{info.get('reason')}{at}{trace}"


def _why(note: dict[str, Any]) -> str:
    lines = str(note.get("reason") or "").rstrip().splitlines()[-TRACE_LINES:]
    return "".join(f"\n    {line}" for line in lines)


def _counts(found: Sequence[Status]) -> Table:
    table = Table(box=None, pad_edge=False)
    keys = ("points", "finished", "running", "pending", "failed", "lost")
    for column in ("sweep", *keys):
        table.add_column(column, justify="left" if column == "sweep" else "right")
    for each in found:
        table.add_row(each.sweep, *(f"{getattr(each, key):,}" for key in keys))
    return table


def _show_dry_run(sweep: Sweep, planned: Plan, tasks: Sequence[Task], json: bool) -> None:
    """The script, and the packs of each task."""
    from sae_sweep.sweep.slurm.submit import script

    text = script(sweep, len(tasks))
    if json:
        rows = [
            {"points": len(t.points), "packs": [len(p) for p in t.packs], "seconds": round(t.seconds, 1)} for t in tasks
        ]
        head = {"schema": 1, "sweep": sweep.name, "points": len(planned.points), "finished": len(planned.finished)}
        print(json_module.dumps(head | {"tasks": rows, "script": text}))
        return
    print(text)
    table = Table(box=None, pad_edge=False)
    for column in ("task", "points", "packs", "estimate", "memory"):
        table.add_column(column, justify="left" if column == "packs" else "right")
    for number, task in enumerate(tasks[:LISTED]):
        packs = " ".join(f"{len(pack)}×{pack[0].sae.architecture} {pack[0].sae.width}" for pack in task.packs[:4]) + (
            f" … {len(task.packs)} packs" if len(task.packs) > 4 else ""
        )
        time = commands.duration(task.seconds)
        table.add_row(str(number), str(len(task.points)), packs, time, f"{task.bytes / 2**30:.1f} GiB")
    more = [f"… and {len(tasks) - LISTED:,} more tasks"] if len(tasks) > LISTED else []
    points = sum(len(task.points) for task in tasks)
    title = f"# {sweep.name}: {points:,} points to do in {len(tasks):,} tasks"
    layout.write(layout.console(sys.stdout), title, table, *more)
