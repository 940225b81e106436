"""What Slurm says of jobs: squeue first, sacct for those it has forgotten. Only what it says counts as an end."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

# What ends a job for good, by Slurm's names. Every other word is a job that still has something before it.
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}
# What Slurm and submitit replace in a path by the number of a job or task.
NUMBERS = ("%j", "%t", "%A", "%a")
# Ids in one call of a command.
_AT_ONCE = 500


class Phase(StrEnum):
    """Where a job is; `unknown` where Slurm could not be asked."""

    pending = "pending"
    running = "running"
    ended = "ended"
    unknown = "unknown"


@dataclass(frozen=True)
class JobState:
    """A job as Slurm last saw it: `word` is its own name for that, `node` where it runs."""

    phase: Phase
    word: str
    node: str = ""


UNKNOWN = JobState(Phase.unknown, "UNKNOWN")


def states(jobs: Collection[str], names: Collection[str]) -> dict[str, JobState]:
    """Job id (`12`, or `12_3` in an array) → its state.

    names: the jobs' names; another job that was given the same id later is not taken for one of them

    squeue answering without a job means that it ended, but one answer is not enough: it is asked twice. squeue not
    answering means nothing at all.
    """
    if not jobs:
        return {}
    queued = _squeue(names)
    if queued is None:
        return dict.fromkeys(jobs, UNKNOWN)
    gone = [job for job in jobs if job not in queued]
    if gone:
        time.sleep(1)
        again = _squeue(names)
        if again is None:
            return {job: queued.get(job, UNKNOWN) for job in jobs}
        queued |= again
        gone = [job for job in jobs if job not in queued]
    ended = _sacct(gone, names)
    # Without accounting nobody remembers how it ended.
    return {job: queued.get(job) or ended.get(job) or JobState(Phase.ended, "GONE") for job in jobs}


def cancel(jobs: Iterable[str]) -> str | None:
    """scancel, many at a time. None, or what Slurm says against it."""
    waiting = list(jobs)
    problems = []
    for first in range(0, len(waiting), _AT_ONCE):
        done = _ask("scancel", *waiting[first : first + _AT_ONCE])
        if done is None:
            problems.append("scancel cannot be run here")
        elif done.returncode:
            problems.append(" ".join(done.stderr.split()))
    return "; ".join(problems) or None


def accounting() -> bool:
    """Whether sacct answers."""
    done = _ask("sacct", "-n", "-X", "-o", "jobid", "-S", "now")
    return done is not None and done.returncode == 0


def _squeue(names: Collection[str]) -> dict[str, JobState] | None:
    """Every job of those names that squeue still shows, ended ones included. None if it does not answer."""
    done = _ask("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%j", f"--name={','.join(names)}")
    if done is None or done.returncode:
        return None
    return dict(_rows(done.stdout, names))


def _sacct(jobs: Collection[str], names: Collection[str]) -> dict[str, JobState]:
    """The states of ended jobs, where accounting is kept."""
    found: dict[str, JobState] = {}
    ids = sorted({job.partition("_")[0] for job in jobs})
    for first in range(0, len(ids), _AT_ONCE):
        listed = ",".join(ids[first : first + _AT_ONCE])
        done = _ask("sacct", "-n", "-X", "-P", "-o", "JobID,State,NodeList,JobName%200", "-j", listed)
        if done is None or done.returncode:
            continue
        for job, state in _rows(done.stdout, names):
            # Accounting may be behind, or never have heard the end: squeue knows the job no more.
            found[job] = state if state.phase is Phase.ended else JobState(Phase.ended, "GONE")
    return {job: found[job] for job in jobs if job in found}


def _rows(text: str, names: Collection[str]) -> Iterable[tuple[str, JobState]]:
    for line in text.splitlines():
        job, word, node, name = line.split("|", 3)
        if name not in names:
            continue
        word = word.partition(" ")[0]  # CANCELLED by 1000
        phase = Phase.ended if word in _ENDED else Phase.running if word in _RUNNING else Phase.pending
        state = JobState(phase, word, "" if node == "None assigned" else node)
        yield from ((each, state) for each in _each(job))


def _each(job: str) -> Iterable[str]:
    """The jobs of an id: sacct writes the tasks of an array that never began as one, such as 12_[0,3-5%2]."""
    match = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job)
    if match is None:
        return [job]
    spans = [span.partition("-") for span in match[2].split(",")]
    return [f"{match[1]}_{i}" for first, _, last in spans for i in range(int(first), int(last or first) + 1)]


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
