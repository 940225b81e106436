"""The command line: what goes to stdout and stderr, exit codes, and one line for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from commandline import SEVERAL, TINY, call, fresh

from sae_sweep.cli import app, features
from sae_sweep.config import overrides
from sae_sweep.config.settings import PARTITIONS
from sae_sweep.registry import kinds
from sae_sweep.store.store import Store
from sae_sweep.toys import model

PENALTIES = tuple(kinds("penalty"))

SEEDS = [*TINY, "penalty.coefficient=0.1,1", "seed=0,1,2", "name=seeds"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with a finished sweep `seeds`: two coefficients, three seeds."""
    place = tmp_path_factory.mktemp("cli") / "outputs"
    assert call("run", "--json", *SEEDS, f"output_dir={place}").code == 0
    return place


# What is loaded


HEAVY = ["torch", "wandb", "pandas", "pyarrow", "hydra", "omegaconf", "numba", "sympy", "safetensors", "plotext"]


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"], []])
def test_help_loads_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom sae_sweep.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"sys.stderr.write(' '.join(sorted(set({HEAVY}) & set(sys.modules))))"
    )
    out = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    assert out.stdout


@pytest.mark.parametrize("words", [["plan"], ["run"]])
def test_what_is_finished_is_known_without_pytorch(words: list[str], root: Path) -> None:
    """Its import alone takes longer than all the rest of such a run."""
    code = (
        "import sys\nfrom sae_sweep.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "sys.stderr.write(' '.join({'torch', 'sympy', 'wandb'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *words, "--json", *SEEDS, f"output_dir={root}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stderr == ""
    assert json.loads(out.stdout).get("skipped", 6) == 6


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app.app).commands))
def test_each_command_has_two_examples_that_it_understands(name: str) -> None:
    program = typer.main.get_command(app.app)
    command = program.commands[name]
    lines = [line for each in (command.epilog or "").splitlines() if (line := each.strip(" \b"))]
    assert lines[0] == "Examples:" and len(lines) == 3
    for line in lines[1:]:
        words = shlex.split(line.partition(" >")[0])
        assert words[:2] == ["sae-sweep", name]
        given = command.make_context(name, words[2:]).params
        if given.get("overrides"):
            overrides.load(given["overrides"], ["launcher=slurm"] if name == "submit" else [])


# Data


def test_run_ends_with_the_json_of_the_design(root: Path) -> None:
    end = call("run", "--json", *SEEDS, f"output_dir={root}")
    directory = str(root / "sweeps" / "seeds")
    expected = {"schema": 1, "sweep": "seeds", "points": 6, "ran": 0, "skipped": 6, "failed": 0}
    assert (end.code, end.err) == (0, "")
    assert list(json.loads(end.out).items()) == [*expected.items(), ("directory", directory)]
    assert end.out.count("\n") == 1


def test_progress_is_on_stderr_one_line_per_point(tmp_path: Path) -> None:
    end = call("run", "--json", *SEEDS, "toy.seed=1", f"output_dir={tmp_path}")
    assert len(end.out.splitlines()) == 1
    assert json.loads(end.out)["ran"] == 6
    lines = end.err.splitlines()
    assert len([line for line in lines if " done " in line]) == 6
    assert lines[0].startswith("toy max_of_k-5-2 seed 1 trained")
    assert "[6/6]" in lines[-1]


@pytest.mark.slow
def test_the_report_follows_a_run(root: Path) -> None:
    end = call("run", *SEEDS, f"output_dir={root}")
    assert end.code == 0
    assert end.out == call("report", "seeds", "--output-dir", str(root)).out
    assert "l1" in end.out
    assert "\x1b" not in end.out


@pytest.mark.parametrize("words", [["plan"], ["run", "--dry-run"]])
def test_a_plan(words: list[str], root: Path, tmp_path: Path) -> None:
    end = call(*words, "--json", *SEEDS, f"output_dir={root}")
    found = json.loads(end.out)
    assert (end.code, end.err, end.out.count("\n")) == (0, "", 1)
    assert list(found) == ["schema", "sweep", "points", "finished", "packs", "estimate"]
    assert list(found.values())[:-1] == [1, "seeds", 6, 6, 0]
    assert found["estimate"] == {"seconds": 0, "peak_memory_bytes": 0}

    place = tmp_path / "new"
    found = json.loads(call(*words, "--json", *SEVERAL, f"output_dir={place}").out)
    assert list(found.values())[:-1] == [1, "several", 16, 0, 4]
    assert found["estimate"]["seconds"] > 0
    assert found["estimate"]["peak_memory_bytes"] > 2**20
    shown = call(*words, *SEVERAL, "--shard", "0/2", f"output_dir={place}").out
    assert "sae.width" in shown and "5, 7" in shown
    many = call(*words, *SEVERAL, "seed=range(0,100)", f"output_dir={place}").out
    assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …, 99 (100 values)" in " ".join(many.split())
    assert not place.exists()


def test_results_in_every_format(root: Path) -> None:
    expected = pd.read_parquet(root / "sweeps" / "seeds" / "results.parquet")

    def show(*words: str) -> bytes:
        end = call("results", "seeds", "--output-dir", str(root), *words)
        assert (end.code, end.err) == (0, "")
        return end.raw

    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(show("--format", "parquet"))), expected)
    csv = pd.read_csv(io.BytesIO(show("--format", "csv")))
    assert list(csv) == list(expected)
    assert csv["loss"].tolist() == expected["loss"].tolist()
    rows = json.loads(show("--format", "json"))
    assert [list(row) for row in rows] == [list(expected)] * 6
    assert [row["loss"] for row in rows] == expected["loss"].tolist()
    assert [row["point_id"] for row in rows] == expected["point_id"].tolist()
    assert rows[0]["penalty_p"] is None and rows[0]["on_front"] in (True, False)
    table = show().decode()
    assert all(name in table for name in ("fvu", "coefficient"))
    assert "penalty_p" not in table


def test_results_over_seeds(root: Path) -> None:
    each = pd.read_parquet(root / "sweeps" / "seeds" / "results.parquet")
    where = ["results", "seeds", "--output-dir", str(root), "--format", "json"]
    mean = json.loads(call(*where, "--seeds", "mean").out)
    assert [row["n"] for row in mean] == [3, 3]
    assert [row["loss"] for row in mean] == pytest.approx(each.groupby("coefficient")["loss"].mean().tolist())
    best = json.loads(call(*where, "--seeds", "best").out)
    assert [row["loss"] for row in best] == each.groupby("coefficient")["loss"].min().tolist()


def test_a_report_as_json(root: Path) -> None:
    end = call("report", "seeds", "--json", "--output-dir", str(root))
    page = str(root / "sweeps/seeds/report.html")
    assert json.loads(end.out) == {"schema": 1, "sweep": "seeds", "points": 6, "claims": [], "report": page}


def test_cells() -> None:
    found = json.loads(call("cells", "toy.d_vocab=64", "toy.k=4", "--json").out)
    assert list(found)[:6] == ["schema", "d_vocab", "k", "cells", "per_max", "partitions"]
    assert (found["distribution"], found["inputs"]) == ("max_stratified", 65_536)
    assert found["ceilings"]["m"] == {"classes": 64, "countable": 64, "owned": 64, "splits": 0}
    assert found["ceilings"]["mqnc"]["classes"] == 95_488 > 1_000 > found["ceilings"]["mqnc"]["countable"]
    assert (found["schema"], found["d_vocab"], found["k"], found["cells"]) == (1, 64, 4, 95_488)
    assert len(found["per_max"]) == 64 and sum(found["per_max"]) == 95_488
    assert set(found["partitions"]) == set(PARTITIONS)
    assert (found["partitions"]["m"], found["partitions"]["mqnc"]) == (64, 95_488)
    assert json.loads(call("cells", "--json").out) == json.loads(call("cells", "device=cpu", "--json").out) == found
    shown = call("cells").out
    assert "95,488" in shown and "expects 8 inputs among the 65,536" in " ".join(shown.split())
    assert "every input is enumerated" in " ".join(call("cells", "toy.d_vocab=16", "toy.k=3").out.split())
    assert "one toy" in call("cells", "toy.k=2,3").err


def test_chances_that_a_toy_does_not_know_are_counted() -> None:
    """As of a plugin's toy, whose planted features may say no more than which are active on an input."""
    toy = (
        overrides.load(["toy=planted", "toy.features=3", "toy.rates='0.3,0.1,0.1'", "toy.tree='0>1:0.2'"]).points[0].toy
    )
    made = model.load(toy, model.train([toy], "cpu")[0])
    np.testing.assert_allclose(features._counted(made, made.planted), made.planted.together, atol=0.015)


def test_cells_of_planted_features() -> None:
    words = ["toy=planted", "toy.features=3", "toy.rates='0.3,0.1,0.1'", "toy.tree='0>1:0.2'"]
    found = json.loads(call("cells", *words, "--json").out)
    assert (found["features"], found["edges"], found["exact"]) == (3, [[0, 1]], True)
    assert found["rates"] == pytest.approx([0.3, 0.06, 0.1], abs=1e-6)
    assert found["l0"] == pytest.approx(0.46, abs=1e-6)
    shown = call("cells", *words).out.splitlines()
    # The child has its parent always, the parent its child on a fifth, and no feature the third on more than a tenth.
    rows = {line.split()[0]: line.rstrip()[-6:] for line in shown if line[:7].strip().isdigit()}
    assert rows["1"].startswith("████") and rows["0"].startswith("██░░")
    alone = json.loads(call("cells", "toy=exclusive", "toy.features=4", "--json").out)
    assert (alone["exact"], alone["l0"], alone["together"][0][1]) == (True, pytest.approx(1), 0)
    assert "active" in call("toys", "circle").out


def test_listings() -> None:
    listed = json.loads(call("penalties", "--json").out)
    assert [row["name"] for row in listed] == list(PENALTIES)
    assert {row["name"]: row["ladder"] for row in listed} == overrides.ladders()
    architectures = json.loads(call("architectures", "--json").out)
    assert [row["name"] for row in architectures] == list(kinds("architecture"))
    for row in (*listed, *architectures):
        assert all(row[key].strip(" -") for key in ("formula", "prior", "source")), row["name"]
    of_kinds = {"architectures": "architecture", "toys": "toy", "metrics": "metric"}
    for kind, names in (("penalties", PENALTIES), *((kind, kinds(family)) for kind, family in of_kinds.items())):
        _, listing = call(kind).out.split("\n\n")
        assert [line.split()[0] for line in listing.splitlines()] == list(names)
    assert [row["name"] for row in json.loads(call("toys", "--json").out)] == list(kinds("toy"))
    assert "toy.tree=none" in call("toys", "planted").out and "did you mean 'circle'?" in call("toys", "cirle").err
    assert call("metrics", "below_cell").out == call("metrics", "labels").out
    assert "evaluation.order=False" in call("metrics", "order").out
    assert json.loads(call("penalties", "log1p", "--json").out)["name"] == "log1p"
    assert "Lomax" in call("penalties", "log1p").out
    assert [line.split()[0] for line in call("encoders").out.split("\n\n")[1].splitlines()] == list(kinds("encoder"))
    assert "toy.d_vocab=16 (" in call("toys", "bigrams").out  # as it is configured, not as a transformer's default is
    assert "encoder.steps=4" in call("encoders", "lista").out and "sae=topk" in call("encoders", "matching_pursuit").out
    ingredients = [row["name"] for row in json.loads(call("recipes", "--json").out)]
    assert {"optimizer=adam", "schedule=cosine", "revival=resample", "target_l0", "until"} < set(ingredients)
    assert all(row["source"] for row in json.loads(call("recipes", "--json").out))
    assert "training.k_start=null" in call("recipes", "k_start").out
    assert call("recipes", "resample").out == call("recipes", "revival=resample").out
    assert "training.revival_every=250" in call("recipes", "resample").out
    assert "did you mean 'revival=resample'?" in call("recipes", "resampel").err
    end = call("penalties", "lgo1p")
    assert end.code == 2 and "did you mean 'log1p'?" in end.err


def test_python_dash_m_and_no_colour(root: Path) -> None:
    words = ["plan", *SEEDS, f"output_dir={root}"]
    plain = fresh(*words, cwd=root, env={"NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert (plain.code, plain.err) == (0, "")
    assert plain.out == call(*words).out
    assert "\x1b" not in plain.out


@pytest.mark.parametrize("format", ["table", "json", "csv"])
def test_a_reader_that_has_seen_enough(root: Path, format: str) -> None:
    """The pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "sae_sweep", "results", "seeds", "--output-dir", str(root), "--format", format]
    with os.fdopen(writer, "wb") as pipe:
        end = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE)
    assert (end.returncode, end.stderr) == (0, b"")


def test_damage_that_a_table_is_missing_is_named(root: Path, tmp_path: Path) -> None:
    place = tmp_path / "outputs"
    assert call("run", "--json", *TINY, "penalty.coefficient=1", "name=one", f"output_dir={place}").code == 0
    (id,) = Store(place).ids("points")
    (place / "points" / id / "record.json").write_bytes(b"{")
    end = call("results", "one", "--format", "csv", "--output-dir", str(place))
    assert end.out.count("\n") == 1
    assert id in end.err and "run again to recompute it" in end.err
    assert end.err.count("\n") == 1


# Bad input

WRONG = [
    (["run", "sae.widht=3"], "did you mean 'sae.width'?"),
    (["run", "penalti=l1"], "did you mean 'penalty'?"),
    (["run", "penalty=sqr"], "did you mean 'sqrt'?"),
    (["run", "experiment=splitings"], "did you mean 'splitting'?"),
    (["run", "quickstart"], "experiment=quickstart"),
    (["run", "sae.width=abc"], "whole number"),
    (["run", "sae.width=0"], "at least 1"),
    (["run", "penalty.coefficient=-1"], "at least 0"),
    (["run", "sae.width=interval(1,9)"], "range()"),
    (["run", "sae.width=choice()"], "empty choice"),
    (["run", "seed=range(0,0)"], "empty"),
    (["run", "toy.k=1"], "at least 2"),
    (["run", "seed=range(0,1000000)"], "--yes"),
    (["run", "seed=range(0,1000)", "data_seed=range(0,1000)"], "--yes"),
    (["run", "seed=1", "seed=2"], "given twice"),
    (["run", "name=../elsewhere"], "names a folder"),
    (["run", "device=tpu"], "cpu"),
    (["run", "--shard", "4/4"], "0/4 to 3/4"),
    (["run", "--shard", "0/0"], "shard"),
    (["run", "--shard", "half"], "I/N"),
    (["run", "--shard", "1/" + "9" * 5000], "I/N"),
    (["run", "--shards", "0/2"], "--shard"),
    (["run", "-x=3"], "-x"),
    (["plan", "sae.width=0"], "at least 1"),
    (["cells", "toy.k=1"], "at least 2"),
    (["results"], "SWEEP"),
    (["results", "nothing"], "there is no sweep nothing"),
    (["results", "nothing", "--format", "xls"], "csv"),
    (["report", "nothing"], "there is no sweep nothing"),
    (["rum"], "rum"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words)[:40] for words, _ in WRONG])
def test_bad_input_is_one_line_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    end = call(*words)
    assert (end.code, end.out) == (2, "")
    assert end.err.startswith("error: ") and end.err.count("\n") == 1 and end.err.endswith("\n")
    assert message in end.err
    assert list(tmp_path.iterdir()) == []


BAD_WEIGHTS = {
    "no such column": ("m,wait\n0,1\n", "weights.csv:1"),
    "no such cell": ("m,weight\n9,1\n", "weights.csv:2"),
    "not a number": ("m,weight\n0,much\n", "weights.csv:2"),
    "nothing": ("", "weights.csv:1"),
    "all zero": ("m,weight\n0,0\n", "sum to 0"),
}


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(("text", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_wrong_file_of_weights_is_found_before_anything_is_written(
    command: str, text: str, message: str, tmp_path: Path
) -> None:
    file, place = tmp_path / "weights.csv", tmp_path / "outputs"
    file.write_text(text)
    end = call(command, *TINY, f"distribution=uniform,{file}", "penalty.coefficient=1", f"output_dir={place}")
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
    assert message in end.err
    assert not place.exists()


def test_an_output_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    end = call("run", *TINY, f"output_dir={tmp_path / 'file' / 'outputs'}")
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
    assert "cannot be written: Not a directory" in end.err


def test_hydras_own_flag_for_a_sweep_changes_nothing(tmp_path: Path) -> None:
    words = [*SEEDS, f"output_dir={tmp_path}", "--json"]
    assert call("plan", "-m", *words).out == call("plan", *words, "--multirun").out == call("plan", *words).out


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """As daemons leave them: no file of the store may become what a C library takes for stderr."""
    script = f'exec "$@" {closed}'
    words = [*TINY, "penalty.coefficient=1", "name=closed"]
    command = ["sh", "-c", script, "sh", sys.executable, "-m", "sae_sweep", "plan", "--json", *words]
    end = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (end.returncode, end.stderr) == (0, "")
    assert (json.loads(end.stdout)["points"] == 1) if ">&- 2" not in closed else end.stdout == ""


# Looking


def test_results_are_chosen_sorted_and_filtered(root: Path) -> None:
    def rows(*words: str) -> list[dict]:
        return json.loads(call("results", "seeds", "--output-dir", str(root), "--format", "json", *words).out)

    assert {row["coefficient"] for row in rows("--where", "coefficient=1")} == {1.0}
    assert len(rows("--where", "penalty.coefficient=0.1,1", "--where", "seed!=0")) == 4
    found = rows("--sort", "-fvu", "--top", "2", "--columns", "fvu,seed")
    assert [list(row) for row in found] == [["fvu", "seed"]] * 2 and found[0]["fvu"] >= found[1]["fvu"]
    lowest = sorted(row["l0"] for row in rows())[:3]
    assert [row["l0"] for row in rows("--sort", "l0", "--top", "3")] == lowest
    (mean,) = rows("--seeds", "mean", "--where", "seed=0,1", "--where", "coefficient=1")
    assert mean["n"] == 2
    assert rows("--where", "partition=null") == rows()
    for words, said in (
        (["--columns", "fvuu"], "did you mean 'fvu'?"),
        (["--sort", "-nothing"], "there is no such column"),
        (["--where", "fvu"], "expected a column"),
        (["--where", "fvu<low"], "compares with a number"),
    ):
        end = call("results", "seeds", "--output-dir", str(root), *words)
        assert end.code == 2 and said in end.err and len(end.err.splitlines()) == 1


def test_a_table_for_people_has_what_varies_and_fits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    end = call("results", "seeds", "--output-dir", str(root))
    lines = end.out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) <= 12
    assert {"coefficient", "seed", "l0", "fvu"} <= set(lines[-8].split())
    assert "width" not in end.out and lines[-1].endswith("--format csv has all")


@pytest.mark.slow
def test_sweeps_beside_each_other(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = [word for word in SEEDS if not word.startswith("name=")]
    assert call("run", *other, "training.lr=0.01", "name=other", f"output_dir={root}", "--json").code == 0
    monkeypatch.chdir(tmp_path)
    end = call("compare", "seeds", "other", "--output-dir", str(root), "--json")
    found = json.loads(end.out)
    assert [row["sweep"] for row in found["rows"]] == ["seeds"] * 6 + ["other"] * 6
    assert Path(found["report"]).read_text().startswith("<!doctype html>")
    assert set(pd.read_csv("seeds-other-figures/front.csv")["given"]) == {"seeds", "other"}
    end = call("compare", "seeds", "other", "--output-dir", str(root))
    assert "5 kmeans seeds" in end.out and "5 kmeans other" in end.out
    assert call("compare", "seeds", "--output-dir", str(root)).code == 2
    assert call("compare", "seeds", "nothing", "--output-dir", str(root)).code == 2


def test_a_run_writes_the_page_and_names_it(root: Path) -> None:
    page = root / "sweeps/seeds/report.html"
    page.unlink(missing_ok=True)
    end = call("run", *SEEDS, f"output_dir={root}")
    assert end.code == 0 and str(page) in end.out and page.exists()
    written = page.stat().st_mtime_ns
    full = call("run", *SEEDS, f"output_dir={root}", "--full")
    assert page.stat().st_mtime_ns == written
    assert "Results by width, init and penalty" in full.out and "Results by width" not in end.out


def test_latents_are_sorted_and_all_of_them_listed(root: Path) -> None:
    point = json.loads(call("results", "seeds", "--output-dir", str(root), "--format", "json").out)[0]["point_id"]
    listed = json.loads(call("inspect", point, "--sort", "-density", "--json", "--output-dir", str(root)).out)[
        "latents"
    ]
    densities = [row["density"] for row in listed]
    assert densities == sorted(densities, reverse=True)
    assert call("inspect", point, "--all", "--output-dir", str(root)).code == 0
    assert call("inspect", point, "--sort", "nothing", "--output-dir", str(root)).code == 2
