"""Every preset in miniature, run to its verdicts: each claim names points of its grid and a column that they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import call

from sae_sweep.cli.show import verdicts_of
from sae_sweep.config import overrides
from sae_sweep.config.axes import listing
from sae_sweep.store import results
from sae_sweep.store.store import Store
from sae_sweep.sweep import attainable
from sae_sweep.toys import sampling

ROOT = Path(__file__).parents[2]
MINIATURE = ["toy.d_vocab=4", "toy.k=3", "toy.steps=20", "training.steps=4", "training.batch_size=16", "seed=0,1"]
MINIATURE += ["toy.seed=0", "evaluation.inputs=256", "evaluation.permutations=1", "logger=none"]
# Thousands of features can be few.
FEWER_FEATURES = ["toy.features=32", "toy.d_model=8", "sae.width=32"]
FEWER = {"published_sanity": FEWER_FEATURES, "published_bench": FEWER_FEATURES}
# Claims that compare lengths of training have lengths to compare; a plateau is known from 800 steps on.
SHORTER = {
    "published_absorption": {"24414": "4", "200000": "5"},
    "recipes_steps": {"1500": "4", "6000": "5", "40000": "800"},
}
# Claims about widths of one of several toys name them: of four tokens in three places they are others.
NARROWER = {"splitting_best": {"1056": "32", "2560": "192"}}
# What must split to have a structure takes a larger toy, and some seconds.
LARGER = {"toy.d_vocab=4": "toy.d_vocab=6", "toy.steps=20": "toy.steps=200", "seed=0,1": "seed=0"}
# From random directions nothing splits in so few steps, and what does not split has no structure.
UNSPLIT = "query_direction_is_learnt"
PRESETS = [name for name in listing("experiment") if not name.endswith("_paper")]
# All of them take minutes.
QUICK = ("published_circle",)


def miniature(experiment: str, folder: Path) -> list[str]:
    """What runs a preset small, without the settings that none of its toys has."""
    words = [LARGER.get(word, word) for word in MINIATURE] + ["penalty=l1"] if experiment == "structure" else MINIATURE
    words = words + FEWER.get(experiment, [])
    preset = experiment
    smaller = {**SHORTER, **NARROWER}.get(experiment)
    if smaller:
        text = (ROOT / "conf" / "experiment" / f"{experiment}.yaml").read_text()
        for number, fewer in smaller.items():
            text = re.sub(rf"\b{number}\b", fewer, text)
        preset = str(folder / f"{experiment}.yaml")
        Path(preset).write_text(text)
    if experiment in SHORTER:
        words = [word for word in words if not word.startswith("training.steps=")]
    toys = {point.toy for point in overrides.load([f"experiment={experiment}", "claims=[]"]).points}
    known = {f"toy.{key}" for toy in toys for key in toy.to_dict()}
    words = [word for word in words if not word.startswith("toy.") or word.partition("=")[0] in known]
    return [f"experiment={preset}", *words]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PRESETS],
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output directory of a preset's miniature, run to its end."""
    experiment, root = request.param, tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        # Four tokens do not have the fifteen maxima that a claim asks for.
        patch.setattr(attainable, "check_attainable", lambda sweep: None)
        # A planted toy draws a million inputs for its mean and scale: here they need not be so exact.
        patch.setattr(sampling, "CONSTANTS_INPUTS", 1 << 14)
        end = call("run", "--json", *miniature(experiment, root), f"output_dir={root}", "name=mini")
        assert end.code == 0, end.err
        found = json.loads(end.out)
        assert (found["ran"], found["failed"]) == (found["points"], 0)
        yield root


def test_an_experiment_ends_in_verdicts(finished: Path) -> None:
    store = Store(finished)
    for verdict in verdicts_of(results.sweep_info(store, "mini"), *results.tables(store, "mini")):
        # Trained for four steps, most predictions fail; what may not fail is that they are about something.
        reason = verdict.sentence.partition("undecided, since ")[2]
        assert "no finished point" not in reason, verdict
        assert "null" not in reason or verdict.name == UNSPLIT, verdict


def test_an_experiment_has_a_page(finished: Path) -> None:
    end = call("report", "mini", "--json", "--output-dir", str(finished))
    assert end.code == 0, end.err
    assert Path(json.loads(end.out)["report"]).read_text().startswith("<!doctype html>")
