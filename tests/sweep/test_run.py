"""Running a sweep: the table is the same whatever the order, the packs, the threads, the company, and who dies when."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commandline import SEVERAL, TINY, Forked, assert_same_tables, call, tables
from faults import RESUME, Bench, Fresh, identities, resumes

from sae_sweep.config import overrides
from sae_sweep.config.settings import toy_id
from sae_sweep.store import checksums
from sae_sweep.store.store import Store
from sae_sweep.sweep import local, plan

# As the design names them.
COLUMNS = """point_id toy toy_seed site distribution architecture init partition width k penalty coefficient penalty_p
penalty_scale seed data_seed steps loss fvu fvu_above_ceiling l0 live_latents dead_latents pure_latents owned_maxes
splits_per_max duplicates_per_max split_maxes label_q label_n label_c label_m label_mq label_mn label_mc label_mqn
label_mqc label_mnc label_mqnc info_query info_runner_up info_copies unique_query unique_runner_up unique_copies
winner_entropy oracle_gap k_sparse_splits absorption_full absorption_fraction loss_recovered kl shrinkage seconds
on_front"""

# Every architecture, from two starts, in stacks of four.
KINDS = [*TINY, "sae=relu,topk,batchtopk", "sae.k=2", "sae.init=kmeans,oracle", "seed=0,1", "name=kinds"]
KINDS += ["penalty=prod1p", "penalty.coefficient=0.1", "sae.width=7"]
KINDS.remove("sae.width=5")
SLOW = pytest.mark.slow
# A quarter of SEVERAL: one pack.
ONE_PACK = [*TINY, "penalty=l1,sqrt", "penalty.coefficient=0.1,1", "name=one"]


def run(words: list[str], root: Path, *more: str) -> dict[str, Any]:
    """The JSON of a run that ends well."""
    end = call("run", "--json", *words, *more, f"output_dir={root}")
    assert end.code == 0, end.err
    found: dict[str, Any] = json.loads(end.out)
    return found


def counts(found: dict[str, Any]) -> tuple[int, int, int]:
    """Points that a run trained or measured, skipped, and failed to train."""
    return found["ran"], found["skipped"], found["failed"]


def weights(root: Path) -> dict[str, bytes]:
    """Finished id → its parameters as stored."""
    store = Store(root)
    return {id: store.read("points", id, "sae_weights.safetensors") for id in store.ids("points")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of SEVERAL, run in one go."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert counts(run(SEVERAL, root)) == (16, 0, 0)
    return root


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """One of one's own to change."""
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


# The table


def test_every_point_and_every_column(undisturbed: Path) -> None:
    points = overrides.load(SEVERAL).points
    results = pd.read_parquet(undisturbed / "sweeps" / "several" / "results.parquet")
    assert results["point_id"].tolist() == [point.id for point in points]
    assert set(COLUMNS.split()) <= set(results)
    # A setting with a column of its own stands there once.
    assert not {"toy.seed", "sae.width", "penalty.name", "penalty.coefficient"} & set(results)
    assert results[["loss", "fvu", "l0", "loss_recovered", "kl", "seconds"]].notna().all(axis=None)
    assert results["width"].tolist() == [point.sae.width for point in points]
    untrained = pd.read_parquet(undisturbed / "sweeps" / "several" / "untrained.parquet")
    assert untrained["point_id"].tolist() == results["point_id"].tolist()
    assert (untrained["fvu"] != results["fvu"]).all()


def test_a_second_run_trains_nothing(copy: Path) -> None:
    before = identities(copy), identities(copy, "toys")
    assert counts(run(SEVERAL, copy)) == (0, 16, 0)
    assert (identities(copy), identities(copy, "toys")) == before


def test_what_is_finished_is_read_once(copy: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look that proves the records is where the tables come from; a shard reads what others finished too."""
    read: list[str] = []
    read_record = checksums.read_record

    def counting(folder: Path, *check: Any) -> dict[str, Any]:
        read.append(folder.name)
        return read_record(folder, *check)

    monkeypatch.setattr(checksums, "read_record", counting)
    for more in ([], ["--shard", "0/2"]):
        read.clear()
        run(SEVERAL, copy, *more)
        points = [name for name in read if name in Store(copy).ids("points")]
        assert sorted(points) == sorted(Store(copy).ids("points"))
    assert_same_tables(copy, undisturbed, "several")


def test_one_more_coefficient_trains_only_the_new_points(copy: Path) -> None:
    before = identities(copy)
    more = [word.replace("0.1,1", "0.1,1,2") for word in SEVERAL]
    assert counts(run(more, copy)) == (8, 16, 0)
    after = identities(copy)
    assert len(after) == 24 and before.items() <= after.items()
    assert len(tables(copy, "several")[0]) == 24


def test_a_point_trained_for_one_sweep_serves_another(copy: Path) -> None:
    assert counts(run(ONE_PACK, copy)) == (0, 4, 0)
    mine, theirs = tables(copy, "one")[0], tables(copy, "several")[0]
    assert mine["loss"].tolist() == theirs.set_index("point_id")["loss"][mine["point_id"]].tolist()


def test_shards_are_disjoint_and_together_the_sweep(undisturbed: Path, tmp_path: Path) -> None:
    done: list[set[str]] = []
    for i in range(3):
        before = set(identities(tmp_path))
        found = run(SEVERAL, tmp_path, "--shard", f"{i}/3")
        done.append(set(identities(tmp_path)) - before)
        assert counts(found) == (len(done[-1]), 0, 0) and found["points"] == found["ran"]
        assert all(int(id, 16) % 3 == i for id in done[-1])
    assert sum(map(len, done)) == 16
    assert_same_tables(tmp_path, undisturbed, "several")


def test_a_name_is_not_reused_for_another_grid(copy: Path) -> None:
    files = sorted(copy.rglob("*"))
    other = [word.replace("sae.width=5,7", "sae.width=5,8") for word in SEVERAL]
    end = call("run", *other, f"output_dir={copy}")
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
    assert "sweep several holds another grid: 8 of its points" in end.err
    assert sorted(copy.rglob("*")) == files


@SLOW
def test_other_evaluation_settings_measure_again_and_train_nothing(kinds: Path, tmp_path: Path) -> None:
    """By the bits that measuring at once gives: what is measured is what is stored."""
    other = ["evaluation.inputs=20", "evaluation.permutations=3", "evaluation.fires_above=0.2"]
    shutil.copytree(kinds, tmp_path / "twice")
    before = identities(tmp_path / "twice")
    first = tables(tmp_path / "twice", "kinds")[0]
    seconds = pd.read_parquet(tmp_path / "twice" / "sweeps" / "kinds" / "results.parquet")["seconds"]
    assert counts(run([*KINDS, *other], tmp_path / "twice")) == (12, 0, 0)
    assert identities(tmp_path / "twice") == before
    again = pd.read_parquet(tmp_path / "twice" / "sweeps" / "kinds" / "results.parquet")
    assert again["seconds"].tolist() == seconds.tolist()
    assert again["point_id"].tolist() == first["point_id"].tolist()
    assert (again["loss"] != first["loss"]).all()
    assert counts(run([*KINDS, *other], tmp_path / "twice")) == (0, 12, 0)
    run([*KINDS, *other], tmp_path / "once")
    assert_same_tables(tmp_path / "twice", tmp_path / "once", "kinds")
    # And back, from what is stored.
    assert counts(run(KINDS, tmp_path / "twice")) == (0, 12, 0)
    pd.testing.assert_frame_equal(tables(tmp_path / "twice", "kinds")[0], first, check_exact=True)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of KINDS, run with as many threads as there are and stacks as large as they come."""
    root = tmp_path_factory.mktemp("kinds")
    run(KINDS, root)
    return root


@pytest.mark.parametrize(
    ("largest", "threads"),
    [(1, 2), pytest.param(2, 1, marks=SLOW), (2, 3), pytest.param(64, 1, marks=SLOW)],
)
def test_packs_and_threads_change_no_bit(
    largest: int, threads: int, kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "LARGEST_PACK", largest)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(threads)))
    run(KINDS, tmp_path)
    assert_same_tables(tmp_path, kinds, "kinds")
    assert weights(tmp_path) == weights(kinds)


# Failures


def test_a_point_that_fails_leaves_its_pack_mates_alone(tmp_path: Path) -> None:
    sane = [*ONE_PACK, "training.lr=1e-3"]
    run(sane, tmp_path / "sane")
    mixed = [*ONE_PACK, "training.lr=1e-3,1e30"]
    end = call("run", "--json", *mixed, f"output_dir={tmp_path / 'mixed'}")
    assert end.code == 3
    found = json.loads(end.out)
    assert counts(found) == (4, 0, 4)
    failed = {point.id for point in overrides.load(mixed).points if point.training.lr > 1}
    assert all(any(id[:8] in line and "not finite" in line for line in end.err.splitlines()) for id in failed)
    assert weights(tmp_path / "mixed") == weights(tmp_path / "sane")
    assert set(tables(tmp_path / "mixed", "one")[0]["point_id"]) == set(weights(tmp_path / "sane"))
    notes = Store(tmp_path / "mixed").failures("one")
    assert set(notes) == failed
    assert all(note["step"] == 25 and "not finite" in note["reason"] for note in notes.values())

    end = call("run", "--json", *mixed, f"output_dir={tmp_path / 'mixed'}")
    assert (end.code, counts(json.loads(end.out))) == (3, (0, 4, 4))
    assert "FAILED" in end.err


def test_fail_fast_stops_at_the_first_failure(tmp_path: Path) -> None:
    # The broken rate comes first, and each width is a pack of its own.
    words = [*TINY, "sae.width=5,6,7", "penalty.coefficient=1", "training.lr=1e30,1e-3", "name=fast"]
    words.remove("sae.width=5")
    end = call("run", "--json", "--fail-fast", *words, f"output_dir={tmp_path}")
    assert (end.code, counts(json.loads(end.out))) == (3, (1, 0, 1))
    assert len(tables(tmp_path, "fast")[0]) == 1
    assert call("run", "--json", *words, f"output_dir={tmp_path}").code == 3
    assert len(tables(tmp_path, "fast")[0]) == 3


def test_a_toy_that_cannot_be_trained_fails_its_own_points_only(tmp_path: Path) -> None:
    words = [*ONE_PACK, "toy.lr=1e30,1e-3"]
    end = call("run", "--json", *words, f"output_dir={tmp_path}")
    assert (end.code, counts(json.loads(end.out))) == (3, (4, 0, 4))
    assert "are not finite" in end.err
    assert {note["reason"] for note in Store(tmp_path).failures("one").values()} == {
        "the toy's activations at pre_unembed are not finite under distribution max_stratified"
    }


def test_a_failure_is_forgotten_once_the_point_succeeds(tmp_path: Path) -> None:
    id = overrides.load(ONE_PACK).points[0].id
    Store(tmp_path).fail("one", id, {"step": 1, "reason": "a bug that has been mended"})
    run(ONE_PACK, tmp_path)
    assert Store(tmp_path).failures("one") == {}


@pytest.mark.parametrize("error", [MemoryError(), pytest.param(RuntimeError("std::bad_alloc"), marks=SLOW)])
def test_a_pack_that_does_not_fit_into_memory_is_split(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pack = local.run_pack

    def small_machine(points: Any, *more: Any) -> None:
        if len(points) > 1 or points[0].penalty.name == "sqrt":
            raise error
        run_pack(points, *more)

    run(ONE_PACK, tmp_path / "large")
    monkeypatch.setattr(local, "run_pack", small_machine)
    end = call("run", "--json", *ONE_PACK, f"output_dir={tmp_path / 'small'}")
    assert (end.code, counts(json.loads(end.out))) == (3, (2, 0, 2))
    assert "a pack of 4 points does not fit into memory" in end.err
    monkeypatch.undo()
    run(ONE_PACK, tmp_path / "small")
    assert_same_tables(tmp_path / "small", tmp_path / "large", "one")


# Damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


POINT_FILES = ["record.json", "config.yaml", "sae_weights.safetensors", "cfg.json", "latents.parquet"]


@pytest.mark.parametrize("damage", [flip, *(pytest.param(by, marks=SLOW) for by in (truncate, empty)), Path.unlink])
def test_damage_is_named_and_recomputed(damage: Callable[[Path], None], undisturbed: Path, copy: Path) -> None:
    points = overrides.load(SEVERAL).points
    for point, filename in zip(points, POINT_FILES, strict=False):
        damage(copy / "points" / point.id / filename)
    toy = toy_id(points[-1].toy)
    damage(copy / "toys" / toy / "toy.safetensors")
    end = call("run", "--json", *SEVERAL, f"output_dir={copy}")
    assert (end.code, counts(json.loads(end.out))) == (0, (5, 11, 0))
    named = [line for line in end.err.splitlines() if "was damaged" in line]
    assert len(named) == 6
    for id, filename in [(toy, "toy.safetensors"), *zip([p.id for p in points], POINT_FILES, strict=False)]:
        assert any(id in line and filename in line for line in named)
    assert_same_tables(copy, undisturbed, "several")
    assert weights(copy) == weights(undisturbed)
    assert Store(copy).ids("toys") == Store(undisturbed).ids("toys")


def test_a_toy_damaged_while_it_is_in_use_is_trained_again(
    undisturbed: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "points")
    run_pack = local.run_pack

    def damage_first(points: Any, *more: Any) -> None:
        flip(copy / "toys" / toy_id(points[0].toy) / "toy.safetensors")
        run_pack(points, *more)

    monkeypatch.setattr(local, "run_pack", damage_first)
    end = call("run", "--json", *SEVERAL, f"output_dir={copy}")
    assert (end.code, counts(json.loads(end.out))) == (0, (16, 0, 0))
    assert end.err.count("was damaged (toy.safetensors does not match its checksum)") == 4
    assert_same_tables(copy, undisturbed, "several")


def test_a_damaged_measurement_is_made_again(copy: Path) -> None:
    other = [*SEVERAL, "evaluation.inputs=20"]
    run(other, copy)
    expected = tables(copy, "several")[0]
    (measured,) = (copy / "points" / expected["point_id"][3] / "measures").iterdir()
    truncate(measured / "record.json")
    end = call("run", "--json", *other, f"output_dir={copy}")
    assert counts(json.loads(end.out)) == (1, 15, 0)
    assert measured.name in end.err
    pd.testing.assert_frame_equal(tables(copy, "several")[0], expected, check_exact=True)


# Interruption


@pytest.mark.parametrize("delay", [0.0, pytest.param(0.3, marks=SLOW), 0.8])
def test_stopped_while_it_loads(delay: float, tmp_path: Path) -> None:
    process = Fresh(["run", "--json", *SEVERAL], tmp_path)
    time.sleep(delay)
    process.send(signal.SIGTERM)
    end = process.wait()
    assert (end.code, end.out) == (75, "")
    assert end.err.splitlines()[-1] == RESUME + " ".join(["run", "--json", *SEVERAL])
    assert "Traceback" not in end.err


def wait_for(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@SLOW
def test_stopped_while_it_logs(undisturbed: Path, tmp_path: Path) -> None:
    logging = [word for word in SEVERAL if word != "logger=none"] + ["logger.mode=offline"]
    process = Forked(["run", "--json", *logging], tmp_path)
    wait_for((tmp_path / "outputs" / "sweeps" / "several" / "results.parquet").exists)
    process.send(signal.SIGTERM)
    end = process.wait()
    assert end.code == 75
    assert end.err.splitlines()[-1].startswith("interrupted: ")
    bench = Bench(tmp_path)
    bench.undisturbed = undisturbed
    resumes(tmp_path, bench)
    assert len(identities(tmp_path / "outputs")) == 16


@pytest.mark.parametrize("times", [pytest.param(1, marks=SLOW), 2])
def test_control_c_does_not_wait_for_a_pack(times: int, tmp_path: Path) -> None:
    """Of ten million steps."""
    words = [word.replace("training.steps=25", "training.steps=10000000") for word in ONE_PACK]
    process = Forked(["run", *words], tmp_path)
    wait_for(lambda: "trained" in (tmp_path / "err").read_text())
    time.sleep(0.2)
    for _ in range(times):
        process.send(signal.SIGINT)
    end = process.wait()
    assert end.code == 130
    assert "Traceback" not in end.err
    assert end.err.splitlines()[-1].startswith("interrupted: ")


# The environment


def test_a_store_deleted_under_a_run_is_filled_again_by_the_next(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_pack = local.run_pack

    def delete_first(points: Any, number: int, *more: Any) -> None:
        if number == 3:
            shutil.rmtree(tmp_path / "outputs")
        run_pack(points, number, *more)

    monkeypatch.setattr(local, "run_pack", delete_first)
    end = call("run", "--json", *SEVERAL, f"output_dir={tmp_path / 'outputs'}")
    assert end.code == 4
    assert end.err.splitlines()[-1].startswith("error: ")
    monkeypatch.undo()
    found = run(SEVERAL, tmp_path / "outputs")
    assert counts(found) == (8, 8, 0)
    assert_same_tables(tmp_path / "outputs", undisturbed, "several")
