"""What CONTRIBUTING.md says to do is done: its Python is run in an interpreter of its own, its experiment planned."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from commandline import fresh_in_turn

from sae_sweep.config import files, overrides

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
RECIPES = [text for language, text in BLOCKS if language == "python"]


def install(place: Path, name: str, code: str) -> None:
    """A package without a wheel: what an installer would leave behind."""
    about = place / f"{name}-0.1.dist-info"
    about.mkdir(parents=True)
    (place / f"{name}.py").write_text(code)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(f"[sae_sweep.plugins]\n{name} = {name}\n")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """The results of a sweep with each recipe, by its text: all of them in one interpreter."""
    place, commands = tmp_path_factory.mktemp("recipes"), []
    for number, code in enumerate(RECIPES):
        install(place / "site", f"recipe{number}", code)
        words = ["run", "toy=small", "toy.d_vocab=5", "toy.k=2", "toy.steps=30", "sae.width=5", "logger=none"]
        words += ["training.steps=20", "training.batch_size=32", "penalty.coefficient=0.1", f"name=tried{number}"]
        commands.append([*words, "penalty=saturating"] if "saturating" in code else words)
    for end in fresh_in_turn(*commands, cwd=place, env={"PYTHONPATH": f"{place / 'site'}:{ROOT}"}):
        assert end.code == 0, end.err
    sweeps = place / "outputs/sweeps"
    return {code: pd.read_parquet(sweeps / f"tried{i}/results.parquet") for i, code in enumerate(RECIPES)}


def test_every_recipe_is_there() -> None:
    assert len(RECIPES) == 2 and sum("register(" in text for text in RECIPES) == 2


@pytest.mark.parametrize("code", RECIPES, ids=lambda code: re.search(r'name="(\w+)"', code)[1])  # type: ignore[index]
@pytest.mark.slow
def test_a_recipe_is_swept(code: str, tables: dict[str, pd.DataFrame]) -> None:
    table = tables[code]
    assert table["penalty"].tolist() == ["saturating"] if "saturating" in code else table["largest_row"].gt(0).all()


def test_the_experiment_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = (text for language, text in BLOCKS if language == "yaml")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "trial.yaml").write_text(text)
    monkeypatch.setenv(files.VARIABLE, str(tmp_path))
    sweep = overrides.load(["experiment=trial"])
    assert len(sweep.points) == 5 * 2 * 2 * 2 and [claim["name"] for claim in sweep.claims] == ["wider_splits_more"]
