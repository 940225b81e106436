"""The words of the short texts by which `toy=planted` is composed: names with numbers, numbers, features."""

from __future__ import annotations

import math
import re

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError

NOTHING = "none"


def words(text: str) -> list[str]:
    """What stands between commas or spaces; nothing of `none`."""
    return [] if text.strip() == NOTHING else re.split(r"[\s,]+", text.strip())


def call(key: str, text: str) -> tuple[str, list[float]]:
    """`name(1, 2)` or `name`: the name, and its numbers."""
    found = re.fullmatch(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*", text)
    if found is None:
        raise UserError(f"{key} cannot be {show(text)}: write a name and its numbers, such as linear(0.3, 0.05)")
    name, inside = found.groups()
    return name, [number(key, word.strip()) for word in inside.split(",")] if inside else []


def number(key: str, text: str) -> float:
    """A finite number."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{key}: {show(text)} is not a number")
    return found


def which_feature(key: str, text: str, count: int, word: str) -> int:
    """The number of one of `count` features."""
    if not text.isdecimal() or int(text) >= count:
        raise UserError(f"{key}: {show(text)} in {word} is no feature from 0 to {count - 1}")
    return int(text)
