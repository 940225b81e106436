"""Where and how a sweep is logged to W&B: the keys of conf/logger/wandb.yaml, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError

PROJECT = "sae-sweep"
# Field: the variable of W&B that stands in where neither the command line nor a file gives a value.
VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "dir": "WANDB_DIR",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
}
# What W&B's server refuses in the name of a project, and how long names and tags may be.
_NOT_IN_A_PROJECT, _LONGEST_PROJECT, _LONGEST_TAG = "/\\#?%:", 128, 64


@dataclass(frozen=True)
class Logger:
    """What W&B is told of the runs of a sweep. What each key means: the YAML.

    Attributes:
        dir: the folder below which W&B's files lie; None: the sweep's own.
        group: None: the name of the sweep.
    """

    project: str = PROJECT
    entity: str | None = None
    mode: str = "auto"
    artifacts: bool = False
    dir: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    job_type: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Logger:
        """From a sweep's record, which may be older than a key."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in settings.items() if key in known})


def resolved(settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The composed logger group, each gap filled from the environment, then from our defaults.

    UserError: a project or a tag that W&B would refuse once everything is trained.
    """
    if settings["name"] != "wandb":
        return dict(settings)
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    where = {key: f"logger.{key}" for key in given}
    for key, variable in VARIABLES.items():
        if key not in given and environment.get(variable):
            given[key] = environment[variable].split(",") if key == "tags" else environment[variable]
            where[key] = variable
    logger = Logger.of(given)
    wrong = sorted(set(logger.project) & set(_NOT_IN_A_PROJECT))
    if wrong or len(logger.project) > _LONGEST_PROJECT:
        why = f"it holds {' '.join(wrong)}" if wrong else f"it is longer than {_LONGEST_PROJECT} letters"
        raise UserError(f"{where['project']}={show(logger.project)} is no name of a W&B project: {why}")
    for tag in logger.tags:
        if not isinstance(tag, str) or not 1 <= len(tag) <= _LONGEST_TAG:
            raise UserError(f"{where['tags']}: {show(tag)} is no tag of W&B, which has 1 to {_LONGEST_TAG} letters")
    folder = None if logger.dir is None else str(Path(logger.dir).expanduser().absolute())
    return {"name": "wandb", **vars(logger), "dir": folder}
