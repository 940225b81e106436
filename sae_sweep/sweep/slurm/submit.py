"""Tasks to job arrays, through submitit. What lies where:

    <sweep>/jobs/<submission>.json   which points each task holds, and the ids that Slurm gave
    <sweep>/jobs/<submission>/       of the user alone (mode 0700): the tasks' files, logs, and submitit's pickles

A submission has a folder of its own, since submitit would run the pickle that an earlier job of the same id left
there. The pickles hold the path of a task's file and nothing else; we never load one.
"""

from __future__ import annotations

import getpass
import json
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from sae_sweep.errors import EnvironmentProblem
from sae_sweep.store import Store
from sae_sweep.sweep.grid import Sweep
from sae_sweep.sweep.slurm import task as node
from sae_sweep.sweep.slurm.launcher import Launcher
from sae_sweep.sweep.slurm.tasks import Task, to_json

# Slurm's own default, for where the cluster does not say.
ARRAY_SIZE = 1001
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


@dataclass(frozen=True)
class Submission:
    """One call of `submit`: its tasks (ids of points, seconds) and its arrays (job id, number of tasks), in order."""

    id: str
    user: str
    created: float
    job_name: str
    tasks: list[dict[str, Any]]
    arrays: list[dict[str, Any]] = field(default_factory=list)

    def job_of(self, task: int) -> str | None:
        """The id of a task's job as Slurm writes it, or None if it was never accepted."""
        first = 0
        for array in self.arrays:
            if task < first + array["count"]:
                return str(array["job"]) if array["count"] == 1 else f"{array['job']}_{task - first}"
            first += array["count"]
        return None


def submit(sweep: Sweep, tasks: Sequence[Task], store: Store, fail_fast: bool) -> Submission:
    """Write the tasks and submit them as arrays. EnvironmentProblem in one line if Slurm refuses."""
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder = store.sweep(sweep.name).absolute() / "jobs" / id
    listed = [{"points": [point.id for point in task.points], "seconds": task.seconds} for task in tasks]
    submission = Submission(id, getpass.getuser(), time.time(), f"{sweep.name}.{id}", listed)
    executor = _executor(sweep, submission.job_name, folder)
    test(executor)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {folder}: {error.strerror}") from error
    paths = []
    for number, task in enumerate(tasks):
        paths.append(folder / f"task-{number}.json")
        paths[-1].write_text(json.dumps(_content(sweep, task, submission.job_name, fail_fast)) + "\n")
    most = array_size()
    for first in range(0, len(paths), most):
        array = paths[first : first + most]
        # Written before as well: whatever happens next, no job is unknown by name.
        _write(store, sweep.name, submission)
        try:
            jobs = executor.map_array(node.main, [str(path) for path in array])
        except Exception as error:
            sent = f"; {first} of {len(paths)} tasks are submitted: submit again for the rest" if first else ""
            raise EnvironmentProblem(f"Slurm refused: {_reason(error)}{sent}") from error
        submission.arrays.append({"job": jobs[0].job_id.partition("_")[0], "count": len(array)})
        _write(store, sweep.name, submission)
    return submission


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
    """The file that sbatch is given for an array of so many tasks, or the first one if they take several."""
    executor = _executor(sweep, f"{sweep.name}.<submission>", Path("<jobs>"))
    if tasks > 1:
        executor.parameters["map_count"] = min(tasks, array_size())
    return _script(executor)


def _script(executor: _Executor) -> str:
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def test(executor: _Executor) -> None:
    """Ask Slurm whether it would take such a job: it knows the partitions, accounts and limits."""
    command = ["sbatch", "--test-only"]
    try:
        asked = subprocess.run(command, input=_script(executor), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"Slurm cannot be asked here: {error} (sae-sweep doctor says more)") from error
    if asked.returncode:
        raise EnvironmentProblem(f"Slurm would refuse such a job: {_reason(asked.stderr)}")


def array_size() -> int:
    """The largest number of tasks in one array."""
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(1, int(found[1]) if found else ARRAY_SIZE)


class _Executor(SlurmExecutor):
    """submitit's, also where there is no Slurm: a script can be shown anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _executor(sweep: Sweep, job_name: str, folder: Path) -> _Executor:
    launcher = Launcher.of(sweep.launcher)
    python = [sys.executable]
    if launcher.container:
        python = ["apptainer", "exec", *(["--nv"] if launcher.gpus else []), launcher.container, "python"]
    executor = _Executor(folder, python=shlex.join([*GUARD, *python]))
    named = {key: getattr(launcher, key) for key in ("partition", "account", "qos", "constraint")}
    executor.update_parameters(
        **{key: value for key, value in named.items() if value is not None},
        **({"gpus_per_node": launcher.gpus} if launcher.gpus else {}),
        job_name=job_name,
        time=launcher.time,
        cpus_per_task=launcher.cpus,
        signal_delay_s=launcher.signal_seconds,
        array_parallelism=launcher.parallelism,
        setup=[STAY, *launcher.setup],
        teardown=[AFTER],
        # Since 22.05 srun no longer takes over what sbatch was given.
        srun_args=[f"--cpus-per-task={launcher.cpus}"],
        additional_parameters={"mem": launcher.memory, "requeue": True, **launcher.additional},
    )
    return executor


def _content(sweep: Sweep, task: Task, job_name: str, fail_fast: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "sweep": sweep.name,
        "job_name": job_name,
        "output_dir": str(sweep.output_dir.absolute()),
        "device": sweep.device,
        "evaluation": asdict(sweep.evaluation),
        "logger": sweep.logger,
        "checkpoint_seconds": sweep.launcher["checkpoint_seconds"],
        "fail_fast": fail_fast,
        "points": to_json(task.points),
    }


def _write(store: Store, sweep: str, submission: Submission) -> None:
    content = json.dumps(asdict(submission)) + "\n"
    store.write_sweep_file(sweep, f"jobs/{submission.id}.json", content.encode())


def _reason(error: object) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines)[:300] or "no reason given"
