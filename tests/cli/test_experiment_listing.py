"""`experiments`, `init`, `run --cfg` and `--config-dir`, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import call

import sae_sweep
from sae_sweep.cli.completion import candidates
from sae_sweep.config import files


@pytest.fixture(autouse=True)
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that `init` wrote, to work in."""
    monkeypatch.chdir(tmp_path)
    end = call("init", "ideas")
    assert (end.code, len(end.out.splitlines())) == (0, 5), end.err
    monkeypatch.chdir(tmp_path / "ideas")
    yield tmp_path / "ideas"
    files.search_first([])


def test_init_overwrites_nothing(starter: Path) -> None:
    experiment = starter / "conf/experiment/gentle.yaml"
    experiment.write_text("mine")
    for path in ("conf/penalty/gentle.yaml", "notebook.ipynb"):
        (starter / path).unlink()
    end = call("init", ".")
    assert (end.code, end.out, end.err.count("\n")) == (2, "", 1) and "is there already" in end.err
    assert experiment.read_text() == "mine" and not (starter / "notebook.ipynb").exists()


def test_the_starters_parts_are_what_they_say(starter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(sae_sweep, "register", registered.append, raising=False)
    exec((starter / "plugin/my_sae_kinds.py").read_text(), {"__name__": "my_sae_kinds"})
    penalty, metric = registered
    assert (penalty.name, metric.name) == ("bounded", "largest_row") and penalty.parsed.slope_at_zero == "1/s"
    assert isinstance(metric.columns["largest_row"], sae_sweep.Column)
    assert json.loads((starter / "notebook.ipynb").read_text())["nbformat"] == 4
    end = call("run", "experiment=gentle", "--cfg")
    found = yaml.safe_load(end.out)
    assert end.code == 0 and not (starter / "outputs").exists()
    assert (found["points"], found["sae"]["width"], found["penalty"]["p"]) == (12, [16, 136], 0.7)
    assert found["claims"][0]["name"] == "gentle_splits_less"


def test_experiments_tells_of_ours_and_yours(starter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {name: files.options("experiment")[name] for name in ("gentle", "quickstart")}
    both["broken"] = starter / "conf/experiment/broken.yaml"
    both["broken"].write_text("sae: {widht: 3}")
    of = files.options
    with monkeypatch.context() as patched:
        patched.setattr(files, "options", lambda group: both if group == "experiment" else of(group))
        end = call("experiments", "--json")
    mine, ours, broken = json.loads(end.out)
    assert (mine["points"], mine["from"]) == (12, str(both["gentle"])) and mine["seconds"] > 0
    assert mine["asks"].startswith("Does a penalty that is gentler")
    assert ours["from"] == "sae-sweep" and len(ours["claims"]) > 1
    assert "unknown key 'sae.widht'" in broken["error"]
    assert "one split fewer per maximum" in call("experiments", "gentle").out
    assert "did you mean 'gentle'?" in call("experiments", "gentel").err


def test_config_dir_is_taken_wherever_it_stands(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("plan", "experiment=gentle").code == 2
    for words in (
        ["--config-dir", "ideas/conf", "experiment=gentle"],
        ["experiment=gentle", "--config-dir=ideas/conf"],
    ):
        assert json.loads(call("plan", "--json", *words).out)["points"] == 12
    missing = call("plan", "--config-dir", "nowhere")
    assert (missing.code, missing.err.count("\n")) == (2, 1) and "is no folder" in missing.err

    import typer

    from sae_sweep.cli import app

    program = typer.main.get_command(app.app)
    words = ["run", "--config-dir", "ideas/conf"]
    assert "experiment=gentle" in [each.text for each in candidates(program, words, "experiment=g")]
    assert not candidates(program, ["run"], "experiment=g")
