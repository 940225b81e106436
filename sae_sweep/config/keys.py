"""What can be set, and to what: the schema's keys, their limits, and the nearest valid thing to a wrong one."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_sweep.config.settings import PARTS, Evaluation, Point
from sae_sweep.errors import UserError

SEEDS = ("seed", "data_seed")
# Whole numbers are seeds, sizes and counts: torch takes them as 64-bit integers.
LARGEST = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key takes: `kind` is int, float or str; `limits` are those of the schema's metadata."""

    kind: str
    optional: bool = False
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _rules(prefix: str, settings: type[Any]) -> dict[str, Rule]:
    rules = {}
    for f in dataclasses.fields(settings):
        kind, _, rest = str(f.type).partition(" | ")
        rules[prefix + f.name] = Rule(kind, rest == "None", f.metadata)
    return rules


# Not to be set: they come with an option of their group, as do the option's other defaults. What to give instead.
CHOSEN = {f"{part}.name": part for part in PARTS} | {"sae.architecture": "sae", "penalty.ladder": "penalty.coefficient"}
POINT_KEYS: dict[str, Rule] = {
    key: rule
    for rules in (*(_rules(f"{part}.", settings) for part, settings in PARTS.items()), _rules("", Point))
    for key, rule in rules.items()
    if key not in CHOSEN and key not in PARTS and key != "distribution.digest"
}
# The whole of each part, chosen keys included: what a config group's option holds.
PART_KEYS: dict[str, dict[str, Rule]] = {part: _rules("", settings) for part, settings in PARTS.items()}
# One value for the whole sweep.
SWEEP_KEYS: dict[str, Rule] = {
    **_rules("evaluation.", Evaluation),
    "grid.calibrate": Rule("str", optional=True, limits={"choices": ("l0",)}),
    "grid.l0_range": Rule("list"),
    "grid.coefficients": Rule("int", limits={"ge": 2, "le": 100}),
    "device": Rule("str", limits={"choices": ("auto", "cpu", "cuda")}),
    "output_dir": Rule("str"),
    "name": Rule("str", optional=True),
}


def coerce(key: str, rule: Rule, value: Any) -> Any:
    """`value` as the type that `rule` asks for; UserError in one line if it is another type or out of bounds."""
    if value is None and rule.optional:
        return None
    if rule.kind == "float" and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    if type(value).__name__ != rule.kind or value == "":
        kinds = {"int": "a whole number", "float": "a number", "str": "a word", "bool": "true or false"}
        kinds |= {"list": "a list", "dict": "a mapping"}
        raise UserError(f"{key} must be {kinds[rule.kind]}, got {show(value)}")
    if rule.kind == "float" and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {show(value)}")
    if rule.kind == "int" and abs(value) > LARGEST:
        raise UserError(f"{key} must be at most {LARGEST}, got {show(value)}")
    choices = rule.limits.get("choices")
    if choices and value not in choices:
        raise UserError(f"{key} cannot be {show(value)}{nearest(str(value), choices)}")
    for name, holds, words in (
        ("ge", lambda bound: value >= bound, "at least"),
        ("gt", lambda bound: value > bound, "above"),
        ("le", lambda bound: value <= bound, "at most"),
        ("lt", lambda bound: value < bound, "below"),
    ):
        if name in rule.limits and not holds(rule.limits[name]):
            raise UserError(f"{key} must be {words} {rule.limits[name]}, got {show(value)}")
    return value


def check_axis(key: str, values: Sequence[Any]) -> list[Any]:
    """The values of one axis of a grid, converted; references such as `${toy.d_vocab}` wait for their point."""
    if key in CHOSEN:
        raise UserError(f"{key} comes with its group: give {CHOSEN[key]}=… instead")
    if key not in POINT_KEYS:
        if key in SWEEP_KEYS or key.partition(".")[0] in ("evaluation", "grid", "logger", "launcher", "experiment"):
            raise UserError(f"{key} is one for the whole sweep: it cannot be an axis")
        raise UserError(f"unknown key {show(key)}{nearest(key, POINT_KEYS)}")
    if not values:
        raise UserError(f"{key} has no values: an empty axis makes an empty grid")
    rule = POINT_KEYS[key]
    return [value if isinstance(value, str) and "${" in value else coerce(key, rule, value) for value in values]


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
