"""Overrides given in Python, as the command line would have them.

words(["sae.width=8,16"], {"penalty": "l1", "seed": [0, 1], "toy__k": 3})
-> ["sae.width=8,16", "penalty=l1", "seed=0,1", "toy.k=3"]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sae_sweep.config.axes import is_sweep_key
from sae_sweep.config.keys import show
from sae_sweep.errors import UserError

Override = str | Mapping[str, Any]
# What the grammar reads as it is; all other text goes between quotes.
_PLAIN = re.compile(r"[\w./:+-]+|\$\{[\w.:]+\}")
# Read as they are typed, whatever is in them.
_RAW = ("penalty.formula", "penalty.outer")


def words(overrides: Iterable[Override], settings: Mapping[str, Any]) -> list[str]:
    """Words of the command line: text as it is; keys of mappings and of `settings` with their values.

    A keyword's two underscores are a dot. A list, tuple or range is an axis, but of keys that take lists, such as
    `logger.tags`, the value; None is null. UserError: an override is neither text nor a mapping.
    """
    found = []
    for override in overrides:
        if isinstance(override, str):
            found.append(override)
        elif isinstance(override, Mapping):
            found += [_word(str(key), value) for key, value in override.items()]
        else:
            raise UserError(f"an override is text, as 'sae.width=8,16', or a mapping of keys, got {show(override)}")
    return found + [_word(key.replace("__", "."), value) for key, value in settings.items()]


def _word(key: str, value: Any) -> str:
    several = isinstance(value, list | tuple | range) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)
    if not several:
        return f"{key}={_spelled(key, value)}"
    values = ",".join(_spelled(key, each) for each in value)
    return f"{key}=[{values}]" if is_sweep_key(key) else f"{key}={values}"


def _spelled(key: str, value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()  # a number of NumPy
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_spelled(key, each)}" for name, each in value.items()) + "}"
    text = str(value)
    # Text that looks like another thing, such as "1" or "null", stays text.
    looks = re.fullmatch(r"(?i)null|true|false|nan|inf|[+-]?[\d._]+(e[+-]?\d+)?", text)
    if key in _RAW or (_PLAIN.fullmatch(text) and not looks):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), text) + "'"
