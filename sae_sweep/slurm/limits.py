"""How many jobs Slurm takes at once. It is asked: it knows each limit there is, and what already counts towards it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from sae_sweep.errors import EnvironmentProblem

# Slurm's own default, for where the cluster does not say.
ARRAY_SIZE = 1001


@dataclass(frozen=True)
class Room:
    """How many jobs Slurm takes now of those asked for, and what it says against more."""

    jobs: int
    reason: str = ""


def room(script: Callable[[int], str], jobs: int) -> Room:
    """For an array of `jobs` jobs; `script` gives the sbatch file for so many. EnvironmentProblem: Slurm is not there.

    `sbatch --test-only` applies the limits of user, account, QOS and partition to the whole array, with the jobs that
    are queued already, and MaxJobCount.
    """
    reason = _refusal(script(1))
    if reason:
        return Room(0, reason)
    reason = _refusal(script(jobs)) if jobs > 1 else ""
    if not reason:
        return Room(jobs)
    taken, refused = 1, jobs
    while refused - taken > 1:
        middle = (taken + refused) // 2
        if _refusal(script(middle)):
            refused = middle
        else:
            taken = middle
    return Room(taken, reason)


def array_size() -> int:
    """The largest number of jobs in one array."""
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown, re.MULTILINE)
    return max(1, int(found[1]) if found else ARRAY_SIZE)


def said(error: object) -> str:
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
    return said(asked.stderr) if asked.returncode else ""
