"""What docs/activations.md says to do is done, with fewer steps and settings."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from commandline import call

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "activations.md").read_text()
BLOCKS = dict(reversed(re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)))


@pytest.mark.slow
def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["python"].replace("range(300)", "range(60)"), {})
    Path("tokens.yaml").write_text(BLOCKS["yaml"])
    words = BLOCKS["bash"].split()[1:]
    end = call(*words, "training.steps=20", "penalty=l1", "sae.init=kmeans", "toy.seed=0", "seed=0", "name=tokens")
    assert end.code == 0, end.err
    # The headline is broken where the terminal ends.
    said = " ".join(end.out.split())
    assert "activations-24-32 · m letter, q casing" in said and "splits per letter" in said
    assert "max" not in said.split("Claims")[1].split("Where it lies")[0].replace("max(", "")
    table = pd.read_parquet("outputs/sweeps/tokens/results.parquet")
    assert table["width"].tolist() == [24, 72] and table["loss_recovered"].between(0, 1).all()
    assert (table["toy_accuracy"] == 1).all()
    page = Path("outputs/sweeps/tokens/report.html").read_text()
    assert "m letter, q casing" in page and "Split latents per letter" in page and "per maximum" not in page
    (latents,) = (pd.read_parquet(path) for path in list(Path("outputs/points").glob("*/latents.parquet"))[:1])
    assert latents["label_class"].dropna().str.fullmatch(r"letter=[a-z](,casing=\w+)?|casing=\w+").all()
