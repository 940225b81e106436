"""A stranger's store, a planted secret, a clever override: none gets anywhere. And one table however it is made."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from commandline import TINY, assert_same_tables, call, fresh
from faults import identities, intact

from sae_sweep.config import overrides
from sae_sweep.signals import Interrupted
from sae_sweep.store import checksums as sealed
from sae_sweep.store.store import Store
from sae_sweep.sweep import plan
from sae_sweep.sweep import run as runner
from sae_sweep.sweep.events import Event, TrainProgress

# The same table, however

PENALTIES = ["penalty=l1,sqrt,lp,prod1p", "penalty.p=0.3", "penalty.coefficient=0.1,0.2"]
EIGHT = [*TINY, *PENALTIES, "training.steps=75", "name=eight", "sae.width=9"]
EIGHT = [word for word in EIGHT if word not in ("training.steps=25", "sae.width=5")]


def run(words: list[str], root: Path, stop_at: int | None) -> None:
    """A run in this process, interrupted once in the training of its first pack, and run again."""
    sweep, store = overrides.load([*words, f"output_dir={root}"]), Store(root)

    def say(event: Event) -> None:
        if isinstance(event, TrainProgress) and event.step == stop_at:
            raise Interrupted(15)

    if stop_at is not None:
        with pytest.raises(Interrupted):
            runner.run(sweep, runner.look(sweep, store), store, say)
        assert list(root.glob("checkpoints/*/*.safetensors"))
    assert call("run", "--json", *words, f"output_dir={root}").code == 0


@pytest.fixture(scope="module")
def one_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eight")
    run(EIGHT, root, None)
    return root


# All of them take half a minute. These hold every pack size, place of the interruption and number of threads.
QUICK = ((1, 50, 1), (2, 25, 2), (8, None, 1), (8, 25, 2))
WAYS = [
    pytest.param(*way, marks=() if way in QUICK else pytest.mark.slow)
    for way in itertools.product((1, 2, 8), (None, 25, 50), (1, 2))
]


@pytest.mark.parametrize(("packs", "stop_at", "threads"), WAYS)
def test_packs_restarts_and_threads_change_no_number(
    packs: int, stop_at: int | None, threads: int, one_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, every column but `seconds`: on the CPU there is no tolerance to state."""
    monkeypatch.setattr(plan, "LARGEST_PACK", 8 // packs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(threads)))
    sweep = overrides.load(EIGHT)
    assert len(plan.plan(sweep, frozenset()).packs) == packs
    before = torch.get_num_threads()
    run(EIGHT, tmp_path, stop_at)
    torch.set_num_threads(before)
    assert_same_tables(tmp_path, one_pack, "eight")


# A stranger's store


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.mkdir, (str(self.marker),))


FOUR = [*TINY, "penalty=l1,sqrt", "penalty.coefficient=0.1,1", "name=four"]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("honest")
    assert call("run", "--json", *FOUR, f"output_dir={root}").code == 0
    return root


def plant(root: Path, name: str, content: bytes) -> None:
    """Put `content` into every file of that name, and make every checksum right again."""
    for place in [*root.glob(f"points/*/{name}"), *root.glob(f"toys/*/{name}")]:
        place.write_bytes(content)
        if name != sealed.RECORD:
            record = json.loads((place.parent / sealed.RECORD).read_bytes())
            del record["sha256"]
            files = {file: (place.parent / file).read_bytes() for file in record["sizes"]}
            (place.parent / sealed.RECORD).write_bytes(sealed.sealed_record(record, files))
    for place in root.glob(f"sweeps/*/{name}"):
        place.write_bytes(content)


# Read as text, some of it as YAML. In the place of the others YAML is as foreign as a pickle.
TEXTS = (sealed.RECORD, "config.yaml", "cfg.json", "sweep.yaml", "points.txt")
POINT_FILES = ("config.yaml", "sae_weights.safetensors", "cfg.json", "latents.parquet", "toy.safetensors")
SWEEP_FILES = ("sweep.yaml", "points.txt", "results.parquet", "untrained.parquet")
FILES = [
    # Of all that is read YAML alone can name a class: it is among the fast tests.
    pytest.param(name, marks=() if name == "sweep.yaml" else pytest.mark.slow)
    for name in (sealed.RECORD, *POINT_FILES, *SWEEP_FILES)
]


@pytest.mark.parametrize("name", FILES)
def test_a_strangers_store_runs_no_code(name: str, honest: Path, tmp_path: Path) -> None:
    """A pickle, and YAML that would make an object, in the place of every kind of file, checksums and all."""
    root, marker = tmp_path / "outputs", tmp_path / "marker"
    trap = pickle.dumps(Trap(marker))
    loaded = tmp_path / "loaded"
    pickle.loads(pickle.dumps(Trap(loaded)))
    assert loaded.exists()  # the trap works
    yaml_trap = f"schema: {sealed.SCHEMA}\nevil: !!python/object/apply:os.mkdir ['{marker}']\n".encode()
    for content in (trap, sealed.seal(yaml_trap) if name == "sweep.yaml" else yaml_trap)[: 1 + (name in TEXTS)]:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(honest, root)
        plant(root, name, content)
        for words in (
            ["results", "four", "--format", "json", "--output-dir", str(root)],
            ["report", "four", "--output-dir", str(root)],
            ["status", "four", "--output-dir", str(root)],
            ["run", "--json", *FOUR, "evaluation.inputs=20", f"output_dir={root}"],
            ["run", "--json", *FOUR, f"output_dir={root}"],
        ):
            end = call(*words)
            assert end.code in (0, 2, 4), (words, end.err)
            assert "Traceback" not in end.err
        assert not marker.exists()
    assert_same_tables(root, honest, "four")


def test_nothing_of_ours_can_unpickle() -> None:
    """No module of the package names what would: submitit's own pickles are its own (tests/slurm/test_slurm.py)."""
    package = Path(overrides.__file__).parents[1]
    for path in package.rglob("*.py"):
        text = path.read_text()
        for word in ("pickle.", "yaml.load(", "yaml.unsafe", "joblib"):
            assert word not in text, f"{path}: {word}"
        # What others wrote is read as tensors and nothing else.
        for word, safely in (("torch.load(", "weights_only=True"), ("np.load(", "allow_pickle=False")):
            assert all(safely in line for line in text.splitlines() if word in line), f"{path}: {word}"


# Secrets


@pytest.mark.slow  # W&B in processes of its own
def test_no_record_log_or_message_holds_a_secret(tmp_path: Path) -> None:
    planted = {
        "WANDB_API_KEY": "feedface" * 5,
        "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-0123456789",
        "MY_PASSWORD": "planted-password-0123456789",
        "GIT_ASKPASS": "/planted/askpass-0123456789",
    }
    words = [word for word in FOUR if word != "logger=none"] + ["logger.mode=offline"]
    end = fresh("run", "--json", *words, cwd=tmp_path, env=planted)
    assert end.code == 0, end.err
    fresh("doctor", cwd=tmp_path, env=planted)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for name, secret in planted.items():
        for text in (end.raw, end.err.encode(), *(path.read_bytes() for path in files)):
            assert secret.encode() not in text, name
    # Nor the rest of the environment: what is not asked for is not kept.
    records = b"".join(path.read_bytes() for path in files if path.name == sealed.RECORD)
    assert not any(value.encode() in records for key, value in os.environ.items() if len(value) > 12 and "PATH" in key)


# Paths

ESCAPES = [
    "name=../x",
    "name=/tmp/x",
    "name=a/b",
    "name=..",
    "name='../../x'",
    "experiment=../../x",
    "toy=../../x",
    "penalty=../l1",
    "sae=/etc/passwd",
    "logger=../none",
    "launcher=../../x",
    "toy.name=../x",
    "penalty.name=../x",
    "sae.init=../x",
    "sae.partition=../x",
    "+x=../y",
    "hydra.run.dir=../x",
    "hydra.sweep.dir=/tmp/x",
    "hydra.searchpath=[/tmp]",
]


@pytest.mark.parametrize("word", ESCAPES)
def test_no_override_but_output_dir_leads_out_of_the_output_directory(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b" / "here").mkdir(parents=True)  # `..` and `../..` are folders of the test's own
    monkeypatch.chdir(tmp_path / "a" / "b" / "here")
    before = sorted(tmp_path.rglob("*"))
    given = [one for one in TINY if one.partition("=")[0] != word.partition("=")[0]]
    end = call("run", "--json", *given, word, "output_dir=outputs")
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1), end.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../x", "/etc", "..", "a/../../b", ""])
def test_no_name_on_the_command_line_leads_out_of_it_either(name: str, honest: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "outputs"))
    (tmp_path / "x").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for command in ("results", "report", "status", "cancel", "logs", "sync"):
        end = call(command, name, "--output-dir", str(root))
        assert end.code in (2, 4), (command, end.err)
        assert end.err.count("\n") == 1, end.err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_record_is_known_by_what_it_says(honest: Path, tmp_path: Path) -> None:
    """The seal is over every byte but itself, so a table can be checked by anyone with sha256sum."""
    root = Path(shutil.copytree(honest, tmp_path / "outputs"))
    place = next(root.glob("points/*/record.json"))
    *lines, last = place.read_bytes().splitlines(keepends=True)
    assert json.loads(b'{"' + last.partition(b'"')[2])["sha256"] == hashlib.sha256(b"".join(lines)).hexdigest()
    intact(root)
    assert len(identities(root)) == len(pd.read_parquet(root / "sweeps/four/results.parquet"))
    assert yaml.safe_load((root / "sweeps/four/sweep.yaml").read_text())["schema"] == sealed.SCHEMA


def test_verify_reads_every_byte(honest: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(honest, tmp_path / "outputs"))
    words = ("verify", "--json", "--output-dir", str(root))
    end = call(*words)
    whole = {"schema": 1, "toys": 1, "points": 4, "measurements": 0, "sweeps": 1, "damaged": []}
    assert (end.code, json.loads(end.out)) == (0, whole)
    place = sorted(root.glob("points/*/latents.parquet"))[1]
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (root / "sweeps" / "four" / "points.txt").write_text("")
    end = call(*words)
    found = json.loads(end.out)
    assert (end.code, found["points"], found["sweeps"], len(found["damaged"])) == (4, 3, 0, 2)
    assert place.parent.name in found["damaged"][0] and "latents.parquet" in found["damaged"][0]
    assert call(*words).code == 0
    assert call("run", "--json", *FOUR, f"output_dir={root}").code == 0
    assert json.loads(call(*words).out) == whole
    assert_same_tables(root, honest, "four")
