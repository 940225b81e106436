"""How far a sweep is: each point finished, running, pending, failed or lost, from the store and the queue alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_sweep.slurm.queue import JobState, Phase, states
from sae_sweep.slurm.task import known
from sae_sweep.slurm.tasks import Submission, submissions
from sae_sweep.store import results
from sae_sweep.store.store import Store
from sae_sweep.sweep import heartbeat

# What an unfinished point can be.
STATES = ("running", "pending", "failed", "lost")
# What is taken to be left of a task, as a share of the estimate, when its time is up and it is not done.
_OVERDUE = 0.1

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

    @property
    def path(self) -> str:
        """Tells tasks of a sweep apart: the submission and the number in it."""
        return f"{self.submission.id}/task-{self.number}"

    def holds(self, point: str) -> bool:
        """Whether a point is in it; of its id the beginning will do."""
        return any(id.startswith(point) for id in self.submission.tasks[self.number]["points"])


@dataclass
class Status:
    """How far each point of a sweep is. `points` is the sum of the counts; `seconds` is left if all goes on.

    unfinished: id → running, pending, failed or lost; unsent: how many of the pending are in no job
    tasks: those of which points are left; lost_tasks: those of them by whose end points are lost
    unknown: whether Slurm did not answer
    runs: what runs outside of Slurm say that are at work on it
    """

    sweep: str
    points: int = 0
    unfinished: dict[str, str] = field(default_factory=dict)
    unsent: int = 0
    seconds: float = 0.0
    unknown: bool = False
    tasks: list[TaskStatus] = field(default_factory=list)
    lost_tasks: list[TaskStatus] = field(default_factory=list)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[heartbeat.Note] = field(default_factory=list)

    @property
    def finished(self) -> int:
        """Points that are trained and measured."""
        return self.points - len(self.unfinished)

    def count(self, state: str) -> int:
        """Points in a state of `STATES`."""
        return sum(each == state for each in self.unfinished.values())

    @property
    def live(self) -> list[TaskStatus]:
        """Tasks that are queued or running, or may be."""
        return [task for task in self.tasks if task.state.phase in LIVE]

    def to_json(self) -> dict[str, Any]:
        """The report of `sae-sweep status --json`."""
        tasks = [
            {"job": t.job, "state": t.state.word, "node": t.state.node, "points": t.points, "left": t.left}
            for t in self.tasks
        ]
        return {
            "schema": 1,
            "sweep": self.sweep,
            "points": self.points,
            "finished": self.finished,
            **{state: self.count(state) for state in STATES},
            "queue_answers": not self.unknown,
            "seconds_left": round(self.seconds, 1),
            "unsent": self.unsent,
            "tasks": tasks,
            "unfinished": self.unfinished,
            "failures": {id: info.get("reason") for id, info in self.failures.items()},
        }


def status(store: Store, sweep: str, seen: set[str] | None = None) -> Status:
    """Look at the store and ask Slurm. UserError if there is no such sweep.

    seen: what an earlier look found finished; added to, so that no record is read twice
    """
    info = results.sweep_info(store, sweep)
    ids = results.sweep_ids(store, sweep)
    finished = set() if seen is None else seen
    finished |= _said_done(store, sweep, info["measure_id"]).intersection(ids)
    finished |= _finished(store, [id for id in ids if id not in finished], info["measure_id"])
    tasks = tasks_of(store, sweep, finished)
    found = Status(sweep, len(ids), tasks=tasks, unknown=any(t.state.phase is Phase.unknown for t in tasks))
    found.runs = heartbeat.notes(store, sweep)
    training = {point for run in found.runs for point in run.training}
    failures, holders = store.failures(sweep), _holders(tasks)
    lost: set[str] = set()
    for point in (id for id in ids if id not in finished):
        task = holders.get(point)
        # A task that is at work may have said that a point failed; one that still waits has yet to try again.
        if point in failures and not (task and task.state.phase is Phase.pending):
            found.unfinished[point] = "failed"
            found.failures[point] = failures[point]
        elif task is None:
            found.unfinished[point] = "running" if point in training else "pending"
            found.unsent += not found.runs
        elif task.state.phase is Phase.ended:
            found.unfinished[point] = "lost"
            lost.add(task.path)
        else:
            found.unfinished[point] = "pending" if task.state.phase is Phase.pending else "running"
    found.lost_tasks = [task for task in tasks if task.path in lost]
    left = [_seconds_left(task) for task in found.live]
    at_once = max(1, sum(task.state.phase is not Phase.pending for task in found.live))
    here = [run.seconds - (time.time() - run.written) for run in found.runs]
    found.seconds = max(0.0, *left, sum(left) / at_once, *here)
    return found


def _seconds_left(task: TaskStatus) -> float:
    """By the planner's estimate; of what a running task is at, its time so far is off."""
    left = task.seconds * task.left / max(1, task.points)
    if task.state.phase is not Phase.running or "began" not in task.note:
        return left
    spent = time.time() - float(task.note["began"])
    beyond = spent - (task.seconds - left)  # of this start: earlier ones may have finished what is finished
    return min(left, max(left - beyond, _OVERDUE * left))


def _said_done(store: Store, sweep: str, measure_id: str) -> set[str]:
    """Points of tasks that finished all of theirs: a note instead of thousands of records."""
    folder = store.sweep(sweep) / "jobs"
    found: set[str] = set()
    for submission in submissions(store, sweep):
        for number, task in enumerate(submission.tasks):
            note = _note(folder, submission, number)
            if note.get("state") == "done" and not note["failed"] and note.get("measure_id") == measure_id:
                found.update(task["points"])
    return found & store.ids("points")


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
    found = states({row[2] for row in rows}, {row[0].job_name for row in rows})
    folder = store.sweep(sweep) / "jobs"
    return [
        TaskStatus(submission, number, job, found[job], points, left, seconds, _note(folder, submission, number))
        for submission, number, job, points, left, seconds in rows
    ]


def _note(jobs: Path, submission: Submission, number: int) -> dict[str, Any]:
    """What a task has said of itself."""
    return known(jobs / submission.id / f"task-{number}.json")


def _holders(tasks: list[TaskStatus]) -> dict[str, TaskStatus]:
    """Point → its task: of several, one that is alive, or the last."""
    holders: dict[str, TaskStatus] = {}
    for task in tasks:
        for id in task.submission.tasks[task.number]["points"]:
            if id not in holders or holders[id].state.phase not in LIVE:
                holders[id] = task
    return holders
