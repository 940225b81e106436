"""The files for other engines: as valid as can be told without a cluster, and every command in them is one of ours."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import call

FOLDER = Path(__file__).resolve().parent.parent / "scripts" / "cluster"


def planned(line: str, index: int, count: int, index_name: str, count_name: str = "-") -> set[str]:
    """Points of the shard that a line of shell runs as number `index` of `count`."""
    line = line.replace(f"${index_name}", str(index)).replace(f"${count_name}", str(count))
    words = shlex.split(line)
    start = words.index("sae-sweep")
    assert words[start + 1] == "run"
    result = call("plan", *words[start + 2 :], "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)["points"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def whole(*overrides: str) -> int:
    return int(json.loads(call("plan", *overrides, "--json").out)["points"])


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


def test_the_table_of_scaling_shows_growth_and_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER.parent)
    scaling = importlib.import_module("bench_scaling")
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
