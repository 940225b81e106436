"""A sweep on a real Slurm: the numbers of a local run, whatever happens to its jobs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import TINY, assert_same_tables, call
from slurm_cluster import PATIENCE, Cluster, missing, wait_for

from sae_sweep.cli import slurm as cluster_commands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3 * PATIENCE),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

TASK = ["launcher.memory=900M", "launcher.cpus=1", "launcher.time=30", "launcher.signal_seconds=20"]
ONE_TASK = [*TASK, "launcher.target_minutes=30"]
# As many tasks as allowed.
MANY_TASKS = [*TASK, "launcher.target_minutes=0.0001", "launcher.max_tasks=4"]
WITHOUT_WIDTH = [word for word in TINY if not word.startswith(("sae.width", "training.steps"))]
# 24 points of two toys and two widths.
SWEEP = [*WITHOUT_WIDTH, "device=cpu", "training.steps=25", "sae.width=5,7", "toy.seed=0,1", "penalty=l1,sqrt"]
SWEEP += ["penalty.coefficient=0.1,0.3,1"]
# Two points that take some ten seconds: long enough to be interrupted.
LONG = [*WITHOUT_WIDTH, "device=cpu", "training.steps=150000", "sae.width=9", "penalty=l1", "penalty.coefficient=0.1,1"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """A cluster without accounting, whose arrays hold at most three jobs."""
    found = Cluster()
    found.start()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def here(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, on the cluster; nothing is left queued behind."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(cluster_commands, "INTERVAL", 1.0)
    yield work
    slurm.ask("scancel", "--user=root")
    wait_for("an empty queue", lambda: not slurm.ask("squeue", "-h"))


@pytest.fixture(scope="module")
def long_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a local run of LONG that nothing disturbed."""
    root = tmp_path_factory.mktemp("long")
    assert call("run", *LONG, "name=long", f"output_dir={root}").code == 0
    return root


def submit(*words: str) -> dict[str, Any]:
    result = call("submit", *words, "--json")
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def status(name: str) -> dict[str, Any]:
    result = call("status", name, "--json")
    assert result.code == 0, result.err
    return dict(json.loads(result.out))


def notes(here: Path, name: str) -> list[dict[str, Any]]:
    """What each task that began said of itself."""
    return [json.loads(path.read_bytes()) for path in (here / "outputs/sweeps" / name).glob("jobs/*/*.state.json")]


def over(name: str) -> bool:
    now = status(name)
    return not (now["running"] or now["pending"])


def wait_for_end(name: str) -> dict[str, Any]:
    wait_for(f"{name} over", lambda: over(name))
    return status(name)


def begun(here: Path) -> bool:
    """Whether a stack has been trained for some steps."""
    return any((here / "outputs" / "checkpoints").glob("*/*.safetensors"))


def test_a_sweep_over_two_nodes_equals_the_local_run(here: Path, tmp_path: Path) -> None:
    assert call("run", *SWEEP, "name=both", f"output_dir={tmp_path}/local").code == 0
    sent = submit(*SWEEP, *MANY_TASKS, "name=both")
    assert sent["points"] == 24
    assert sent["tasks"] == 4
    assert len(sent["jobs"]) == 2
    end = wait_for_end("both")
    assert (end["finished"], end["failed"], end["lost"]) == (24, 0, 0)
    assert call("report", "both").code == 0
    assert_same_tables(here / "outputs", tmp_path / "local", "both")
    said = notes(here, "both")
    assert {note["node"] for note in said} == {"n1", "n2"}
    # Slurm gives each task of a node a GPU of its own, and what it gave is what the task saw.
    assert {note["cuda_visible_devices"] for note in said} == {"0", "1"}
    for folder in (here / "outputs/sweeps/both/jobs").iterdir():
        if folder.is_dir():
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    nothing = submit(*SWEEP, *MANY_TASKS, "name=both")
    assert (nothing["finished"], nothing["tasks"], nothing["jobs"]) == (24, 0, [])


def test_tasks_side_by_side_in_a_container_one_of_which_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` waits; the point that fails leaves the other running, on the other GPU of the same job."""
    stand_in = here / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$*" >>{here}/asked\nshift 5\nexec "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    words = [word for word in SWEEP if not word.startswith(("toy.seed", "penalty", "sae.width"))]
    words += ["penalty=l1", "penalty.coefficient=0.1", "sae.width=5", "training.lr=0.003,1e30", "training.clip=1e38"]
    launcher = [*MANY_TASKS, "launcher=slurm", "launcher.gpus=a100:2", "launcher.container=image.sif"]
    result = call("run", *words, *launcher, "name=fails", "--json")
    assert result.code == 3, result.err
    end = json.loads(result.out)
    assert (end["points"], end["ran"], end["failed"], end["lost"]) == (2, 1, 1, 0)
    assert "FAILED" in result.err
    (reason,) = status("fails")["failures"].values()
    assert "not finite" in reason
    assert "not finite" in call("logs", "fails").out
    said = notes(here, "fails")
    assert sorted(note["cuda_visible_devices"] for note in said) == ["0", "1"]
    assert len({note["job"] for note in said}) == 1
    assert f"exec --nv --bind {here}/outputs image.sif python" in (here / "asked").read_text()


def test_the_traceback_of_a_task_that_breaks_is_shown_at_once(here: Path) -> None:
    words = [word.replace("0.1,0.3,1", "0.1") for word in SWEEP]
    submit(*words, *ONE_TASK, "launcher.additional={hold: true}", "name=breaks")
    (path,) = (here / "outputs/sweeps/breaks/jobs").glob("*/task-0.json")
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "nonsense"'))
    subprocess.run(["scontrol", "release", status("breaks")["tasks"][0]["job"]], check=True)
    shown = call("status", "breaks", "--watch").out
    assert "LOST 8 points" in shown
    assert "nonsense" in shown
    assert "Traceback" in call("logs", "breaks").out


def test_a_second_submit_while_the_first_runs_sends_nothing_twice(here: Path) -> None:
    first = submit(*LONG, *ONE_TASK, "name=twice")
    assert first["tasks"] == 1
    assert submit(*LONG, *ONE_TASK, "name=twice")["tasks"] == 0
    more = [word.replace("coefficient=0.1,1", "coefficient=0.1,1,2") for word in LONG]
    second = submit(*more, *ONE_TASK, "name=twice")
    assert (second["points"], second["tasks"]) == (3, 1)
    tasks = [json.loads(path.read_bytes()) for path in (here / "outputs/sweeps/twice/jobs").glob("*/task-0.json")]
    assert sorted(len(task["points"]) for task in tasks) == [1, 2]


def test_cancelled_jobs_are_lost_and_go_on_when_submitted_again(here: Path, long_alone: Path) -> None:
    submit(*LONG, *ONE_TASK, "launcher.checkpoint_seconds=0.5", "name=long")
    wait_for("training", lambda: begun(here))
    now = status("long")
    assert (now["running"], now["lost"]) == (2, 0)
    assert call("cancel", "long").code == 0
    end = wait_for_end("long")
    assert (end["finished"], end["lost"], end["failed"]) == (0, 2, 0)
    (note,) = notes(here, "long")
    assert note["starts"] == 1
    assert "lost" in call("status", "long").out
    assert submit(*LONG, *ONE_TASK, "name=long")["tasks"] == 1
    assert wait_for_end("long")["finished"] == 2
    assert "go on from step" in call("logs", "long").out
    assert call("report", "long").code == 0
    assert_same_tables(here / "outputs", long_alone, "long")


def test_preempted_by_the_high_partition(here: Path, slurm: Cluster, long_alone: Path) -> None:
    submit(*LONG, *ONE_TASK, "launcher.partition=low", "launcher.checkpoint_seconds=0.5", "name=long")
    wait_for("training", lambda: begun(here))
    slurm.ask("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3")
    wait_for("preemption", lambda: status("long")["pending"] == 2)
    assert wait_for_end("long")["finished"] == 2
    (note,) = notes(here, "long")
    assert note["starts"] >= 2
    assert "go on from step" in call("logs", "long").out
    assert call("report", "long").code == 0
    assert_same_tables(here / "outputs", long_alone, "long")


def test_requeued_at_the_time_limit(here: Path) -> None:
    # Warned by SIGUSR2; if that comes before the task listens, by SIGTERM at the end of its time.
    limit = ["launcher.memory=900M", "launcher.cpus=1", "launcher.time=1", "launcher.signal_seconds=35"]
    longer = [word.replace("150000", "3000000") for word in LONG]
    submit(*longer, *limit, "launcher.checkpoint_seconds=0.5", "name=longer")
    wait_for("a second start", lambda: any(note["starts"] > 1 for note in notes(here, "longer")))
    assert "stopped by SIG" in call("logs", "longer").out
    wait_for("going on", lambda: "go on from step" in call("logs", "longer").out)


def test_a_node_lost_in_the_middle(here: Path, slurm: Cluster, long_alone: Path) -> None:
    submit(*LONG, *ONE_TASK, "launcher.checkpoint_seconds=0.5", "name=long")
    wait_for("training", lambda: begun(here))
    (note,) = notes(here, "long")
    slurm.kill(f"slurmd-{note['node']}")
    slurm.kill_jobs()
    try:
        assert wait_for_end("long")["finished"] == 2
    finally:
        slurm.start_node(note["node"])
    (note,) = notes(here, "long")
    assert note["starts"] > 1
    assert call("report", "long").code == 0
    assert_same_tables(here / "outputs", long_alone, "long")
    slurm.wait_until_idle()


def test_what_slurm_would_refuse_is_refused_before_anything_is_written(here: Path) -> None:
    result = call("submit", *SWEEP, *TASK, "launcher.partition=nosuch", "name=refused")
    assert result.code == 4
    assert "partition" in result.err
    assert len(result.err.splitlines()) == 1
    assert not (here / "outputs/sweeps/refused/jobs").exists()


def test_fail_fast_stops_the_other_jobs(here: Path) -> None:
    words = [word for word in LONG if not word.startswith("penalty")]
    words += ["penalty=l1", "penalty.coefficient=0.1", "training.lr=1e30,0.003", "training.clip=1e38", "sae.width=9,10"]
    words.remove("sae.width=9")
    submit(*words, *MANY_TASKS, "name=stops", "--fail-fast")
    end = wait_for_end("stops")
    assert end["failed"] >= 1
    assert end["lost"] >= 1
    assert end["finished"] < 2


def test_an_earlier_job_of_the_same_id_is_not_taken_for_ours(here: Path, slurm: Cluster) -> None:
    few = [word.replace("0.1,0.3,1", "0.1") for word in SWEEP]
    slurm.start_again()
    first = submit(*few, *ONE_TASK, "name=same")
    assert wait_for_end("same")["finished"] == 8
    slurm.start_again()
    second = submit(*SWEEP, *ONE_TASK, "name=same")
    assert first["jobs"] == second["jobs"]
    end = wait_for_end("same")
    assert (end["points"], end["finished"], end["lost"]) == (24, 24, 0)


def test_a_plain_job_array_is_as_good(here: Path, tmp_path: Path) -> None:
    file = Path(__file__).resolve().parents[2] / "scripts" / "cluster" / "array.sbatch"
    few = [word.replace("0.1,0.3,1", "0.1") for word in SWEEP]
    smaller = ["--cpus-per-task=1", "--mem=900M", "--time=10", "--array=0-2"]
    subprocess.run(["sbatch", *smaller, str(file), *few, "name=plain"], check=True, capture_output=True)
    assert call("run", *few, "name=plain", f"output_dir={tmp_path}/local").code == 0
    wait_for("the array done", lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout)
    assert call("report", "plain").code == 0
    assert_same_tables(here / "outputs", tmp_path / "local", "plain")


@pytest.fixture(scope="module")
def accounting() -> Iterator[Cluster]:
    """A cluster that remembers jobs and limits how many a user submits."""
    if missing(accounting=True):
        pytest.skip(str(missing(accounting=True)))
    found = Cluster(accounting=True)
    found.start()
    yield found
    found.stop()


def test_with_accounting_status_knows_how_a_job_ended(accounting: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(accounting.conf))
    submit(*LONG, *ONE_TASK, "name=remembered")
    wait_for("running", lambda: status("remembered")["running"] == 2)
    assert call("cancel", "remembered").code == 0
    wait_for("squeue has forgotten it", lambda: not accounting.ask("squeue", "-h", "-t", "all"))
    end = status("remembered")
    assert end["lost"] == 2
    assert end["tasks"][0]["state"] == "CANCELLED"


def test_no_more_is_submitted_than_an_account_may(accounting: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held jobs only: nothing trains."""
    monkeypatch.setenv("SLURM_CONF", str(accounting.conf))
    # Tasks of which two do not fit into the time of a job.
    words = [word.replace("150000", "200000000") for word in LONG]
    words = [*words[:-1], "penalty.coefficient=1,2,3,4,5", *TASK, "launcher.target_minutes=0.1"]
    words += ["launcher.additional={hold: true}", "name=limited"]
    accounting.limit(2)
    first = call("submit", *words, "--json")
    assert first.code == 0, first.err
    sent = json.loads(first.out)
    assert (sent["tasks"], sent["held"]) == (2, 3)
    assert "3 of 5 tasks are held back" in first.err
    assert "MaxSubmitJobLimit" in first.err
    again = call("submit", *words)
    assert (again.code, len(again.err.splitlines())) == (4, 1)
    assert "MaxSubmitJobLimit" in again.err
    accounting.limit(-1)
    assert submit(*words)["tasks"] == 3
    assert status("limited")["unsent"] == 0
    assert call("cancel", "limited").code == 0
