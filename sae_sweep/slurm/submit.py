"""From a sweep to job arrays: what is left of it, how much of that Slurm takes, and the files that sbatch is given.

What lies where, through submitit:

    <sweep>/jobs/<submission>.json   which points each task holds, and the ids that Slurm gave
    <sweep>/jobs/<submission>/       of the user alone (mode 0700): the tasks' files, logs, and submitit's pickles

A submission has a folder of its own, since submitit would run the pickle that an earlier job of the same id left
there. The pickles hold the path of a task's file and nothing else; we never load one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from sae_sweep import environment
from sae_sweep.config import overrides
from sae_sweep.config.grid import Sweep
from sae_sweep.config.launcher import Launcher
from sae_sweep.config.settings import toy_id
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.slurm import task as node
from sae_sweep.slurm.queue import NUMBERS
from sae_sweep.slurm.status import live_points
from sae_sweep.slurm.tasks import Submission, Task, make_tasks, to_json
from sae_sweep.store.store import Store
from sae_sweep.sweep import run as runner
from sae_sweep.sweep.attainable import check_attainable
from sae_sweep.sweep.plan import Pack, Plan, stacks

# A task that was interrupted is queued again: a warning or a preemption finds it running, a time limit is the reason
# given, and what is COMPLETING for no reason was cancelled.
AFTER = f"""\
code=$?
if [ $code -eq {node.INTERRUPTED} ]; then
    scontrol show job "$SLURM_JOB_ID" | grep -Eq "JobState=RUNNING|Reason=TimeLimit" && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code"""

# At a time limit the script is told to stop as well, and must outlive its task to have it queued again.
STAY = "trap : TERM USR2"
# What asks a task to stop would end Python while it starts, and the job with it: until the task listens, nothing does.
GUARD = ["bash", "-c", 'trap "" USR2 TERM; exec "$@"', "guard"]
# Slurm's own default, for where the cluster does not say.
ARRAY_SIZE = 1001


@dataclass(frozen=True)
class Prepared:
    """`sweep` as the nodes will run it, `plan` what is left of it, `packs` what of that is in no live job."""

    sweep: Sweep
    store: Store
    plan: Plan
    packs: list[Pack]
    trained: set[str]
    launcher: Launcher
    tasks: list[Task]

    def cut(self, most: int) -> list[Task]:
        """The packs as at most so many tasks. UserError where one needs more memory than it is to have."""
        launcher, device = self.launcher, self.sweep.device
        workers = launcher.cpus if device == "cpu" else 1
        target = 60 * launcher.target_minutes
        tasks = make_tasks(self.packs, self.sweep.evaluation, device, target, most, self.trained, workers)
        largest = max((task.bytes for task in tasks), default=0)
        if device == "cpu" and largest > launcher.megabytes() * 2**20:
            needed = largest / 2**30
            raise UserError(f"launcher.memory={launcher.memory} is less than a task needs: {needed:.1f} GiB")
        return tasks

    def fitted(self, capacity: Capacity) -> list[Task]:
        """The tasks, made longer where Slurm takes fewer than they are; but not longer than a job may run."""
        most = capacity.jobs * self.launcher.per_job
        if most >= len(self.tasks) or not capacity.reason:
            return self.tasks
        longer = self.cut(most)
        fit = all(task.seconds <= 60 * self.launcher.time - self.launcher.signal_seconds for task in longer)
        return longer if fit else self.tasks


def prepare(sweep: Sweep) -> Prepared:
    """Look at the store and the queue; reads nothing but these and writes nothing. UserError: cannot be meant."""
    launcher = Launcher.of(sweep.launcher)
    if sweep.device == "auto":
        # What is here says nothing about the nodes.
        sweep = dataclasses.replace(sweep, device="cuda" if launcher.gpu_count else "cpu")
    if sweep.device == "cuda" and not launcher.gpu_count and "gres" not in launcher.additional:
        raise UserError("device=cuda needs launcher.gpus=1")
    overrides.check_writable(sweep.output_dir)
    place = str(sweep.output_dir.absolute())
    if any(number in place for number in NUMBERS):
        raise UserError(f"output_dir={place} cannot be used on Slurm: {', '.join(NUMBERS)} stand for numbers of jobs")
    runner.check_files(sweep)
    check_attainable(sweep)
    store = Store(sweep.output_dir)
    work = runner.look(sweep, store)
    alive = live_points(store, sweep.name)
    packs = [tuple(point for point in pack if point.id not in alive) for pack in work.plan.packs]
    packs += stacks(point for point in work.stale if point.id not in alive)
    trained = {toy_id(point.toy) for point in sweep.points} - {toy_id(toy) for toy in work.toys}
    found = Prepared(sweep, store, work.plan, [pack for pack in packs if pack], trained, launcher, [])
    return dataclasses.replace(found, tasks=found.cut(launcher.max_tasks))


def capacity(sweep: Sweep, tasks: int) -> Capacity:
    """How many jobs Slurm takes now for so many tasks, as far as one array goes. EnvironmentProblem if none."""
    jobs = min(-(-tasks // Launcher.of(sweep.launcher).per_job), array_size())
    found = _capacity(_executor(sweep, sweep.name, Path("jobs")).script, jobs)
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
    submission = Submission(id, environment.user() or str(os.getuid()), time.time(), name, listed, per_job=per_job)
    paths = _write_tasks(sweep, tasks, folder, name, fail_fast)
    jobs = [paths[first : first + per_job] for first in range(0, len(paths), per_job)]
    made, most, first = _executor(sweep, name, folder), array_size(), 0
    while first < len(jobs):
        free = _capacity(made.script, min(most, len(jobs) - first))
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
            raise EnvironmentProblem(f"Slurm refused: {_reason(error)}{sent}") from error
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


def script(sweep: Sweep, tasks: int) -> str:
    """The file that sbatch is given for so many tasks, or for the first of the arrays that they take."""
    jobs = -(-tasks // Launcher.of(sweep.launcher).per_job)
    return _executor(sweep, f"{sweep.name}.<submission>", Path("<jobs>")).script(min(jobs, array_size()))


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


@dataclass(frozen=True)
class Capacity:
    """How many jobs Slurm takes now of those asked for, and what it says against more."""

    jobs: int
    reason: str = ""


def _capacity(script: Callable[[int], str], jobs: int) -> Capacity:
    """For an array of `jobs` jobs; `script` gives the sbatch file for so many. EnvironmentProblem: Slurm is not there.

    `sbatch --test-only` applies the limits of user, account, QOS and partition to the whole array, with the jobs that
    are queued already, and MaxJobCount.
    """
    reason = _refusal(script(1))
    if reason:
        return Capacity(0, reason)
    reason = _refusal(script(jobs)) if jobs > 1 else ""
    if not reason:
        return Capacity(jobs)
    taken, refused = 1, jobs
    while refused - taken > 1:
        middle = (taken + refused) // 2
        if _refusal(script(middle)):
            refused = middle
        else:
            taken = middle
    return Capacity(taken, reason)


def array_size() -> int:
    """The largest number of jobs in one array."""
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(1, int(found[1]) if found else ARRAY_SIZE)


def _reason(error: object) -> str:
    """What Slurm gives as its reason, in one line."""
    prefix = re.compile(r"^(sbatch: |error: |allocation failure: |Batch job submission failed: )+")
    lines = [prefix.sub("", line) for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines)[:300] or "no reason given"


def _refusal(text: str) -> str:
    """What Slurm has against such a file; nothing if it would take it."""
    try:
        asked = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"Slurm cannot be asked here: {error} (sae-sweep doctor says more)") from error
    return _reason(asked.stderr) if asked.returncode else ""


class Executor(SlurmExecutor):
    """submitit's, also where there is no Slurm: a script can be shown anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int) -> str:
        """The file for an array of so many jobs."""
        self.parameters.pop("map_count", None)
        if jobs > 1:
            self.parameters["map_count"] = jobs
        try:
            return self._make_submission_file_text(self._submitit_command_str, "")
        finally:
            self.parameters.pop("map_count", None)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        """submitit's, with each % of the folder doubled where Slurm would take it for the number of a job."""
        folder = str(self.folder)
        written = re.compile(f"(--(?:output|error)[= ]'?){re.escape(folder)}")
        return written.sub(
            lambda at: at[1] + folder.replace("%", "%%"), super()._make_submission_file_text(command, uid)
        )


def _executor(sweep: Sweep, job_name: str, folder: Path) -> Executor:
    """For the tasks of a sweep. `folder`: where submitit puts its pickles and the logs."""
    launcher = Launcher.of(sweep.launcher)
    python = [sys.executable]
    if launcher.container:
        options = ["--nv"] if launcher.gpu_count else []
        # The container has the home and the working folder of its own accord; the store may lie elsewhere.
        options += ["--bind", str(sweep.output_dir.absolute())]
        python = ["apptainer", "exec", *options, launcher.container, "python"]
    made = Executor(folder, python=shlex.join([*GUARD, *python]))
    named = {key: getattr(launcher, key) for key in ("partition", "account", "qos", "constraint")}
    several = launcher.per_job > 1
    made.update_parameters(
        **{key: value for key, value in named.items() if value is not None},
        **({"gpus_per_node": launcher.gpus} if launcher.gpu_count else {}),
        **({"ntasks_per_node": launcher.per_job} if several else {}),
        job_name=job_name,
        time=launcher.time,
        cpus_per_task=launcher.cpus,
        signal_delay_s=launcher.signal_seconds,
        array_parallelism=max(1, launcher.parallelism // launcher.per_job),
        setup=[STAY, "export PYTHONUTF8=1", *launcher.setup],
        teardown=[AFTER],
        # Since 22.05 srun no longer takes over what sbatch was given. A task leaves those beside it running.
        srun_args=[f"--cpus-per-task={launcher.cpus}", *(["--kill-on-bad-exit=0", "--wait=0"] if several else [])],
        additional_parameters={
            "mem": launcher.job_memory,
            "requeue": True,
            **{key: value for key, value in launcher.additional.items() if value is not False},
        },
    )
    return made
