"""What can be set, and to what: the schema's keys, their limits, and the nearest valid thing to a wrong one."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_sweep import registry
from sae_sweep.config.settings import PARTS, Evaluation
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

SEEDS = ("seed", "data_seed")
SEED = Setting(0, ge=0)
# Whole numbers are seeds, sizes and counts: torch takes them as 64-bit integers.
LARGEST = 2**63 - 1
# Not to be set: they come with an option of their group, as do the option's other defaults. What to give instead.
CHOSEN = {f"{part}.name": part for part, kind in PARTS.items() if "name" in kind.choices}
CHOSEN |= {"sae.architecture": "sae", "penalty.ladder": "penalty.coefficient"}
# One value for the whole sweep, beside those of the evaluation.
_OF_SWEEP = {
    "grid.calibrate": Setting(None, kind="str", optional=True, choices=("l0",)),
    "grid.l0_range": Setting(None, kind="list"),
    "grid.coefficients": Setting(4, ge=2, le=100),
    "device": Setting("auto", choices=("auto", "cpu", "cuda")),
    "output_dir": Setting("outputs"),
    "name": Setting(None, kind="str", optional=True),
    # On a command line to leave an experiment's claims out: claims=[].
    "claims": Setting(None, kind="list", optional=True),
}


@registry.derived
def point_keys() -> Mapping[str, Setting]:
    """What may be an axis: dotted keys of a point's settings, and its seeds."""
    found = {
        f"{part}.{name}": setting
        for part, kind in PARTS.items()
        for name, setting in kind.all_settings().items()
        if setting.given and f"{part}.{name}" not in CHOSEN
    }
    return found | dict.fromkeys(SEEDS, SEED)


@registry.derived
def sweep_keys() -> Mapping[str, Setting]:
    """What has one value for the whole sweep."""
    return {f"evaluation.{name}": setting for name, setting in Evaluation.all_settings().items()} | _OF_SWEEP


def coerce(key: str, rule: Setting, value: Any) -> Any:
    """`value` as the type that `rule` asks for; UserError in one line if it is another type or out of bounds."""
    if value is None and rule.optional:
        return None
    if (rule.verbatim or rule.kind == "text") and type(value) in (int, float):
        value = str(value)  # a text that is one number
    if rule.kind == "float" and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if rule.kind == "number" and type(value) is float and value.is_integer():
        value = int(value)
    kinds_of = {"number": ("int", "float"), "text": ("str",)}.get(rule.kind, (rule.kind,))
    if type(value).__name__ not in kinds_of or value == "":
        kinds = {
            "int": "a whole number",
            "float": "a number",
            "str": "a word",
            "text": "a text",
            "bool": "true or false",
        }
        kinds |= {"number": "a number", "list": "a list", "dict": "a mapping"}
        raise UserError(f"{key} must be {kinds[rule.kind]}, got {show(value)}")
    if rule.kind in ("float", "number") and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {show(value)}")
    if type(value) is int and abs(value) > LARGEST:
        raise UserError(f"{key} must be at most {LARGEST}, got {show(value)}")
    if rule.choices and value not in rule.choices and not (key == "sae.init" and names_sae(value)):
        raise UserError(f"{key} cannot be {show(value)}{nearest(str(value), rule.choices)}")
    for bound, holds, words in (
        (rule.ge, operator.ge, "at least"),
        (rule.gt, operator.gt, "above"),
        (rule.le, operator.le, "at most"),
        (rule.lt, operator.lt, "below"),
    ):
        if bound is not None and not holds(value, bound):
            raise UserError(f"{key} must be {words} {bound}, got {show(value)}")
    return value


def names_sae(init: Any) -> bool:
    """Whether a value of `sae.init` is no kind of init but a trained SAE: a point's id, or the path of its files."""
    return isinstance(init, str) and (re.fullmatch(r"[0-9a-f]{16}", init) is not None or "/" in init)


def check_axis(key: str, values: Sequence[Any]) -> list[Any]:
    """The values of one axis of a grid, converted; references such as `${toy.d_vocab}` wait for their point."""
    if key in CHOSEN:
        raise UserError(f"{key} comes with its group: give {CHOSEN[key]}=… instead")
    if key not in point_keys():
        if key in sweep_keys() or key.partition(".")[0] in ("evaluation", "grid", "logger", "launcher", "experiment"):
            raise UserError(f"{key} is one for the whole sweep: it cannot be an axis")
        raise UserError(f"unknown key {show(key)}{nearest(key, point_keys())}")
    if not values:
        raise UserError(f"{key} has no values: an empty axis makes an empty grid")
    rule = point_keys()[key]
    return [value if isinstance(value, str) and "${" in value else coerce(key, rule, value) for value in values]


def split_at_commas(text: str, closing: bool = False) -> list[str]:
    """The parts of a text between the commas that stand in no bracket.

    closing: end where a bracket closes that was not opened in the text
    """
    parts: list[str] = []
    depth, begin = 0, 0
    for at, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth < 0 and closing:
                return [*parts, text[begin:at]]
        elif character == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def nearest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the valid word nearest to a wrong one, and all of them where they are few.

    A key is near if either the whole or its last component is: `lr` finds `training.lr`.
    """
    options = list(valid)

    def likeness(option: str) -> float:
        short = option.rpartition(".")[2]
        return max(_ratio(word, option), 0.95 * _ratio(word.rpartition(".")[2], short))

    score = max(map(likeness, options), default=0.0)
    near = [option for option in options if likeness(option) == score] if score >= 0.5 else []
    hints = ["did you mean " + " or ".join(map(repr, near[:3])) + "?"] if near else []
    if len(options) <= 12 or not hints:
        hints.append("valid: " + ", ".join(options if len(options) <= 12 else [*options[:11], "…"]))
    return f" ({'; '.join(hints)})"


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a[:80], b).ratio()


def show(value: Any) -> str:
    """`value` in a message: one short line, whatever was typed."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write whole numbers of thousands of digits
        text = "a number too long to print"
    return text if len(text) <= 60 else text[:57] + "..."
