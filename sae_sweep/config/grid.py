"""Axes to points: the product of each block's values, checked, canonical, each point once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_sweep import registry
from sae_sweep.config.calibration import Calibration, stand_ins
from sae_sweep.config.keys import SEED, SEEDS, coerce, names_sae, nearest, point_keys, show
from sae_sweep.config.settings import PARTS, Evaluation, Part, Point, canonical, reseeded
from sae_sweep.errors import UserError

# Larger grids are more often a slip than a plan.
LARGEST_GRID = 100_000
YES = ": pass --yes if that is meant"

_REFERENCE = re.compile(r"\$\{\s*(?:cells:\s*(?P<partition>\w*)|(?P<key>[\w.]+))\s*\}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A named grid and everything around it that is one for the whole sweep.

    `points` are canonical, unique and in grid order; `varied` are the dotted keys that differ among them.
    `calibration`: which coefficients are to be chosen, or were; None if all are given.
    `files`: the user's own files that it was composed of, path → content.
    """

    name: str
    overrides: list[str]
    experiment: str | None
    points: list[Point]
    varied: list[str]
    evaluation: Evaluation
    claims: list[dict[str, Any]]
    logger: dict[str, Any]
    launcher: dict[str, Any]
    device: str
    output_dir: Path
    calibration: Calibration | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where a grid starts from.

    options: part → option → {setting: value}, for every option that the blocks or `chosen` name
    chosen: part → the option where a block names none
    seeds: the values of `seed` and `data_seed` where a block gives none
    """

    options: Mapping[str, Mapping[str, Mapping[str, Any]]]
    chosen: Mapping[str, str]
    seeds: Mapping[str, Any]


Block = Mapping[str, Sequence[Any]]


def expand(settings: Settings, blocks: Sequence[Block], largest: int | None = LARGEST_GRID) -> list[Point]:
    """The points of the union of `blocks`; each block is the product of its keys' values.

    A key is a part (its values are options of that config group) or a dotted key. Values may be `${a.key}` or
    `${cells:mq}`, the number of non-empty cells of a partition of the point's toy; a coefficient of null takes the
    penalty's ladder. Parts vary slowest, then keys in the order given. Settings without effect are put to their
    defaults, and points that are then equal collapse.
    UserError: a value of the wrong type or out of bounds, or more than `largest` combinations.
    """
    products = _all_products(settings, blocks, largest)
    return list(dict.fromkeys(point for product in products for point in product.points()))


def expand_uncalibrated(
    settings: Settings, blocks: Sequence[Block], calibration: Calibration, largest: int | None = LARGEST_GRID
) -> tuple[list[Point], Calibration]:
    """The points of `expand` with stand-ins in place of each ladder, and the calibration with those for its rungs."""
    points: dict[Point, None] = {}
    rungs: dict[Point, int] = {}
    given: set[Point] = set()
    for product in _all_products(settings, blocks, largest, calibration.coefficients):
        for point in product.points():
            points[point] = None
            if point.penalty.coefficient in product.ladder:  # architectures that count have none
                rungs[point] = product.ladder.index(point.penalty.coefficient)
            else:
                given.add(point)
    return list(points), dataclasses.replace(calibration, rungs=rungs, given=frozenset(given & rungs.keys()))


def varied(points: Sequence[Point]) -> list[str]:
    """The dotted keys whose values differ among `points`, in the schema's order."""
    keys = []
    for part in PARTS:
        # Points share most parts, and objects are told apart sooner than what they hold.
        seen = list(set({id(each): each for each in map(operator.attrgetter(part), points)}.values()))
        for name, setting in PARTS[part].all_settings().items():
            # Parts whose kinds have no such setting differ in their kinds.
            if setting.told and len({each.get(name) for each in seen if name in each.to_dict()}) > 1:
                keys.append(f"{part}.{name}")
    return keys + [name for name in SEEDS if len({getattr(point, name) for point in points}) > 1]


def keys_read(settings: Settings, blocks: Sequence[Block]) -> set[str]:
    """The dotted keys that the kinds of some point have, before what has no effect is put to its default."""
    read: set[str] = set()
    for product in (product for block in blocks for product in _products(settings, block, None)):
        for part, kind in PARTS.items():
            named = {f"{part}.{key}": default for key, (_, default) in kind.choices.items()}
            values = [product.axes.get(key, [product.base.get(key, default)]) for key, default in named.items()]
            values = [["trained" if names_sae(each) else each for each in some] for some in values]
            for chosen in itertools.product(*values):
                own = kind.own_settings(*chosen)
                read |= {*named, *(f"{part}.{name}" for name, setting in own.items() if setting.given)}
    return read


def counted(claims: Any, points: Sequence[Point]) -> Any:
    """Claims with each `${cells:mq}` replaced by the number, or numbers, that it stands for in the toys of `points`."""
    if isinstance(claims, Mapping):
        return {key: counted(value, points) for key, value in claims.items()}
    if isinstance(claims, list):
        return [counted(value, points) for value in claims]
    match = _REFERENCE.fullmatch(claims) if isinstance(claims, str) else None
    if match is None or match["partition"] is None:
        return claims
    toys = dict.fromkeys(point.toy for point in points)
    numbers = dict.fromkeys(toy.kind.classes(match["partition"], toy) for toy in toys)
    return list(numbers) if len(numbers) > 1 else next(iter(numbers))


def _all_products(
    settings: Settings, blocks: Sequence[Block], largest: int | None, rungs: int | None = None
) -> list[_Product]:
    products = [product for block in blocks for product in _products(settings, block, rungs)]
    total = sum(math.prod(len(values) for values in product.axes.values()) for product in products)
    if largest is not None and total > largest:
        raise UserError(f"the grid has {total:,} combinations, more than {largest:,}{YES}")
    return products


def _products(settings: Settings, block: Block, rungs: int | None) -> Iterator[_Product]:
    """One product of plain keys for every combination of the options that the block names.

    rungs: so many stand-ins take the place of each ladder
    """
    parts = [part for part in PARTS if part in block]
    for options in itertools.product(*(block[part] for part in parts)):
        chosen = {**settings.chosen, **dict(zip(parts, options, strict=True))}
        base = {part: dict(settings.options[part][chosen[part]]) for part in PARTS}
        ladder = base["penalty"].pop("ladder", None)
        axes = {key: values for key, values in block.items() if key not in PARTS}
        if axes.get("penalty.coefficient", [base["penalty"]["coefficient"]]) == [None]:
            if not ladder:
                raise UserError(f"penalty={chosen['penalty']} has no ladder: give penalty.coefficient")
            ladder = ladder if rungs is None else stand_ins(ladder, rungs)
            axes = {**axes, "penalty.coefficient": ladder}
        else:
            ladder = None
        flat = {f"{part}.{name}": value for part in PARTS for name, value in base[part].items()}
        yield _Product({**flat, **settings.seeds}, axes, ladder or [])


class _Product:
    """The product of plain axes over fixed options.

    Points share their parts: a part is built once for every combination of the axes it reads, itself or by reference.
    `ladder`: the coefficients, if they are not given.
    """

    def __init__(self, base: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], ladder: Sequence[float]) -> None:
        self.base = base
        self.axes = axes
        self.ladder = ladder
        self.place = {key: i for i, key in enumerate(axes)}

    def points(self) -> Iterator[Point]:
        """Canonical points. UserError: the parts of one do not go together."""
        reads = {part: self._reads([f"{part}.{name}" for name in kind.all_settings()]) for part, kind in PARTS.items()}
        reads |= {name: self._reads([name]) for name in SEEDS}
        made: dict[str, dict[tuple[Any, ...], Any]] = {part: {} for part in reads}
        moving = {part: places for part, places in reads.items() if places}
        # What a point is beside its seeds, by its parts as they were made: a hundred thousand have few combinations.
        known: dict[tuple[int, ...], Point] = {}
        parts: dict[str, Any] = {}
        for values in itertools.product(*self.axes.values()):
            for part, places in (moving if parts else reads).items():
                read = tuple([values[i] for i in places])
                if read not in made[part]:
                    made[part][read] = self._part(part, values) if part in PARTS else self._seed(part, values)
                parts[part] = made[part][read]
            whole = tuple([id(parts[part]) for part in PARTS])
            if whole not in known:
                known[whole] = canonical(_sensible(Point(**parts)))
            yield reseeded(known[whole], parts["seed"], parts["data_seed"])

    def _seed(self, key: str, values: Sequence[Any]) -> Any:
        return coerce(key, SEED, self._resolve(key, values, ()))

    def _part(self, part: str, values: Sequence[Any], trail: tuple[str, ...] = ()) -> Part:
        """One part of a point, resolved and checked."""
        kind = PARTS[part]
        settings = {
            key: self._resolve(f"{part}.{key}", values, trail) if self._says(f"{part}.{key}") else default
            for key, (_, default) in kind.choices.items()
        }
        start = settings.get("init")
        if names_sae(start):
            settings["init"] = "trained"
        for name, setting in kind.own_settings(*settings.values()).items():
            key = f"{part}.{name}"
            if setting.given and self._says(key):
                settings[name] = coerce(key, setting, self._resolve(key, values, trail))
        if part == "distribution":
            settings |= _weights(settings)
        if part == "toy":
            settings |= registry.get("toy", settings["name"]).resolve(settings)
        if part == "sae":
            settings["start"] = start if names_sae(start) else None
            settings |= registry.get("init", settings["init"]).resolve(settings)
        made = kind(**settings)
        for chosen in made.chosen.values():
            chosen.check(made)
        return made

    def _says(self, key: str) -> bool:
        return key in self.place or key in self.base

    def _resolve(self, key: str, values: Sequence[Any], trail: tuple[str, ...]) -> Any:
        """The value of `key` where the axes have `values`; `trail` are the keys that led here by reference."""
        value = values[self.place[key]] if key in self.place else self.base[key]
        if key in trail:
            raise UserError(f"{key}: {show(value)} refers back to itself")
        if not isinstance(value, str) or "${" not in value:
            return value
        match = _REFERENCE.fullmatch(value)
        if match is None:
            raise UserError(f"{key}: {show(value)} is neither ${{a.key}} nor ${{cells:mq}}")
        if match["partition"] is not None:
            toy = self._part("toy", values, (*trail, key))
            return toy.kind.classes(match["partition"], toy)
        target = match["key"]
        if self._says(target):
            return self._resolve(target, values, (*trail, key))
        return self._unsaid(key, value, target, values, trail)

    def _unsaid(self, key: str, value: str, target: str, values: Sequence[Any], trail: tuple[str, ...]) -> Any:
        """What a key refers to that nothing sets: the default of a kind; of a toy without tokens, how many maxima."""
        if target not in point_keys():
            raise UserError(f"{key}: {show(value)} names no setting{nearest(target, point_keys())}")
        part, _, name = target.partition(".")
        if part == key.partition(".")[0]:
            return PARTS[part].all_settings()[name].default
        made = self._part(part, values, (*trail, key))
        found = made.maxima if target == "toy.d_vocab" else made.get(name)
        if found is None:
            raise UserError(f"{key}: {show(value)} names a setting that {made} does not have")
        return found

    def _reads(self, keys: Sequence[str]) -> tuple[int, ...]:
        """The places of the axes that decide the values of `keys`, references followed."""
        found: set[str] = set()
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            if key in found:
                continue
            found.add(key)
            for value in self.axes.get(key, [self.base.get(key)]):
                if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
                    part = (match["key"] or "toy.").partition(".")[0]
                    named = [f"{part}.{name}" for name in PARTS[part].all_settings()] if part in PARTS else []
                    waiting += [*named, match["key"] or "toy.name"]
        return tuple(self.place[key] for key in self.axes if key in found)


def _sensible(point: Point) -> Point:
    """The point; UserError if its parts do not go together."""
    penalty, kind = registry.get("penalty", point.penalty.name), registry.get("architecture", point.sae.architecture)
    if penalty.counts and kind.fires is None and not kind.counts:
        able = [name for name, each in registry.kinds("architecture").items() if each.fires]
        raise UserError(
            f"penalty={penalty.name} counts, and a count has no slope under sae={kind.name} "
            f"(did you mean {' or '.join(f'sae={name}' for name in able)}?)"
        )
    _check_target(point)
    _check_length(point)
    encoder = registry.get("encoder", point.encoder.name)
    if not encoder.suits(kind):
        able = [name for name, each in registry.kinds("architecture").items() if encoder.suits(each)]
        raise UserError(f"encoder={encoder.name} goes with sae={', '.join(able)}, not with sae={kind.name}")
    sites = point.toy.kind.sites
    if sites and point.site.name not in sites:
        raise UserError(f"toy={point.toy.name} has no site {point.site.name}{nearest(point.site.name, sites)}")
    if point.sae.init == "truth" and not point.toy.kind.planted:
        raise UserError(f"sae.init=truth begins at planted features, and toy={point.toy.name} has none")
    return point


def _check_target(point: Point) -> None:
    """UserError if a mean L0 is asked for that nothing could reach, or k is to fall where there is none."""
    target, sae = point.training.target_l0, point.sae
    kind = registry.get("architecture", sae.architecture)
    if point.training.k_start is not None and not kind.counts:
        raise UserError(f"training.k_start is for what counts: sae={kind.name} has no sae.k")
    if target is None:
        return
    if kind.counts:
        raise UserError(f"training.target_l0 is for penalties: sae={kind.name} is told its L0 by sae.k")
    if not point.penalty.coefficient and "thresholds" not in kind.extras:
        raise UserError(f"training.target_l0 needs a penalty: sae={kind.name} has nothing else that makes it sparse")
    if target > sae.width:
        raise UserError(f"training.target_l0={target:g} is more than sae.width={sae.width}")


def _check_length(point: Point) -> None:
    """UserError if training is to end as the loss settles, and something goes by how many steps there are in all."""
    training = point.training
    if training.until != "plateau":
        return
    if registry.get("schedule", training.schedule).by_share:
        stay = [name for name, kind in registry.kinds("schedule").items() if not kind.by_share]
        raise UserError(
            f"training.until=plateau needs a rate that stays: training.schedule={training.schedule} falls over all "
            f"steps (did you mean {' or '.join(f'training.schedule={name}' for name in stay)}?)"
        )
    moving = {"training.k_start": training.k_start, "training.target_l0": training.target_l0}
    moving["penalty.p_end"] = point.penalty.get("p_end")
    if key := next((key for key, value in moving.items() if value is not None), None):
        raise UserError(f"training.until=plateau needs a loss that stays the same one, which {key} changes in training")


def _weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The absolute path and the digest of a file of weights; neither where the distribution has a formula."""
    if settings["name"] != "weights":
        return {}
    if settings.get("file") is None:
        raise UserError("distribution=weights needs distribution.file, a CSV of weights per cell")
    path = Path(settings["file"])
    try:
        path = path.expanduser().resolve()
        content = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"distribution.file={show(settings['file'])}: {reason}") from error
    return {"file": str(path), "digest": hashlib.sha256(content).hexdigest()[:16]}
