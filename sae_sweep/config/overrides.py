"""From what the user typed to a sweep: compose the YAML, apply the overrides, check everything.

The only file that imports hydra. Hydra composes once for each option of a config group; plain values are applied to
plain dictionaries (config/grid.py), since composing costs about 0.1 s a time.
"""

from __future__ import annotations

import contextlib
import copy
import decimal
import hashlib
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_sweep import registry
from sae_sweep.config.axes import (
    FAMILIES,
    GROUPS,
    PLAIN,
    Axes,
    UnknownOption,
    check_values,
    conf_dir,
    fileless,
    is_file,
    is_sweep_key,
    listing,
    merge_blocks,
)
from sae_sweep.config.calibration import LEAST, Calibration
from sae_sweep.config.claims import check_claims
from sae_sweep.config.gc import no_collection
from sae_sweep.config.grid import (
    LARGEST_GRID,
    YES,
    Settings,
    Sweep,
    counted,
    expand,
    expand_uncalibrated,
    varied,
)
from sae_sweep.config.keys import SEEDS, check_axis, coerce, nearest, point_keys, show, split_at_commas, sweep_keys
from sae_sweep.config.launcher import Launcher
from sae_sweep.config.logger import resolved
from sae_sweep.config.settings import PARTS, Evaluation, Part, Point, measure_id
from sae_sweep.environment import dangling
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

# Overrides of these alone leave the grid as it is.
NEUTRAL = ("logger", "device", "output_dir", "launcher", "name")
# What a configuration has where nothing is said: a width that goes with the toy, and the ladder of the penalty.
IN_CONFIG: dict[str, dict[str, Any]] = {"sae": {"width": "${toy.d_vocab}"}, "penalty": {"coefficient": None}}
# Beyond this an axis is not even counted out, --yes or not.
LONGEST_AXIS = 10_000_000


def load(overrides: Sequence[str], command_defaults: Sequence[str] = (), yes: bool = False) -> Sweep:
    """The sweep that a command line asks for.

    overrides: Hydra's grammar; every `a,b`, `choice()`, `range()` and `glob()` is an axis of the grid
    command_defaults: overrides that a command implies; the user's own take precedence
    yes: let grids of more than LARGEST_GRID combinations through

    UserError, one line, for everything that is wrong with them.
    """
    words = [word for word in overrides if word not in ("-m", "--multirun")]
    largest = None if yes else LARGEST_GRID
    try:
        asked = {**_parse(command_defaults, largest), **_parse(words, largest)}
    except UnknownOption as error:
        raise _with_its_package(error, words) from error
    experiment, alone = _experiment(asked)
    one = {key: values[0] for key, values in asked.items() if is_sweep_key(key)}
    axes = {key: values for key, values in asked.items() if key not in one}

    # With several options of a group, the first stands for it wherever the others do not matter.
    first = {group: values[0] for group, values in asked.items() if group in GROUPS} | {"experiment": experiment}
    tree, chosen = _compose(first)
    where = f"experiment={experiment}" if experiment else "conf"
    blocks = merge_blocks(tree["grid"], axes, where)
    options = _options(first, tree, chosen, blocks)
    values = {key: coerce(key, rule, one.get(key, _lookup(tree, key))) for key, rule in sweep_keys().items()}
    settings = Settings(options, chosen, {name: tree[name] for name in SEEDS})
    calibration = _calibration(values, one)
    if calibration is None:
        with no_collection():
            points = expand(settings, blocks, largest)
    else:
        points, calibration = expand_uncalibrated(settings, blocks, calibration, largest)
        if not calibration.rungs:
            raise UserError(
                "grid.calibrate=l0 has nothing to choose: every coefficient is given, or sae.k counts in its place "
                "(leave penalty.coefficient out, or give penalty.coefficient=null)"
            )
    for key in ("penalty.formula", "penalty.outer"):
        if key in axes and not any(point.penalty.get("formula") for point in points):
            raise UserError(f"{key} is read by penalty=formula alone: give that too")
    if "distribution.file" in axes and not any(point.distribution.get("file") for point in points):
        raise UserError("distribution.file is read by distribution=weights alone (did you mean distribution=FILE?)")

    evaluation = Evaluation(**{name: values[f"evaluation.{name}"] for name in Evaluation.all_settings()})
    grid = _hash(points, evaluation, calibration)
    name = values["name"] or (experiment if alone else None) or f"{experiment or 'adhoc'}-{grid}"
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name, re.ASCII):
        raise UserError(f"name={show(name)} names a folder: letters, digits, dot, plus, minus and underscore only")
    return Sweep(
        name=name,
        overrides=[*words],
        experiment=experiment,
        points=points,
        varied=varied(points),
        evaluation=evaluation,
        claims=check_claims(counted(values["claims"] or [], points), where),
        logger=resolved(_free(tree["logger"], "logger", one), os.environ),
        launcher=_launcher(_free(tree["launcher"], "launcher", one)),
        device=values["device"],
        output_dir=Path(values["output_dir"]),
        calibration=calibration,
    )


def _with_its_package(error: UnknownOption, words: Sequence[str]) -> UserError:
    """The error; if a sweep of the output folder used that option from another package, what that package was."""
    place = next((word.partition("=")[2] for word in words if word.startswith("output_dir=")), "outputs")
    line = re.compile(rf"^  {FAMILIES.get(error.group, '')} {re.escape(str(error.option))}: (.+)$", re.MULTILINE)
    for path in sorted(Path(place).glob("sweeps/*/sweep.yaml")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if found := line.search(path.read_text(encoding="utf-8")):
                package = f"{error.group}={error.option} comes from the package {found[1]}, which is not installed here"
                return UserError(f"{package} (sweep {path.parent.name} used it)")
    return error


def check_writable(path: Path) -> None:
    """UserError if no file can be made in `path`, or, where it does not exist yet, in its nearest parent that does."""
    link = dangling(path)
    if link is not None:
        raise UserError(f"output_dir={show(str(path))} cannot be written: {link} is a link to nothing (choose another)")
    try:
        place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"output_dir={show(str(path))} cannot be written: {reason} (choose another)") from error


def axes_of(sweep: Sweep) -> list[tuple[str, list[Any]]]:
    """Every key that the sweep varies with its values, both in the order of the schema and of the grid."""
    return [(key, list(dict.fromkeys(point.get(key) for point in sweep.points))) for key in sweep.varied]


def ladder(penalty: str) -> list[float]:
    """The coefficients that a penalty takes where none is given."""
    tree, _ = _compose({"penalty": penalty})
    return check_axis("penalty.coefficient", tree["penalty"]["ladder"])


def ladders() -> dict[str, list[float]]:
    """The ladder of each penalty."""
    return {name: ladder(name) for name in listing("penalty")}


def _parse(words: Sequence[str], largest: int | None) -> Axes:
    """key → the values asked for, in the order given, each checked as far as it can be without the rest."""
    parser = OverridesParser.create()
    asked: Axes = {}
    for word in words:
        name, _, text = word.partition("=")
        rule = point_keys().get(name)
        if rule and rule.verbatim:
            _keep(asked, name, as_typed(text))
            continue
        try:
            override = parser.parse_override(word)
        # The grammar's actions raise whatever Python raises on odd input, and the input is always the user's.
        except Exception as error:
            raise UserError(_unreadable(word, error)) from error
        key = override.key_or_group
        if override.is_delete():
            raise UserError(f"{show(word)}: a key cannot be deleted, only given another value")
        if override.package is not None:
            raise UserError(f"{show(word)}: packages (@) are not used here")
        _keep(asked, key, _values(key, override, largest))
    return asked


def _keep(asked: Axes, key: str, values: list[Any]) -> None:
    if key in asked:
        raise UserError(f"{show(key)} is given twice: give all its values at once, as {key}=a,b")
    asked[key] = check_values(key, values)


def as_typed(text: str) -> list[str]:
    """The values of a setting whose text is not Hydra's: between commas that stand in no bracket, quotes taken off."""
    return [_unquoted(part.strip()) for part in split_at_commas(_unquoted(text.strip()))]


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text


def _unreadable(word: str, error: Exception) -> str:
    """One line for what the grammar says in several."""
    if not re.match(r"[~+]*[\w./@]+=", word):
        likely = (f"experiment={name}" for name in listing("experiment"))
        return (
            f"{show(word)} is not of the form key=value{nearest(word, [*likely, *(f'{key}=' for key in point_keys())])}"
        )
    lines = [line for line in str(error).splitlines() if line and not line.startswith(("Error parsing", "See "))]
    reason = (lines or ["malformed"])[0].partition(" expecting ")[0]
    if " while evaluating " in reason:
        return f"cannot read {show(word)}: {reason.partition(' while evaluating ')[2]}"
    if reason.startswith("LexerNoViableAlt"):
        reason = "a character out of place"
    return f"cannot read {show(word)}: {reason} (put quotes around text: key='…')"


def _values(key: str, override: Override, largest: int | None) -> list[Any]:
    """The values of one override, swept or not."""
    asked = override.value()
    longest = LONGEST_AXIS if largest is None else largest
    if isinstance(asked, IntervalSweep):
        raise UserError(f"{key}=interval() has no end of values: use range() or choice()")
    if isinstance(asked, RangeSweep):
        return _range(key, asked, longest)
    if isinstance(asked, Glob):
        names = listing(key) if key in GROUPS else list(point_keys().get(key, Setting("")).choices)
        matching = asked.filter(names)
        if not matching:
            raise UserError(f"{key}={show(', '.join(asked.include))} matches nothing{nearest('', names)}")
        return matching
    if isinstance(asked, ChoiceSweep):
        # The order typed, shuffle() or not: it would only reorder the table.
        return [value.text if isinstance(value, QuotedString) else value for value in asked.list]
    return [asked]


def _range(key: str, asked: RangeSweep, longest: int) -> list[Any]:
    """Whole numbers as they are, others in decimal: range(0, 1, 0.1) holds 0.3, not 0.30000000000000004."""
    numbers = (asked.start, asked.stop, asked.step)
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers) or asked.step == 0:
        raise UserError(f"{key}=range() needs a finite start and stop and a step that is not 0")
    start, stop, step = (decimal.Decimal(str(number)) for number in numbers)
    length = max(0, math.ceil((stop - start) / step))
    if length > longest:
        raise UserError(
            f"{key} has {length:,} values, more than {longest:,}" + ("" if longest == LONGEST_AXIS else YES)
        )
    if length == 0:
        raise UserError(f"{key}=range({asked.start}, {asked.stop}) is empty")
    values = [start + i * step for i in range(length)]
    whole = all(isinstance(number, int) for number in numbers)
    return [int(value) if whole else float(value) for value in values]


def _experiment(asked: Axes) -> tuple[str | None, bool]:
    """The experiment, and whether the command line says nothing else about the grid."""
    named = {key.partition(".")[0] for key in asked} - set(NEUTRAL)
    if not named:
        return "quickstart", True
    return asked.get("experiment", [None])[0], named == {"experiment"}


def _options(
    first: Mapping[str, str | None], tree: dict[str, Any], chosen: Mapping[str, str], blocks: Sequence[Axes]
) -> dict[str, dict[str, dict[str, Any]]]:
    """part → option → its settings under this experiment, for every option that a block names."""
    options: dict[str, dict[str, dict[str, Any]]] = {}
    for part in PARTS:
        options[part] = {chosen[part]: tree[part]}
        for option in dict.fromkeys(option for block in blocks for option in block.get(part, ())):
            if option in options[part]:
                continue
            other, _ = _compose({**first, part: option})
            if {**other, part: None} != {**tree, part: None}:
                raise UserError(f"conf/{part}/{option}.yaml sets keys outside its group")
            options[part][option] = other[part] | ({"file": option} if is_file(part, option) else {})
    return options


def _compose(asked: Mapping[str, str | None]) -> tuple[dict[str, Any], dict[str, str]]:
    """The composed configuration and the option that each group ended up with; references are left unresolved."""
    named = {group: "weights" if is_file(group, option) else option for group, option in asked.items() if option}
    # Options without a file differ in nothing but their name: one composition serves them all.
    alike = {group: fileless(group) for group in named if named[group] in fileless(group)}
    words = (f"{group}={alike[group][0] if group in alike else option}" for group, option in named.items())
    tree, chosen = copy.deepcopy(_composed(tuple(words)))
    for group in alike:
        tree[group][next(iter(PARTS[group].choices))] = chosen[group] = named[group]
    return {**tree, **{part: _with_defaults(part, tree[part]) for part in PARTS}}, chosen


@registry.derived
def _composed(overrides: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    _offer_kinds()
    try:
        # Hydra 1.3 warns where the version is not given, 1.4 where it is.
        with warnings.catch_warnings(action="ignore"), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("config", list(overrides), return_hydra_config=True)
        chosen = dict(config.hydra.runtime.choices)
        OmegaConf.set_readonly(config, False)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        tree: Any = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())[:300]}") from error
    _check_tree(tree, " ".join(overrides))
    return tree, chosen


@registry.derived
def _offer_kinds() -> None:
    """Let `penalty: NAME` be composed for every kind: only what differs from its defaults needs a YAML file."""
    store = ConfigStore.instance()
    for group, family in FAMILIES.items():
        key = next(iter(PARTS[group].choices))
        for name in registry.kinds(family):
            store.store(group=group, name=name, node={key: name})
    for group in PLAIN:
        store.store(group=group, name="default", node={})


def _with_defaults(part: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a group, with what a configuration has in place of the defaults of the settings."""
    if part not in FAMILIES:
        return given
    key, (family, default) = next(iter(PARTS[part].choices.items()))
    kinds = registry.kinds(family)
    name = given.get(key, default)
    if name not in kinds:
        raise UserError(f"{part}.{key} cannot be {show(name)}{nearest(str(name), kinds)}")
    found = {key: name, **IN_CONFIG.get(part, {}), **kinds[name].defaults}
    if part == "penalty":
        found["ladder"] = list(kinds[name].ladder)
    return {**found, **given}


def _check_tree(tree: Any, where: str) -> None:
    """Every key of the composed YAML is known."""
    known: dict[str, set[str]] = {part: _given(kind) for part, kind in PARTS.items()}
    known["penalty"] |= {"ladder"}
    known["evaluation"] = _given(Evaluation)
    top = {*known, *SEEDS, "logger", "launcher", "device", "output_dir", "name", "grid", "claims"}
    for name, keys, expected in [("", tree, top), *((f"{part}.", tree.get(part), known[part]) for part in known)]:
        if not isinstance(keys, dict):
            raise UserError(f"{where}: {name[:-1]} must be a mapping, got {show(keys)}")
        wrong = min(set(keys) - expected, key=str, default=None)
        if wrong is not None:
            raise UserError(f"{where}: unknown key {show(f'{name}{wrong}')}{nearest(str(wrong), expected)}")
    if missing := min(top - set(tree), default=None):
        raise UserError(f"{where}: {missing} is missing")
    if not isinstance(tree["penalty"].get("ladder", []), list):
        raise UserError(f"{where}: penalty.ladder must be a list, got {show(tree['penalty']['ladder'])}")


def _given(kind: type[Part]) -> set[str]:
    return {name for name, setting in kind.all_settings().items() if setting.given}


def _lookup(tree: Mapping[str, Any], key: str) -> Any:
    part, _, name = key.rpartition(".")
    if part == "evaluation":
        return tree[part].get(name, Evaluation.all_settings()[name].default)
    return tree[part][name] if part else tree[name]


def _free(settings: Mapping[str, Any], group: str, one: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the logger or launcher: their YAML says which keys there are and of what type."""
    settings = dict(settings)
    for key, value in one.items():
        name = key.removeprefix(f"{group}.")
        if name == key:
            continue
        if name == "name":
            raise UserError(f"{key} comes with its group: give {group}=… instead")
        if name not in settings:
            raise UserError(f"unknown key {show(key)}{nearest(key, [f'{group}.{each}' for each in settings])}")
        if group != "launcher":  # what each key of that takes is its own affair
            kind = "str" if settings[name] is None else type(settings[name]).__name__
            value = coerce(key, Setting(None, kind=kind, optional=settings[name] is None), value)
        settings[name] = value
    return settings


def _launcher(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a launcher, checked."""
    return settings if settings["name"] == "local" else {"name": settings["name"], **vars(Launcher.of(settings))}


def _calibration(values: Mapping[str, Any], one: Mapping[str, Any]) -> Calibration | None:
    """What grid.calibrate asks for; UserError if it cannot be meant."""
    if values["grid.calibrate"] is None:
        unread = min((key for key in one if key in ("grid.l0_range", "grid.coefficients")), default=None)
        if unread:
            raise UserError(f"{unread} is read by grid.calibrate=l0 alone: give that too")
        return None
    asked = values["grid.l0_range"]
    if len(asked) != 2:
        raise UserError(f"grid.l0_range is from where to where, as [1,4], got {show(asked)}")
    low, high = (coerce("grid.l0_range", Setting(0.0, ge=LEAST), value) for value in asked)
    if low >= high:
        raise UserError(f"grid.l0_range={show(asked)} is empty: the second L0 must be above the first")
    return Calibration((low, high), values["grid.coefficients"])


def _hash(points: Sequence[Point], evaluation: Evaluation, calibration: Calibration | None) -> str:
    """Tells grids apart: the points, in whatever order, and how they are measured. 8 hexadecimal digits."""
    chosen = [] if calibration is None else [str(calibration.l0_range)]
    text = " ".join([measure_id(evaluation), *chosen, *sorted(point.id for point in points)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
