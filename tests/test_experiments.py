"""Every preset in miniature, run to its verdicts: each claim names points of its grid and a column that they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import call

from sae_sweep.sweep.axes import listing

MINIATURE = ["toy.d_vocab=4", "toy.k=3", "toy.steps=20", "training.steps=4", "training.batch_size=16", "seed=0,1"]
MINIATURE += ["toy.seed=0", "evaluation.inputs=256", "evaluation.permutations=1", "logger=none"]
# What must split to have a structure takes a larger toy, and some seconds.
LARGER = {"toy.d_vocab=4": "toy.d_vocab=6", "toy.steps=20": "toy.steps=200", "seed=0,1": "seed=0"}
PRESETS = [name for name in listing("experiment") if not name.endswith("_paper") and name != "structure"]


@pytest.mark.parametrize("experiment", [*PRESETS, pytest.param("structure", marks=pytest.mark.slow)])
def test_an_experiment_ends_in_verdicts(experiment: str, tmp_path: Path) -> None:
    size = [LARGER.get(word, word) for word in MINIATURE] + ["penalty=l1"] if experiment == "structure" else MINIATURE
    words = [f"experiment={experiment}", *size, f"output_dir={tmp_path}", "name=mini"]
    end = call("run", "--json", *words)
    assert end.code == 0, end.err
    found = json.loads(end.out)
    assert (found["ran"], found["failed"]) == (found["points"], 0)
    report = json.loads(call("report", "mini", "--json", "--output-dir", str(tmp_path)).out)
    for claim in report["claims"]:
        # Trained for four steps, most predictions fail; what may not fail is that they are about something.
        reason = claim["sentence"].partition("undecided, since ")[2]
        assert "no finished point" not in reason, claim
        assert "null" not in reason, claim
