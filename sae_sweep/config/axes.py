"""The axes of a grid: the experiment's blocks under what the command line says, each value checked on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sae_sweep import registry
from sae_sweep.config import files
from sae_sweep.config.files import GROUPS
from sae_sweep.config.keys import CHOSEN, check_axis, nearest, point_keys, show, sweep_keys
from sae_sweep.config.settings import PARTS
from sae_sweep.errors import UserError

# What the grid of an experiment takes beside its axes and blocks.
CALIBRATION = ("calibrate", "l0_range", "coefficients")
# Groups that have an option of no settings of its own.
PLAIN = ("training", "evaluation")
# The family of the kinds that are options of a group.
FAMILIES = {
    part: next(iter(kind.choices.values()))[0] for part, kind in PARTS.items() if kind.choices and part not in PLAIN
}

Axes = dict[str, list[Any]]


def listing(group: str) -> list[str]:
    """The options of a config group: YAML files of the user's folders and ours, and the kinds that are registered."""
    kinds = registry.kinds(FAMILIES[group]) if group in FAMILIES else {}
    return sorted({*files.options(group), *kinds, *(["default"] if group in PLAIN else [])})


def fileless(group: str) -> list[str]:
    """The options of a group that are kinds without a YAML file."""
    if group not in FAMILIES:
        return []
    return [name for name in registry.kinds(FAMILIES[group]) if name not in files.options(group)]


def is_file(group: str, option: Any) -> bool:
    """A distribution may be named by its file of weights."""
    named = group == "distribution" and isinstance(option, str) and not files.is_path(option)
    return named and ("/" in option or option.endswith(".csv"))


def is_sweep_key(key: str) -> bool:
    """Whether the key is one for the whole sweep, and no setting of a point."""
    part = key.partition(".")[0]
    return part in ("evaluation", "grid", "logger", "launcher", "experiment", "device", "output_dir", "name", "claims")


def check_values(key: str, values: list[Any]) -> list[Any]:
    """The values of one key, converted. UserError: no such key or option, a setting out of its limits, no values."""
    if key.startswith(("hydra.", "hydra/")):
        raise files.refuse_hydra(key.replace("/", "."))
    if key == "grid" or key.startswith(("grid.axes", "grid.blocks")):
        raise UserError(
            f"{show(key)} is of the file of an experiment, as grid: {{axes: …}}; an axis by itself is its key with its "
            "values, as sae.width=16,64"
        )
    if key in GROUPS:
        if key == "experiment" and values == [None]:
            return values
        _options_exist(key, values)
    elif is_sweep_key(key):
        if key not in sweep_keys() and not key.startswith(("logger.", "launcher.")):
            raise UserError(f"unknown key {show(key)}{nearest(key, [*point_keys(), *sweep_keys()])}")
    else:
        if key not in point_keys() and key not in CHOSEN:
            raise UserError(f"unknown key {show(key)}{nearest(key, [*point_keys(), *sweep_keys(), *GROUPS])}")
        # `null` for a coefficient is the penalty's ladder, as it is when the key is not given at all.
        return values if (key, values) == ("penalty.coefficient", [None]) else check_axis(key, values)
    if is_sweep_key(key) and len(values) != 1:
        raise UserError(f"{key} takes one value for the whole sweep, got {len(values)}")
    return values


class UnknownOption(UserError):
    """A config group has no such option."""

    def __init__(self, group: str, option: Any) -> None:
        super().__init__(f"{group} cannot be {show(option)}{nearest(str(option), listing(group))}")
        self.group, self.option = group, option


def _options_exist(group: str, values: Sequence[Any]) -> None:
    known = listing(group)
    for value in values:
        if files.is_path(value):
            files.locate(group, value)
        elif value not in known and not is_file(group, value):
            raise UnknownOption(group, value)
    if not values:
        raise UserError(f"{group} has no values: an empty axis makes an empty grid")


def merge_blocks(grid: Any, axes: Axes, where: str) -> list[dict[str, list[Any]]]:
    """The blocks of the experiment's grid, each with the axes; what the command line says replaces either."""
    if not isinstance(grid, dict) or not set(grid) <= {"axes", "blocks", *CALIBRATION}:
        raise UserError(f"{where}: grid takes axes and blocks, beside {', '.join(CALIBRATION)}, got {show(grid)}")
    named_blocks = [(f"{where}: grid.axes", grid.get("axes") or {})]
    listed = grid.get("blocks") or [{}]
    if not isinstance(listed, list):
        raise UserError(f"{where}: grid.blocks must be a list, got {show(listed)}")
    named_blocks += [(f"{where}: grid.blocks[{i}]", block) for i, block in enumerate(listed)]
    common, *blocks = (_block(block, name, axes) for name, block in named_blocks)
    return [{**common, **block, **axes} for block in blocks]


def _block(block: Any, where: str, axes: Axes) -> dict[str, list[Any]]:
    if not isinstance(block, dict):
        raise UserError(f"{where} must be a mapping of keys to values, got {show(block)}")
    checked = {}
    for key, value in block.items():
        try:
            # What the command line replaces is still checked: an experiment is right or wrong as it stands.
            values = check_values(str(key), value if isinstance(value, list) else [value])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if is_sweep_key(key):
            raise UserError(f"{where}: {key} is one for the whole sweep and no axis")
        checked[key] = axes.get(key, values)
    return checked
