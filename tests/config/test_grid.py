"""The grid: products, references, collapsing, limits."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_sweep.config.grid import Block, Settings, counted, expand, varied
from sae_sweep.config.keys import check_axis, coerce, nearest, point_keys
from sae_sweep.config.settings import (
    PARTITIONS,
    Distribution,
    Encoder,
    Penalty,
    Point,
    Sae,
    Site,
    Toy,
    Training,
    canonical,
    toy_id,
)
from sae_sweep.errors import UserError
from sae_sweep.toys.classes import count_classes


def settings(**changes: Any) -> Settings:
    """Two penalties and two architectures over a small toy; `changes` are dotted keys, dots as double underscores."""
    parts: dict[str, Any] = {
        "toy": Toy(d_vocab=16, k=3),
        "site": Site(),
        "distribution": Distribution(),
        "encoder": Encoder(),
        "training": Training(),
    }
    options: dict[str, dict[str, dict[str, Any]]] = {name: {"a": part.to_dict()} for name, part in parts.items()}
    options["sae"] = {name: Sae(architecture=name, width=8).to_dict() for name in ("relu", "topk")}
    options["penalty"] = {
        "l1": {**Penalty("l1").to_dict(), "coefficient": None, "ladder": [0.25, 1]},
        "tanh": {**Penalty("tanh").to_dict(), "coefficient": None, "ladder": [0.5, 2.0, 8.0]},
    }
    for key, value in changes.items():
        part, _, name = key.partition("__")
        for option in options[part].values():
            option[name] = value
    chosen = dict.fromkeys(parts, "a") | {"sae": "relu", "penalty": "l1"}
    return Settings(options, chosen, {"seed": 0, "data_seed": 0})


def test_each_penalty_takes_its_own_ladder() -> None:
    points = expand(settings(), [{"penalty": ["l1", "tanh"]}])
    found = [(point.penalty.name, point.penalty.coefficient) for point in points]
    assert found == [("l1", 0.25), ("l1", 1.0), ("tanh", 0.5), ("tanh", 2.0), ("tanh", 8.0)]


def test_a_given_coefficient_replaces_the_ladders_and_null_asks_for_them() -> None:
    given_one = expand(settings(), [{"penalty": ["l1", "tanh"], "penalty.coefficient": [3]}])
    assert [(p.penalty.name, p.penalty.coefficient) for p in given_one] == [("l1", 3.0), ("tanh", 3.0)]
    fixed = settings(penalty__coefficient=3.0)
    assert len(expand(fixed, [{}])) == 1
    assert [p.penalty.coefficient for p in expand(fixed, [{"penalty.coefficient": [None]}])] == [0.25, 1.0]


def test_the_grid_is_the_union_of_the_blocks_products_in_order() -> None:
    blocks: list[Block] = [
        {"sae.width": [4, 8], "penalty.coefficient": [1.0], "seed": [0, 1]},
        {"sae.width": [8, 2], "penalty.coefficient": [1.0]},
    ]
    found = [(p.sae.width, p.seed) for p in expand(settings(), blocks)]
    assert found == [(4, 0), (4, 1), (8, 0), (8, 1), (2, 0)]


def test_points_are_canonical_unique_and_their_numbers_of_the_schemas_type() -> None:
    points = expand(settings(), [{"penalty.scale": [1, 2, 3], "sae.k": [1, 2], "penalty.coefficient": [1]}])
    assert points == [canonical(points[0])]
    assert type(points[0].penalty.coefficient) is float
    topk = expand(settings(), [{"sae": ["topk"], "penalty": ["l1", "tanh"], "sae.k": [1, 2]}])
    assert [(p.sae.k, p.penalty.name) for p in topk] == [(1, "none"), (2, "none")]


def test_references_follow_the_point_they_are_in() -> None:
    points = expand(
        settings(),
        [{"toy.d_vocab": [8, 16], "sae.width": ["${toy.d_vocab}", "${cells:mq}", 5], "penalty.coefficient": [1.0]}],
    )
    assert [(p.toy.d_vocab, p.sae.width) for p in points] == [(8, 8), (8, 36), (8, 5), (16, 16), (16, 136), (16, 5)]
    chain: Block = {
        "seed": ["${toy.seed}"],
        "toy.seed": ["${data_seed}"],
        "data_seed": [3, 4],
        "penalty.coefficient": [1.0],
    }
    assert [(p.seed, p.toy.seed, p.data_seed) for p in expand(settings(), [chain])] == [(3, 3, 3), (4, 4, 4)]
    assert expand(settings(sae__width="${toy.k}"), [{}])[0].sae.width == 3


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"sae.width": ["${toy.d_vocb}"]}, "toy.d_vocab"),
        ({"sae.width": ["${cells:mx}"]}, "no such partition"),
        ({"sae.width": ["2${toy.k}"]}, "neither"),
        ({"sae.width": ["${sae.k}"], "sae.k": ["${sae.width}"]}, "refers back to itself"),
        ({"toy.k": ["${cells:mq}"]}, "refers back to itself"),
        ({"sae.width": ["${site.name}"]}, "whole number"),
        ({"sae.width": ["${seed}"]}, "at least 1, got 0"),
        ({"sae": ["topk"], "sae.k": [9]}, "sae.k=9 is more than sae.width=8"),
    ],
)
def test_what_cannot_be_resolved_is_said_in_one_line(block: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")) as caught:
        expand(settings(), [block])
    assert "\n" not in str(caught.value)


def test_a_grid_beyond_the_limit_is_refused_before_it_is_built() -> None:
    blocks = [{"seed": range(10), "sae.width": range(1, 4), "penalty.coefficient": [1.0]}] * 2
    with pytest.raises(UserError, match="60 combinations, more than 59: pass --yes"):
        expand(settings(), blocks, largest=59)
    assert len(expand(settings(), blocks, largest=60)) == len(expand(settings(), blocks, largest=None)) == 30


def test_a_weights_file_counts_by_its_content(tmp_path: Path) -> None:
    for name, text in (("a", "m,weight\n0,1\n"), ("b", "m,weight\n0,1\n"), ("c", "m,weight\n0,2\n")):
        (tmp_path / f"{name}.csv").write_text(text)
    files = [str(tmp_path / f"{name}.csv") for name in "abc"]
    points = expand(
        settings(distribution__name="weights"), [{"distribution.file": files, "penalty.coefficient": [1.0]}]
    )
    assert [point.distribution.file for point in points] == [files[0], files[2]]
    assert points[0].id != points[1].id
    moved = dataclasses.replace(points[0], distribution=points[0].distribution.replace(file=files[1]))
    assert moved.id == points[0].id
    assert varied(points) == ["distribution.digest"]
    with pytest.raises(UserError, match=r"needs distribution\.file"):
        expand(settings(distribution__name="weights"), [{}])


def test_varied_names_what_differs_and_nothing_else() -> None:
    points = expand(
        settings(), [{"penalty": ["l1", "tanh"], "seed": [0, 1], "penalty.coefficient": [1.0], "sae.k": [1, 2]}]
    )
    assert varied(points) == ["penalty.name", "seed"]
    assert varied(points[:1]) == []


def test_closed_forms_agree_with_enumeration() -> None:
    for d_vocab, k in ((2, 2), (2, 3), (3, 2), (4, 3), (5, 2), (3, 4)):
        sequences = itertools.product(range(d_vocab), repeat=k)
        factors = [
            {"m": max(s), "q": s[-1], "n": max((t for t in s if t < max(s)), default=-1), "c": s.count(max(s))}
            for s in sequences
        ]
        for partition in PARTITIONS:
            classes = {tuple(cell[name] for name in partition) for cell in factors}
            assert count_classes(partition, d_vocab, k) == len(classes), (partition, d_vocab, k)


def test_a_claim_may_count_in_cells() -> None:
    claim = {"where": {"width": "${cells:mq}", "init": "oracle"}, "versus": {"where": {"width": ["${cells:m}", 7]}}}
    toys = [Point(toy=Toy(d_vocab=d, k=3)) for d in (16, 4)]
    (one,) = counted([claim], toys[:1])
    assert one == {"where": {"width": 136, "init": "oracle"}, "versus": {"where": {"width": [16, 7]}}}
    assert counted(claim, toys)["where"]["width"] == [136, 10]
    with pytest.raises(UserError, match=r"did you mean 'rough'"):
        counted({"where": {"width": "${cells:rouhg}"}}, toys)


def test_the_published_cell_counts() -> None:
    counts = {name: count_classes(name, 64, 4) for name in ("m", "mc", "mq", "mn", "mqc", "mnc", "mqn", "mqnc")}
    assert counts == {
        "m": 64,
        "mc": 253,
        "mq": 2080,
        "mn": 2080,
        "mqc": 6301,
        "mnc": 6112,
        "mqn": 45760,
        "mqnc": 95488,
    }


def test_ids_tell_apart_what_trains_apart_and_nothing_else() -> None:
    point = Point()
    assert point.id == Point(penalty=Penalty(coefficient=1)).id  # 1 and 1.0 are one setting
    assert point.id == Point(penalty=Penalty(scale=7.0)).id
    assert point.id == Point(sae=Sae(k=7, partition="mq")).id
    assert Point(penalty=Penalty("lp", 1.0, p=0.5)).id == Point(penalty=Penalty("sqrt", 1.0)).id
    changed = [
        Point(seed=1),
        Point(data_seed=1),
        Point(site=Site("post_unembed")),
        Point(toy=Toy(seed=1)),
        Point(penalty=Penalty(coefficient=1.5)),
        Point(sae=Sae(architecture="topk")),
        Point(sae=Sae(architecture="topk", k=2)),
        Point(training=Training(lr=0.5)),
        Point(distribution=Distribution("uniform")),
    ]
    ids = {point.id, *(each.id for each in changed)}
    assert len(ids) == len(changed) + 1
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in ids)
    assert toy_id(Toy()) != toy_id(Toy(seed=1))


@given(
    st.integers() | st.floats() | st.text(max_size=5) | st.booleans() | st.none() | st.lists(st.integers(), max_size=2)
)
def test_a_value_is_either_converted_within_its_limits_or_refused(value: Any) -> None:
    for key, rule in point_keys().items():
        try:
            converted = coerce(key, rule, value)
        except UserError as error:
            assert str(error).startswith(key)
            assert "\n" not in str(error)
            continue
        kinds = {"number": ("int", "float"), "text": ("str",)}.get(rule.kind, (rule.kind,))
        assert (converted is None and rule.optional) or type(converted).__name__ in kinds
        if (rule.verbatim or rule.kind == "text") and type(value) in (int, float):
            assert converted == str(value)  # a file's number, where the shell's is text
            continue
        assert converted == (float(value) if rule.kind == "float" and value is not None else value)
        if converted is None:
            continue
        assert all(converted >= limit for limit in (rule.ge, rule.gt) if limit is not None)
        assert all(converted <= limit for limit in (rule.le, rule.lt) if limit is not None)


def test_open_limits_exclude_their_ends() -> None:
    for key, value in (("training.lr", 0), ("sae.margin", 1), ("penalty.p", 0)):
        with pytest.raises(UserError, match=r"above 0|below 1"):
            check_axis(key, [value])
    assert check_axis("sae.margin", [0, "${training.lr_decay}"]) == [0.0, "${training.lr_decay}"]


def test_the_nearest_valid_thing() -> None:
    assert "'sae.width'" in nearest("sae.widht", point_keys())
    assert "'sae.width'" in nearest("width", point_keys())
    assert "'toy.lr' or 'training.lr'" in nearest("lr", point_keys())
    assert nearest("zzz", ["l1", "sqrt"]) == " (valid: l1, sqrt)"
