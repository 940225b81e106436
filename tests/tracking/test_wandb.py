"""The logs are read back from the files that W&B writes, by W&B's own format and messages."""

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from processes import descendants
from wandb_server import KEY, serving

from sae_sweep.config.columns import LABELS, table_columns
from sae_sweep.config.logger import Logger, resolved
from sae_sweep.config.settings import Evaluation, Penalty, Point, Sae, Site, canonical, measure_id
from sae_sweep.errors import UserError
from sae_sweep.tracking.content import point_name, point_run, run_id
from sae_sweep.tracking.logging import WandbLog
from sae_sweep.tracking.process import TIMEOUT

METRICS = {"loss": 2.5, "fvu": 0.04, "l0": 2.25, "owned_maxes": 15, "kl": None, "oracle_gap": float("nan")}
COEFFICIENTS = (0.5, 1.0, 2.0)


def record(point: Point, **metrics) -> dict:
    return {
        "id": point.id,
        "settings": canonical(point).to_dict(),
        "measure_id": measure_id(Evaluation()),
        "metrics": {**METRICS, **metrics},
        "untrained": {**METRICS, "fvu": 0.7},
        "curve": [{"step": step, "loss": 9.0 - step / 100, "fvu": 0.5, "l0": 3.0} for step in (0, 50, 100)],
        "provenance": {"git_sha": "abc", "git_dirty": False, "versions": {}, "device": "cpu"},
        "seconds": 1.5,
    }


def points() -> list[Point]:
    return [
        Point(sae=Sae(width=width), penalty=Penalty(name, coefficient))
        for width in (16, 136)
        for name in ("l1", "sqrt")
        for coefficient in COEFFICIENTS
    ]


def results() -> pd.DataFrame:
    """Two seeds of every point; L0 falls and FVU rises with the coefficient; the middle one is off the front."""
    rows = [row(point, seed) for seed in (0, 1) for point in points()]
    return pd.DataFrame(rows).reindex(columns=[*table_columns()]).astype(table_columns())


def row(point: Point, seed: int) -> dict:
    coefficient = point.penalty.coefficient
    settings = {"toy": "max_of_k", "toy_seed": 0, "site": "pre_unembed", "distribution": "max_stratified"}
    settings |= {"architecture": "relu", "init": "kmeans", "partition": None, "width": point.sae.width, "k": None}
    settings |= {"penalty": point.penalty.name, "coefficient": coefficient, "penalty_p": None, "penalty_scale": None}
    settings |= {"seed": seed, "data_seed": 0, "steps": 3000}
    metrics = {"loss": 2.0, "fvu": coefficient / 100 + seed / 1000, "l0": 4.0 / coefficient, "kl": None}
    metrics |= {"owned_maxes": 14 + seed, "splits_per_max": coefficient / 2, "duplicates_per_max": 8.0 - seed}
    metrics |= {f"label_{label}": 0 for label in LABELS}
    metrics |= {"label_m": 3, "label_mq": 2 * int(point.penalty.name == "sqrt"), "seconds": 1.0}
    return {"point_id": f"{point.id[:-1]}{seed}", **settings, **metrics, "on_front": coefficient != 1.0}


VERDICTS = [{"claim": "one_per_max", "verdict": "supported", "sentence": "Width 16 gives 15 of 16 maxima a latent."}]


def read_log(path: Path) -> SimpleNamespace:
    """The run in a `.wandb` file: blocks of 32 KiB, each record framed by checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    read = SimpleNamespace(path=path, run=None, history=[], summary={}, exit_code=None, config={})
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + body)
        at += 7 + length
        # 1 whole, 2 first, 3 middle, 4 last
        parts = body if kind in (1, 2) else parts + body
        if kind in (1, 4):
            add(read, Record.FromString(parts))
    return read


def add(read: SimpleNamespace, message) -> None:
    kind = message.WhichOneof("record_type")
    if kind == "run":
        read.run = message.run
        read.config |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
    elif kind == "config":
        read.config |= {".".join(item.nested_key): json.loads(item.value_json) for item in message.config.update}
    elif kind == "history":
        row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message.history.item}
        read.history.append((message.history.step.num, row))
    elif kind == "summary":
        read.summary |= {
            item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message.summary.update
        }
    elif kind == "exit":
        read.exit_code = message.exit.exit_code


def logs(sweep: Path) -> dict[str, SimpleNamespace]:
    found = [read_log(path) for path in sorted((sweep / "wandb").glob("*run-*/run-*.wandb"))]
    assert len({log.run.run_id for log in found}) == len(found), "a run was logged twice"
    return {log.run.run_id: log for log in found}


def ids(some: Iterable[Point], sweep: str = "quick start") -> set[str]:
    """The ids of points' runs."""
    return {run_id(point.id, sweep) for point in some}


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch, tmp_path):
    """No key, no settings, a home of its own, a current folder of its own: what a fresh machine has."""
    for key in [key for key in os.environ if key.startswith("WANDB_") or key == "NETRC"]:
        monkeypatch.delenv(key)
    for name in ("home", "cwd", "sweep"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def open_log(tmp_path, notes):
    def make(folder: str = "sweep", timeout: float = TIMEOUT, **settings) -> WandbLog:
        logger = Logger(project="toys", **settings)
        return WandbLog(tmp_path / folder, "quick start", logger, note=notes.append, timeout=timeout)

    return make


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def test_every_point_is_read_back(open_log, notes, tmp_path, capfd):
    with open_log() as log:
        for point in points():
            log.log_point(record(point))
    read = logs(tmp_path / "sweep")
    assert set(read) == ids(points())
    for point in points():
        log = read[run_id(point.id, "quick start")]
        assert (log.run.run_group, log.run.job_type, log.run.project) == ("quick start", "sae", "toys")
        assert log.run.display_name == point_name(point.to_dict())
        for key, value in canonical(point).to_dict().items():
            assert log.config[key] == value
        assert log.config["sweep"] == "quick start"
        assert [step for step, _ in log.history] == [0, 50, 100]
        assert [row["training/loss"] for _, row in log.history] == [9.0, 8.5, 8.0]
        assert log.summary["fvu"] == 0.04
        assert log.summary["untrained/fvu"] == 0.7
        assert log.summary["kl_divergence"] is None
        assert log.summary["oracle_gap"] is None
        assert log.summary["seconds"] == 1.5
        assert log.exit_code == 0
    own = {run_id(point.id, "quick start"): f"fvu_by_penalty/{point.penalty.name}" for point in points()}
    assert {log.summary[own[id]] for id, log in read.items()} == {0.04}
    assert len({(*sorted(log.config), *sorted({*log.summary} - {own[id]})) for id, log in read.items()}) == 1
    assert notes == []
    assert capfd.readouterr() == ("", "")
    assert files(tmp_path / "home") == files(tmp_path / "cwd") == []
    assert not [key for key in os.environ if key.startswith("WANDB_")]


@pytest.mark.slow
def test_the_sweeps_run_carries_table_and_charts(open_log, notes, tmp_path):
    frame = results()
    with open_log() as log:
        log.log_sweep(frame, frame.assign(fvu=0.7), VERDICTS, {"points": 12})
    ((run_id, run),) = logs(tmp_path / "sweep").items()
    assert run_id.startswith("sweep-quick-start-")
    assert (run.run.run_group, run.run.job_type, run.run.display_name) == ("quick start", "sweep", "quick start")
    assert run.config["points"] == 12
    assert run.summary["points"] == 24
    assert run.summary["most_owned_maxima"] == 15
    assert run.summary["lowest_fvu"] == 0.005
    ((_, media),) = run.history
    tables = {
        key.removesuffix(".path"): json.loads((run.path.parent / "files" / path).read_text())
        for key, path in media.items()
        if key.endswith(".path")
    }
    assert tables["results"]["columns"] == [*frame.columns]
    assert [row[0] for row in tables["results"]["data"]] == [*frame["point_id"]]
    assert {row[tables["results"]["columns"].index("kl")] for row in tables["results"]["data"]} == {None}
    assert {row[tables["untrained"]["columns"].index("fvu")] for row in tables["untrained"]["data"]} == {0.7}
    # The figures of the report page.
    for name in ("front", "split_counts", "labels"):
        assert tables[f"figure/{name}"]["data"]
    assert {tables["figure/front"]["layout"][axis]["type"] for axis in ("xaxis", "yaxis")} == {"log"}
    assert tables["verdicts"]["columns"] == ["verdict", "sentence", "claim"]
    assert tables["verdicts"]["data"] == [[VERDICTS[0][name] for name in tables["verdicts"]["columns"]]]
    assert notes == []


@pytest.mark.slow
def test_logging_again_logs_nothing(open_log, tmp_path):
    first, second = points()[:2]
    with open_log() as log:
        log.log_point(record(first))
        log.log_point(record(first))
        log.log_sweep(results())
    before = files(tmp_path / "sweep")
    with open_log() as log:
        assert log.logged(first.id, measure_id(Evaluation()))
        assert not log.logged(second.id, measure_id(Evaluation()))
        log.log_point(record(first))
        log.log_sweep(results())
    assert files(tmp_path / "sweep") == before
    with open_log() as log:
        log.log_point(record(second))
    assert set(logs(tmp_path / "sweep")) >= ids([first, second])


@pytest.mark.slow
def test_a_new_measurement_and_a_grown_table_replace_the_old(open_log, tmp_path):
    point = points()[0]
    with open_log() as log:
        log.log_point(record(point))
        log.log_sweep(results().head(3))
    with open_log() as log:
        log.log_point({**record(point, fvu=0.01), "measure_id": "another"})
        log.log_sweep(results())
    read = logs(tmp_path / "sweep")
    assert read.pop(run_id(point.id, "quick start")).summary["fvu"] == 0.01
    assert [run.summary["points"] for run in read.values()] == [24]


@pytest.mark.slow
def test_a_run_killed_half_way_is_logged_again(open_log, tmp_path):
    point = points()[0]
    half = tmp_path / "sweep" / "wandb" / f"offline-run-20260101_000000-{run_id(point.id, 'quick start')}"
    half.mkdir(parents=True)
    (half / "run-half.wandb").write_bytes(b":W&B")
    with open_log() as log:
        log.log_point(record(point))
    assert not half.exists()
    assert logs(tmp_path / "sweep")[run_id(point.id, "quick start")].exit_code == 0


@pytest.mark.parametrize("variable", ["disabled", pytest.param("offline", marks=pytest.mark.slow)])
def test_wandb_mode_is_honoured(variable, open_log, tmp_path, monkeypatch, notes):
    monkeypatch.setenv("WANDB_MODE", variable)
    # A key that no server knows: asking for one would fail, and say so.
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with open_log() as log:
        log.log_point(record(points()[0]))
        assert log.logged(points()[0].id, "another") == (variable == "disabled")
    assert bool(files(tmp_path / "sweep")) == (variable == "offline")
    assert notes == []


@pytest.mark.slow
def test_online_without_a_key_is_offline_and_says_so(open_log, tmp_path, notes):
    with open_log(mode="online") as log:
        log.log_point(record(points()[0]))
    assert set(logs(tmp_path / "sweep")) == ids(points()[:1])
    (note,) = notes
    assert "offline" in note
    assert "wandb login" in note


def test_an_unwritable_folder_is_a_note(open_log, tmp_path, notes):
    (tmp_path / "file").write_text("in the way")
    with open_log("file") as log:
        for point in points():
            log.log_point(record(point))
    assert len(notes) == 1
    assert notes[0].startswith("W&B: logging stopped (")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["init", "setup"])
def test_a_broken_wandb_is_a_note(call, open_log, tmp_path, notes, monkeypatch):
    broken = tmp_path / "broken" / "wandb.py"
    broken.parent.mkdir()
    stub = "init = setup = Settings = teardown = lambda *_, **__: None\n"
    broken.write_text(f"{stub}def {call}(**_):\n    raise RuntimeError('all is\\nlost')\n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(broken.parent)
        with open_log() as log:
            for point in points():
                log.log_point(record(point))
            log.log_sweep(results())
    (note,) = notes
    assert "(all is lost); nothing trained is lost, and running the sweep again logs what is missing" in note
    with open_log() as log:
        log.log_point(record(points()[0]))
    assert set(logs(tmp_path / "sweep")) == ids(points()[:1])


def assert_gone(processes: list[int]) -> None:
    """W&B's service looks after its parent now and then."""
    deadline = time.monotonic() + 30
    while left := [each for each in processes if Path(f"/proc/{each}").exists()]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def test_a_logger_that_dies_is_a_note(open_log, notes, tmp_path):
    with open_log(mode="offline") as log:
        log.start()
        os.kill(log._process.pid, signal.SIGKILL)
        log.log_point(record(points()[0]))
    (note,) = notes
    assert note.startswith("W&B: logging stopped (")
    assert "-9" in note


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_logger_ends_with_the_process(number, server, tmp_path):
    """The server hangs and the command is stopped: no process of it is left, and none of W&B's hooks in its way."""
    server.hangs = "UpsertBucket"
    script = f"""
        import signal, sys, time, pathlib
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
        from sae_sweep.config.logger import Logger
        from sae_sweep.tracking import logging as ours
        ours.INTERRUPTED_TIMEOUT = 0.2
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from test_wandb import points, record
        with ours.WandbLog(pathlib.Path("sweep"), "s", Logger(), note=lambda text: print(text, flush=True)) as log:
            log.start()
            log.log_point(record(points()[0]))
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not server.asked("UpsertBucket"):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    started = descendants(process.pid)
    assert len(started) >= 2  # the logger, and W&B's service
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert_gone(started)
    if number == signal.SIGINT:
        assert "stopped before everything was logged" in out
        assert err.rstrip().endswith("KeyboardInterrupt")


def test_names_are_for_people():
    def name(**changes) -> str:
        return point_name(canonical(Point(**changes)).to_dict())

    assert name(sae=Sae(width=136), penalty=Penalty("l1", 0.5)) == "width136-l1-0.5-s0"
    assert name(sae=Sae(architecture="topk", k=2, width=16), seed=3) == "width16-topk-k2-s3"
    assert name(penalty=Penalty("lp", 1.0, p=0.7), site=Site("post_unembed")) == "width64-lp0.7-1-post_unembed-s0"
    assert name(sae=Sae(init="oracle", partition="mq")) == "width64-l1-1-oracle-mq-s0"


@pytest.mark.parametrize(("rows", "logged"), [(0, 0), (1, 1), (40, 40), (41, 21), (400, 40), (405, 37)])
def test_long_curves_are_thinned_to_their_end(rows, logged):
    curve = [{"step": step, "loss": 1.0} for step in range(rows)]
    steps = [step for step, _ in point_run(record(points()[0]) | {"curve": curve}, "s").history]
    assert len(steps) == logged
    assert steps[-1:] == [row["step"] for row in curve[-1:]]


def test_keys_do_not_depend_on_the_point():
    runs = [point_run(record(point), "s") for point in points()]
    # But for the name that each penalty's FVU has.
    named = [[key for key in run.summary if not key.startswith("fvu_by_penalty")] for run in runs]
    assert (
        len({(tuple(run.config), tuple(keys), *run.history[0][1]) for run, keys in zip(runs, named, strict=True)}) == 1
    )
    assert {key for run in runs for key in run.summary if key.startswith("fvu_by_penalty")} == {
        "fvu_by_penalty/l1",
        "fvu_by_penalty/sqrt",
    }


@pytest.fixture
def server(monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server


def test_with_a_key_points_go_to_the_server(server, open_log, notes):
    with open_log() as log:
        for point in points()[:3]:
            log.log_point(record(point))
    assert notes == []
    started = {
        content["name"]: content for what, content in server.told if what == "UpsertBucket" and content["groupName"]
    }
    assert set(started) == ids(points()[:3])
    assert {(content["project"], content["groupName"]) for content in started.values()} == {("toys", "quick start")}
    history = [
        json.loads(line)
        for what, content in server.told
        if what == "file_stream"
        for line in content.get("files", {}).get("wandb-history.jsonl", {}).get("content", ())
    ]
    assert sorted(row["training/loss"] for row in history) == sorted(3 * [9.0, 8.5, 8.0])
    told = len(server.told)
    with open_log() as log:
        log.log_point(record(points()[0]))
    assert len(server.told) == told


@pytest.mark.slow
@pytest.mark.parametrize("what", ["Viewer", "UpsertBucket"])
@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_a_server_that_lets_down_is_one_note_and_an_offline_log(
    what,
    how,
    server,
    open_log,
    notes,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    setattr(server, how, what)
    with open_log(timeout=0.5) as log:
        for point in points()[:3]:
            log.log_point(record(point))
    assert set(logs(tmp_path / "sweep")) == ids(points()[:3])
    (note,) = notes
    assert "offline" in note


@pytest.mark.slow
def test_an_upload_that_does_not_end_is_given_up(server, open_log, notes, tmp_path):
    server.hangs = "file_stream"
    with open_log(timeout=0.5) as log:
        log.log_point(record(points()[0]))
    assert set(logs(tmp_path / "sweep")) == ids(points()[:1])
    (note,) = notes
    assert "offline" in note


TYPED = {"name": "wandb", "project": None, "entity": None, "mode": "auto", "artifacts": False, "dir": None}
TYPED |= {"group": None, "tags": [], "notes": None, "job_type": None}


def test_what_was_typed_comes_before_the_environment_and_that_before_our_defaults(tmp_path):
    environment = {"WANDB_PROJECT": "mine", "WANDB_ENTITY": "team", "WANDB_TAGS": "a,b", "WANDB_DIR": str(tmp_path)}
    environment |= {"WANDB_RUN_GROUP": "g", "WANDB_NOTES": "n", "WANDB_JOB_TYPE": "j"}
    assert resolved(TYPED, {})["project"] == "sae-sweep"
    found = resolved(TYPED | {"project": "typed", "tags": ["c"]}, environment)
    assert (found["project"], found["entity"], found["tags"]) == ("typed", "team", ["c"])
    assert (found["dir"], found["group"], found["notes"], found["job_type"]) == (str(tmp_path), "g", "n", "j")
    assert resolved(TYPED, environment)["tags"] == ["a", "b"]


@pytest.mark.parametrize("wrong", ["a/b", "50%", "x" * 129])
def test_a_project_that_the_server_will_refuse_is_refused_before_training(wrong):
    with pytest.raises(UserError, match=r"^WANDB_PROJECT=.* is no name of a W&B project"):
        resolved(TYPED, {"WANDB_PROJECT": wrong})
    with pytest.raises(UserError, match=r"^logger\.project="):
        resolved(TYPED | {"project": wrong}, {})
    with pytest.raises(UserError, match=r"^logger\.tags: ''"):
        resolved(TYPED | {"tags": [""]}, {})


@pytest.mark.slow
def test_runs_carry_group_tags_and_notes_where_the_logger_says(open_log, notes, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    settings = {"group": "g", "tags": ["a", "b"], "notes": "why", "job_type": "try", "dir": str(tmp_path / "elsewhere")}
    with open_log(mode="offline", **settings) as log:
        log.log_point(record(points()[0]))
    assert not list((tmp_path / "sweep/wandb").glob("*run-*"))
    (run,) = (log.run for log in logs(tmp_path / "elsewhere/sweep").values())
    assert (run.run_group, [*run.tags], run.notes, run.job_type) == ("g", ["a", "b"], "why", "try")
    assert log.complete and notes == []


def test_a_point_in_two_sweeps_is_two_runs():
    runs = [point_run(record(points()[0]), sweep) for sweep in ("first", "second")]
    assert runs[0].id != runs[1].id
    assert {run.config["point_id"] for run in runs} == {points()[0].id}
