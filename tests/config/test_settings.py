"""The identity of a point: ids that stores already hold stay what they are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest

from sae_sweep.config import settings as schema
from sae_sweep.config.settings import Distribution, Penalty, Point, Sae, Site, Toy, Training, toy_id

SMALL = Toy(d_vocab=16, k=3, steps=1500, batch_size=256, lr=3e-3)
# Written down before any setting was added, at the first TRAIN_VERSION.
FIRST_IDS = {
    "ac536f4d7fefd40d": Point(),
    "ff328ed4ab9c451e": Point(sae=Sae("topk", width=136, k=4, init="whitened", margin=0.0)),
    "a0cecaf5fd4a2222": Point(
        site=Site("post_unembed"),
        sae=Sae(init="oracle", partition="mq", width=136, margin=0.7, ridge=1e-4),
        penalty=Penalty("log1p", 0.6, scale=2.0),
    ),
    "ecad7f08d761df77": Point(
        toy=SMALL,
        penalty=Penalty("lp", 0.5, p=0.3),
        training=Training(1000, coefficient_warmup=0.1),
        seed=2,
        data_seed=1,
    ),
    "ac0701e81b04fb95": Point(distribution=Distribution("weights", "/x", "abc123")),
}


@pytest.mark.parametrize("id", FIRST_IDS)
def test_ids_stay(id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "TRAIN_VERSION", 1)
    assert FIRST_IDS[id].id == id


def test_an_architecture_whose_step_changed_has_new_ids_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    changed, others = Point(sae=Sae("tied")), [Point(), Point(sae=Sae("topk"))]
    now, same = changed.id, [point.id for point in others]
    monkeypatch.setattr(schema, "STEP_VERSIONS", {"tied": schema.STEP_VERSIONS["tied"] + 1, "topk": 1})
    assert dataclasses.replace(changed).id != now
    assert [dataclasses.replace(point).id for point in others] == same


def test_ids_of_toys_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "TRAIN_VERSION", 1)
    assert [toy_id(Toy()), toy_id(Toy(d_vocab=16, k=3))] == ["094b77a5320aa8cc", "364a83a61a5c2afd"]


@dataclass(frozen=True)
class _Grown(Penalty):
    new: float = dataclasses.field(default=0.5, metadata={"as_before": 0.5})
    word: str = dataclasses.field(default="other", metadata={"as_before": "old"})


def _told(**settings: Any) -> str:
    return schema._digest({"penalty": _Grown("l1", 1.0, **settings)})


def test_a_new_setting_is_told_only_where_it_differs_from_before() -> None:
    before = schema._digest({"penalty": Penalty("l1", 1.0)})
    assert _told(word="old") == before
    assert _told(word="old", new=0.25) != before
    assert _told() != before  # a default that differs from before is told
    assert len({_told(word="old"), _told(), _told(new=0.25), _told(new=0.25, word="old")}) == 4


def test_every_setting_since_has_a_value_as_before() -> None:
    first = {"toy": 11, "site": 1, "distribution": 3, "sae": 7, "penalty": 4, "training": 7}
    for part, count in first.items():
        fields = dataclasses.fields(getattr(Point(), part))
        assert all("as_before" in f.metadata for f in fields[count:]), part
        assert not any("as_before" in f.metadata for f in fields[:count]), part
    assert set(schema.settings_before()) == {
        f"{part}.{f.name}" for part, count in first.items() for f in dataclasses.fields(getattr(Point(), part))[count:]
    }
