"""The store: content-addressed folders that exist if and only if they are finished.

    <root>/toys/<id>/  <root>/points/<id>/  <root>/sweeps/<name>/

A folder is built under a temporary name beside its place, flushed to the disk, and renamed into place whole. A rename
is atomic and fails if the place is taken, so there are no locks: whoever comes second discards its copy. What a killed
process leaves behind is a temporary folder that nothing reads and a later process sweeps away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sae_sweep.errors import EnvironmentProblem, UserError

RECORD = "record.json"
# A temporary folder of another host is taken for abandoned after a day: no commit takes longer.
STALE_SECONDS = 86_400
# The last line of a record: the digest of every byte before it.
_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\}\n\Z')
_SEAL_BYTES = len('"sha256": ""}\n') + 64
_TEMPORARY = re.compile(r"\.tmp-.+-(?P<host>[0-9a-f]{12})-(?P<pid>\d+)-[0-9a-f]{8}\Z")


class StoreDamaged(EnvironmentProblem):
    """What was stored is not what lies there now. It has been set aside, so a rerun recomputes it."""


class Store:
    """Finished toys, points and sweeps under one root folder, shared by any number of processes and machines.

    Attributes:
        root: the output directory; made on the first write.
        damaged: one line for each damaged folder that this object came upon and set aside.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.damaged: list[str] = []
        self._swept: set[Path] = set()

    # -- toys and points ------------------------------------------------------------------------------------------

    def path(self, kind: str, id: str) -> Path:
        """The folder of a toy or point (`kind` is "toys" or "points"), whether or not it exists."""
        return self.root / kind / id

    def ids(self, kind: str) -> set[str]:
        """Every finished id of a kind: one directory scan, nothing is opened."""
        return _folders(self.root / kind)

    def commit(self, kind: str, id: str, record: Mapping[str, Any], files: Mapping[str, bytes]) -> bool:
        """Store a finished toy or point. False if another process was first: its copy stays, this one is dropped.

        `record` gains `checksums` and `sizes` of the files and is written as record.json with a digest of its own;
        NaN and infinity become null. Raises EnvironmentProblem if the disk is full or may not be written.
        """
        return self._commit(self.root / kind, id, record, files)

    def read_record(self, kind: str, id: str) -> dict[str, Any]:
        """The record of a finished toy or point. Raises StoreDamaged, or UserError if there is no such id."""
        with self._set_aside_if_damaged(self.root / kind, id):
            return _read_record(self.path(kind, id))

    def read(self, kind: str, id: str, filename: str) -> bytes:
        """A file's content, its checksum verified. Raises StoreDamaged, or UserError if there is no such id."""
        with self._set_aside_if_damaged(self.root / kind, id):
            folder = self.path(kind, id)
            record = _read_record(folder)
            if filename not in record["checksums"]:
                raise UserError(f"{folder} holds no file {filename}")
            return _read_verified(folder, record, filename)

    def records(self, kind: str, ids: Iterable[str], verify: bool = False) -> dict[str, dict[str, Any]]:
        """The records of those ids that are finished and whole, in the order asked for.

        Each record's digest and the presence and size of every file beside it are checked; the content of the files
        is checked when they are read, or here with `verify`. A damaged folder is set aside, noted in `damaged`, and
        left out.
        """
        finished, found = self.ids(kind), {}
        for id in ids:
            if id in finished:
                with contextlib.suppress(StoreDamaged), self._set_aside_if_damaged(self.root / kind, id):
                    record = _read_record(self.path(kind, id))
                    for filename in record["checksums"] if verify else ():
                        _read_verified(self.path(kind, id), record, filename)
                    found[id] = record
        return found

    # -- measurements under other evaluation settings -------------------------------------------------------------

    def commit_measure(
        self, point_id: str, measure_id: str, record: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> bool:
        """Store a measurement of a finished point under other evaluation settings; see `commit`."""
        return self._commit(self.path("points", point_id) / "measures", measure_id, record, files)

    def measures(self, point_id: str) -> dict[str, dict[str, Any]]:
        """The records of a point's further measurements by measure id; a damaged one is set aside and left out."""
        folder, found = self.path("points", point_id) / "measures", {}
        for measure_id in sorted(_folders(folder)):
            with contextlib.suppress(StoreDamaged), self._set_aside_if_damaged(folder, measure_id):
                found[measure_id] = _read_record(folder / measure_id)
        return found

    # -- sweeps ---------------------------------------------------------------------------------------------------

    def sweep(self, name: str) -> Path:
        """The folder of a sweep, whether or not it exists."""
        return self.root / "sweeps" / name

    def sweeps(self) -> list[str]:
        """The names of the sweeps there are."""
        return sorted(_folders(self.root / "sweeps"))

    def write_sweep_file(self, name: str, filename: str, content: bytes) -> Path:
        """Write or replace a file of a sweep: a reader sees the old content or the new, never a part."""
        return self._replace(self.sweep(name) / filename, content)

    def write_checkpoint(self, place: Path, content: bytes) -> Path:
        """Write a file of training in progress, whole or not at all (sweep/checkpoint.py)."""
        return self._replace(place, content)

    def fail(self, sweep: str, id: str, info: Mapping[str, Any]) -> None:
        """Note that a point of a sweep failed; `info` says where and why."""
        self.write_sweep_file(sweep, f"failures/{id}.json", (json.dumps(_plain(info)) + "\n").encode())

    def failures(self, sweep: str) -> dict[str, dict[str, Any]]:
        """What is known of each failed point of a sweep, by id."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.sweep(sweep) / "failures").glob("*.json")):
            try:
                found[path.stem] = json.loads(path.read_bytes())
            except FileNotFoundError:  # cleared since it was listed
                continue
            except ValueError:  # a note is not worth more than the fact that it is there
                found[path.stem] = {"reason": "the note of this failure cannot be read"}
        return found

    def clear_failure(self, sweep: str, id: str) -> None:
        """Forget a failure, because the point has since succeeded or is tried again."""
        place = self.sweep(sweep) / "failures" / f"{id}.json"
        with _environment(place):
            place.unlink(missing_ok=True)

    # -- how ------------------------------------------------------------------------------------------------------

    def _replace(self, place: Path, content: bytes) -> Path:
        with _environment(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            self._sweep_away(place.parent)
            temporary = _temporary_beside(place)
            try:
                _write_file(temporary, content)
                temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)
            _flush_folder(place.parent)
        return place

    def _commit(self, parent: Path, id: str, record: Mapping[str, Any], files: Mapping[str, bytes]) -> bool:
        place = parent / id
        with _environment(place):
            parent.mkdir(parents=True, exist_ok=True)
            self._sweep_away(parent)
            temporary = _temporary_beside(place)
            try:
                temporary.mkdir()
                for filename, content in files.items():
                    _write_file(temporary / filename, content)
                _write_file(temporary / RECORD, _sealed(record, files))
                _flush_folder(temporary)
                temporary.rename(place)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    return False
                raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _flush_folder(parent)
        return True

    def _sweep_away(self, parent: Path) -> None:
        """Remove what killed processes left in a folder: once per object and folder, before the first write."""
        if parent in self._swept:
            return
        self._swept.add(parent)
        for path in parent.glob(".tmp-*"):
            with contextlib.suppress(OSError):  # another process may be sweeping too
                if _abandoned(path):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def _set_aside_if_damaged(self, parent: Path, id: str) -> Iterator[None]:
        """Move <parent>/<id> to <parent>/.damaged/<id>-<n> and raise StoreDamaged if the block finds it damaged."""
        place = parent / id
        with _environment(place, "read"):
            try:
                inode = place.stat().st_ino
            except FileNotFoundError:
                raise UserError(f"there is no {place}") from None
            try:
                yield
            except _Damage as damage:
                aside = _move_aside(place, inode)
                line = f"{place} was damaged ({damage}) and is set aside as {aside}: run again to recompute it"
                self.damaged.append(line)
                raise StoreDamaged(line) from None


class _Damage(Exception):
    """What is wrong with a stored folder."""


def _move_aside(place: Path, inode: int) -> Path:
    grave = place.parent / ".damaged"
    grave.mkdir(exist_ok=True)
    taken = _folders(grave)
    aside = next(grave / f"{place.name}-{n}" for n in range(len(taken) + 1) if f"{place.name}-{n}" not in taken)
    # Another process may have set the damaged folder aside already, and a whole one taken its place.
    with contextlib.suppress(FileNotFoundError):
        if place.stat().st_ino == inode:
            place.rename(aside)
    return aside


def _sealed(record: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """record.json: one line per key, the digest of all the lines before it on the last."""
    whole = {
        **_plain(record),
        "checksums": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "sizes": {name: len(content) for name, content in files.items()},
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in whole.items())
    body = f"{{{lines},\n".encode()
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def _read_record(folder: Path) -> dict[str, Any]:
    content = _read_file(folder / RECORD)
    seal = _SEAL.search(content, max(0, len(content) - _SEAL_BYTES))
    if seal is None or hashlib.sha256(content[: seal.start()]).hexdigest() != seal[1].decode():
        raise _Damage(f"{RECORD} does not match its checksum")
    record: dict[str, Any] = json.loads(content)
    del record["sha256"]
    with os.scandir(folder) as entries:
        actual = {entry.name: entry.stat().st_size for entry in entries}
    for name, size in record["sizes"].items():
        if name not in actual:
            raise _Damage(f"{name} is missing")
        if actual[name] != size:
            raise _Damage(f"{name} has {actual[name]} bytes instead of {size}")
    return record


def _read_verified(folder: Path, record: Mapping[str, Any], filename: str) -> bytes:
    content = _read_file(folder / filename)
    if hashlib.sha256(content).hexdigest() != record["checksums"][filename]:
        raise _Damage(f"{filename} does not match its checksum")
    return content


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _Damage(f"{path.name} is missing") from None


def _plain(value: Any) -> Any:
    """The value in JSON's own types: numpy scalars unwrapped, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _folders(parent: Path) -> set[str]:
    try:
        with os.scandir(parent) as entries:
            return {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {parent}: {error.strerror}") from error


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Flush a folder's entries: without it a rename may be lost when the power fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_beside(place: Path) -> Path:
    return place.parent / f".tmp-{place.name}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def _host() -> str:
    """Where a process id means something: this host, since this boot, in this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def _abandoned(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > STALE_SECONDS:
        return True
    name = _TEMPORARY.match(path.name)
    if name is None or name["host"] != _host():
        return False
    try:
        os.kill(int(name["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it runs, as another user
        return False
    return False


@contextlib.contextmanager
def _environment(place: Path, verb: str = "write") -> Iterator[None]:
    """Turn the operating system's refusals into one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"cannot {verb} {place}: {error.strerror or error}") from error
