"""Measures, grids and ids against what their definitions say, written out slowly, on whatever chance brings."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CUT, Planted

from sae_sweep.config.grid import Settings, expand, varied
from sae_sweep.config.keys import point_keys
from sae_sweep.config.settings import PARTITIONS, PARTS, Evaluation, Point, canonical
from sae_sweep.metrics.information import information, share_told
from sae_sweep.metrics.labels import NOTHING, PURE, class_name, count, describe, only_one
from sae_sweep.registry import kinds, offered

ARCHITECTURES = tuple(kinds("architecture"))
INITS = offered("init")
PENALTIES = tuple(kinds("penalty"))

EVALUATION = Evaluation(fires_above=CUT)
shapes = st.sampled_from([(2, 2), (3, 2), (4, 2), (2, 3), (3, 3), (4, 3), (3, 4)])
distributions = st.sampled_from(["uniform", "max_stratified", "cell_stratified", "copies_balanced"])


def codes(planted: Planted, rng: np.random.Generator) -> np.ndarray:
    """Contributions [N, width]: classes of random partitions with losses, additions and levels of their own."""
    columns = []
    for _ in range(rng.integers(1, 7)):
        classes = planted.one_per(PARTITIONS[rng.integers(len(PARTITIONS))])
        column = classes[:, rng.integers(classes.shape[1])] * rng.choice([0.0, 0.5, 1.0, 3.0])
        column = column * (rng.random(len(column)) > rng.choice([0, 0.1, 0.4]))
        columns.append(column + 0.5 * (rng.random(len(column)) < rng.choice([0, 0.05, 0.3])))
    return np.stack(columns, 1).astype(np.float32)


@given(shapes, distributions, st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=80, deadline=None)
def test_owners_life_and_counts_against_the_inputs_one_by_one(
    shape: Any, distribution: str, seed: int, drawn: bool
) -> None:
    planted = Planted(*shape, distribution)
    norms = codes(planted, np.random.default_rng(seed))
    classes = planted.classes(EVALUATION, drawn)
    latents = describe(planted.table(norms), classes)
    counted = count(latents, classes)
    found = only_one(counted.metrics)
    weight, d_vocab = planted.weight, shape[0]
    by_cell: dict[int, float] = defaultdict(float)
    for cell, w in zip(planted.cell, weight, strict=True):
        by_cell[cell] += w
    floor = min(by_cell.values()) / 2
    owned, named, splits, wholes = set(), defaultdict(set), [0] * d_vocab, [0] * d_vocab
    keys = {name: list(zip(*(planted.factor(f).tolist() for f in name), strict=True)) for name in PARTITIONS}
    sizes = {
        name: Counter(key for key, w in zip(of_input, weight, strict=True) if w) for name, of_input in keys.items()
    }
    pure_in: dict[str, set[Any]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for j in range(norms.shape[1]):
        fires = norms[:, j] > np.float32(CUT)
        mass: dict[int, float] = defaultdict(float)
        for m, value, w in zip(planted.factor("m")[fires], norms[fires, j], weight[fires], strict=True):
            mass[m] += w * float(value)
        fired = weight[fires].sum()
        live = fired >= floor * (1 - 1e-9) and (fires.sum() >= 8 or not drawn)
        assert latents.live[j] == live
        assert latents.inputs[j] == fires.sum()
        assert latents.density[j] == pytest.approx(fired / weight.sum())
        if not mass:
            assert latents.owner[j] == NOTHING and np.isnan(latents.purity[j])
            continue
        share = max(mass.values()) / sum(mass.values())
        assert latents.purity[j] == pytest.approx(share, abs=1e-11)
        assert mass[latents.owner[j]] == pytest.approx(max(mass.values()))
        label = PARTITIONS[latents.label[j]] if latents.label[j] != NOTHING else ""
        assert live or not label
        counts[f"label_{label}"] += 1
        for name, of_input in keys.items():
            masses: dict[Any, float] = defaultdict(float)
            for i in np.flatnonzero(fires):
                masses[of_input[i]] += weight[i] * float(norms[i, j])
            best = max(masses, key=masses.__getitem__)
            if live and masses[best] >= (0.8 - 1e-9) * sum(masses.values()):
                counts[f"pure_{name}"] += 1
                pure_in[name].add(best)
                inside = np.array([key == best for key in of_input])
                if name == "mqnc" and weight[inside & fires].sum() < (0.5 - 1e-9) * weight[inside].sum():
                    counts["below_cell"] += 1
        if live and share >= 0.8 - 1e-9:
            counts["pure_latents"] += 1
            owned.add(latents.owner[j])
        if label:
            # The class that the label names is the one that the latent fires on most purely.
            example = latents.example[j]
            same = np.all([planted.factor(f) == planted.cells.factors[f][example] for f in label], axis=0)
            f1 = 2 * weight[same & fires].sum() / (weight[same].sum() + fired)
            assert 0.8 - 1e-9 <= f1 <= latents.f1[j] + 1e-9
            values = {f: int(planted.cells.factors[f][example]) for f in label}
            spelled = ",".join(f"{f}={'none' if (f, v) == ('n', -1) else v}" for f, v in values.items())
            assert class_name(planted.cells, latents.label[j], example) == spelled
            if label == "m":
                wholes[values["m"]] += 1
            elif "m" in label:
                splits[values["m"]] += 1
                named[values["m"]].add(spelled)
    duplicates = [max(0, n - 1) for n in wholes]
    assert counted.splits[0].tolist() == splits
    assert counted.duplicates[0].tolist() == duplicates
    expected = {name: counts[name] for name in ("pure_latents", *(f"label_{p}" for p in PARTITIONS))}
    expected |= {"owned_maxes": len(owned), "below_cell": counts["below_cell"]}
    expected |= {"split_maxes": sum(len(classes) >= 2 for classes in named.values())}
    for name in PURE:
        countable = {key for key, n in sizes[name].items() if n >= (8 if drawn else 0)}
        if len(sizes[name]) > 1 and countable:
            expected |= {f"pure_{name}": counts[f"pure_{name}"]}
            assert found[f"found_{name}"] == pytest.approx(len(pure_in[name] & countable) / len(countable))
        else:
            expected |= {f"pure_{name}": None, f"found_{name}": None}
    assert {name: found[name] for name in expected} == expected
    assert found["splits_per_max"] == pytest.approx(sum(splits) / d_vocab)
    assert found["distinct_splits_per_max"] == pytest.approx(sum(map(len, named.values())) / d_vocab)
    assert found["duplicates_per_max"] == pytest.approx(sum(duplicates) / d_vocab)


@given(shapes, distributions, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_information_against_entropies_over_the_inputs(shape: Any, distribution: str, seed: int) -> None:
    planted = Planted(*shape, distribution)
    norms = codes(planted, np.random.default_rng(seed))
    table = planted.table(norms)
    fires = norms > np.float32(CUT)
    top = np.where(fires.any(1), np.where(fires, norms, 0).argmax(1), -1).tolist()
    values = {factor: planted.factor(factor).tolist() for factor in "mqnc"}
    columns = information(table, planted.cells, 3)
    for name, factor in (("query", "q"), ("runner_up", "n"), ("copies", "c")):
        for kind, given_ in (("info", "m"), ("unique", "mqnc".replace(factor, ""))):
            condition = list(zip(*(values[g] for g in given_), strict=True))
            entropy = _entropy(planted.weight, condition, values[factor])
            left = _entropy(planted.weight, list(zip(condition, top, strict=True)), values[factor])
            told = share_told(table, planted.cells, factor, given_)
            if entropy < 1e-9:
                assert told is None and columns[f"{kind}_{name}"] is None
            else:
                assert told == pytest.approx((entropy - left) / entropy, abs=1e-8)
                # What is corrected for chance is never more than what is not, and never more than everything.
                assert columns[f"{kind}_{name}"] is None or columns[f"{kind}_{name}"] <= told + 1e-8


def _entropy(weight: np.ndarray, given_: list[Any], values: list[Any]) -> float:
    """H(values | given_) in nats under the weights."""
    joint: dict[Any, float] = defaultdict(float)
    alone: dict[Any, float] = defaultdict(float)
    for w, condition, value in zip(weight / weight.sum(), given_, values, strict=True):
        joint[condition, value] += w
        alone[condition] += w
    return float(-sum(p * np.log(p / alone[condition]) for (condition, _), p in joint.items() if p > 0))


# Grids and ids

AXES: dict[str, list[Any]] = {
    "toy.seed": [0, 1, 2],
    "sae.width": [2, 3, 4],
    "sae.k": [1, 2],
    "sae.init": [name for name in INITS if name != "truth"],  # of planted features alone
    "sae.partition": ["m", "mq"],
    "penalty.coefficient": [0.0, 0.5, 1, 2.0],
    "penalty.p": [0.3, 0.5, 1],
    "penalty.scale": [1.0, 2.0],
    "training.coefficient_warmup": [0.0, 0.5],
    "seed": [0, 1],
    "data_seed": [0, 7],
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    part: {"only": kind().to_dict()} for part, kind in PARTS.items() if part not in ("sae", "penalty")
}
OPTIONS["sae"] = {name: PARTS["sae"](architecture=name).to_dict() for name in ARCHITECTURES}
OPTIONS["penalty"] = {name: PARTS["penalty"](name=name).to_dict() for name in PENALTIES}
CHOSEN = {part: next(iter(options)) for part, options in OPTIONS.items()}


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, list[Any]]:
    """A block of a few axes, of plain keys and of options, each with distinct values in any order."""
    keys = draw(st.lists(st.sampled_from([*AXES, "sae", "penalty"]), unique=True, max_size=4))
    # A count of what fires is no penalty of a ReLU: such grids are refused (test_config.py).
    values = {**AXES, "sae": list(ARCHITECTURES), "penalty": [name for name in PENALTIES if name != "l0"]}
    return {key: draw(st.lists(st.sampled_from(values[key]), unique=True, min_size=1, max_size=3)) for key in keys}


@given(st.lists(blocks(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_grid_is_the_union_of_products_each_point_once(given_: list[dict[str, list[Any]]]) -> None:
    found = expand(Settings(OPTIONS, CHOSEN, {"seed": 0, "data_seed": 0}), given_)
    expected: list[Point] = []
    for block in given_:
        for combination in itertools.product(*block.values()):
            chosen = dict(zip(block, combination, strict=True))
            parts = {part: dict(OPTIONS[part][chosen.get(part, CHOSEN[part])]) for part in PARTS}
            seeds = {"seed": 0, "data_seed": 0}
            for key, value in chosen.items():
                part, _, name = key.rpartition(".")
                if part:
                    parts[part][name] = value
                elif key in seeds:
                    seeds[key] = value
            point = canonical(Point(**{part: PARTS[part](**values) for part, values in parts.items()}, **seeds))
            if point not in expected:
                expected.append(point)
    assert set(found) == set(expected) and len(found) == len(expected)
    ids = [point.id for point in found]
    assert len(set(ids)) == len(ids)
    assert ids == [dataclasses.replace(point, seed=point.seed).id for point in found]
    assert all(len(id) == 16 and int(id, 16) >= 0 for id in ids)
    # The order in which axes and blocks are given changes the order of the points alone.
    turned = [dict(reversed(block.items())) for block in reversed(given_)]
    assert set(expand(Settings(OPTIONS, CHOSEN, {"seed": 0, "data_seed": 0}), turned)) == set(found)
    for key in varied(found):
        assert key in point_keys() or key in ("penalty.name", "sae.architecture")
        assert len({_value(point, key) for point in found}) > 1
    for key in AXES.keys() - set(varied(found)):
        # Points of other kinds have no such setting.
        assert len({_value(point, key) for point in found} - {None}) <= 1


def _value(point: Point, key: str) -> Any:
    return point.get(key)


def _merged(point: Point, key: str, value: Any) -> Point:
    part, _, name = key.rpartition(".")
    if not part:
        return dataclasses.replace(point, **{key: value})
    return dataclasses.replace(point, **{part: getattr(point, part).replace(**{name: value})})


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_ids_differ_exactly_where_canonical_settings_do(data: st.DataObject) -> None:
    point = Point(
        sae=PARTS["sae"](architecture=data.draw(st.sampled_from(ARCHITECTURES))),
        penalty=PARTS["penalty"](name=data.draw(st.sampled_from(PENALTIES))),
    )
    other = point
    for key in data.draw(st.lists(st.sampled_from(list(AXES)), max_size=3)):
        point = _merged(point, key, data.draw(st.sampled_from(AXES[key])))
        other = _merged(other, key, data.draw(st.sampled_from(AXES[key])))
    assert (point.id == other.id) == (canonical(point) == canonical(other))
    assert canonical(canonical(point)) == canonical(point)
    assert canonical(point).id == point.id
