"""Push what was logged offline, on nodes without a network, from a machine that has one: W&B's own `wandb sync`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sae_sweep.errors import EnvironmentProblem

# Runs in one call of `wandb sync`, which takes some seconds to start.
AT_ONCE = 200


def unsynced(folder: Path) -> list[Path]:
    """The offline runs of a sweep's `wandb` folder that no server has yet. W&B itself marks those that one has."""
    logs = [next(iter(run.glob("run-*.wandb")), None) for run in sorted(folder.glob("offline-run-*"))]
    return [log.parent for log in logs if log is not None and not log.with_name(f"{log.name}.synced").exists()]


def push(folder: Path, say: Callable[[str], None]) -> int:
    """Push every run that no server has yet, files and tables included; returns how many.

    Called again, after a failure or not, it goes on with what is left. EnvironmentProblem: no key, or no server.
    """
    waiting = unsynced(folder)
    for first in range(0, len(waiting), AT_ONCE):
        some = waiting[first : first + AT_ONCE]
        command = [sys.executable, "-m", "wandb", "sync", "--no-include-synced", *map(str, some)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        left = len(unsynced(folder))
        if done.returncode or left > len(waiting) - first - len(some):
            raise EnvironmentProblem(
                f"W&B took {len(waiting) - left} of {len(waiting)} runs, then: {_reason(done)}; sync again for the rest"
            )
        say(f"{first + len(some):,} of {len(waiting):,} runs pushed")
    return len(waiting)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.removeprefix("wandb: ").strip() for line in (done.stderr + done.stdout).splitlines()]
    telling = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
    return " ".join((telling or ["no reason given"])[-1].split())[:300]
