"""From what the user typed to a sweep: compose the YAML, apply the overrides, check everything.

Hydra's grammar is read here; it composes once for each option of a config group (config/compose.py); plain values are
applied to plain dictionaries (config/grid.py), since composing costs about 0.1 s a time.
"""

from __future__ import annotations

import contextlib
import decimal
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, QuotedString, RangeSweep

from sae_sweep import registry
from sae_sweep.config import files
from sae_sweep.config.axes import (
    FAMILIES,
    GROUPS,
    Axes,
    UnknownOption,
    check_values,
    is_file,
    is_sweep_key,
    listing,
    merge_blocks,
)
from sae_sweep.config.calibration import LEAST, Calibration
from sae_sweep.config.claims import check_claims
from sae_sweep.config.compose import compose, with_defaults
from sae_sweep.config.gc import no_collection
from sae_sweep.config.grid import (
    LARGEST_GRID,
    YES,
    Settings,
    Sweep,
    counted,
    expand,
    expand_uncalibrated,
    keys_read,
    varied,
)
from sae_sweep.config.keys import (
    CHOSEN,
    SEEDS,
    check_axis,
    coerce,
    nearest,
    point_keys,
    show,
    split_at_commas,
    sweep_keys,
)
from sae_sweep.config.launcher import Launcher
from sae_sweep.config.logger import resolved
from sae_sweep.config.settings import PARTS, Evaluation, Point, measure_id
from sae_sweep.config.text import PATHS, resolve
from sae_sweep.environment import dangling
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

# Overrides of these alone leave the grid as it is.
NEUTRAL = ("logger", "device", "output_dir", "launcher", "name")
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
    option, alone = _experiment(asked)
    typed = tuple(key for key in asked if not is_sweep_key(key))
    asked = {**_swept_by_hydra(option, largest), **asked}
    one = {key: values[0] for key, values in asked.items() if is_sweep_key(key)}
    axes = {key: values for key, values in asked.items() if key not in one}

    # With several options of a group, the first stands for it wherever the others do not matter.
    first = {group: values[0] for group, values in asked.items() if group in GROUPS} | {"experiment": option}
    composed = compose(first)
    tree, chosen = composed.tree, composed.chosen
    where = f"experiment={option}" if option else "conf"
    blocks = merge_blocks(tree["grid"], axes, where)
    options = _options(first, tree, chosen, blocks)
    settings = Settings(options, chosen, {name: tree[name] for name in SEEDS})
    _check_read(settings, blocks, typed, tree, where)
    values = {key: coerce(key, rule, one.get(key, _lookup(tree, key))) for key, rule in sweep_keys().items()}
    points, calibration = _points(settings, blocks, _calibration(values, one), largest)

    evaluation = Evaluation(**{name: values[f"evaluation.{name}"] for name in Evaluation.all_settings()})
    experiment = Path(option).stem if option and files.is_path(option) else option
    grid = _hash(points, evaluation, calibration)
    name = values["name"] and resolve("name", values["name"])
    name = name or (experiment if alone else None) or f"{experiment or 'adhoc'}-{grid}"
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
        output_dir=Path(resolve("output_dir", values["output_dir"])),
        calibration=calibration,
        files={str(path): path.read_text(encoding="utf-8-sig") for path in composed.user_files},
    )


def _points(
    settings: Settings, blocks: Sequence[Axes], calibration: Calibration | None, largest: int | None
) -> tuple[list[Point], Calibration | None]:
    """The points of the grid; with the calibration, that holds its stand-ins."""
    if calibration is None:
        with no_collection():
            return expand(settings, blocks, largest), None
    points, calibration = expand_uncalibrated(settings, blocks, calibration, largest)
    if not calibration.rungs:
        raise UserError(
            "grid.calibrate=l0 has nothing to choose: every coefficient is given, or sae.k counts in its place "
            "(leave penalty.coefficient out, or give penalty.coefficient=null)"
        )
    return points, calibration


def _swept_by_hydra(experiment: str | None, largest: int | None) -> Axes:
    """What the file of an experiment sweeps under `hydra.sweeper.params`, as the command line would."""
    path = files.locate("experiment", experiment) if experiment else None
    if path is None:
        return {}
    params = files.read("experiment", path).get(files.PARAMS, {})
    listed = {key: value if isinstance(value, list) else [value] for key, value in params.items()}
    words = [f"{key}={','.join(map(str, value))}" for key, value in listed.items()]
    try:
        return _parse(words, largest)
    except UserError as error:
        raise UserError(f"{path}: {files.PARAMS}: {error}") from error


def _check_read(
    settings: Settings, blocks: Sequence[Axes], typed: Sequence[str], tree: Mapping[str, Any], where: str
) -> None:
    """UserError for a key that no point of the grid reads, with the kinds that would read it.

    Of an experiment, what the command line took the use of is let be: with another penalty, its exponent.
    """
    read = keys_read(settings, blocks)
    replaced = {key.partition(".")[0] for key in typed}
    given = dict.fromkeys(typed, "")
    named = [f"{part}.{name}" for part in PARTS for name in _written(part, tree[part])]
    named += [key for block in blocks for key in block]
    given |= {key: f"{where}: " for key in named if key.partition(".")[0] not in replaced}
    for key, prefix in given.items():
        if key in point_keys() and key not in read and key not in SEEDS:
            raise UserError(f"{prefix}{key} is read by {_readers(key)} alone, and no point of this grid has that")


def _written(part: str, values: Mapping[str, Any]) -> list[str]:
    """The settings of a part that are not merely what the kind it has brings with it."""
    chooser = next(iter(PARTS[part].choices))
    brought = with_defaults(part, {chooser: values[chooser]}) if chooser in values else {}
    return [name for name, value in values.items() if name not in brought or brought[name] != value]


def _readers(key: str) -> str:
    """The kinds that have a setting: `penalty=lp`, or `sae.init=kmeans, oracle`."""
    part, _, name = key.partition(".")
    found = []
    for chooser, (family, _) in PARTS[part].choices.items():
        able = [
            kind.name for kind in registry.kinds(family).values() if name in kind.settings and kind.settings[name].given
        ]
        group = CHOSEN.get(f"{part}.{chooser}", f"{part}.{chooser}")
        found += [f"{group}={', '.join(able)}"] if able else []
    return " or ".join(found)


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
    return check_axis("penalty.coefficient", compose({"penalty": penalty}).tree["penalty"]["ladder"])


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
        if name in PATHS and text.startswith("~"):
            _keep(asked, name, [text])  # Hydra's grammar has no word that begins so
            continue
        if rule and rule.verbatim:
            _keep(asked, name, [None if rule.optional and value == "null" else value for value in as_typed(text)])
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
            other = compose({**first, part: option}).tree
            if {**other, part: None} != {**tree, part: None}:
                raise UserError(f"{files.locate(part, option)} sets keys outside its group")
            options[part][option] = other[part] | ({"file": option} if is_file(part, option) else {})
    return options


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
            raise _no_setting(key, group, name, settings)
        if group != "launcher":  # what each key of that takes is its own affair
            kind = "str" if settings[name] is None else type(settings[name]).__name__
            value = coerce(key, Setting(None, kind=kind, optional=settings[name] is None), value)
        settings[name] = value
    return {name: resolve(f"{group}.{name}", value) for name, value in settings.items()}


def _no_setting(key: str, group: str, name: str, settings: Mapping[str, Any]) -> UserError:
    """The option of the group that has such a setting, or the nearest setting of the one that is chosen."""
    for option, path in files.options(group).items():
        if name in files.read(group, path):
            return UserError(f"{key} is read by {group}={option} alone: give {group}={option} too")
    known = [f"{group}.{each}" for each in settings if each != "name"]
    hint = nearest(key, known) if known else f": {group}={settings['name']} has no settings"
    return UserError(f"unknown key {show(key)}{hint}")


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
