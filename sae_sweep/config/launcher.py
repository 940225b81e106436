"""What can be asked of Slurm: the keys of conf/launcher/slurm.yaml, checked before anything is submitted."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sae_sweep.config.keys import coerce, nearest, show
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

# Options of sbatch that we set or build on, so that nothing else may.
OURS = {"array", "chdir", "clusters", "error", "job-name", "no-requeue", "nodes", "ntasks", "ntasks-per-gpu"}
OURS |= {"ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "wait", "wrap"}
# Options that a key of ours stands for.
_OF = {"cpus-per-task": "cpus", "cpus-per-gpu": "cpus"}
_OF |= dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"), "gpus")
_OF |= dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), "memory")
# A number of GPUs, or TYPE:NUMBER, as `--gpus-per-node` takes it.
_GPUS = re.compile(r"(?:(?P<type>[A-Za-z][\w.-]*|\d+g\.[\w.+]+):)?(?P<count>\d{1,3})", re.ASCII)


def _at(default: Any, **limits: Any) -> Any:
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Launcher:
    """One task's share of the cluster, and how the work is cut into tasks. What each key means: the YAML."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: str = "1"
    cpus: int = _at(8, ge=1)
    memory: str = "32G"
    time: int = _at(240, ge=1)
    signal_seconds: int = _at(120, ge=1, le=65535)
    checkpoint_seconds: float = _at(60.0, gt=0)
    target_minutes: float = _at(30.0, gt=0)
    max_tasks: int = _at(1000, ge=1)
    parallelism: int = _at(64, ge=1)
    setup: list[str] = field(default_factory=list)
    container: str | None = None
    additional: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Launcher:
        """From the composed launcher group. UserError: an unknown key, a wrong type, a value out of bounds."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        given = {key: value for key, value in settings.items() if key != "name"}
        if type(given.get("gpus")) is int:
            given["gpus"] = str(given["gpus"])
        for key, value in given.items():
            if key not in known:
                raise UserError(f"unknown key {show(f'launcher.{key}')}{nearest(key, known)}")
            kind, _, rest = str(known[key].type).partition(" | ")
            if kind in ("int", "float", "str"):
                given[key] = coerce(
                    f"launcher.{key}", Setting(None, kind=kind, optional=rest == "None", **known[key].metadata), value
                )
        launcher = cls(**given)
        launcher._check()
        return launcher

    @property
    def gpu_count(self) -> int:
        """GPUs of a job, each with a task of its own; 0: one task, on processors."""
        found = _GPUS.fullmatch(self.gpus)
        return int(found["count"]) if found else 0

    @property
    def per_job(self) -> int:
        """Tasks that run side by side in one job."""
        return max(1, self.gpu_count)

    def _check(self) -> None:
        if not _GPUS.fullmatch(self.gpus):
            raise UserError(f"launcher.gpus={self.gpus} is no number of GPUs: such as 1, 4, a100:1, or 0 for none")
        if not re.fullmatch(r"\d+[KMGT]?", self.memory):
            raise UserError(f"launcher.memory={show(self.memory)} is no size: a whole number and K, M, G or T")
        if 60 * self.time <= self.signal_seconds:
            raise UserError(
                f"launcher.signal_seconds={self.signal_seconds} leaves nothing of launcher.time={self.time} min"
            )
        if not (isinstance(self.setup, list) and all(isinstance(line, str) for line in self.setup)):
            raise UserError(f"launcher.setup must be a list of lines, got {show(self.setup)}")
        if not isinstance(self.additional, dict):
            raise UserError(f"launcher.additional must be a mapping of options of sbatch, got {show(self.additional)}")
        for key, value in self.additional.items():
            option = str(key).replace("_", "-")
            key_of = {f.name: f.name for f in dataclasses.fields(self)} | _OF
            if not re.fullmatch(r"[a-z][a-z-]+", option) or not isinstance(value, str | int | float | bool):
                raise UserError(f"launcher.additional: {show(key)}: {show(value)} is no option of sbatch with a value")
            if option == "gres" and "gpu" in str(value):
                raise UserError("launcher.additional.gres: give launcher.gpus instead, such as launcher.gpus=a100:1")
            if option in OURS:
                raise UserError(f"launcher.additional.{key} cannot be set: the sweep needs it")
            if option in key_of:
                raise UserError(f"launcher.additional.{key}: give launcher.{key_of[option]} instead")

    @property
    def job_memory(self) -> str:
        """The memory of a job, as sbatch takes it."""
        return self.memory if self.per_job == 1 else f"{self.per_job * self.megabytes()}M"

    def megabytes(self) -> int:
        """The memory of a task in MiB; a bare number is that, as Slurm reads it."""
        number, unit = re.fullmatch(r"(\d+)([KMGT]?)", self.memory).groups()  # type: ignore[union-attr]
        return math.ceil(int(number) * {"K": 1 / 1024, "M": 1, "": 1, "G": 2**10, "T": 2**20}[unit])
