"""Trials of what goes wrong inside: damaged files, numbers that overflow, memory that runs out, silly requests."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from commandline import SEVERAL, TINY, Forked, assert_same_tables, call, tables
from faults import WORDS, Bench, Fresh, environment_of, intact
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from processes import descendants
from wandb_server import Server

from sae_sweep.config import overrides as config
from sae_sweep.config.axes import GROUPS
from sae_sweep.config.keys import point_keys, sweep_keys
from sae_sweep.config.settings import toy_id
from sae_sweep.registry import get, kinds
from sae_sweep.signals import Interrupted
from sae_sweep.store import checksums
from sae_sweep.store.store import Store
from sae_sweep.sweep import local
from sae_sweep.sweep import run as runner
from sae_sweep.sweep.events import Event, TrainProgress
from sae_sweep.sweep.pack import Machine, run_pack

PENALTIES = tuple(kinds("penalty"))

ELSEWISE = "evaluation.inputs=20"
STORES = Path(__file__).parent / "stores"


def weights(root: Path) -> dict[str, bytes]:
    """Finished id → its parameters as stored."""
    store = Store(root)
    return {id: store.read("points", id, "sae_weights.safetensors") for id in store.ids("points")}


# Damaged files

KINDS = {
    **{
        f"points/{name}": name
        for name in ("record.json", "config.yaml", "sae_weights.safetensors", "cfg.json", "latents.parquet")
    },
    **{f"toys/{name}": name for name in ("record.json", "toy.safetensors")},
    **{f"measures/{name}": name for name in ("record.json", "latents.parquet")},
    **{f"sweeps/{name}": name for name in ("sweep.yaml", "points.txt", "results.parquet", "untrained.parquet")},
    "checkpoints": "*.safetensors",
}
# Written for people and never read by the program: a rerun writes them anew and has nothing to say about it.
NEVER_READ = ("results.parquet", "untrained.parquet")


def spoil(place: Path, chance: random.Random) -> None:
    """Truncate a file, empty it, or flip one bit of it."""
    content = bytearray(place.read_bytes())
    how = chance.randrange(4)
    if how == 0:
        content = bytearray()
    elif how == 1:
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    place.write_bytes(content)


def damaged(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """A file of each kind in turn is damaged between two runs."""
    kind = list(KINDS)[trial % len(KINDS)]
    root = folder / "outputs"
    shutil.copytree(begun(bench) if kind == "checkpoints" else measured_twice(bench), root)
    place = chance.choice(sorted(path for path in root.rglob(KINDS[kind]) if _kind(path, root) == kind))
    spoil(place, chance)
    words = [*WORDS, *([ELSEWISE] if kind.startswith("measures") else []), f"output_dir={root}"]
    end = call(*words)
    assert end.code == 0, end.err
    named = [line for line in end.err.splitlines() if "was damaged" in line]
    if place.name in NEVER_READ:
        assert not named
    else:
        assert (len(named) == 1 and str(place) in named[0]) or place.parent.name in named[0], end.err
        assert len(list(root.rglob(".damaged/*"))) == 1
    expected = measured_twice(bench) if kind.startswith("measures") else bench.undisturbed
    if kind.startswith("measures"):
        assert end.code == call(*words).code == 0
        pd.testing.assert_frame_equal(
            tables(root, "several")[0], tables(elsewise(bench), "several")[0], check_exact=True
        )
    else:
        assert_same_tables(root, expected, "several")
    assert weights(root) == weights(bench.undisturbed)
    intact(root)


def _kind(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    if parts[0] == "checkpoints":
        return "checkpoints"
    return f"{'measures' if 'measures' in parts else parts[0]}/{path.name}"


def _once(bench: Bench, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that trials share, made when the first asks."""
    place = bench.place / name
    if not place.exists():
        make(place)
    return place


def measured_twice(bench: Bench) -> Path:
    """The undisturbed store, measured under two evaluation settings; its tables are those of the first."""

    def make(place: Path) -> None:
        shutil.copytree(elsewise(bench), place)
        assert call(*WORDS, f"output_dir={place}").code == 0

    return _once(bench, "twice", make)


def elsewise(bench: Bench) -> Path:
    """The undisturbed store with the tables of other evaluation settings."""

    def make(place: Path) -> None:
        shutil.copytree(bench.undisturbed, place)
        assert call(*WORDS, ELSEWISE, f"output_dir={place}").code == 0

    return _once(bench, "elsewise", make)


def begun(bench: Bench) -> Path:
    """A store with nothing but toys and one pack in the middle of its training."""

    def make(place: Path) -> None:
        sweep, store = config.load(SEVERAL), Store(place)
        pack = [point for point in sweep.points if point.sae.width == 5 and point.toy.seed == 0]

        def stop(event: Event) -> None:
            if isinstance(event, TrainProgress):
                raise Interrupted(signal.SIGTERM)

        try:
            run_pack(pack, 1, 1, store, sweep.evaluation, Machine("cpu", 1), stop)
        except Interrupted:
            return
        raise AssertionError("nothing was trained")

    return _once(bench, "begun", make)


# Numbers that overflow

OVERFLOWS = {
    "learning rate": (["training.lr=1e-3,1e30"], lambda point: point.training.lr > 1),
    "coefficient": (["penalty.coefficient=0.1,1e30"], lambda point: point.penalty.coefficient > 1),
    "coefficient beyond float32": (["penalty.coefficient=0.1,1e300"], lambda point: point.penalty.coefficient > 1),
    "scale": (["penalty.scale=1,1e-300"], lambda point: point.penalty.scale < 1),
}
SANE = {"training.lr": "1e-3", "penalty.coefficient": "0.1", "penalty.scale": "1"}
CAUSES = [
    (penalty, cause)
    for cause in OVERFLOWS
    for penalty in PENALTIES
    if (penalty != "none" or cause == "learning rate") and (cause != "scale" or penalty == "prod1p")
]


def overflow(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """Every penalty breaks in every way in turn, beside a sane point of the same pack."""
    penalty, cause = CAUSES[trial % len(CAUSES)]
    words, broken = OVERFLOWS[cause]
    # A key that a penalty does not read is refused.
    sane = {
        key: value
        for key, value in SANE.items()
        if key != "penalty.scale" or "scale" in get("penalty", penalty).settings
    }
    plain = [f"{key}={value}" for key, value in sane.items() if f"{key}=" not in words[0]]
    common = ["run", "--json", *TINY, f"penalty={penalty}", "name=overflow"]
    common += ["sae=jumprelu"] if penalty == "l0" else []  # a count has no slope elsewhere
    common += ["penalty.formula=a/(a+s)"] if penalty == "formula" else []
    both = call(*common, *plain, *words, f"output_dir={folder / 'both'}")
    alone = call(*common, *(f"{key}={value}" for key, value in sane.items()), f"output_dir={folder / 'alone'}")
    assert alone.code == 0, alone.err
    extreme = {point.id for point in config.load([*both_words(common), *plain, *words]).points if broken(point)}
    assert len(extreme) == 1
    notes = Store(folder / "both").failures("overflow")
    found, finished = weights(folder / "both"), weights(folder / "alone")
    assert both.code == 3, both.err
    assert set(notes) == extreme
    assert all(note["step"] == 25 and "not finite" in note["reason"] for note in notes.values()), notes
    assert found == finished
    losses = [
        tables(folder / each, "overflow")[0].set_index("point_id")["loss"][list(finished)] for each in ("both", "alone")
    ]
    pd.testing.assert_series_equal(*losses, check_exact=True)


def both_words(words: list[str]) -> list[str]:
    """Overrides alone, without the command and its options."""
    return [word for word in words[1:] if not word.startswith("--")]


# Memory that runs out


def pretended(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """Packs of more than a random size do not fit."""
    most = chance.randint(1, 3)
    run_pack_, kind = local.run_pack, chance.choice([MemoryError, RuntimeError])

    def small_machine(points: Any, *more: Any) -> None:
        if len(points) > most:
            raise kind("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        run_pack_(points, *more)

    with mock.patch.object(local, "run_pack", small_machine):
        end = call(*WORDS, f"output_dir={folder / 'outputs'}")
    assert end.code == 0, end.err
    assert "a pack of 4 points does not fit into memory: trying halves" in end.err
    assert_same_tables(folder / "outputs", bench.undisturbed, "several")


# Eight SAEs of 20,000 latents: 15 MiB each with their moments, and as much again while they start.
HEAVY = [*TINY, "sae.init=random_unit"]
HEAVY += ["penalty=l1", "penalty.coefficient=1", "training.steps=2", "evaluation.inputs=16"]
HEAVY = [word for word in HEAVY if not word.startswith(("sae.width", "training.steps=25"))]
HEAVY += ["sae.width=20000", "seed=range(0,8)", "name=heavy"]


def ulimit(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """The process gets so much address space more than it has, and no further (`ulimit -v`).

    Where a C library aborts for lack of it, as where a kernel kills for it, it is a kill: what is finished stays.
    """
    free = _once(bench, "heavy", lambda place: _heavy(place, None))
    end = _heavy(folder / "outputs", chance.randint(140, 420) << 20)
    # 127: what the loader of libraries aborts with.
    assert end.code in (0, 3, 4, 127, -signal.SIGABRT), (end.code, end.err[-2000:])
    assert "Traceback" not in end.err, end.err[-2000:]
    found, whole = weights(folder / "outputs"), weights(free)
    assert found.items() <= whole.items()
    intact(folder / "outputs")
    if end.code == 0:
        assert found == whole
    else:
        assert _heavy(folder / "outputs", None).code == 0
        assert weights(folder / "outputs") == whole


def _heavy(root: Path, room: int | None) -> Any:
    process = Forked(["run", "--json", *HEAVY, f"output_dir={root}"], root.parent / "log", room)
    return process.wait(300)


# Silly requests

KEYS = st.sampled_from([*point_keys(), *sweep_keys(), *GROUPS, "logger.mode", "launcher.x", "hydra.run.dir", "+a.b"])
ODD = "1 0 -1 1.5 true null l1 topk 1,2 range(0,3) choice(1,a) glob(*) ${toy.k} {a:1} [1,2] '${cells:mq}' 1e400 a/b.csv"
ODD += " ../x /etc/passwd ~root $HOME ${oc.env:HOME} ${now:%Y} '' inf nan -0.0 1_000 0x10 99999999999999999999 é \t"
VALUES = st.text(max_size=12) | st.sampled_from([*ODD.split(" "), "interval(0,1)", "shuffle(1,2)", "int(3.2)"])
VALUES |= (
    st.integers().map(str)
    | st.floats().map(str)
    | st.recursive(
        st.sampled_from(["1", "a"]), lambda inner: st.lists(inner, max_size=3).map(lambda each: f"[{','.join(each)}]")
    )
)
REQUESTS = st.lists(st.text(max_size=20) | st.builds("{}={}".format, KEYS | st.text(max_size=8), VALUES), max_size=4)


class Accepted(BaseException):
    """What was asked for is valid: this is as far as the trial goes."""


def silly(bench: Bench, folder: Path, trials: int) -> None:
    """`run` with generated overrides: they are valid, or refused with exit 2 in one line; nothing is written."""
    place = folder / "silly"
    place.mkdir()

    @settings(
        max_examples=trials,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(REQUESTS)
    def holds(words: list[str]) -> None:
        words = [word for word in words if not word.startswith("-")]  # options are typer's own
        given_place = any(word.lstrip("+~").startswith("output_dir") for word in words)
        with mock.patch.object(runner, "look", side_effect=Accepted):
            try:
                end = call("run", *words, *([] if given_place else [f"output_dir={place}"]))
            except Accepted:
                pass
            else:
                assert end.code == 2, (end.code, end.err)
                assert end.out == ""
                assert end.err.startswith("error: ") and end.err.count("\n") == 1 and len(end.err) < 600, end.err
        assert list(place.iterdir()) == []

    holds()


# Stores of other versions


def older(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """What a version before wrote is refused in one line that says what to do, and not touched."""
    archives = sorted(STORES.glob("*.tar.gz"))
    shutil.unpack_archive(archives[trial % len(archives)], folder)
    root = folder / "outputs"
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for words in ([*WORDS, f"output_dir={root}"], ["results", "several", "--output-dir", str(root)]):
        end = call(*words)
        assert (end.code, end.out, end.err.count("\n")) == (4, "", 1), end.err
        assert "schema 1, this one reads 2" in end.err and "choose another output_dir=" in end.err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def newer(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """What a later version wrote is refused in one line that says what to do, and not touched."""
    root = Path(shutil.copytree(bench.undisturbed, folder / "outputs"))
    if trial % 2:
        place = chance.choice(sorted(root.glob("points/*/record.json")))
        record = json.loads(place.read_bytes()) | {"schema": 99}
        del record["sha256"]
        files = {name: (place.parent / name).read_bytes() for name in record["sizes"]}
        place.write_bytes(checksums.sealed_record(record, files))
    else:
        Store(root).write_sweep_file("several", "sweep.yaml", b"schema: 99\nfrom: the future\n")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for words in (WORDS, ["results", "several", "--output-dir", str(root)]):
        end = call(*words, *([f"output_dir={root}"] if words is WORDS else []))
        assert (end.code, end.out, end.err.count("\n")) == (4, "", 1), end.err
        assert "schema 99" in end.err and "use that version, or choose another output_dir=" in end.err
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


# W&B

LETDOWNS = ("down", "service killed", "server killed", "wrong key", "slow")


def wandb(bench: Bench, folder: Path, trial: int, chance: random.Random) -> None:
    """A W&B that is down, slow, refuses the key, or dies under the run: the run does not notice."""
    how = LETDOWNS[trial % len(LETDOWNS)]
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if how == "slow":
        server.hangs = chance.choice(["Viewer", "UpsertBucket", "file_stream"])
    if how == "wrong key":
        server.fails = "Viewer"
    if how == "down":
        server.shutdown()
        server.server_close()
    words = [word for word in WORDS if word != "logger=none"]
    process = Fresh(words, folder, **environment_of(server.url))
    try:
        if "killed" in how:
            _await(lambda: any(what == "UpsertBucket" for what, _ in server.told), process)
            time.sleep(chance.uniform(0, 1))
        if how == "server killed":
            server.shutdown()
            server.server_close()
        if how == "service killed":
            # Ours, which logs, or below it W&B's own.
            chosen = chance.choice(descendants(process.process.pid) or [0])
            subprocess.run(["kill", "-9", str(chosen)], capture_output=True)
        end = process.wait()
    finally:
        server.released.set()
        if how not in ("down", "server killed"):
            server.shutdown()
            server.server_close()
    assert end.code == 0, end.err
    assert "Traceback" not in end.err, end.err
    assert json.loads(end.out)["ran"] == 16
    assert_same_tables(folder / "outputs", bench.undisturbed, "several")
    intact(folder / "outputs")
    assert toy_id(config.load(SEVERAL).points[0].toy) in Store(folder / "outputs").ids("toys")


def _await(found: Callable[[], bool], process: Fresh) -> None:
    deadline = time.monotonic() + 60
    while not found() and process.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
