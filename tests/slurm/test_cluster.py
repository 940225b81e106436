"""What can be told of a cluster without one: tasks, launcher settings, the queue's answers, sync, the doctor."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from commandline import TINY, call
from stacks import stack_of
from wandb_server import KEY, Server, serving

from sae_sweep import signals
from sae_sweep.config import overrides as config
from sae_sweep.config.settings import measure_id, toy_id
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.slurm import queue, submit
from sae_sweep.slurm import task as node
from sae_sweep.slurm.status import status
from sae_sweep.slurm.tasks import Submission, from_json, make_tasks, to_json
from sae_sweep.store.store import Store
from sae_sweep.sweep.checkpoint import Checkpoint
from sae_sweep.sweep.cost import pack_seconds
from sae_sweep.sweep.hardware_profile import SPEEDS
from sae_sweep.sweep.plan import Work, plan
from sae_sweep.tracking.content import run_id
from sae_sweep.tracking.logging import unsynced


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


GRID = ["toy=small", "device=cpu", "sae.width=8,16", "penalty=l1,sqrt", "seed=range(0,20)", "toy.seed=0,1,2"]


# -- tasks ---------------------------------------------------------------------------------------------------------


def test_tasks_hold_every_point_once_and_about_the_work_asked_for() -> None:
    sweep = config.load(GRID)
    packs = plan(sweep, set()).packs
    toys = {toy_id(point.toy) for point in sweep.points}
    for minutes in (0.05, 1, 10, 1000):
        tasks = make_tasks(packs, sweep.evaluation, "cpu", 60 * minutes, 1000, toys)
        assert sorted(p.id for task in tasks for p in task.points) == sorted(p.id for pack in packs for p in pack)
        for task in tasks:
            assert task.seconds <= 60 * minutes or len(task.points) == 1
        # No two neighbours would have fitted into one.
        assert all(a.seconds + b.seconds > 60 * minutes for a, b in pairwise(tasks))
    assert len(tasks) == 1


def test_no_more_tasks_than_allowed() -> None:
    sweep = config.load(GRID)
    packs = plan(sweep, set()).packs
    assert len(make_tasks(packs, sweep.evaluation, "cpu", 0.001, 7)) <= 7
    assert len(make_tasks(packs, sweep.evaluation, "cpu", 0.001, 1)) == 1


def test_packs_of_a_toy_come_together() -> None:
    """Whatever the order of the grid: so that no more than a toy at each end of a task may be trained twice."""
    sweep = config.load([*GRID[:-1], "toy.seed=range(0,6)"])
    packs = plan(sweep, set()).packs
    tasks = make_tasks(sorted(packs, key=lambda pack: pack[0].sae.width), sweep.evaluation, "cpu", 10, 1000)
    assert len(tasks) > 6
    trained = sum(len({point.toy for point in task.points}) for task in tasks)
    assert trained <= 6 + len(tasks) - 1


def test_a_toy_is_part_of_the_work_until_it_is_trained() -> None:
    sweep = config.load(["toy=small", "device=cpu", "penalty.coefficient=1"])
    packs = plan(sweep, set()).packs
    (task,) = make_tasks(packs, sweep.evaluation, "cpu", 1e9, 1)
    (trained,) = make_tasks(packs, sweep.evaluation, "cpu", 1e9, 1, {toy_id(sweep.points[0].toy)})
    assert trained.seconds == pack_seconds(packs[0], sweep.evaluation, SPEEDS["cpu"], 1) < task.seconds


def test_points_survive_their_file(tmp_path: Path) -> None:
    weights = tmp_path / "weights.csv"
    weights.write_text("m,weight\n" + "".join(f"{m},1\n" for m in range(16)))
    for overrides in (["sae=topk", "sae.k=2"], ["sae.init=oracle", "sae.partition=mq"], [f"distribution={weights}"]):
        points = config.load(["toy=small", "penalty.coefficient=0.1,1", *overrides]).points
        assert from_json(json.loads(json.dumps(to_json(points)))) == points


def test_points_of_another_version_are_refused() -> None:
    rows = to_json(config.load(["toy=small", "penalty.coefficient=1"]).points)
    with pytest.raises(EnvironmentProblem, match="another version"):
        from_json([{**rows[0], "id": "0" * 16}])
    with pytest.raises(EnvironmentProblem, match="another version"):
        from_json([{**rows[0], "sae": {**rows[0]["sae"], "new_key": 1}}])


def test_the_job_of_a_task() -> None:
    arrays = [{"job": "12", "count": 3}, {"job": "15", "count": 1}]
    submission = Submission("x", "me", 0.0, "name", [{}] * 5, arrays)
    assert [submission.job_of(i) for i in range(5)] == ["12_0", "12_1", "12_2", "15", None]


# -- launcher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launcher.gpus=a100", "a100:1"),
        ("launcher.gpus=-1", "no number of GPUs"),
        ("launcher.gpus=[1]", "launcher.gpus"),
        ("launcher.additional={gres: 'gpu:1'}", "launcher.gpus"),
        ("launcher.additional={mem_per_cpu: 3G}", "launcher.memory"),
        ("launcher.additional={nodes: 2}", "the sweep needs it"),
        ("launcher.cpus=0", "at least 1"),
        ("launcher.memory=lots", "launcher.memory"),
        ("launcher.time=2", "launcher.signal_seconds"),
        ("launcher.setup=3", "a list"),
        ("launcher.setup=[3]", "a list of lines"),
        ("launcher.additional=[x]", "a mapping"),
        ("launcher.additional={array: 0-3}", "the sweep needs it"),
        ("launcher.additional={mem: 3G}", "launcher.memory"),
        ("launcher.additional={A_b: 3}", "no option of sbatch"),
        ("launcher.partitions=x", "did you mean"),
        ("launcher.target_minutes=0", "above 0"),
    ],
)
def test_a_wrong_launcher_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.load(["launcher=slurm", override])


def test_a_dry_run_shows_script_and_packs_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["toy=small", "launcher.partition=gpu", "launcher.setup=[module load cuda]", "launcher.time=90"]
    asked += ["launcher.additional={nice: 100, exclusive: true, overcommit: false}", "launcher.account=lab"]
    result = call("submit", *asked, "--dry-run")
    assert result.code == 0, result.err
    for line in ("partition=gpu", "account=lab", "time=90", "nice=100", "exclusive", "gpus-per-node=1", "requeue"):
        assert f"#SBATCH --{line}\n" in result.out
    assert "\nmodule load cuda\n" in result.out
    assert "4 points to do in 1 task\n" in result.out
    assert "overcommit" not in result.out
    assert not list(tmp_path.iterdir())
    same = call("run", "launcher=slurm", *asked, "--dry-run", "--json")
    whole = json.loads(same.out)
    assert whole["script"].strip() in result.out
    assert [task["points"] for task in whole["tasks"]] == [4]
    container = call("submit", "launcher.container=image.sif", f"output_dir={tmp_path}/far", "--dry-run").out
    assert f"apptainer exec --nv --bind {tmp_path}/far image.sif python" in container


def test_a_job_of_several_gpus_has_a_task_for_each(tmp_path: Path) -> None:
    asked = ["toy=small", "launcher.gpus=a100:4", "launcher.cpus=3", "launcher.memory=5G", "launcher.parallelism=10"]
    asked += ["penalty.coefficient=1", "seed=range(0,9)", "launcher.target_minutes=0.0001", "training.steps=10"]
    result = call("submit", *asked, "--dry-run")
    assert result.code == 0, result.err
    # Nine tasks, four to a job; ten tasks at a time are two jobs.
    for line in ("gpus-per-node=a100:4", "ntasks-per-node=4", "cpus-per-task=3", "mem=20480M", "array=0-2%2"):
        assert f"#SBATCH --{line}\n" in result.out
    submission = Submission("x", "me", 0.0, "name", [{}] * 9, [{"job": "12", "count": 2}], per_job=4)
    assert [submission.job_of(task) for task in (0, 3, 4, 7, 8)] == ["12_0", "12_0", "12_1", "12_1", None]
    assert submission.sent == 8


def test_a_percent_sign_in_the_output_folder_is_no_number_of_a_job(tmp_path: Path) -> None:
    folder = tmp_path / "50% off"
    end = call("submit", *TINY, "launcher.gpus=0", "launcher.memory=64G", f"output_dir={folder}", "--dry-run")
    # The folder of a submission is not known yet: it is made up in a dry run.
    assert end.code == 0, end.err
    made = submit._executor(SimpleNamespace(launcher={"name": "slurm"}, output_dir=folder), "name", folder / "jobs")
    text = made.script(2)
    assert f"--output='{tmp_path}/50%% off/jobs/%A_%a_0_log.out'" in text
    assert f"--output '{tmp_path}/50%% off/jobs/%A_%a_%t_log.out'" in text
    assert f"_submit '{folder}/jobs'" in text
    end = call("submit", *TINY, f"output_dir={tmp_path}/run%j", "--dry-run")
    assert end.code == 2 and "stand for numbers of jobs" in end.err


def test_what_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (("submit", "launcher=local"), "sae-sweep run"),
        (("run", "launcher=slurm", "--shard", "0/2"), "--shard"),
        (("submit", "device=cuda", "launcher.gpus=0"), "launcher.gpus"),
        (("submit", "device=cpu", "launcher.memory=1M"), "launcher.memory"),
        (("status", "nosuch"), "nosuch"),
        (("cancel", "nosuch"), "nosuch"),
        (("logs", "nosuch"), "nosuch"),
    ):
        result = call(*words)
        assert result.code == 2, words
        assert said in result.err
        assert len(result.err.splitlines()) == 1


# -- a task --------------------------------------------------------------------------------------------------------


def test_a_task_that_never_gets_further_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped again and again before its first checkpoint it ends; each step of progress gives it more starts."""
    points = config.load([*TINY, "penalty.coefficient=0.1,1"]).points
    settings = {
        "sweep": "s",
        "output_dir": str(tmp_path),
        "device": "cpu",
        "logger": {"name": "none"},
        "evaluation": {},
    }
    settings |= {"job_name": "s", "checkpoint_seconds": 60, "fail_fast": False, "points": to_json(points)}
    path = tmp_path / "task-0.json"
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(signals, "note_signals", lambda: None)

    def start() -> int:
        with pytest.raises(SystemExit) as end, mock.patch.object(node.os, "_exit", sys.exit):
            node.main([str(path)])
        return int(end.value.code)

    def stopped(*_: object) -> None:
        raise signals.Interrupted(signal.SIGTERM)

    def stopped_at_a_step(work: Work, store: Store, *_: object) -> None:
        stack = stack_of(points)
        stack.step = 5
        Checkpoint(store, points, "cpu").save(stack, [])
        stopped()

    with mock.patch.object(node, "_execute", stopped):
        assert [start() for _ in range(2)] == [75] * 2
    with mock.patch.object(node, "_execute", stopped_at_a_step):
        assert start() == 75
    with mock.patch.object(node, "_execute", stopped):
        assert [start() for _ in range(4)] == [75] * 3 + [4]
    assert "launcher.time" in node.known(path)["reason"]


def test_status_believes_the_note_of_a_finished_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("run", "--json", *TINY, "penalty.coefficient=0.1,1", "name=noted").code == 0
    store, sweep = Store(tmp_path / "outputs"), config.load([*TINY, "penalty.coefficient=0.1,1"])
    tasks = [{"points": [point.id for point in sweep.points], "seconds": 1.0}]
    content = Submission("once", "me", 0.0, "noted.once", tasks, [{"job": "1", "count": 1}])
    store.write_sweep_file("noted", "jobs/once.json", json.dumps(asdict(content)).encode())
    (tmp_path / "outputs/sweeps/noted/jobs/once").mkdir()
    read: list[str] = []
    monkeypatch.setattr(Store, "records", lambda self, kind, ids: {id: read.append(id) for id in ids} and {})
    for measured, records in ((measure_id(sweep.evaluation), 0), ("otherwise", 2)):
        node.note(tmp_path / "outputs/sweeps/noted/jobs/once/task-0.json", state="done", failed=0, measure_id=measured)
        read.clear()
        assert (status(store, "noted").finished, len(read)) == (2 - records, records)


# -- the queue -----------------------------------------------------------------------------------------------------

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts commands of Slurm on the PATH that are a line of shell each."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: None)

    def put(name: str, shell: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{shell}\n")
        (tmp_path / name).chmod(0o755)

    put("sacct", "exit 1")
    return put


def phases(jobs: list[str]) -> list[str]:
    return [f"{state.phase} {state.word}" for state in queue.states(jobs, {"ours"}).values()]


def test_a_job_is_where_squeue_says(fake: Fake) -> None:
    fake("squeue", 'printf "7_0|RUNNING|n1|ours\\n7_1|PENDING||ours\\n7_2|CANCELLED||ours\\n8|REQUEUED||ours\\n"')
    assert phases(["7_0", "7_1", "7_2", "8"]) == [
        "running RUNNING",
        "pending PENDING",
        "ended CANCELLED",
        "pending REQUEUED",
    ]


def test_no_answer_is_no_end(fake: Fake) -> None:
    fake("squeue", "exit 1")
    assert phases(["7"]) == ["unknown UNKNOWN"]
    # Nor is one answer without it: the next has it again.
    fake("squeue", 'test -e seen && printf "7|RUNNING|n1|ours\\n"; touch seen')
    assert phases(["7"]) == ["running RUNNING"]


def test_what_squeue_has_forgotten_ended_as_sacct_says(fake: Fake) -> None:
    fake("squeue", "exit 0")
    assert phases(["7"]) == ["ended GONE"]
    fake("sacct", 'printf "7|CANCELLED by 0|n1|ours\\n8|RUNNING|n1|ours\\n9|FAILED|n1|theirs\\n"')
    assert phases(["7", "8", "9"]) == ["ended CANCELLED", "ended GONE", "ended GONE"]


def test_tasks_of_an_array_that_never_began_are_one_row_of_sacct(fake: Fake) -> None:
    fake("squeue", "exit 0")
    fake("sacct", 'printf "7_0|COMPLETED|n1|ours\\n7_[1,3-4%%2]|CANCELLED by 0|None assigned|ours\\n"')
    assert phases(["7_0", "7_1", "7_2", "7_3", "7_4"]) == [
        "ended COMPLETED",
        "ended CANCELLED",
        "ended GONE",
        "ended CANCELLED",
        "ended CANCELLED",
    ]


def test_another_job_of_that_id_is_not_ours(fake: Fake) -> None:
    fake("squeue", 'printf "7|RUNNING|n1|theirs\\n"')
    assert phases(["7"]) == ["ended GONE"]


# -- what Slurm takes ----------------------------------------------------------------------------------------------

# Tasks of a point each, of which two would not fit into a job's time.
LONG_TASKS = ["toy=small", "device=cpu", "logger=none", "sae.width=16", "training.steps=4000000"]
LONG_TASKS += ["launcher.time=30", "launcher.cpus=1"]


@pytest.fixture
def slurm(fake: Fake, tmp_path: Path) -> Fake:
    """A Slurm that takes five jobs at a time, in arrays of at most four; what it took waits."""
    fake("scontrol", 'echo "MaxArraySize = 4"')
    fake("srun", "exit 0")
    fake(
        "squeue",
        f"""
for job in $(cat {tmp_path}/taken 2>/dev/null); do printf "$job|PENDING||$(cat {tmp_path}/name)\n"; done""",
    )
    fake(
        "sbatch",
        rf"""
file=/dev/stdin; [ "$1" = --test-only ] || file=$1
text=$(cat "$file")
last=$(echo "$text" | sed -n 's/^#SBATCH --array=0-\([0-9]*\)%.*/\1/p')
taken=$(wc -w < {tmp_path}/taken 2>/dev/null || echo 0)
if [ $((taken + ${{last:-0}} + 1)) -gt $(cat {tmp_path}/limit) ]; then
    echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1
fi
[ "$1" = --test-only ] && exit 0
if [ -e {tmp_path}/refuse$taken ]; then echo "sbatch: error: Batch job submission failed: no reason" >&2; exit 1; fi
echo "$text" | sed -n "s/^#SBATCH --job-name=//p" > {tmp_path}/name
for each in $(seq 0 ${{last:-0}}); do echo "1${{taken}}${{last:+_$each}}" >> {tmp_path}/taken; done
echo "Submitted batch job 1$taken"
""",
    )
    (tmp_path / "limit").write_text("5")
    return fake


def submitted(*words: str) -> dict:
    result = call("submit", *LONG_TASKS, "name=many", *words, "--json")
    assert result.code == 0, result.err
    return {**json.loads(result.out), "err": result.err}


@pytest.mark.usefixtures("slurm")
def test_what_slurm_does_not_take_is_held_back_and_sent_later(tmp_path: Path) -> None:
    seven = ["penalty=l1", "penalty.coefficient=1,2,3,4,5,6,7", "launcher.target_minutes=0.1"]
    first = submitted(*seven)
    assert (first["tasks"], first["held"], len(first["jobs"])) == (5, 2, 2)
    assert first["err"].splitlines() == [
        "2 of 7 tasks are held back: Slurm takes no more now (AssocMaxSubmitJobLimit); submit again when some are over"
    ]
    refused = call("submit", *LONG_TASKS, *seven, "name=many")
    assert refused.code == 4
    assert "AssocMaxSubmitJobLimit" in refused.err
    assert len(refused.err.splitlines()) == 1
    now = json.loads(call("status", "many", "--json").out)
    assert (now["pending"], now["unsent"]) == (7, 2)
    (tmp_path / "limit").write_text("50")
    second = submitted(*seven)
    assert (second["tasks"], second["held"]) == (2, 0)


@pytest.mark.usefixtures("slurm")
def test_coefficients_are_chosen_before_anything_is_sent(tmp_path: Path) -> None:
    asked = [*TINY, "device=cpu", "launcher.cpus=1", "sae.init=random_unit"]
    asked += ["training.lr=0.02", "seed=0,1,2", "name=even"]
    asked += ["grid.calibrate=l0", "grid.l0_range=[0.5,1.5]", "grid.coefficients=2"]
    dry = call("submit", *asked, "--dry-run")
    assert dry.code == 0 and "are chosen by submit, on this machine" in dry.err and not (tmp_path / "outputs").exists()
    first = call("submit", *asked, "--json")
    assert first.code == 0 and "choosing coefficients by L0" in first.err
    store = Store(tmp_path / "outputs")
    (line,) = store.info("even")["calibration"]["lines"].values()
    (task,) = (tmp_path / "outputs" / "sweeps" / "even" / "jobs").glob("*/task-0.json")
    points = from_json(json.loads(task.read_text())["points"])
    assert sorted({point.penalty.coefficient for point in points}) == line["coefficients"]
    # What was trained to choose them is not sent.
    ids, sent = store.read_sweep_file("even", "points.txt").split(), {point.id for point in points}
    assert [id for id in ids if id in sent] == [id for id in ids if id not in store.ids("points")]
    again = call("submit", *asked)
    assert "nothing to submit" in again.out and "choosing coefficients" not in again.err


@pytest.mark.usefixtures("slurm")
def test_tasks_grow_to_fit_what_slurm_takes(tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("3")
    shorter = [word.replace("4000000", "100000") for word in LONG_TASKS]
    seven = ["penalty=l1", "penalty.coefficient=1,2,3,4,5,6,7", "launcher.target_minutes=0.1", "name=grown"]
    sent = json.loads(call("submit", *shorter, *seven, "--json").out)
    assert (sent["points"], sent["held"]) == (7, 0)
    assert 2 <= sent["tasks"] <= 3


@pytest.mark.usefixtures("slurm")
def test_what_was_sent_before_a_refusal_is_kept(tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("50")
    (tmp_path / "refuse4").touch()
    six = ["penalty=l1", "penalty.coefficient=1,2,3,4,5,6", "launcher.target_minutes=0.1"]
    result = call("submit", *LONG_TASKS, *six, "name=many")
    assert result.code == 4
    assert result.err.splitlines() == [
        "error: Slurm refused: no reason; 4 of 6 tasks are at work: submit again for the rest"
    ]
    (tmp_path / "refuse4").unlink()
    assert submitted(*six)["tasks"] == 2


# -- W&B -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as found:
        yield found


@pytest.mark.slow
def test_what_was_logged_offline_is_pushed_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word.replace("logger=none", "logger=wandb") for word in TINY]
    assert call("run", "--json", *words, "penalty.coefficient=0.1,1", "name=offline", "logger.mode=offline").code == 0
    folder = tmp_path / "outputs/sweeps/offline/wandb"
    assert len(unsynced(folder)) == 3
    refused = call("sync", "offline")
    assert refused.code == 4
    assert len(refused.err.splitlines()) == 1
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert json.loads(call("sync", "offline", "--json").out)["pushed"] == 3
    named = {content["name"] for what, content in server.told if what == "UpsertBucket" and content.get("name")}
    points = {path.name for path in (tmp_path / "outputs/points").iterdir() if not path.name.startswith(".")}
    assert {run_id(point, "offline") for point in points} < named
    assert any(name.endswith("results.table.json") for name in server.files)
    told = len(server.told)
    assert json.loads(call("sync", "offline", "--json").out)["pushed"] == 0
    assert [what for what, _ in server.told[told:] if what in ("UpsertBucket", "CreateArtifact")] == []


def test_nothing_to_push_where_nothing_was_to_be_logged() -> None:
    assert call("run", "--json", *TINY, "penalty.coefficient=1", "name=silent").code == 0
    result = call("sync", "silent")
    assert result.code == 2
    assert "logger=none" in result.err


# -- doctor --------------------------------------------------------------------------------------------------------


def test_the_doctor_says_what_to_do(fake: Fake) -> None:
    for name in ("sbatch", "srun"):
        fake(name, "exit 0")
    fake("sinfo", 'echo "gpu* 12 nodes gpu:8"')
    fake("sacct", "exit 0")
    findings = {each["name"]: each for each in json.loads(call("doctor", "--json").out)["findings"]}
    machine = {"current folder", "home", "user", "text", "compiled code"}
    assert set(findings) == {"GPU", "output folder", "shared filesystem", "Slurm", "sacct", "W&B", *machine}
    # What is merely not there is no fault.
    assert findings["W&B"]["absent"] and not findings["Slurm"]["absent"]
    assert findings["Slurm"]["usable"]
    assert "gpu:8" in findings["Slurm"]["found"]
    assert findings["sacct"]["usable"]
    fake("sinfo", "echo sinfo: error: fetch_config: DNS SRV lookup failed >&2; exit 1")
    findings = {each["name"]: each for each in json.loads(call("doctor", "--json").out)["findings"]}
    assert findings["Slurm"]["absent"] and not findings["Slurm"]["usable"]
    fake("sinfo", "echo sinfo: error: no controller >&2; exit 1")
    fake("sacct", "exit 1")
    findings = {each["name"]: each for each in json.loads(call("doctor", "--json").out)["findings"]}
    assert not findings["Slurm"]["usable"]
    assert "no controller" in findings["Slurm"]["found"]
    assert not findings["sacct"]["usable"]
    for each in findings.values():
        assert each["usable"] or each["advice"]
