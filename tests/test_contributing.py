"""What CONTRIBUTING.md says to do is done: its Python is run in an interpreter of its own, its experiment planned."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from commandline import fresh

from sae_sweep.config import files, overrides

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
RECIPES = [text for language, text in BLOCKS if language == "python"]


def install(place: Path, code: str) -> None:
    """A package without a wheel: what an installer would leave behind."""
    about = place / "recipe-0.1.dist-info"
    about.mkdir(parents=True)
    (place / "recipe.py").write_text(code)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: recipe\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[sae_sweep.plugins]\nrecipe = recipe\n")


def test_every_recipe_is_there() -> None:
    assert len(RECIPES) == 2 and sum("register(" in text for text in RECIPES) == 2


@pytest.mark.parametrize("code", RECIPES, ids=lambda code: re.search(r'name="(\w+)"', code)[1])  # type: ignore[index]
def test_a_recipe_is_swept(code: str, tmp_path: Path) -> None:
    install(tmp_path / "site", code)
    words = ["run", "toy=small", "toy.d_vocab=5", "toy.k=2", "toy.steps=30", "sae.width=5", "logger=none", "name=tried"]
    words += ["training.steps=20", "training.batch_size=32", "penalty.coefficient=0.1"]
    words += ["penalty=saturating"] if "saturating" in code else []
    end = fresh(*words, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"})
    assert end.code == 0, end.err
    table = pd.read_parquet(tmp_path / "outputs/sweeps/tried/results.parquet")
    assert table["penalty"].tolist() == ["saturating"] if "saturating" in code else table["largest_row"].gt(0).all()


def test_the_experiment_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (text for language, text in BLOCKS if language == "yaml")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "trial.yaml").write_text(text)
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    sweep = overrides.load(["experiment=trial"])
    assert len(sweep.points) == 5 * 2 * 2 * 2 and [claim["name"] for claim in sweep.claims] == ["wider_splits_more"]
