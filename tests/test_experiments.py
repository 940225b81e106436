"""Every preset in miniature, run to its verdicts: each claim names points of its grid and a column that they have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import call

from sae_sweep.sweep.axes import listing

MINIATURE = ["toy.d_vocab=4", "toy.k=3", "toy.steps=20", "training.steps=4", "training.batch_size=16", "seed=0,1"]
MINIATURE += ["toy.seed=0", "evaluation.inputs=256", "evaluation.permutations=1", "logger=none"]


@pytest.mark.parametrize("experiment", [name for name in listing("experiment") if not name.endswith("_paper")])
def test_an_experiment_ends_in_verdicts(experiment: str, tmp_path: Path) -> None:
    words = [f"experiment={experiment}", *MINIATURE, f"output_dir={tmp_path}", "name=mini"]
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
