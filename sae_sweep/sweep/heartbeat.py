"""That a run is at work on this sweep, and how far it is: a note in the sweep's folder for `status` in another shell.

    <sweep>/at_work/<host>-<process id>.json

Written anew every few seconds and removed at the end. The note of a killed run is known by its process, which is gone,
or, from another host, by its age. Nothing is decided by these notes: without them `status` only knows less.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from sae_sweep.config.settings import Point
from sae_sweep.errors import EnvironmentProblem
from sae_sweep.store.atomic import host
from sae_sweep.store.store import Store
from sae_sweep.sweep.events import Event, ToyProgress, TrainProgress

# Seconds between two notes, and from which on the note of another host is taken for a dead run's.
EVERY, STALE = 2.0, 60.0


@dataclass(frozen=True)
class Note:
    """What a run says of itself. `doing`: in words, with `step` of `steps`; `training`: ids of the points in training;
    `seconds`: what it expects to take from `written` (seconds since 1970) on."""

    doing: str
    step: int = 0
    steps: int = 0
    training: tuple[str, ...] = ()
    seconds: float = 0.0
    written: float = 0.0


class Beat:
    """Keeps a run's note. A context manager."""

    def __init__(
        self, store: Store, sweep: str, packs: Sequence[Sequence[Point]], seconds_left: Callable[[], float]
    ) -> None:
        self._store, self._sweep, self._packs, self._seconds_left = store, sweep, packs, seconds_left
        self._name = f"at_work/{host()}-{os.getpid()}.json"
        self._due = 0.0

    def handle(self, event: Event) -> None:
        """Take note of how far the run is."""
        if isinstance(event, ToyProgress) and event.step >= event.steps:
            self._write(Note("preparing the SAEs"))
        elif time.monotonic() < self._due:
            return
        elif isinstance(event, ToyProgress):
            self._write(Note("training the toy", event.step, event.steps))
        elif isinstance(event, TrainProgress):
            training = tuple(point.id for point in self._packs[event.pack - 1])
            self._write(Note(f"pack {event.pack} of {event.packs}", event.step, event.steps, training))

    def __enter__(self) -> Beat:
        # Nothing is written yet: a run that is refused leaves no folder behind.
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            place = self._store.sweep(self._sweep) / self._name
            place.unlink()
            place.parent.rmdir()

    def _write(self, note: Note) -> None:
        self._due = time.monotonic() + EVERY
        whole = {**asdict(note), "seconds": self._seconds_left(), "written": time.time()}
        with suppress(EnvironmentProblem):  # a full disk is for those to say who have something to lose
            self._store.write_sweep_file(self._sweep, self._name, json.dumps(whole).encode())


def notes(store: Store, sweep: str) -> list[Note]:
    """What the runs that are at work on a sweep say, oldest first."""
    found = []
    for path in (store.sweep(sweep) / "at_work").glob("*-*.json"):
        with suppress(OSError, ValueError, TypeError):
            if _alive(path):
                told = json.loads(path.read_bytes())
                found.append(Note(**{**told, "training": tuple(told["training"])}))
    return sorted(found, key=lambda note: note.written)


def _alive(path: Path) -> bool:
    where, _, process = path.stem.rpartition("-")
    if where != host():
        return time.time() - path.stat().st_mtime < STALE
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
