"""Axes to points: the product of each block's values, checked, canonical, each point once."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_sweep.config.calibration import Calibration, stand_ins
from sae_sweep.config.keys import PART_KEYS, PARTS, POINT_KEYS, SEEDS, coerce, nearest, show
from sae_sweep.config.settings import COUNTED, PARTITIONS, Evaluation, Point, Toy, canonical
from sae_sweep.errors import UserError

# Larger grids are more often a slip than a plan.
LARGEST_GRID = 100_000
YES = ": pass --yes if that is meant"

_REFERENCE = re.compile(r"\$\{\s*(?:cells:\s*(?P<partition>\w*)|(?P<key>[\w.]+))\s*\}")
_SIZES = ("toy.name", "toy.d_vocab", "toy.k", "toy.features", "toy.modifiers", "toy.contexts")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A named grid and everything around it that is one for the whole sweep.

    `points` are canonical, unique and in grid order; `varied` are the dotted keys that differ among them.
    `calibration`: which coefficients are to be chosen, or were; None if all are given.
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
    return list(dict.fromkeys(canonical(point) for product in products for point in product.points()))


def expand_uncalibrated(
    settings: Settings, blocks: Sequence[Block], calibration: Calibration, largest: int | None = LARGEST_GRID
) -> tuple[list[Point], Calibration]:
    """The points of `expand` with stand-ins in place of each ladder, and the calibration with those for its rungs."""
    points: dict[Point, None] = {}
    rungs: dict[Point, int] = {}
    given: set[Point] = set()
    for product in _all_products(settings, blocks, largest, calibration.coefficients):
        for point in map(canonical, product.points()):
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
        seen = list({getattr(point, part) for point in points})
        for name in PART_KEYS[part]:
            if (part, name) != ("distribution", "file") and len({getattr(each, name) for each in seen}) > 1:
                keys.append(f"{part}.{name}")
    return keys + [name for name in SEEDS if len({getattr(point, name) for point in points}) > 1]


def count_classes(partition: str, d_vocab: int, k: int) -> int:
    """How many non-empty classes a partition of the cells has (REFERENCE: closed forms, k ≥ 2).

    With q or n below the maximum, at most k − 1 places are left for copies; q < n < m needs three places.
    """
    pairs = d_vocab * (d_vocab - 1) // 2
    triples = pairs * (d_vocab - 2) // 3
    counts = {
        "m": d_vocab,
        "q": d_vocab,
        "n": d_vocab,
        "c": k,
        "mq": d_vocab + pairs,
        "mn": d_vocab + pairs,
        "mc": 1 + (d_vocab - 1) * k,
        "mqn": d_vocab + 2 * pairs + (triples if k > 2 else 0),
        "mqc": 1 + (d_vocab - 1) * k + (k - 1) * pairs,
        "mnc": d_vocab + (k - 1) * pairs,
        "mqnc": d_vocab + 2 * (k - 1) * pairs + (k - 2) * triples,
        # Gross's rough count of the last, about eleven times it (REFERENCE, P2).
        "rough": d_vocab**3 * k,
    }
    if partition not in counts:
        raise UserError(f"${{cells:{partition}}}: no such partition{nearest(partition, counts)}")
    return counts[partition]


def counted(claims: Any, points: Sequence[Point]) -> Any:
    """Claims with each `${cells:mq}` replaced by the number, or numbers, that it stands for in the toys of `points`."""
    if isinstance(claims, Mapping):
        return {key: counted(value, points) for key, value in claims.items()}
    if isinstance(claims, list):
        return [counted(value, points) for value in claims]
    match = _REFERENCE.fullmatch(claims) if isinstance(claims, str) else None
    if match is None or match["partition"] is None:
        return claims
    numbers = dict.fromkeys(toy_classes(match["partition"], p.toy) for p in points)
    return list(numbers) if len(numbers) > 1 else next(iter(numbers))


def toy_classes(partition: str, toy: Toy) -> int:
    """How many classes a partition of the toy's cells has; UserError if there is no such partition, or no cells."""
    if toy.name == "max_of_k":
        return count_classes(partition, toy.d_vocab, toy.k)
    if toy.name == "independent":
        raise UserError(f"${{cells:{partition}}}: toy=independent has no cells, its features come in any combination")
    if partition not in PARTITIONS:
        raise UserError(f"${{cells:{partition}}}: no such partition{nearest(partition, PARTITIONS)}")
    with_q = {"parents": toy.modifiers + 1, "bigrams": toy.contexts}.get(toy.name, 1) if "q" in partition else 1
    return (toy.maxima if "m" in partition else 1) * with_q


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
        reads = {part: self._reads([f"{part}.{name}" for name in PART_KEYS[part]]) for part in PARTS}
        reads |= {name: self._reads([name]) for name in SEEDS}
        made: dict[str, dict[tuple[Any, ...], Any]] = {part: {} for part in reads}
        for values in itertools.product(*self.axes.values()):
            parts = []
            for part, places in reads.items():
                read = tuple([values[i] for i in places])
                if read not in made[part]:
                    made[part][read] = self._part(part, values)
                parts.append(made[part][read])
            yield _sensible(Point(*parts))

    def _part(self, part: str, values: Sequence[Any]) -> Any:
        """One part of a point (or a seed), resolved and checked."""
        if part in SEEDS:
            return self._value(part, values)
        names = [name for name in PART_KEYS[part] if (part, name) != ("distribution", "digest")]
        settings = {name: self._value(f"{part}.{name}", values) for name in names}
        if part == "distribution":
            settings |= _weights(settings)
        if part == "toy" and settings["name"] == "circle" and settings["d_model"] % 2:
            raise UserError(f"toy=circle has a sine for every cosine: toy.d_model={settings['d_model']} must be even")
        if part == "sae" and settings["architecture"] in COUNTED and settings["k"] > settings["width"]:
            raise UserError(f"sae.k={settings['k']} is more than sae.width={settings['width']}")
        return PARTS[part](**settings)

    def _value(self, key: str, values: Sequence[Any]) -> Any:
        part, _, name = key.rpartition(".")
        rule = PART_KEYS[part][name] if part else POINT_KEYS[key]
        return coerce(key, rule, self._resolve(key, values, ()))

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
            sizes = {size.removeprefix("toy."): self._resolve(size, values, (*trail, key)) for size in _SIZES}
            toy = Toy(**{name: coerce(f"toy.{name}", PART_KEYS["toy"][name], size) for name, size in sizes.items()})
            return toy_classes(match["partition"], toy)
        target = match["key"]
        if target not in self.base:
            raise UserError(f"{key}: {show(value)} names no setting{nearest(target, POINT_KEYS)}")
        return self._resolve(target, values, (*trail, key))

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
                    waiting += [match["key"]] if match["key"] else _SIZES
        return tuple(self.place[key] for key in self.axes if key in found)


def _sensible(point: Point) -> Point:
    """The point; UserError if its penalty can teach its architecture nothing."""
    sae = point.sae.architecture
    if point.penalty.name == "l0" and sae != "jumprelu" and sae not in COUNTED:
        raise UserError(f"penalty=l0 counts, and a count has no slope under sae={sae} (did you mean sae=jumprelu?)")
    return point


def _weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The absolute path and the digest of a file of weights; neither where the distribution has a formula."""
    if settings["name"] != "weights":
        return {"file": None, "digest": None}
    if settings["file"] is None:
        raise UserError("distribution=weights needs distribution.file, a CSV of weights per cell")
    path = Path(settings["file"])
    try:
        path = path.expanduser().resolve()
        content = path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"distribution.file={show(settings['file'])}: {reason}") from error
    return {"file": str(path), "digest": hashlib.sha256(content).hexdigest()[:16]}
