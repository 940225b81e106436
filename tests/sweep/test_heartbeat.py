"""What `status` knows of runs in another shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import call
from fabricated import SMALL, point, sweep

from sae_sweep.slurm.status import status
from sae_sweep.store.atomic import host
from sae_sweep.store.store import Store
from sae_sweep.sweep import heartbeat
from sae_sweep.sweep.events import ToyProgress, TrainProgress
from sae_sweep.sweep.heartbeat import Beat, notes

POINTS = [point(seed=seed) for seed in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A sweep of four points, one of them finished."""
    found = sweep(tmp_path / "outputs", [(POINTS[0], {})])
    found.write_sweep_file("quick", "points.txt", "".join(f"{each.id}\n" for each in POINTS).encode())
    return found


def test_a_run_says_what_it_trains(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", 0.0)
    with Beat(store, "quick", [POINTS[1:3], POINTS[3:]], lambda: 40.0) as at_work:
        assert not (store.sweep("quick") / "at_work").exists()
        at_work.handle(ToyProgress(SMALL, 10, 20, 0.5))
        assert [(note.doing, note.step, note.steps) for note in notes(store, "quick")] == [("training the toy", 10, 20)]
        at_work.handle(TrainProgress(1, 2, 2, 50, 100, 0.1, 2.0))
        now = status(store, "quick")
        assert (now.points, now.finished, now.count("running"), now.count("pending")) == (4, 1, 2, 1)
        assert 30 < now.seconds <= 40
        text = call("status", "quick", "--output-dir", str(store.root)).out
        assert "1 of 4 finished, 2 running, 1 pending" in text and "about 40 s left" in text
        assert "at work: pack 1 of 2, step 50 of 100" in text
    assert not (store.sweep("quick") / "at_work").exists()
    now = status(store, "quick")
    assert (now.count("running"), now.count("pending")) == (0, 3)


def test_notes_come_no_more_often_than_they_are_read(store: Store) -> None:
    with Beat(store, "quick", [POINTS], lambda: 1.0) as at_work:
        at_work.handle(TrainProgress(1, 1, 4, 1, 100, 0.1, 2.0))
        (first,) = notes(store, "quick")
        at_work.handle(TrainProgress(1, 1, 4, 2, 100, 0.1, 2.0))
        assert notes(store, "quick") == [first]


def test_the_notes_of_dead_runs_are_not_read(store: Store) -> None:
    with Beat(store, "quick", [POINTS], lambda: 1.0) as at_work:
        at_work.handle(ToyProgress(SMALL, 10, 20, 0.5))
        folder = store.sweep("quick") / "at_work"
        (mine,) = folder.iterdir()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        elsewhere = folder / "0123456789ab-1.json"
        for name in (folder / f"{host()}-{dead.pid}.json", elsewhere):
            name.write_bytes(mine.read_bytes())
        assert len(notes(store, "quick")) == 2
        os.utime(elsewhere, (0, 0))
        assert len(notes(store, "quick")) == 1
        mine.write_text("{")
        assert notes(store, "quick") == []


def test_a_damaged_sweep_hides_no_other(store: Store) -> None:
    sweep(store.root, [(POINTS[0], {})], name="other")
    (store.sweep("other") / "sweep.yaml").write_text("name: other\n")
    end = call("status", "--output-dir", str(store.root))
    assert end.code == 0 and "quick" in end.out and "other" not in end.out
    assert "other/sweep.yaml was damaged" in end.err
