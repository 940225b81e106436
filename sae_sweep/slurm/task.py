"""What a node runs: the points of one task, by the code that runs them on a laptop, on the shared store.

submitit calls `main` with the path of the task's file. It can be called any number of times: what is finished is
skipped, what was begun goes on from its checkpoint. So a job that is to stop exits with INTERRUPTED and its script has
Slurm queue it again (submit.py): there is no state to hand over and no limit to how often.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep import environment, signals
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.signals import Interrupted

if TYPE_CHECKING:
    from sae_sweep.config.settings import Evaluation
    from sae_sweep.store.store import Store
    from sae_sweep.sweep.events import Event
    from sae_sweep.sweep.pack import Machine
    from sae_sweep.sweep.run import Work

# The exit code of the command line for "interrupted, resumable".
INTERRUPTED = 75
# So often a task may be queued again without having got any further, before it gives up.
PATIENCE = 3


def main(paths: list[str]) -> None:
    """Run the task in a file: of several the one of this process, which has a GPU of the job to itself.

    Never returns from an interruption: the process ends with INTERRUPTED.
    """
    place = int(os.environ.get("SLURM_LOCALID", 0)) if len(paths) > 1 else 0
    if place >= len(paths):  # the last job has fewer tasks than GPUs
        return
    path = Path(paths[place])
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if place < len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place]
    signals.note_signals()
    environment.prepare()
    try:
        _run(path)
    except Interrupted as stop:
        print(f"{stop}: what was begun is kept and goes on when the job starts again", file=sys.stderr, flush=True)
        # Not sys.exit: it would wait for worker threads, whose results nobody needs any more.
        os._exit(INTERRUPTED)
    except UserError as problem:
        note(path, state="failed", reason=str(problem))
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(problem.exit_code)
    except Exception:
        note(path, state="failed", reason=traceback.format_exc())
        raise


def known(path: Path) -> dict[str, Any]:
    """What a task has noted of itself; nothing if it never began, or is another user's."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.with_suffix(".state.json").read_bytes()))
    return {}


def note(path: Path, **facts: Any) -> None:
    """What is to be known of a task, beside its file, for `status`: written whole or not at all."""
    place = path.with_suffix(".state.json")
    temporary = place.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known(path) | facts) + "\n")
    temporary.replace(place)


def _run(path: Path) -> None:
    task = json.loads(path.read_bytes())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", "-"))
    job += f"_{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in os.environ else ""
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    starts = int(os.environ.get("SLURM_RESTART_COUNT", 0)) + 1
    facts = {"job": job, "node": node, "pid": os.getpid(), "starts": starts, "cuda_visible_devices": visible}
    note(path, state="running", began=time.time(), reason=None, **facts)
    print(f"job {job} on {node}, start {starts}, CUDA_VISIBLE_DEVICES={visible}", file=sys.stderr, flush=True)
    note(path, state="done", **_work(path, task))


def _work(path: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Train and measure what the store lacks; returns how many points failed, and how the others are measured."""
    from sae_sweep.config.grid import Sweep
    from sae_sweep.config.settings import Evaluation, measure_id
    from sae_sweep.slurm.tasks import from_json
    from sae_sweep.store.store import Store
    from sae_sweep.sweep import run
    from sae_sweep.sweep.local import this_machine
    from sae_sweep.tracking.logging import watch

    points = from_json(task["points"])
    evaluation, place = Evaluation(**task["evaluation"]), Path(task["output_dir"])
    # The task's part of the grid. The sweep's own files were written when it was submitted.
    part = Sweep(task["sweep"], [], None, points, [], evaluation, [], task["logger"], {}, task["device"], place)
    store = Store(place)
    work = run.look(part, store)
    outcome = run.before(part, work, store)
    machine = this_machine(part.device)
    # Where Slurm does not bind a task to its processors, it sees all of the node's.
    threads = min(machine.threads, int(os.environ.get("SLURM_CPUS_PER_TASK", machine.threads)))
    machine = replace(machine, threads=threads, checkpoint_seconds=task["checkpoint_seconds"])
    _check_progress(path, work, store, machine.device)
    with watch(part, work, store) as seen:
        count = run.account(outcome, store, seen.handle, task["fail_fast"])
        try:
            _execute(work, store, part.name, evaluation, machine, count)
        except run.TooManyFailures:
            # The siblings by their common name; a container may lack the command, and then they go on.
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["scancel", f"--name={task['job_name']}"], timeout=60)
    return {"failed": outcome.failed, "measure_id": measure_id(evaluation)}


def _check_progress(path: Path, work: Work, store: Store, device: str) -> None:
    """EnvironmentProblem for a task that was queued again PATIENCE times in a row and never got further by it."""
    from sae_sweep.sweep.checkpoint import steps_kept

    left = [point for pack in work.plan.packs for point in pack]
    reached = {"left": len(left) + len(work.stale), "toys": len(work.toys), "steps": steps_kept(store, left, device)}
    before = known(path)
    idle = before.get("idle", 0) + 1 if before.get("reached") == reached else 0
    note(path, reached=reached, idle=idle)
    if idle >= PATIENCE:
        raise EnvironmentProblem(
            f"stopped {idle} times, each time before it had finished a point or written a checkpoint: submit again "
            "with more launcher.time, or to a partition where it is not preempted at once"
        )


def _execute(
    work: Work, store: Store, sweep: str, evaluation: Evaluation, machine: Machine, say: Callable[[Event], None]
) -> None:
    """Pack by pack, so that one that breaks leaves the others running; its points are noted with the traceback."""
    from sae_sweep.sweep.events import PointFailed
    from sae_sweep.sweep.local import execute
    from sae_sweep.sweep.run import TooManyFailures

    packs = work.plan.packs
    parts = [replace(work, plan=replace(work.plan, packs=[]))]
    parts += [replace(work, plan=replace(work.plan, packs=[pack]), toys=[], stale=[]) for pack in packs]
    for part in parts:
        points = [point for pack in part.plan.packs for point in pack] or part.stale
        try:
            execute(part, store, evaluation, machine, say)
        except (EnvironmentProblem, TooManyFailures):
            raise
        except Exception as error:
            print(trace := traceback.format_exc(), file=sys.stderr, flush=True)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            finished = store.ids("points") if part.plan.packs else set()
            for point in (each for each in points if each.id not in finished):
                try:
                    say(PointFailed(point, None, reason))
                finally:
                    store.fail(sweep, point.id, {"reason": reason, "traceback": trace, "settings": point.to_dict()})
