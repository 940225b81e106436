"""The store: content-addressed folders that exist if and only if they are finished.

    <root>/toys/<id>/  <root>/points/<id>/  <root>/sweeps/<name>/

A folder appears whole (atomic.py), so there are no locks: whoever comes second discards its copy. What was damaged
since is found out by its checksums (checksums.py), set aside under `.damaged/` and named, and counts as missing.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sae_sweep.config.gc import no_collection
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.store import atomic
from sae_sweep.store import checksums as sealed
from sae_sweep.store.checksums import RECORD, Check, Damage

T = TypeVar("T")
# What may name a sweep, a toy or a point: never a way out of the store.
NAME = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)
# Files of a sweep that are read back: they carry a seal. The others are written for people and never read.
SEALED = ("sweep.yaml", "points.txt")
# Parts of a point's record in which training says of itself what no measuring finds again, beside its curve.
OF_TRAINING = ("revival", "control", "until")


class StoreDamaged(EnvironmentProblem):
    """What was stored is not what lies there now. It has been set aside, so a rerun recomputes it."""


class NotThere(UserError):
    """There is no such thing in the store."""


class Store:
    """Finished toys, points and sweeps under one root folder, shared by any number of processes and machines.

    Attributes:
        root: the output directory; made on the first write.
        damaged: one line for each damaged folder or file that this object came upon and set aside.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.damaged: list[str] = []
        self._swept: set[Path] = set()

    # -- toys and points ------------------------------------------------------------------------------------------

    def path(self, kind: str, id: str) -> Path:
        """The folder of a toy or point (`kind` is "toys" or "points"), whether or not it exists."""
        return self.root / kind / _name(id)

    def ids(self, kind: str) -> set[str]:
        """Every finished id of a kind: one directory scan, nothing is opened."""
        return atomic.folders(self.root / kind)

    def commit(self, kind: str, id: str, record: Mapping[str, Any], files: Mapping[str, bytes]) -> bool:
        """Store a finished toy or point. False if another process was first: its copy stays, this one is dropped.

        `record` gains `checksums` and `sizes` of the files and is written as record.json with a digest of its own;
        NaN and infinity become null. Raises EnvironmentProblem if the disk is full or may not be written.
        """
        return self._commit(self.path(kind, id), record, files)

    def read_record(self, kind: str, id: str) -> dict[str, Any]:
        """The record of a finished toy or point. Raises StoreDamaged, or NotThere."""
        place = self.path(kind, id)
        with self._set_aside_if_damaged(place):
            return sealed.read_record(place)

    def read(self, kind: str, id: str, filename: str) -> bytes:
        """A file's content, its checksum verified. Raises StoreDamaged, or NotThere."""
        return self.parse(kind, id, filename, bytes)

    def parse(self, kind: str, id: str, filename: str, parser: Callable[[bytes], T]) -> T:
        """What `parser` makes of a file's content, its checksum verified.

        Raises NotThere, or StoreDamaged, also where the parser refuses: whoever made the file can make checksums too.
        """
        place = self.path(kind, id)
        with self._set_aside_if_damaged(place):
            record = sealed.read_record(place)
            if filename not in record["checksums"]:
                raise UserError(f"{place} holds no file {filename}")
            content = sealed.read_verified(place, record, filename)
            try:
                return parser(content)
            except MemoryError:
                raise
            except Exception as error:
                raise Damage(f"{filename} cannot be read: {' '.join(str(error).split())[:200]}") from None

    def records(self, kind: str, ids: Iterable[str], check: Check = "sizes") -> dict[str, dict[str, Any]]:
        """The records of those ids that are finished and whole, in the order asked for.

        Each record's digest and the presence and size of every file beside it are checked, and of what content
        `check` says. A damaged folder is set aside, noted in `damaged`, and left out.
        """
        finished, found = self.ids(kind), {}
        parent = self.root / kind
        with no_collection():
            for id in ids:
                if id in finished:
                    # Another process may have come upon the damage first.
                    with contextlib.suppress(StoreDamaged, NotThere), self._set_aside_if_damaged(parent / id):
                        found[id] = sealed.read_record(parent / id, check)
        return found

    # -- measurements under other evaluation settings -------------------------------------------------------------

    def commit_measure(
        self, point_id: str, measure_id: str, record: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> bool:
        """Store a measurement of a finished point under other evaluation settings; see `commit`."""
        return self._commit(self.path("points", point_id) / "measures" / measure_id, record, files)

    def measures(self, point_id: str, check: Check = "sizes") -> dict[str, dict[str, Any]]:
        """The records of a point's further measurements by measure id; a damaged one is set aside and left out."""
        folder, found = self.path("points", point_id) / "measures", {}
        for measure_id in sorted(atomic.folders(folder)):
            with contextlib.suppress(StoreDamaged, NotThere), self._set_aside_if_damaged(folder / measure_id):
                found[measure_id] = sealed.read_record(folder / measure_id, check)
        return found

    # -- sweeps ---------------------------------------------------------------------------------------------------

    def sweep(self, name: str) -> Path:
        """The folder of a sweep, whether or not it exists. UserError if there can be none of that name."""
        return self.root / "sweeps" / _name(name)

    def sweeps(self) -> list[str]:
        """The names of the sweeps there are."""
        return sorted(atomic.folders(self.root / "sweeps"))

    def write_sweep_file(self, name: str, filename: str, content: bytes) -> Path:
        """Write or replace a file of a sweep: a reader sees the old content or the new, never a part."""
        return self._replace(self.sweep(name) / filename, sealed.seal(content) if filename in SEALED else content)

    def read_sweep_file(self, name: str, filename: str) -> str:
        """One of the SEALED files of a sweep. Raises StoreDamaged, or NotThere."""
        place = self.sweep(name) / filename
        with self._set_aside_if_damaged(place):
            return sealed.read_text(place)

    def info(self, name: str) -> dict[str, Any]:
        """sweep.yaml of a sweep. Raises StoreDamaged, NotThere, or EnvironmentProblem if it is of another schema."""
        place = self.sweep(name) / "sweep.yaml"
        with self._set_aside_if_damaged(place):
            return sealed.read_yaml(place)

    def write_checkpoint(self, place: Path, content: bytes) -> Path:
        """Write a file of training in progress, whole or not at all (sweep/checkpoint.py)."""
        return self._replace(place, content)

    def fail(self, sweep: str, id: str, info: Mapping[str, Any]) -> None:
        """Note that a point of a sweep failed; `info` says where and why."""
        self.write_sweep_file(sweep, f"failures/{id}.json", (json.dumps(sealed.plain(info)) + "\n").encode())

    def failures(self, sweep: str) -> dict[str, dict[str, Any]]:
        """What is known of each failed point of a sweep, by id."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.sweep(sweep) / "failures").glob("*.json")):
            # A note is not worth more than the fact that it is there.
            found[path.stem] = {"reason": "the note of this failure cannot be read"}
            try:
                note = json.loads(path.read_bytes())
            except FileNotFoundError:  # cleared since it was listed
                del found[path.stem]
            except ValueError:
                continue
            else:
                if isinstance(note, dict) and "reason" in note:
                    found[path.stem] = note
        return found

    def clear_failure(self, sweep: str, id: str) -> None:
        """Forget a failure, because the point has since succeeded or is tried again."""
        place = self.sweep(sweep) / "failures" / f"{id}.json"
        with atomic.environment(place):
            place.unlink(missing_ok=True)

    # -- how ------------------------------------------------------------------------------------------------------

    def set_aside(self, place: Path, inode: int, what: str) -> str:
        """Move a damaged file or folder out of the way, unless it is another by now; the line that says so."""
        aside = atomic.move_aside(place, inode)
        self.damaged.append(f"{place} was damaged ({what}) and is set aside as {aside}: run again to recompute it")
        return self.damaged[-1]

    def _replace(self, place: Path, content: bytes) -> Path:
        with atomic.environment(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            self._sweep_away(place.parent)
            atomic.write_file(place, content)
        return place

    def _commit(self, place: Path, record: Mapping[str, Any], files: Mapping[str, bytes]) -> bool:
        with atomic.environment(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            self._sweep_away(place.parent)
            # The record last: what the filesystem calls newer was changed.
            return atomic.write_folder(place, {**files, RECORD: sealed.sealed_record(record, files)})

    def _sweep_away(self, parent: Path) -> None:
        """Remove what killed processes left in a folder: once per object and folder, before the first write."""
        if parent not in self._swept:
            self._swept.add(parent)
            atomic.sweep_away(parent)

    @contextlib.contextmanager
    def _set_aside_if_damaged(self, place: Path) -> Iterator[None]:
        """Move `place` to .damaged/<name>-<n> beside it and raise StoreDamaged if the block finds it damaged."""
        try:
            inode = place.stat().st_ino
            yield
        except Damage as damage:
            with atomic.environment(place, "set aside"):
                line = self.set_aside(place, inode, str(damage))
            raise StoreDamaged(line) from None
        except FileNotFoundError:
            raise NotThere(f"there is no {place}") from None
        except OSError as error:
            raise EnvironmentProblem(f"cannot read {place}: {error.strerror or error}") from error


def _name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise UserError(f"{name[:60]!r} is no name: letters, digits, dot, plus, minus and underscore only")
    return name
