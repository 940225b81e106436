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
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep import interruption
from sae_sweep.errors import EnvironmentProblem
from sae_sweep.interruption import Interrupted

if TYPE_CHECKING:
    from sae_sweep.schema import Evaluation
    from sae_sweep.store import Store
    from sae_sweep.sweep.events import Event
    from sae_sweep.sweep.pack import Machine
    from sae_sweep.sweep.run import Work

# The exit code of the command line for "interrupted, resumable".
INTERRUPTED = 75


def main(path: str) -> None:
    """Run the task in a file. Never returns from an interruption: the process ends with INTERRUPTED."""
    interruption.note_signals()
    try:
        _run(Path(path))
    except Interrupted as stop:
        print(f"{stop}: what was begun is kept and goes on when the job starts again", file=sys.stderr, flush=True)
        # Not sys.exit: it would wait for worker threads, whose results nobody needs any more.
        os._exit(INTERRUPTED)
    except EnvironmentProblem as problem:
        note(Path(path), state="failed", reason=str(problem))
        print(f"error: {problem}", file=sys.stderr, flush=True)
        os._exit(problem.exit_code)
    except Exception:
        note(Path(path), state="failed", reason=traceback.format_exc())
        raise


def note(path: Path, **facts: Any) -> None:
    """What is to be known of a task, beside its file, for `status`: written whole or not at all."""
    place = path.with_suffix(".state.json")
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(place.read_bytes())
    temporary = place.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(known | facts) + "\n")
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
    failed = _work(task)
    note(path, state="done", failed=failed)


def _work(task: dict[str, Any]) -> int:
    """Train and measure what the store lacks; returns how many points failed."""
    from sae_sweep import commands
    from sae_sweep.reports.live import LiveView
    from sae_sweep.schema import Evaluation
    from sae_sweep.store import Store
    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.events import Note, PointDone
    from sae_sweep.sweep.grid import Sweep
    from sae_sweep.sweep.local import this_machine
    from sae_sweep.sweep.slurm.tasks import from_json

    points = from_json(task["points"])
    evaluation, place = Evaluation(**task["evaluation"]), Path(task["output_dir"])
    # The task's part of the grid. The sweep's own files were written when it was submitted.
    part = Sweep(task["sweep"], [], None, points, [], evaluation, [], task["logger"], {}, task["device"], place)
    store = Store(place)
    work = runner.look(part, store)
    outcome = runner.before(part, work, store)
    machine = replace(this_machine(part.device), checkpoint_seconds=task["checkpoint_seconds"])
    with ExitStack() as stack:
        view = stack.enter_context(LiveView(len(points), outcome.skipped, work.plan.seconds))
        log = commands.wandb_log(part, store, lambda text: view.handle(Note(text)))
        if log is not None:
            stack.enter_context(log)

        def say(event: Event) -> None:
            view.handle(event)
            if log is not None and isinstance(event, PointDone):
                log.log_point(event.record)

        count = runner.account(outcome, store, say, task["fail_fast"])
        try:
            _execute(work, store, part.name, evaluation, machine, count)
        except runner.TooManyFailures:
            # The siblings by their common name; a container may lack the command, and then they go on.
            with suppress(OSError, subprocess.SubprocessError):
                subprocess.run(["scancel", f"--name={task['job_name']}"], timeout=60)
    return outcome.failed


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
                    store.fail(sweep, point.id, {"reason": reason, "traceback": trace, "settings": asdict(point)})
