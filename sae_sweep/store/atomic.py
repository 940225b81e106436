"""Writing to a shared disk so that a reader sees a thing whole or not at all, whoever dies when.

What is written gets a temporary name beside its place, is flushed, and renamed into place. A rename is atomic. What a
killed process leaves behind is a temporary name that nothing reads and a later process sweeps away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from sae_sweep.errors import EnvironmentProblem

# Something temporary of another host is taken for abandoned after a day: no write takes longer.
STALE_SECONDS = 86_400
_TEMPORARY = re.compile(r"\.tmp-.+-(?P<host>[0-9a-f]{12})-(?P<pid>\d+)-[0-9a-f]{8}\Z")


def write_file(place: Path, content: bytes) -> None:
    """Write or replace a file; its folder exists."""
    temporary = _temporary_beside(place)
    try:
        _write(temporary, content)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(place.parent)


def write_folder(place: Path, files: Mapping[str, bytes]) -> bool:
    """Write a folder of files, in this order; its parent exists. False if the place is taken: then nothing changes."""
    temporary = _temporary_beside(place)
    try:
        temporary.mkdir()
        for filename, content in files.items():
            _write(temporary / filename, content)
        _flush_folder(temporary)
        temporary.rename(place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush_folder(place.parent)
    return True


def sweep_away(parent: Path) -> None:
    """Remove what killed processes left in a folder."""
    for path in parent.glob(".tmp-*"):
        with contextlib.suppress(OSError):  # another process may be sweeping too
            if _abandoned(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def move_aside(place: Path, inode: int) -> Path:
    """Rename a file or folder to .damaged/<name>-<n> beside it, if it is still the one of this inode."""
    grave = place.parent / ".damaged"
    grave.mkdir(exist_ok=True)
    with os.scandir(grave) as entries:
        taken = {entry.name for entry in entries}
    aside = next(grave / f"{place.name}-{n}" for n in range(len(taken) + 1) if f"{place.name}-{n}" not in taken)
    # Another process may have set the damaged one aside already, and a whole one taken its place.
    with contextlib.suppress(FileNotFoundError):
        if place.stat().st_ino == inode:
            place.rename(aside)
    return aside


def folders(parent: Path) -> set[str]:
    """The names of the folders in a folder, hidden ones left out; none if it is not there."""
    try:
        with os.scandir(parent) as entries:
            return {entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {parent}: {error.strerror}") from error


@contextlib.contextmanager
def environment(place: Path, verb: str = "write") -> Iterator[None]:
    """Turn the operating system's refusals into one line."""
    try:
        yield
    except OSError as error:
        raise EnvironmentProblem(f"cannot {verb} {place}: {error.strerror or error}") from error


def _write(path: Path, content: bytes) -> None:
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
    return place.parent / f".tmp-{place.name}-{host()}-{os.getpid()}-{secrets.token_hex(4)}"


@cache
def host() -> str:
    """Where a process id means something: this host, since this boot, in this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def _abandoned(path: Path) -> bool:
    if time.time() - path.stat().st_mtime > STALE_SECONDS:
        return True
    name = _TEMPORARY.match(path.name)
    if name is None or name["host"] != host():
        return False
    try:
        os.kill(int(name["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it runs, as another user
        return False
    return False
