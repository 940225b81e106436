"""The store: a folder exists if and only if it is finished, whatever dies when; damage is never used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.store import atomic
from sae_sweep.store import checksums as sealed
from sae_sweep.store.store import NotThere, Store, StoreDamaged

RECORD = {"id": "a1", "metrics": {"fvu": 0.1 + 0.2, "l0": 1.0}}
FILES = {"sae_weights.safetensors": bytes(range(256)) * 40, "cfg.json": b'{"d_sae": 3}'}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "outputs")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_committed_is_read_back(store: Store) -> None:
    assert store.ids("points") == set()
    assert store.commit("points", "a1", RECORD, FILES)
    assert store.ids("points") == {"a1"}
    record = store.read_record("points", "a1")
    assert {key: record[key] for key in RECORD} == RECORD
    assert set(record["checksums"]) == set(FILES)
    assert {name: store.read("points", "a1", name) for name in FILES} == FILES
    assert names(store.root / "points") == ["a1"]
    assert json.loads((store.path("points", "a1") / "record.json").read_text())["id"] == "a1"


def test_numpy_values_and_what_is_not_a_number(store: Store) -> None:
    metrics = {"fvu": np.float64(0.1), "dead": np.int64(3), "kl": float("nan"), "splits": np.arange(3), "q": np.inf}
    store.commit("points", "a1", {"metrics": metrics}, {})
    assert store.read_record("points", "a1")["metrics"] == {
        "fvu": 0.1,
        "dead": 3,
        "kl": None,
        "splits": [0, 1, 2],
        "q": None,
    }


def test_the_second_comer_discards_its_copy(store: Store) -> None:
    assert store.commit("points", "a1", RECORD, FILES)
    assert not store.commit("points", "a1", {**RECORD, "metrics": {}}, {})
    assert store.read_record("points", "a1")["metrics"] == RECORD["metrics"]
    assert names(store.root / "points") == ["a1"]


def test_unknown_ids_and_files_are_the_users_errors(store: Store) -> None:
    store.commit("points", "a1", RECORD, FILES)
    with pytest.raises(UserError, match=r"there is no .*b2"):
        store.read_record("points", "b2")
    with pytest.raises(UserError, match="holds no file x"):
        store.read("points", "a1", "x")
    assert store.ids("points") == {"a1"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {"flipped": flip, "truncated": truncate, "empty": lambda path: path.write_bytes(b""), "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("filename", ["record.json", *FILES])
def test_damage_is_set_aside_and_can_be_recomputed(store: Store, damage, filename: str) -> None:
    for n in range(2):
        assert store.commit("points", "a1", RECORD, FILES)
        damage(store.path("points", "a1") / filename)
        with pytest.raises(StoreDamaged, match=r"damaged.*run again") as caught:
            store.read("points", "a1", filename if filename in FILES else "cfg.json")
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)
        assert store.ids("points") == set()
        assert names(store.root / "points" / ".damaged") == [f"a1-{i}" for i in range(n + 1)]
    assert store.commit("points", "a1", RECORD, FILES)
    assert store.read("points", "a1", "cfg.json") == FILES["cfg.json"]


def test_any_flipped_bit_of_a_record_is_noticed(store: Store) -> None:
    store.commit("points", "a1", RECORD, {"cfg.json": b"{}"})
    path = store.path("points", "a1") / "record.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(StoreDamaged):
            store.read_record("points", "a1")
        store.commit("points", "a1", RECORD, {"cfg.json": b"{}"})


def test_bulk_reading_leaves_out_what_is_missing_or_damaged(store: Store) -> None:
    for id in ("a1", "b2", "c3", "d4"):
        store.commit("points", id, {**RECORD, "id": id}, FILES)
    truncate(store.path("points", "b2") / "sae_weights.safetensors")
    flip(store.path("points", "c3") / "record.json")
    records = store.records("points", ["d4", "zz", "c3", "b2", "a1"])
    assert list(records) == ["d4", "a1"]
    assert [records[id]["id"] for id in records] == ["d4", "a1"]
    assert len(store.damaged) == 2
    assert store.ids("points") == {"a1", "d4"}


def test_content_is_verified_where_asked(store: Store) -> None:
    for id in ("a1", "b2"):
        store.commit("points", id, {**RECORD, "id": id}, FILES)
    flip(store.path("points", "a1") / "cfg.json")
    assert list(store.records("points", ["a1", "b2"])) == ["a1", "b2"]
    assert list(store.records("points", ["a1", "b2"], "changed")) == ["b2"]
    assert len(store.damaged) == 1 and "cfg.json does not match its checksum" in store.damaged[0]
    assert store.ids("points") == {"b2"}


def test_what_nobody_wrote_is_found_where_every_byte_is_read(store: Store) -> None:
    """A bit lost by the disk itself leaves no newer time behind, as here where the record is the newest file again."""
    for id in ("a1", "b2"):
        store.commit("points", id, {**RECORD, "id": id}, FILES)
    flip(store.path("points", "a1") / "cfg.json")
    time.sleep(0.05)  # the filesystem's clock has ticks
    (store.path("points", "a1") / "record.json").chmod(0o600)
    assert list(store.records("points", ["a1", "b2"], "changed")) == ["a1", "b2"]
    assert list(store.records("points", ["a1", "b2"], "everything")) == ["b2"]
    assert len(store.damaged) == 1 and "cfg.json" in store.damaged[0]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_grid_is_set_aside(store: Store, damage) -> None:
    for filename in ("sweep.yaml", "points.txt"):
        store.write_sweep_file("quick", filename, b"schema: 2\n")
        damage(store.sweep("quick") / filename)
        if damage is Path.unlink:
            with pytest.raises(NotThere):
                store.read_sweep_file("quick", filename)
        else:
            with pytest.raises(StoreDamaged, match="damaged"):
                store.read_sweep_file("quick", filename)
            assert not (store.sweep("quick") / filename).exists()
            assert (store.sweep("quick") / ".damaged" / f"{filename}-0").exists()


def test_any_flipped_bit_of_a_grid_is_noticed(store: Store) -> None:
    place = store.write_sweep_file("quick", "points.txt", b"a1\nb2\n")
    whole = place.read_bytes()
    for position in range(len(whole)):
        place.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(StoreDamaged):
            store.read_sweep_file("quick", "points.txt")


@pytest.mark.parametrize("schema", [1, 3, None, "2", {"a": 1}])
def test_another_schema_is_refused_with_what_to_do_and_left_alone(store: Store, schema: object) -> None:
    store.commit("points", "a1", {"schema": schema}, FILES)
    store.write_sweep_file("quick", "sweep.yaml", json.dumps({"schema": schema}).encode() + b"\n")
    for read in (
        lambda: store.read_record("points", "a1"),
        lambda: store.records("points", ["a1"]),
        lambda: store.read("points", "a1", "cfg.json"),
        lambda: store.info("quick"),
    ):
        with pytest.raises(EnvironmentProblem, match=r"another version.*this one reads 2.*output_dir=") as caught:
            read()
        assert not isinstance(caught.value, StoreDamaged)
        assert "\n" not in str(caught.value)
    assert store.ids("points") == {"a1"} and names(store.sweep("quick")) == ["sweep.yaml"]
    assert store.damaged == []


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", "", ".damaged", "a\n", "é", "x" * 101])
def test_no_name_leads_out_of_the_store(store: Store, name: str) -> None:
    for use in (
        lambda: store.sweep(name),
        lambda: store.path("points", name),
        lambda: store.commit("points", name, RECORD, FILES),
        lambda: store.write_sweep_file(name, "x", b""),
    ):
        with pytest.raises(UserError, match="is no name"):
            use()
    assert not store.root.exists()


@pytest.mark.parametrize(
    "body", [b"", b"{,\n", b"[1,\n", b'{"schema": 1,\n', b'{"sizes": {}, "checksums": {"x": ""},\n', b"[" * 99999]
)
def test_a_well_sealed_record_that_is_none_is_damage(store: Store, body: bytes) -> None:
    store.commit("points", "a1", RECORD, FILES)
    content = body + f'"sha256": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
    (store.path("points", "a1") / "record.json").write_bytes(content)
    with pytest.raises(StoreDamaged):
        store.read_record("points", "a1")
    assert store.ids("points") == set()


@pytest.mark.parametrize("name", ["../b2/cfg.json", "/etc/hostname", "", "..", "a\0b"])
def test_a_record_vouches_for_its_own_folder_alone(store: Store, name: str) -> None:
    store.commit("points", "b2", RECORD, FILES)
    store.commit("points", "a1", RECORD, {})
    place = store.path("points", "a1") / "record.json"
    place.write_bytes(sealed.sealed_record(RECORD, {name: FILES["cfg.json"]}))
    with pytest.raises(StoreDamaged, match="is missing"):
        store.read_record("points", "a1")


def test_a_whole_folder_that_took_the_damaged_ones_place_stays(store: Store) -> None:
    store.commit("points", "a1", RECORD, FILES)
    with pytest.raises(StoreDamaged), store._set_aside_if_damaged(store.root / "points" / "a1"):
        # meanwhile another process finds the damage, sets the folder aside, and recomputes it
        store.path("points", "a1").rename(store.root / "points" / ".other")
        Store(store.root).commit("points", "a1", RECORD, FILES)
        raise sealed.Damage("seen before the other process mended it")
    assert store.read_record("points", "a1")["id"] == "a1"


def test_measurements_under_other_settings(store: Store) -> None:
    store.commit("points", "a1", RECORD, FILES)
    assert store.measures("a1") == {}
    assert store.commit_measure("a1", "e1", {"metrics": {"fvu": 0.5}}, {"latents.parquet": b"12"})
    assert not store.commit_measure("a1", "e1", {"metrics": {"fvu": 0.6}}, {})
    store.commit_measure("a1", "e2", {"metrics": {}}, {})
    flip(store.path("points", "a1") / "measures" / "e2" / "record.json")
    assert {id: record["metrics"] for id, record in store.measures("a1").items()} == {"e1": {"fvu": 0.5}}
    assert store.read("points", "a1", "cfg.json") == FILES["cfg.json"]


def test_sweep_files_and_failures(store: Store) -> None:
    assert store.sweeps() == []
    store.write_sweep_file("quick", "sweep.yaml", b"old")
    assert store.write_sweep_file("quick", "sweep.yaml", b"new").read_bytes().startswith(b"new")
    assert store.read_sweep_file("quick", "sweep.yaml") == "new"
    assert store.write_sweep_file("quick", "report.html", b"new").read_bytes() == b"new"
    assert store.failures("quick") == {}
    store.fail("quick", "a1", {"step": 3, "reason": "diverged"})
    store.fail("quick", "b2", {"step": None, "reason": "no memory"})
    store.clear_failure("quick", "b2")
    store.clear_failure("quick", "b2")
    assert store.failures("quick") == {"a1": {"step": 3, "reason": "diverged"}}
    (store.sweep("quick") / "failures" / "a1.json").write_text("{")
    assert list(store.failures("quick")) == ["a1"]
    assert store.sweeps() == ["quick"]
    assert names(store.sweep("quick")) == ["failures", "report.html", "sweep.yaml"]
    (store.sweep("quick") / "failures" / "a1.json").write_text("[1]")
    assert store.failures("quick")["a1"]["reason"] == "the note of this failure cannot be read"


def _commit_all(root: Path, worker: int, start, won) -> None:
    store = Store(root)
    start.wait()
    for i in range(60):
        if store.commit("points", f"{i:04x}", {**RECORD, "worker": worker}, {"by": bytes([worker]) * 5000}):
            won.put(i)


def test_concurrent_committers_leave_one_whole_copy_each(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_commit_all, args=(store.root, w, start, won)) for w in range(4)]
    for worker in workers:
        worker.start()
    winners = sorted(won.get(timeout=60) for _ in range(60))
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert winners == list(range(60)) and won.empty()
    for id, record in store.records("points", sorted(store.ids("points"))).items():
        assert store.read("points", id, "by") == bytes([record["worker"]]) * 5000
    assert names(store.root / "points") == [f"{i:04x}" for i in range(60)]


COMMITTER = """
import sys
from sae_sweep.store.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
for i in range(10**6):
    store.commit("points", f"{i:06x}", {"id": f"{i:06x}"}, {"weights": bytes(200_000), "cfg": b"1"})
"""


def test_killed_committers_lose_nothing_finished_and_leave_nothing_to_mistake(store: Store) -> None:
    finished: set[str] = set()
    for n in range(12):
        process = subprocess.Popen([sys.executable, "-c", COMMITTER, str(store.root)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.017 * n)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = store.ids("points")
        assert now >= finished
        assert set(store.records("points", now)) == now
        finished = now
    assert finished and store.damaged == []
    for id in finished:
        assert len(store.read("points", id, "weights")) == 200_000
    store.commit("points", "last", {}, {})
    assert set(names(store.root / "points")) == finished | {"last"}


def test_only_abandoned_temporary_folders_are_swept_away(store: Store) -> None:
    parent = store.root / "points"
    host, dead = atomic.host(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folders = {
        "dead": f".tmp-a1-{host}-{dead.pid}-00000000",
        "alive": f".tmp-a1-{host}-{os.getpid()}-00000000",
        "elsewhere": f".tmp-a1-{'0' * 12}-{dead.pid}-00000000",
        "old": f".tmp-a1-{'0' * 12}-{dead.pid}-00000001",
    }
    for name in folders.values():
        (parent / name).mkdir(parents=True)
    os.utime(parent / folders["old"], (0, time.time() - 2 * 86_400))
    store.commit("points", "b2", RECORD, {})
    assert names(parent) == sorted([folders["alive"], folders["elsewhere"], "b2"])
    assert store.ids("points") == {"b2"}


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match=r"^cannot write .*a1: No space left on device$"):
        store.commit("points", "a1", RECORD, FILES)
    with pytest.raises(EnvironmentProblem, match="No space left on device"):
        store.write_sweep_file("quick", "sweep.yaml", b"1")
    assert names(store.root / "points") == []
    assert names(store.root / "sweeps" / "quick") == []


def test_a_place_that_cannot_be_written_is_the_environments_problem(tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(EnvironmentProblem, match=r"cannot write .*Not a directory"):
        Store(tmp_path / "outputs").commit("points", "a1", RECORD, FILES)
