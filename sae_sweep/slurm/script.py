"""The file that sbatch is given, made by submitit from the launcher's settings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from submitit import SlurmExecutor

from sae_sweep.config.grid import Sweep
from sae_sweep.config.launcher import Launcher
from sae_sweep.slurm import task as node

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


def executor(sweep: Sweep, job_name: str, folder: Path) -> Executor:
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
        setup=[STAY, *launcher.setup],
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
