"""What is stored carries its own proof: a record seals itself and the files beside it, a text its own lines.

record.json is sealed by its last line, the digest of every byte before it, and holds size and digest of every other
file of its folder. The files are written first and never again, so one that the filesystem says was changed after its
record was is read and checked before the folder is taken for whole. Everything is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

import orjson
import yaml

from sae_sweep.errors import EnvironmentProblem

RECORD = "record.json"
# Of records, sweep.yaml and points.txt. Raise when what is written now could not be read by what read it before.
SCHEMA = 2
# What of a folder is looked at: names and sizes alone; also what changed since the record was written; every byte.
Check = Literal["sizes", "changed", "everything"]

_RECORD_SEAL = re.compile(rb'"sha256": "([0-9a-f]{64})"\}\n\Z')
_TEXT_SEAL = re.compile(rb"# sha256: ([0-9a-f]{64})\n\Z")
_SEAL_BYTES = len('"sha256": ""}\n') + 64


class Damage(Exception):
    """What is wrong with something stored."""


def check_schema(found: Any, place: Path) -> None:
    """EnvironmentProblem if what was stored there is of a layout that this version does not read."""
    if found != SCHEMA:
        raise EnvironmentProblem(
            f"{place} was written by another version of sae-sweep (schema {found!r:.20}, this one reads {SCHEMA}): "
            "use that version, or choose another output_dir="
        )


def sealed_record(record: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """record.json: a line per key, the digest of all the lines before it on the last. NaN and infinity become null."""
    whole = {
        "schema": SCHEMA,
        **plain(record),
        "checksums": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "sizes": {name: len(content) for name, content in files.items()},
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in whole.items())
    body = f"{{{lines},\n".encode()
    return body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def read_record(folder: Path, check: Check = "sizes") -> dict[str, Any]:
    """The record of a folder. Damage if it or a file beside it is not what was written, EnvironmentProblem if it is of
    another schema."""
    # Ten thousand of these are read where a run begins: no Path is made where a string does.
    content = _read_file(f"{folder}/{RECORD}", RECORD)
    seal = _RECORD_SEAL.search(content, max(0, len(content) - _SEAL_BYTES))
    if seal is None or hashlib.sha256(content[: seal.start()]).hexdigest() != seal[1].decode():
        raise Damage(f"{RECORD} does not match its checksum")
    record = _parse(content)
    check_schema(record.get("schema"), folder)
    names = set(os.listdir(folder))  # noqa: PTH208
    written = _stat(folder, names, RECORD).st_ctime_ns
    for name, size in record["sizes"].items():
        there = _stat(folder, names, name)
        if there.st_size != size:
            raise Damage(f"{name} has {there.st_size} bytes instead of {size}")
        # ctime, unlike mtime, cannot be set back. A copied folder's files have any order: they are read, no more.
        changed = there.st_ctime_ns > written
        if check == "everything" or (check == "changed" and changed):
            read_verified(folder, record, name)
    return record


def _parse(content: bytes) -> dict[str, Any]:
    """A sealed record without its seal. A stranger's may be anything."""
    try:
        record = orjson.loads(content)
    except ValueError:
        raise Damage(f"{RECORD} is no JSON") from None
    if not isinstance(record, dict):
        raise Damage(f"{RECORD} is no record")
    del record["sha256"]
    if not all(isinstance(record.get(key), dict) for key in ("sizes", "checksums")):
        raise Damage(f"{RECORD} does not say what lies beside it")
    if set(record["sizes"]) != set(record["checksums"]):
        raise Damage(f"{RECORD} contradicts itself")
    return record


def read_verified(folder: Path, record: Mapping[str, Any], filename: str) -> bytes:
    """The content of a file beside its record. Damage if it is not what was written."""
    content = _read_file(f"{folder}/{filename}", filename)
    if hashlib.sha256(content).hexdigest() != record["checksums"][filename]:
        raise Damage(f"{filename} does not match its checksum")
    return content


def seal(lines: bytes) -> bytes:
    """Lines of YAML or of words, and a comment with their digest."""
    return lines + f"# sha256: {hashlib.sha256(lines).hexdigest()}\n".encode()


def read_text(place: Path) -> str:
    """What `seal` was given, as text. Damage if it is not what was written."""
    content = _read_file(str(place), place.name)
    seal = _TEXT_SEAL.search(content, max(0, len(content) - _SEAL_BYTES))
    if seal is None or hashlib.sha256(content[: seal.start()]).hexdigest() != seal[1].decode():
        raise Damage(f"{place.name} does not match its checksum")
    return content[: seal.start()].decode()


def read_yaml(place: Path) -> dict[str, Any]:
    """A mapping from such lines. Damage, or EnvironmentProblem if it is of another schema."""
    try:
        found = yaml.safe_load(read_text(place))
    except (yaml.YAMLError, RecursionError):
        raise Damage(f"{place.name} is no YAML") from None
    if not isinstance(found, dict):
        raise Damage(f"{place.name} is no mapping")
    check_schema(found.get("schema"), place)
    return found


def _stat(folder: Path, names: Container[str], name: str) -> os.stat_result:
    """Of a file in the folder. A stranger's record may name anything, also what lies elsewhere."""
    if name not in names:
        raise Damage(f"{name} is missing")
    return os.stat(f"{folder}/{name}")  # noqa: PTH116


def _read_file(path: str, name: str) -> bytes:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except FileNotFoundError:
        raise Damage(f"{name} is missing") from None


def plain(value: Any) -> Any:
    """The value in JSON's own types: numpy scalars unwrapped, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
