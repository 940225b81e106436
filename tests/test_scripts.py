"""scripts/: the files for other engines are valid as far as can be told without a cluster, and every script runs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fabricated
import pandas as pd
import pytest
import torch
import yaml
from commandline import call

from sae_sweep.config.settings import Toy

FOLDER = Path(__file__).resolve().parent.parent / "scripts" / "cluster"
# bench_gpu defines kernels, in the interpreter or not for all tests of a process: tests/kernels/test_bench_gpu.py.
SCRIPTS = [path.stem for path in sorted(FOLDER.parent.glob("*.py")) if path.stem != "bench_gpu"]


@functools.cache
def whole(*overrides: str) -> int:
    """Points that a command would run."""
    result = call("plan", *overrides, "--json")
    assert result.code == 0, result.err
    return int(json.loads(result.out)["points"])


def planned(line: str, index: int, count: int, index_name: str, count_name: str = "-") -> int:
    """Points of the shard that a line of shell runs as number `index` of `count`."""
    line = line.replace(f"${index_name}", str(index)).replace(f"${count_name}", str(count))
    words = shlex.split(line)
    start = words.index("sae-sweep")
    assert words[start + 1] == "run"
    return whole(*words[start + 2 :])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def test_the_indexed_job() -> None:
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec: dict[str, Any] = job["spec"]
    assert set(spec) <= {"completionMode", "completions", "parallelism", "backoffLimit", "template"}
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")  # a Job takes no other
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    shell, option, line = container["command"]
    assert (shell, option) == ("sh", "-c")
    count = spec["completions"]
    assert line.endswith(f"--shard $JOB_COMPLETION_INDEX/{count}")
    # Where the store lies must be on the volume.
    assert f"output_dir={container['volumeMounts'][0]['mountPath']}/" in line
    line = re.sub(r"output_dir=\S+", "", line)
    total = sum(planned(line, index, count, "JOB_COMPLETION_INDEX") for index in range(count))
    assert total == whole("experiment=splitting_paper")


def test_the_skypilot_task() -> None:
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run", "envs"}
    first, copy = task["run"].splitlines()
    names = ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")
    count = task["num_nodes"]
    total = sum(planned(first, index, count, *names) for index in range(count))
    assert total == whole("experiment=splitting_paper")
    assert set(task["file_mounts"]) == {f"/{shlex.split(copy)[-1].strip('/')}"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sbatch")), ids=lambda path: path.name)
def test_shell_is_shell(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path]).returncode == 0


def test_stores_merge_by_copying(tmp_path: Path) -> None:
    words = ["toy=small", "toy.d_vocab=5", "toy.k=2", "toy.steps=30", "training.steps=25", "sae.width=5", "logger=none"]
    words += ["device=cpu", "penalty.coefficient=0.1,0.2,0.3,0.4", "name=merged"]
    (tmp_path / "all").mkdir()
    for index in range(2):
        assert call("run", "--json", *words, "--shard", f"{index}/2", f"output_dir={tmp_path}/part{index}").code == 0
        parts = [str(tmp_path / f"part{index}" / kind) for kind in ("toys", "points", "sweeps")]
        subprocess.run(["cp", "-r", "-n", *parts, str(tmp_path / "all")], check=True)
    again = json.loads(call("run", *words, f"output_dir={tmp_path}/all", "--json").out)
    assert (again["ran"], again["skipped"]) == (0, 4)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Imports a script by its name and gives it a command line."""
    monkeypatch.syspath_prepend(FOLDER.parent)

    def load(name: str, *words: str) -> Any:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_says_what_it_takes(
    name: str, script: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        script(name, "--help").main()
    assert not end.value.code and capsys.readouterr().out.startswith("usage: ")


def test_a_line_for_every_compiled_architecture(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = script("bench_architectures", "--only", "relu", "topk", "gated")
    monkeypatch.setattr(bench, "SHAPES", ((64, 32, 8, 1, 1),))
    monkeypatch.setattr(bench, "TURNS", 1)
    assert bench.main() == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["relu", "topk", "gated"]
    for row in rows:  # both saw as many latents fire
        assert len(set(row[-1].split(" / "))) == 1


@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk"])
def test_a_worker_trains_what_peers_are_compared_on(architecture: str, script: Callable[..., Any]) -> None:
    bench = script("bench_worker")
    work = bench.Work("w", architecture, (16,), (("l1", 0.1),), 2, 8, 64, 1e-2)
    starts = {16: bench.exemplar_start(16, 8)}
    before = bench.quality(work, starts[16])[0]
    ours = bench.SaeSweep(work, starts, 1)
    ours.train(20)
    (trained,) = ours.saes()
    assert bench.quality(work, trained)[0] < before
    bench.Floor(work, starts, 1).train(1)


def test_steps_are_timed_of_stacks_that_fire_as_asked(script: Callable[..., Any]) -> None:
    bench = script("bench_steps")
    side = bench.Side()
    for row in (bench.Row(2, "relu", 64, 8, 256, "l1", 8), bench.Row(2, "topk", 64, 8, 256, "none", 1)):
        assert side.start(row, "") == pytest.approx(row.l0, rel=0.2)
        assert side.step() > 0 and side.product(row) > 0


@pytest.mark.slow
def test_a_work_is_compared_in_processes_that_take_turns(script: Callable[..., Any]) -> None:
    bench = script("bench_peers")
    work = bench._work("tiny", "relu", (16,))
    workers = [bench.Worker(sys.executable, backend, 1) for backend in (bench.FLOOR, bench.OURS)]
    floor, ours = bench.compare(bench.Task(work, 2, 2, 3), workers)
    for worker in workers:
        worker.close()
    assert floor["fvu"] is None and 0 < ours["fvu"] < 1 and ours["ratio_floor"] > 1
    assert "| tiny | sae-sweep |" in bench.table([floor, ours])
    assert {task.work.name for task in bench.tasks(True)} < {task.work.name for task in bench.tasks(False)}


def test_saes_as_a_user_runs_them_are_those_that_a_peer_trains(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, asked = script("bench_peers"), []

    def plan(words: list[str]) -> float:
        assert words[:3] == ["-m", "sae_sweep", "run"]
        asked.append(whole(*words[3:]))
        return 2.0

    class Lens:
        backend, trained = "sae-lens", 0

        def ask(self, **request: Any) -> dict[str, float]:
            self.trained += "train" in request
            return {"seconds": 1.0}

    monkeypatch.setattr(bench.bench_commands, "seconds", plan)
    lens = Lens()
    ours, theirs = bench.user_rows(lens)
    assert asked == [12] == [lens.trained] and ours["ratio_best_peer"] == 6.0
    assert "| 12 SAEs | sae-lens | 12.0000 |" in bench.table([ours, theirs])


def test_a_store_of_copies_is_finished(script: Callable[..., Any], tmp_path: Path) -> None:
    overrides = script("bench_commands").finished_store(tmp_path / "outputs", 3)
    again = json.loads(call("run", "--json", *overrides).out)
    assert (again["points"], again["ran"]) == (3, 0)


def test_scale_is_simulated(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = script("simulate_scale", str(tmp_path / "scale"), "--points", "3")
    monkeypatch.setattr(scale, "GRID", ["toy=small", "sae.width=16,64", "penalty=l1", "penalty.coefficient=0.1,1"])
    scale.main()
    assert "| points | 3 |" in capsys.readouterr().out


def test_accuracy_of_toys_is_held_against_what_is_published(
    script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = script("toy_accuracy", "--seeds", "2")
    monkeypatch.setattr(accuracy, "Toy", partial(Toy, d_vocab=5, k=2, steps=30))
    assert accuracy.main() == 1  # far from it after 30 steps
    assert "| accuracy | 0." in capsys.readouterr().out


def test_what_a_finished_sweep_found_is_written_down(script: Callable[..., Any], tmp_path: Path) -> None:
    points = [fabricated.point(seed=seed, width=16) for seed in (0, 1)]
    host = {"provenance": {"device": "a processor"}}
    fabricated.sweep(
        tmp_path,
        [(point, {"fvu": 0.1 + 0.2 * point.seed}) for point in points],
        "oracle",
        {point.id: host for point in points},
    )
    results = script("results", "oracle", "--output-dir", str(tmp_path))
    results.DOCS = tmp_path
    (tmp_path / "results.md").write_text("Of others.")
    page = tmp_path / "recipes.md"
    page.write_text("Before.\n<!-- oracle -->\nolder\n<!-- end -->\nAfter.\n")
    (tmp_path / "results").mkdir()
    results.main()
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "older" not in text
    assert "2 SAEs" in text and "on a processor;" in text
    table = pd.read_csv(tmp_path / "results" / "oracle.csv")
    assert (table["n"][0], table["fvu"][0], round(table["fvu_std"][0], 3)) == (2, 0.2, 0.141)


@pytest.mark.slow
def test_the_sae_that_saebench_scores(script: Callable[..., Any], tmp_path: Path) -> None:
    case = script("compare_saebench").trained(1.0, tmp_path, steps=50)
    width, d = case["W_dec"].shape
    assert case["W_enc"].shape == (d, width) and case["codes"].shape == (len(case["x"]), width)
    codes = torch.relu(torch.from_numpy(case["x"]) @ torch.from_numpy(case["W_enc"]) + torch.from_numpy(case["b_enc"]))
    assert torch.equal(codes, torch.from_numpy(case["codes"])) and codes.any()


def test_the_table_of_scaling_shows_growth_and_estimates(
    script: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = script("bench_scaling")
    # Twice the cost for twice the width, then four times: growth 1, then 2.
    rows = [scaling.Row("width", 64, 1.0, 0.5), scaling.Row("width", 128, 2.0, 0.5, 2**20)]
    rows += [scaling.Row("width", 256, 8.0, 0.5), scaling.Row("grid", "topk", 8.0)]
    lines = scaling.table(rows, [(2.0, 0), (2.0, 2**21), (2.0, 0), (4.0, 0)]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[3] for row in cells] == ["", "1.00", "2.00", ""]
    assert [row[4] for row in cells] == ["2.00", "4.00", "16.00", ""]
    assert [row[5] for row in cells] == ["2.00", "1.00", "0.25", "0.50"]
    assert cells[1][6:] == ["1 MiB", "2.00"]
    # Rows that a file holds are kept; those that are asked for are made anew.
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([dataclasses.asdict(row) for row in rows]))
    monkeypatch.setattr(scaling, "training", lambda axis, setting, threads: scaling.Row(axis, setting.l0, 3.0))
    monkeypatch.setattr("sys.argv", ["bench_scaling.py", "--rows", str(file), "--only", "l0 1"])
    assert scaling.main() == 0
    found = {(row["axis"], row["value"]): row["seconds"] for row in json.loads(file.read_text())}
    assert found[("width", 256)] == 8.0 and found[("l0", 1)] == found[("l0", 16)] == 3.0 and ("l0", 4) not in found
