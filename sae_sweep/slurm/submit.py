"""Tasks to job arrays, through submitit. What lies where:

    <sweep>/jobs/<submission>.json   which points each task holds, and the ids that Slurm gave
    <sweep>/jobs/<submission>/       of the user alone (mode 0700): the tasks' files, logs, and submitit's pickles

A submission has a folder of its own, since submitit would run the pickle that an earlier job of the same id left
there. The pickles hold the path of a task's file and nothing else; we never load one.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_sweep.config.grid import Sweep
from sae_sweep.config.launcher import Launcher
from sae_sweep.errors import EnvironmentProblem
from sae_sweep.slurm import limits
from sae_sweep.slurm import task as node
from sae_sweep.slurm.limits import Room
from sae_sweep.slurm.script import executor
from sae_sweep.slurm.tasks import Task, to_json
from sae_sweep.store.store import Store


@dataclass(frozen=True)
class Submission:
    """One call of `submit`: its tasks (ids of points, seconds) and its arrays (job id, number of jobs), in order.

    per_job: tasks that one job runs side by side.
    """

    id: str
    user: str
    created: float
    job_name: str
    tasks: list[dict[str, Any]]
    arrays: list[dict[str, Any]] = field(default_factory=list)
    per_job: int = 1

    def job_of(self, task: int) -> str | None:
        """The id of a task's job as Slurm writes it, or None if it was never accepted."""
        job, first = task // self.per_job, 0
        for array in self.arrays:
            if job < first + array["count"]:
                return str(array["job"]) if array["count"] == 1 else f"{array['job']}_{job - first}"
            first += array["count"]
        return None

    @property
    def sent(self) -> int:
        """How many of the tasks were accepted."""
        return min(len(self.tasks), self.per_job * sum(array["count"] for array in self.arrays))


def room(sweep: Sweep, tasks: int) -> Room:
    """How many jobs Slurm takes now for so many tasks, as far as one array goes. EnvironmentProblem if none."""
    jobs = min(-(-tasks // Launcher.of(sweep.launcher).per_job), limits.array_size())
    found = limits.room(executor(sweep, sweep.name, Path("jobs")).script, jobs)
    if not found.jobs:
        raise EnvironmentProblem(f"Slurm would refuse such a job: {found.reason}")
    return found


def submit(sweep: Sweep, tasks: Sequence[Task], store: Store, fail_fast: bool) -> tuple[Submission, str]:
    """Write the tasks and submit them as arrays: as many as Slurm takes. Returns also what it says against the rest.

    EnvironmentProblem in one line if it refuses what it said it would take; what was accepted before is at work.
    """
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = store.sweep(sweep.name).absolute() / "jobs" / id
    listed = [{"points": [point.id for point in task.points], "seconds": task.seconds} for task in tasks]
    per_job, name = Launcher.of(sweep.launcher).per_job, f"{sweep.name}.{id}"
    submission = Submission(id, getpass.getuser(), time.time(), name, listed, per_job=per_job)
    paths = _write_tasks(sweep, tasks, folder, name, fail_fast)
    jobs = [paths[first : first + per_job] for first in range(0, len(paths), per_job)]
    made, most, first = executor(sweep, name, folder), limits.array_size(), 0
    while first < len(jobs):
        free = limits.room(made.script, min(most, len(jobs) - first))
        if not free.jobs:
            return submission, free.reason
        array = jobs[first : first + free.jobs]
        # Written before as well: whatever happens next, no job is unknown by name.
        _write(store, sweep.name, submission)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says there comes with the error
                accepted = made.map_array(node.main, array)
        except Exception as error:
            sent = f"; {submission.sent} of {len(tasks)} tasks are at work: submit again for the rest" if first else ""
            raise EnvironmentProblem(f"Slurm refused: {limits.said(error)}{sent}") from error
        submission.arrays.append({"job": accepted[0].job_id.partition("_")[0], "count": len(array)})
        _write(store, sweep.name, submission)
        first += len(array)
        if free.reason:
            return submission, free.reason
    return submission, ""


def _write_tasks(sweep: Sweep, tasks: Sequence[Task], folder: Path, job_name: str, fail_fast: bool) -> list[str]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {folder}: {error.strerror}") from error
    paths = [folder / f"task-{number}.json" for number in range(len(tasks))]
    for path, task in zip(paths, tasks, strict=True):
        path.write_text(json.dumps(_content(sweep, task, job_name, fail_fast)) + "\n")
    return [str(path) for path in paths]


def submissions(store: Store, sweep: str) -> list[Submission]:
    """What was submitted for a sweep, oldest first."""
    found = []
    for path in sorted((store.sweep(sweep) / "jobs").glob("*.json")):
        try:
            found.append(Submission(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError) as error:
            raise EnvironmentProblem(f"{path} cannot be read: {error}") from error
    return found


def script(sweep: Sweep, tasks: int) -> str:
    """The file that sbatch is given for so many tasks, or for the first of the arrays that they take."""
    jobs = -(-tasks // Launcher.of(sweep.launcher).per_job)
    return executor(sweep, f"{sweep.name}.<submission>", Path("<jobs>")).script(min(jobs, limits.array_size()))


def _content(sweep: Sweep, task: Task, job_name: str, fail_fast: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "sweep": sweep.name,
        "job_name": job_name,
        "output_dir": str(sweep.output_dir.absolute()),
        "device": sweep.device,
        "evaluation": sweep.evaluation.to_dict(),
        "logger": sweep.logger,
        "checkpoint_seconds": sweep.launcher["checkpoint_seconds"],
        "fail_fast": fail_fast,
        "points": to_json(task.points),
    }


def _write(store: Store, sweep: str, submission: Submission) -> None:
    content = json.dumps(asdict(submission)) + "\n"
    store.write_sweep_file(sweep, f"jobs/{submission.id}.json", content.encode())
