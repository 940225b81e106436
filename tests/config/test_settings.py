"""The identity of a point: what it is made of, and what it must not depend on."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from sae_sweep import registry
from sae_sweep.config import settings
from sae_sweep.config.settings import (
    Distribution,
    Part,
    Penalty,
    Point,
    Sae,
    Site,
    Toy,
    Training,
    canonical,
    point_from,
    reseeded,
    toy_id,
)
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

# Written down at TRAIN_VERSION 3. An id here changes only with that, or with the version of one of its kinds.
IDS = {
    "43695af543216bbc": Point(),
    "d96b96a05eff9e95": Point(sae=Sae("topk", width=136, k=4, init="whitened", margin=0.0)),
    "6a7f7ae1ad45dce1": Point(
        toy=Toy("parents", modifiers=3), sae=Sae("jumprelu"), penalty=Penalty("lp", 0.5, p=0.3), seed=2
    ),
    "e722be043890fe3e": Point(
        site=Site("post_unembed"), sae=Sae(init="oracle", partition="mq", ridge=1e-4), data_seed=1
    ),
}


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Put another kind in the place of one that is registered."""

    def change(kind: registry.Kind, **said: object) -> None:
        monkeypatch.setitem(registry._kinds[kind.family], kind.name, dataclasses.replace(kind, **said))  # type: ignore[arg-type]
        forget()

    def forget() -> None:
        for clear in registry._derived:
            clear()

    yield change
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("id", IDS)
def test_ids_stay(id: str) -> None:
    assert IDS[id].id == id


def test_a_kind_of_another_version_changes_its_own_ids_and_no_others(changed) -> None:  # type: ignore[no-untyped-def]
    of_tied, others = Point(sae=Sae("tied")), [Point(), Point(sae=Sae("topk"))]
    before, same = of_tied.id, [point.id for point in others]
    changed(registry.get("architecture", "tied"), version=2)
    assert Point(sae=Sae("tied")).id != before
    assert [Point().id, Point(sae=Sae("topk")).id] == same
    assert toy_id(Toy()) == toy_id(Toy())


def test_a_setting_that_came_later_is_told_only_where_it_differs_from_its_legacy(changed) -> None:  # type: ignore[no-untyped-def]
    before, record = Point(penalty=Penalty("tanh", 1.0)).id, Point(penalty=Penalty("tanh", 1.0)).to_dict()
    kind = registry.get("penalty", "tanh")
    later = {"sharpness": Setting(2.0, legacy=1.0)}
    changed(kind, settings={**kind.settings, **later})
    as_before = Point(penalty=Penalty("tanh", 1.0, sharpness=1.0))
    assert as_before.id == before
    assert (
        len({before, Point(penalty=Penalty("tanh", 1.0)).id, Point(penalty=Penalty("tanh", 1.0, sharpness=3)).id}) == 3
    )
    # A record from before is read with the value that means what was done then, not with the default.
    assert point_from(record) == as_before


def test_a_part_holds_the_settings_of_its_own_kinds_alone() -> None:
    assert Penalty("l1", 1.0, p=0.3, scale=2.0) == Penalty("l1", 1.0)
    assert Sae("relu", k=3) == Sae("relu") != Sae("topk", k=3)
    assert Sae("relu", init="random", margin=0.9) == Sae("relu", init="random")
    assert "d_vocab" not in Toy("circle", d_vocab=5).to_dict()
    with pytest.raises(AttributeError, match="name=circle has no setting 'd_vocab'"):
        Toy("circle").d_vocab  # noqa: B018
    with pytest.raises(TypeError, match="Penalty has no setting 'q'"):
        Penalty("l1", q=1)
    with pytest.raises(UserError, match="there is no penalty 'l7': none, l1"):
        Penalty("l7")


def test_parts_are_frozen_and_survive_copies() -> None:
    part: Part = Sae("topk", width=3, k=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        part.k = 3
    for other in (
        copy.copy(part),
        copy.deepcopy(part),
        pickle.loads(pickle.dumps(part)),
        part.replace(),
        eval(repr(part)),
    ):
        assert other == part and hash(other) == hash(part) and other.to_dict() == part.to_dict()
    assert Penalty("l1", 1).coefficient == 1.0 and Penalty("l1", 1) == Penalty("l1", 1.0)


def test_what_has_no_effect_is_not_in_the_identity() -> None:
    same = [
        (Point(penalty=Penalty("lp", 0.5, p=0.5)), Point(penalty=Penalty("sqrt", 0.5))),
        (Point(penalty=Penalty("lp", 0.5, p=1)), Point(penalty=Penalty("l1", 0.5))),
        (Point(penalty=Penalty("tanh", 0.0)), Point(penalty=Penalty("none", 0.0))),
        (Point(sae=Sae("topk"), penalty=Penalty("l1")), Point(sae=Sae("topk"), penalty=Penalty("sqrt"))),
        (Point(toy=Toy("circle"), site=Site("post_unembed")), Point(toy=Toy("circle"))),
        (Point(toy=Toy("circle"), distribution=Distribution("uniform")), Point(toy=Toy("circle"))),
        (
            Point(distribution=Distribution("weights", file="/x", digest="d")),
            Point(distribution=Distribution("weights", file="/y", digest="d")),
        ),
    ]
    for one, other in same:
        assert one.id == other.id and canonical(one) == canonical(other)
    different = [
        *(point for pair in same for point in pair[:1]),
        Point(seed=1),
        Point(data_seed=1),
        Point(training=Training(1)),
    ]
    assert len({point.id for point in different}) == len(different) - 1  # the two of the circle are one


def test_a_train_version_changes_every_id(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Point().id, toy_id(Toy())
    monkeypatch.setattr(settings, "TRAIN_VERSION", settings.TRAIN_VERSION + 1)
    assert Point(seed=0).id != before[0] and toy_id(Toy()) != before[1]


def test_points_survive_their_records() -> None:
    for point in (
        Point(),
        Point(toy=Toy("parents", modifiers=3), sae=Sae("jumprelu", init="oracle", partition="mq"), seed=4),
    ):
        assert point_from(point.to_dict()) == point


def test_seeds_are_of_names_and_do_not_collide() -> None:
    names = [(word, seed, width) for word in ("a", "b", "relu") for seed in range(40) for width in range(40)]
    seeds = {settings.derive_seed(*name) for name in names}
    assert len(seeds) == len(names) and all(0 <= seed < 2**63 for seed in seeds)
    # What an earlier scheme of digits gave to the same generator: a width of 2^21, and the next seed.
    assert settings.derive_seed("init", "relu", 2**21, 0) != settings.derive_seed("init", "relu", 0, 1)


def test_a_point_with_other_seeds_is_what_it_would_be_by_itself() -> None:
    point = canonical(Point(penalty=Penalty("sqrt", 0.3, scale=2.0), seed=1))
    assert point.id  # known before, and not taken along
    other = reseeded(point, 7, 3)
    wanted = canonical(dataclasses.replace(point, seed=7, data_seed=3))
    assert other == wanted and other.id == wanted.id != point.id
    assert canonical(other) is other and hash(other) == hash(wanted)
