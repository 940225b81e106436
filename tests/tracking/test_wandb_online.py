"""The real client online, against a server on this machine that works, fails, limits, or is not there; and the
workspace that `dashboard` builds, printed and saved."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commandline import TINY, Result, call, fresh
from test_wandb import ids, logs, points, record, results
from wandb_server import KEY, Server, serving

from sae_sweep.config.columns import LABELS, metric_columns
from sae_sweep.config.logger import Logger
from sae_sweep.store.results import sweep_ids
from sae_sweep.store.store import Store
from sae_sweep.tracking import keys
from sae_sweep.tracking.content import run_id
from sae_sweep.tracking.logging import WandbLog, unsynced
from sae_sweep.tracking.process import TIMEOUT
from sae_sweep.tracking.workspace import views

# A W&B run takes seconds to begin and to end, and these have dozens.
pytestmark = pytest.mark.slow
ONLINE = [*(word for word in TINY if word != "logger=none"), "logger.mode=online", "penalty=l1,sqrt", "seed=0,1"]
ONLINE += ["penalty.coefficient=1", "name=online"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server, and a home and a current folder of its own."""
    for key in [key for key in os.environ if key.startswith("WANDB_") or key == "NETRC"]:
        monkeypatch.delenv(key)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with serving() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield found


@pytest.fixture
def log_points(tmp_path: Path) -> Callable[..., list[str]]:
    """Log some points and the sweep; returns what the user was told."""

    def log(count: int = 3, timeout: float = TIMEOUT) -> list[str]:
        notes: list[str] = []
        folder, note = tmp_path / "outputs/sweeps/s", notes.append
        with WandbLog(folder, "s", Logger(project="toys", mode="online"), note=note, timeout=timeout) as log:
            for point in points()[:count]:
                log.log_point(record(point))
            log.log_sweep(results())
        return notes

    return log


def run(*words: str) -> Result:
    return call("run", *ONLINE, *words)


# A server that works


def test_a_sweep_with_its_table_charts_files_and_artifacts(server: Server, tmp_path: Path) -> None:
    assert run("logger.artifacts=true", "--json").code == 0
    ids = sweep_ids(Store(tmp_path / "outputs"), "online")
    runs = {run_id(id, "online") for id in ids}
    (sweep,) = server.runs().keys() - runs
    assert server.runs().keys() == {*runs, sweep}
    assert {(each["project"], each["groupName"]) for each in server.runs().values()} == {("sae-sweep", "online")}
    assert {"figure/front", "figure/split_counts"} <= {key for row in server.history() for key in row}
    (table,) = (body for name, body in server.files.items() if "media/table/results" in name)
    assert sorted(row[0] for row in json.loads(table)["data"]) == sorted(ids)
    uploaded = {name.partition("/")[2]: body for name, body in server.files.items()}
    latents = {(tmp_path / f"outputs/points/{id}/latents.parquet").read_bytes() for id in ids}
    assert uploaded["latents.parquet"] in latents and "sae_weights.safetensors" in uploaded
    named = {each["input"]["artifactCollectionName"] for each in server.asked("CreateArtifact")}
    assert {f"sae-{id}" for id in ids} <= named
    assert len(server.asked("CommitArtifact")) >= len(ids) + 1


@pytest.mark.slow
def test_logging_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    assert run("seed=0").code == 2  # given twice
    assert run().code == 0
    first = set(server.runs())
    told = len(server.told)
    assert run().code == 0
    assert len(server.told) == told
    assert call("run", *(word.replace("seed=0,1", "seed=0,1,2") for word in ONLINE)).code == 0
    again = [each["name"] for what, each in server.told[told:] if what == "UpsertBucket" and each.get("groupName")]
    assert set(again) - first and {name for name in again if name in first} == {n for n in first if "sweep" in n}


# A server that lets down


@pytest.mark.slow
@pytest.mark.parametrize(("what", "status"), [("UpsertBucket", 429), ("file_stream", 500), ("CreateArtifact", 429)])
def test_what_a_server_refuses_for_a_while_is_sent_again(
    server: Server, what: str, status: int, log_points: Callable[..., list[str]]
) -> None:
    server.fails, server.status, server.times = what, status, 1
    assert log_points() == []
    assert ids(points()[:3], "s") < server.runs().keys()
    assert server.times == 0
    assert sorted(row["training/loss"] for row in server.history() if "training/loss" in row) == sorted(
        3 * [9.0, 8.5, 8.0]
    )


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_always_refuses_is_one_note_and_an_offline_log(
    server: Server, status: int, log_points: Callable[..., list[str]], tmp_path: Path
) -> None:
    server.fails, server.status = "UpsertBucket", status
    (note,) = log_points(timeout=1.0)
    assert note.startswith("W&B: logging online failed, going on offline")
    assert ids(points()[:3], "s") < logs(tmp_path / "outputs/sweeps/s").keys()


def test_several_runs_are_sent_at_a_time(server: Server, tmp_path: Path) -> None:
    """The server answers nobody before a second run has begun."""
    server.hangs = "file_stream"

    def release() -> None:
        while len(server.runs()) < 2:
            time.sleep(0.01)
        server.released.set()

    threading.Thread(target=release, daemon=True).start()
    notes: list[str] = []
    folder = tmp_path / "outputs/sweeps/s"
    with WandbLog(folder, "s", Logger(project="toys", mode="online"), note=notes.append, timeout=30.0) as log:
        for point in points()[:3]:
            log.log_point(record(point))
    assert notes == []
    assert ids(points()[:3], "s") == server.runs().keys()


def test_a_run_that_is_refused_among_others_is_logged_offline(
    server: Server, log_points: Callable[..., list[str]], tmp_path: Path
) -> None:
    (server.refused,) = ids(points()[3:4], "s")
    (note,) = log_points(12, timeout=2.0)
    assert note.startswith("W&B: logging online failed, going on offline")
    found = logs(tmp_path / "outputs/sweeps/s")  # each once
    offline = {id for id, log in found.items() if "offline-run" in str(log.path)}
    assert server.refused in offline and not ids(points()[:1], "s") & offline
    assert ids(points(), "s") < found.keys()
    ledger = [path.name.partition(".")[0] for path in (tmp_path / "outputs/sweeps/s/wandb/logged").iterdir()]
    assert sorted(ledger) == sorted(found)


def test_a_wrong_key_is_one_note_and_an_offline_log(
    server: Server, log_points: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "1" * 40)
    (note,) = log_points()
    assert note.startswith("W&B: logging offline (")
    assert len(logs(tmp_path / "outputs/sweeps/s")) == 4
    assert not server.runs()


@pytest.mark.slow
def test_no_network_is_one_note_and_a_log_that_is_pushed_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
        end = run("logger.artifacts=true")
    assert end.code == 0
    (note,) = (line for line in end.err.splitlines() if line.startswith("W&B"))
    assert note.startswith("W&B: logging offline (")
    folder = tmp_path / "outputs/sweeps/online/wandb"
    assert len(unsynced(folder)) == 5
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    assert call("sync", "online").code == 0
    assert len(server.runs().keys() | {each["name"] for each in server.asked("UpsertBucket")}) >= 5
    assert any(name.endswith("sae_weights.safetensors") for name in server.files)
    assert unsynced(folder) == []


def test_a_kill_in_the_middle_loses_nothing(server: Server, tmp_path: Path) -> None:
    """Killed while the server holds the second run back; run again, every point and the sweep are there."""
    script = f"""
        import os, pathlib, sys, threading, time
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from test_wandb import points, record
        from sae_sweep.config.logger import Logger
        from sae_sweep.tracking.logging import WandbLog
        folder = pathlib.Path("outputs/sweeps/s")
        log = WandbLog(folder, "s", Logger(project="toys", mode="online"), note=print)
        log.start()
        log.log_point(record(points()[0]))
        while not list((folder / "wandb/logged").glob("*")):
            time.sleep(0.05)
        for point in points()[1:3]:
            log.log_point(record(point))
        while len(list((folder / "wandb").glob("run-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    """
    end = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=100)
    assert end.returncode == -9, end.stderr
    notes: list[str] = []
    with WandbLog(tmp_path / "outputs/sweeps/s", "s", Logger(project="toys", mode="online"), note=notes.append) as log:
        for point in points()[:3]:
            log.log_point(record(point))
    assert notes == []
    started = [each["name"] for each in server.asked("UpsertBucket") if each.get("groupName")]
    assert set(started) == ids(points()[:3], "s")
    # What was finished before the kill is not sent again.
    assert started.count(*ids(points()[:1], "s")) == 1
    ledger = {path.name.partition(".")[0] for path in (tmp_path / "outputs/sweeps/s/wandb/logged").iterdir()}
    assert ledger == set(started)


# The workspace


def test_views_draw_what_runs_log() -> None:
    frame = results()
    varied = ["sae.width", "penalty.name", "penalty.coefficient", "seed"]
    main, means = views("quick start", frame, {"varied": varied}, "me", "toys")
    assert (main.name, means.name) == ("quick start", "quick start, means over seeds")
    panels = {panel.title: panel for section in main.sections for panel in section.panels if hasattr(panel, "title")}
    for penalty in ("l1", "sqrt"):
        front = panels[f"Front of {penalty}: FVU against L0, running minimum"]
        assert (front.x, front.y, front.log_x, front.running_ymin) == ("l0", f"fvu_by_penalty/{penalty}", True, True)
    (grid,) = (panel for name, panel in panels.items() if name == "The grid")
    assert [str(column.metric) for column in grid.columns][3:] == [
        "l0",
        "fvu",
        "owned_maxima",
        "splits_per_maximum",
        "distinct_splits_per_maximum",
        "duplicates_per_maximum",
    ]
    spec = json.loads(json.dumps(main._spec["spec"]))["section"]
    assert [section["name"] for section in spec["panelBankConfig"]["sections"]] == [
        *("Answer", "Front", "Splits", "Labels", "Phases", "Grid", "Sweep", "Training")
    ]
    # Every metric that a panel or the run table asks for is one that runs log.
    logged = {
        *map(keys.key, metric_columns()),
        "fvu_by_penalty/l1",
        "fvu_by_penalty/sqrt",
        *(f"training/{name}" for name in ("fvu", "l0", "loss", "gradient")),
        "_step",
    }
    text = json.dumps(spec)
    asked = {part.split('"')[0] for part in text.split('"summary:')[1:]}
    assert asked and asked <= logged
    assert {keys.key(f"label_{label}") for label in LABELS} <= set(
        panels["Latents by what they tell apart, mean by init"].metrics
    )
    (runs,) = spec["runSets"]
    assert "quick start" in json.dumps(runs["filters"])
    assert list(runs["runFeed"]["columnPinned"])[:4] == [
        "run:displayName",
        "config:sae.value.width",
        "config:penalty.value.name",
        "config:penalty.value.coefficient",
    ]
    colours = spec["customRunColors"]
    of_penalty = {
        name: {colours[run_id(id, "quick start")] for id in rows["point_id"]} for name, rows in frame.groupby("penalty")
    }
    assert all(len(found) == 1 for found in of_penalty.values()) and of_penalty["l1"] != of_penalty["sqrt"]
    (grouped,) = json.loads(json.dumps(means._spec["spec"]))["section"]["runSets"]
    assert len(grouped["grouping"]) == 3
    # The first screen answers: verdicts, front, splits by width, dead latents.
    (answer,) = (section for section in main.sections if section.name == "Answer")
    verdicts, front, splits, dead = answer.panels
    assert (verdicts.table_name, front.media_keys) == ("verdicts", ["figure/front"])
    assert ([*map(str, splits.metrics)], [*map(str, dead.metrics)]) == (["splits_per_maximum"], ["dead_latents"])
    named = views("quick start", frame, {"varied": varied, "factors": ["letter", "casing"]}, "me", "toys")[0]
    titles = [getattr(panel, "title", None) or "" for section in named.sections for panel in section.panels]
    assert "Split latents per letter, by width" in titles and not any("maxim" in title for title in titles)


def test_dashboard_saves_once_and_then_replaces(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", *(word.replace("mode=online", "mode=offline") for word in ONLINE)).code == 0
    end = call("dashboard", "online")
    assert end.code == 0, end.err
    assert len(server.views) == 2 and end.out.count(server.url) == 2
    assert "5 runs are logged offline" in end.err
    assert {view["displayName"] for view in server.views.values()} == {"online", "online, means over seeds"}
    assert call("dashboard", "online").out == end.out
    assert len(server.views) == 2 and len(server.asked("UpsertView2")) == 4
    printed = json.loads(call("dashboard", "online", "--json").out)
    assert [view["name"] for view in printed["views"]] == ["online", "online, means over seeds"]
    refused = fresh(
        "dashboard", "online", cwd=tmp_path, env={"WANDB_API_KEY": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert refused.code == 4 and len(refused.err.splitlines()) == 2
    assert "wandb login" in refused.err and "--json" in refused.err


def test_dashboard_says_what_is_missing(server: Server) -> None:
    assert call("dashboard", "nothing").code == 2
    assert call("run", *TINY, "name=silent").code == 0
    end = call("dashboard", "silent")
    assert end.code == 2 and "logger=none" in end.err
