"""How far a sweep is: each point finished, running, pending, failed or lost, from the store and the queue alone."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from sae_sweep import frame
from sae_sweep.store import Store
from sae_sweep.sweep.slurm.queue import JobState, Phase, states
from sae_sweep.sweep.slurm.submit import Submission, submissions

LIVE = (Phase.pending, Phase.running, Phase.unknown)


@dataclass(frozen=True)
class TaskStatus:
    """A task whose job is not over, or whose job ended before its points were."""

    submission: Submission
    number: int
    job: str
    state: JobState
    points: int
    left: int
    seconds: float
    note: dict[str, Any]


@dataclass
class Status:
    """Counts of the points of a sweep: `points` is their sum. `seconds` is what is left, if what runs goes on."""

    sweep: str
    points: int = 0
    finished: int = 0
    running: int = 0
    pending: int = 0
    failed: int = 0
    lost: int = 0
    seconds: float = 0.0
    unknown: bool = False
    tasks: list[TaskStatus] = field(default_factory=list)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report of `sae-sweep status --json`."""
        counts = ("sweep", "points", "finished", "running", "pending", "failed", "lost")
        tasks = [
            {"job": t.job, "state": t.state.word, "node": t.state.node, "points": t.points, "left": t.left}
            for t in self.tasks
        ]
        return {
            "schema": 1,
            **{key: getattr(self, key) for key in counts},
            "queue_answers": not self.unknown,
            "seconds_left": round(self.seconds, 1),
            "tasks": tasks,
            "failures": {id: info.get("reason") for id, info in self.failures.items()},
        }


def status(store: Store, sweep: str, known: set[str] | None = None) -> Status:
    """Look at the store and ask Slurm. UserError if there is no such sweep.

    known: what an earlier look found finished; added to, so that no record is read twice
    """
    info = frame.sweep_info(store, sweep)
    ids = frame.sweep_ids(store, sweep)
    finished = set() if known is None else known
    finished |= _finished(store, [id for id in ids if id not in finished], info["measure_id"])
    tasks = [task for task in tasks_of(store, sweep, finished) if task.left]
    live = [task for task in tasks if task.state.phase in LIVE]
    found = Status(sweep, len(ids), tasks=tasks, unknown=any(t.state.phase is Phase.unknown for t in tasks))
    failures = store.failures(sweep)
    phases = _phases(tasks)
    counts: Counter[str] = Counter()
    for id in ids:
        if id in finished:
            counts["finished"] += 1
        # A task that is at work may have said that a point failed; one that still waits has yet to try again.
        elif id in failures and phases.get(id) is not Phase.pending:
            counts["failed"] += 1
            found.failures[id] = failures[id]
        elif id in phases:
            counts[
                "lost" if phases[id] is Phase.ended else "pending" if phases[id] is Phase.pending else "running"
            ] += 1
        else:
            counts["pending"] += 1
    for key, count in counts.items():
        setattr(found, key, count)
    workers = max(1, sum(task.state.phase is not Phase.pending for task in live))
    left = [task.seconds * task.left / max(1, task.points) for task in live]
    found.seconds = max(max(left, default=0.0), sum(left) / workers)
    return found


def _finished(store: Store, ids: list[str], measure_id: str) -> set[str]:
    """Those points that are trained and measured as the sweep asks."""
    records = store.records("points", ids)
    return {
        id for id, record in records.items() if record["measure_id"] == measure_id or measure_id in store.measures(id)
    }


def live_points(store: Store, sweep: str) -> set[str]:
    """The points of tasks that are queued or running, or may be."""
    return {
        id
        for task in tasks_of(store, sweep, set())
        if task.state.phase in LIVE
        for id in task.submission.tasks[task.number]["points"]
    }


def tasks_of(store: Store, sweep: str, finished: set[str]) -> list[TaskStatus]:
    """Every task that was ever submitted, oldest first, except those of which nothing is left."""
    rows = []
    for submission in submissions(store, sweep):
        for number, task in enumerate(submission.tasks):
            left = [id for id in task["points"] if id not in finished]
            job = submission.job_of(number)
            if left and job is not None:
                rows.append((submission, number, job, len(task["points"]), len(left), task["seconds"]))
    found = states([row[2] for row in rows], {row[0].job_name for row in rows})
    return [
        TaskStatus(
            submission, number, job, found[job], points, left, seconds, task_note(store, sweep, submission, number)
        )
        for submission, number, job, points, left, seconds in rows
    ]


def task_note(store: Store, sweep: str, submission: Submission, number: int) -> dict[str, Any]:
    """What the task said of itself; nothing if it never began, or is another user's."""
    with suppress(OSError, ValueError):
        path = store.sweep(sweep) / "jobs" / submission.id / f"task-{number}.state.json"
        return dict(json.loads(path.read_bytes()))
    return {}


def _phases(tasks: list[TaskStatus]) -> dict[str, Phase]:
    """Point → where its task is: of several, one that is alive, or the last."""
    phases: dict[str, Phase] = {}
    for task in tasks:
        for id in task.submission.tasks[task.number]["points"]:
            if phases.get(id) not in LIVE:
                phases[id] = task.state.phase
    return phases
