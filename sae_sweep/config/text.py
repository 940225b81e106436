"""Text with `${oc.env:NAME}`, `${now:%Y-%m-%d}` or `~` in it, in settings that are no part of a point."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
# Keys of which the value is a path.
PATHS = ("output_dir", "logger.dir", "launcher.container")
# Lines of shell, in which `${HOME}` is the shell's own affair.
SHELL = "launcher.setup"


def resolve(key: str, value: Any) -> Any:
    """`value` with its references replaced, wherever there is text in it.

    `${oc.env:NAME}` and `${oc.env:NAME,default}` are variables of the environment, `${now:FORMAT}` the time, as
    strftime writes it; in paths `~` is the home folder. UserError: any other `${…}`, or a variable that is not set.
    """
    if isinstance(value, list):
        return [resolve(key, each) for each in value]
    if isinstance(value, dict):
        return {name: resolve(f"{key}.{name}", each) for name, each in value.items()}
    if not isinstance(value, str):
        return value
    text = _REFERENCE.sub(lambda match: _replacement(key, value, match), value)
    if key in PATHS and text.startswith("~"):
        try:
            return str(Path(text).expanduser())
        except RuntimeError as error:
            raise UserError(f"{key}={show(value)}: {error}") from error
    return text


def _replacement(key: str, value: str, match: re.Match[str]) -> str:
    resolver, colon, rest = match[1].strip().partition(":")
    if resolver == "oc.env" and colon:
        name, comma, default = (part.strip() for part in rest.partition(","))
        found = os.environ.get(name, default if comma else None)
        if found is None:
            raise UserError(f"{key}={show(value)}: the environment has no {name} (give ${{oc.env:{name},default}})")
        return found
    if resolver == "now" and colon:
        return time.strftime(rest)
    if key == SHELL:
        return match[0]
    raise UserError(f"{key}={show(value)}: {match[0]} is not known here: ${{oc.env:NAME}} and ${{now:%Y-%m-%d}} are")
