"""Interrupted and taken up again ends as if nothing had happened: bit for bit, whatever was interrupted."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import TINY
from safetensors.torch import save

from sae_sweep.config import overrides as config
from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import Point
from sae_sweep.signals import Interrupted
from sae_sweep.store.store import Store
from sae_sweep.sweep import checkpoint
from sae_sweep.sweep.events import Event, PointDone, TrainProgress
from sae_sweep.sweep.pack import Machine, run_pack

STEPS = 150
ARCHITECTURES = (
    ["sae=relu", "penalty=l1,sqrt", "penalty.coefficient=0.1,1"],
    ["penalty=lp_annealed", "penalty.coefficient=0.1,1", "penalty.p_end=0.3,0.5"],
    ["penalty=exclusive_pi", "penalty.coefficient=0.01,0.1", "seed=0,1"],
    ["sae=topk", "sae.k=2", "seed=0,1,2,3"],
    ["sae=batchtopk", "sae.k=2", "seed=0,1,2,3"],
    ["sae=jumprelu", "penalty=l0", "penalty.coefficient=0.1,1"],
    ["sae=gated", "penalty=l1", "penalty.coefficient=0.1,1"],
    ["sae=matryoshka", "sae.k=2", "seed=0,1"],
    ["sae=tied", "penalty=sqrt", "penalty.coefficient=0.1,1"],
    ["sae=topk", "sae.k=1", "sae.width=60", "training.revival=resample", "training.revival_every=50", "seed=0,1"],
)


def sweep_of(*overrides: str) -> Sweep:
    given = {word.partition("=")[0]: word for word in (*TINY, "device=cpu", f"training.steps={STEPS}", *overrides)}
    return config.load(list(given.values()))


class Log:
    """Notes events, and interrupts at the first that `at` picks."""

    def __init__(self, at: Callable[[Event], bool] = lambda event: False) -> None:
        self.at, self.events = at, list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if self.at(event):
            self.at = lambda event: False
            raise Interrupted(12)

    @property
    def steps(self) -> list[int]:
        return [event.step for event in self.events if isinstance(event, TrainProgress)]


def run(sweep: Sweep, store: Store, log: Log, points: Sequence[Point] | None = None, every: float = 1e9) -> None:
    run_pack(points or sweep.points, 1, 1, store, sweep.evaluation, Machine("cpu", 1, every), log)


def step(number: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, TrainProgress) and event.step == number


class Killed(BaseException):
    """What no handler sees."""


def kill_at(number: int) -> Callable[[Event], bool]:
    def kill(event: Event) -> bool:
        if step(number)(event):
            raise Killed
        return False

    return kill


def content(store: Store) -> dict[str, tuple[dict[str, Any], bytes, bytes]]:
    """Everything stored of each point, but for the seconds it took."""
    found = {}
    for id in store.ids("points"):
        record = store.read_record("points", id)
        del record["seconds"]
        files = (store.read("points", id, name) for name in ("sae_weights.safetensors", "latents.parquet"))
        found[id] = (record, *files)
    return found


def checkpoints(store: Store) -> list[Path]:
    return list(store.root.glob("checkpoints/*/*.safetensors"))


# One that learns a threshold and one that revives latents; each compiles its own.
FEW = (4, 9)


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(each, marks=() if i in FEW else pytest.mark.slow) for i, each in enumerate(ARCHITECTURES)],
)
def test_an_interrupted_stack_goes_on_with_the_same_bits(tmp_path: Path, overrides: list[str]) -> None:
    sweep, whole, parts = sweep_of(*overrides), Store(tmp_path / "whole"), Store(tmp_path / "parts")
    run(sweep, whole, Log())
    assert not checkpoints(whole)
    for at in (50, 125):
        with pytest.raises(Interrupted):
            run(sweep, parts, Log(step(at)))
        assert len(checkpoints(parts)) == 1
    last = Log()
    run(sweep, parts, last)
    assert last.steps == [STEPS]
    assert content(parts) == content(whole)
    assert not checkpoints(parts)


@pytest.mark.slow
def test_saes_that_stop_at_steps_of_their_own_go_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before and after the first of them stopped; and a part of the pack, alone from the beginning."""
    words = ["training.until=plateau", "training.schedule=constant", "training.lr=1e-2", "training.steps=1600"]
    sweep = sweep_of(*words, "penalty=l1,sqrt", "penalty.coefficient=0.3,3")
    whole, parts, alone = (Store(tmp_path / name) for name in ("whole", "parts", "alone"))
    log = Log()
    run(sweep, whole, log)
    stops = {id: record["until"]["stopped_at"] for id, (record, *_) in content(whole).items()}
    first, *_, last = sorted(step for step in stops.values() if step)
    assert first < last == min(log.steps[-1], last)
    monkeypatch.setattr(checkpoint, "LARGEST_SHARE", 1e9)
    for at in (first - 25, first, first + 25):
        with pytest.raises(Killed):
            run(sweep, parts, Log(kill_at(at)), every=0)
    resumed = Log()
    run(sweep, parts, resumed)
    assert resumed.steps[0] == first + 50
    assert content(parts) == content(whole)
    assert not checkpoints(parts)
    one, *_ = (point for point in sweep.points if stops[point.id] == first)
    run(sweep, alone, Log(), [one])
    assert content(alone) == {one.id: content(whole)[one.id]}


def test_points_that_were_not_yet_measured_are_not_trained_again(tmp_path: Path) -> None:
    sweep, whole, parts = sweep_of(*ARCHITECTURES[0]), Store(tmp_path / "whole"), Store(tmp_path / "parts")
    run(sweep, whole, Log())
    with pytest.raises(Interrupted):
        run(sweep, parts, Log(lambda event: isinstance(event, PointDone)))
    left = [point for point in sweep.points if point.id not in parts.ids("points")]
    assert 0 < len(left) < len(sweep.points)
    last = Log()
    run(sweep, parts, last, left)
    assert last.steps == []
    assert content(parts) == content(whole)
    assert not checkpoints(parts)


def test_a_pack_may_go_on_in_parts(tmp_path: Path) -> None:
    sweep, whole, parts = sweep_of(*ARCHITECTURES[0]), Store(tmp_path / "whole"), Store(tmp_path / "parts")
    run(sweep, whole, Log())
    with pytest.raises(Interrupted):
        run(sweep, parts, Log(step(75)))
    for half in (sweep.points[1::2], sweep.points[::2]):
        assert checkpoints(parts)
        log = Log()
        run(sweep, parts, log, half)
        assert log.steps[0] == 100
    assert content(parts) == content(whole)
    assert not checkpoints(parts)


def test_a_kill_loses_no_more_than_since_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, store = sweep_of(*ARCHITECTURES[0]), Store(tmp_path)
    monkeypatch.setattr(checkpoint, "LARGEST_SHARE", 1e9)
    with pytest.raises(Killed):
        run(sweep, store, Log(kill_at(100)), every=0)
    (path,) = checkpoints(store)
    assert path.name.split(".")[1] == "100"
    log = Log()
    run(sweep, store, log)
    assert log.steps == [125, 150]


@pytest.mark.parametrize("spoil", ["flip", "cut", "device"])
def test_what_is_no_checkpoint_of_ours_is_not_taken_up(tmp_path: Path, spoil: str) -> None:
    sweep, whole, parts = sweep_of(*ARCHITECTURES[0]), Store(tmp_path / "whole"), Store(tmp_path / "parts")
    run(sweep, whole, Log())
    with pytest.raises(Interrupted):
        run(sweep, parts, Log(step(50)))
    (path,) = checkpoints(parts)
    content_ = bytearray(path.read_bytes())
    if spoil == "flip":
        content_[-1] ^= 1
    elif spoil == "cut":
        content_ = content_[: len(content_) // 2]
    else:
        assert content_.count(b'"cpu"') == 1
        content_ = content_.replace(b'"cpu"', b'"gpu"')
    path.write_bytes(content_)
    log = Log()
    run(sweep, parts, log)
    assert log.steps[0] == 25
    assert content(parts) == content(whole)
    assert not checkpoints(parts)
    (line,) = parts.damaged
    assert str(path) in line and "does not match its checksum" in line
    assert (path.parent / ".damaged" / f"{path.name}-0").read_bytes() == content_


@pytest.mark.parametrize("tensors", [None, {}, {"flat": torch.zeros(3)}, {"failed": torch.zeros(4, dtype=torch.int64)}])
def test_a_strangers_checkpoint_is_no_more_than_its_tensors(tmp_path: Path, tensors: dict | None) -> None:
    """Its checksum is right: whoever made it can count. What it holds is not this stack."""
    sweep, whole, parts = sweep_of(*ARCHITECTURES[0]), Store(tmp_path / "whole"), Store(tmp_path / "parts")
    run(sweep, whole, Log())
    with pytest.raises(Interrupted):
        run(sweep, parts, Log(step(50)))
    (path,) = checkpoints(parts)
    about = {"ids": json.dumps([point.id for point in sweep.points]), "device": "cpu"}
    path.unlink()
    forged = pickle.dumps(print) if tensors is None else save(tensors, about)
    name = path.name.split(".")
    name[2] = hashlib.sha256(forged).hexdigest()[:16]
    path.with_name(".".join(name)).write_bytes(forged)
    log = Log()
    run(sweep, parts, log)
    assert log.steps[0] == 25
    assert content(parts) == content(whole)
    assert len(parts.damaged) == (tensors is None)


def test_a_broken_sae_stays_broken(tmp_path: Path) -> None:
    sweep = sweep_of("penalty=l1", "penalty.coefficient=0.1", "training.lr=0.003,1e30", "training.clip=1e38")
    stores = Store(tmp_path / "whole"), Store(tmp_path / "parts")
    logs = Log(), Log()
    run(sweep, stores[0], logs[0])
    with pytest.raises(Interrupted):
        run(sweep, stores[1], Log(step(100)))
    run(sweep, stores[1], logs[1])
    ends = [[repr(event) for event in log.events if hasattr(event, "reason")] for log in logs]
    assert len(ends[0]) == 1
    assert ends[0] == ends[1]
    assert json.dumps(sorted(stores[0].ids("points"))) == json.dumps(sorted(stores[1].ids("points")))
    assert not checkpoints(stores[1])
