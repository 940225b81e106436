"""`score`: what it says of an SAE we trained is what was stored; SAEs of others are read as they were meant."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from commandline import TINY, call
from layouts import ALL, WIDTH

from sae_sweep.api import load_toy
from sae_sweep.store.store import Store

OTHERS = ["sae=tied", "sae=topk", "sae=matryoshka", "sae=gated"]
KINDS = ["sae=relu", "sae=batchtopk", "sae=jumprelu penalty=l0"]
KINDS += [pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS]


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_a_trained_sae_is_what_was_stored(kind: str, tmp_path: Path) -> None:
    setting = [*TINY, "device=cpu", f"output_dir={tmp_path}"]
    assert call("run", "--json", *kind.split(), "penalty.coefficient=0.1", *setting).code == 0
    store = Store(tmp_path)
    (id,) = store.ids("points")
    record = store.read_record("points", id)
    penalty = record["settings"]["penalty"]
    words = [f"penalty={penalty['name']}", f"penalty.coefficient={penalty['coefficient']}"]
    words += ["sae=jumprelu"] if penalty["name"] == "l0" else []
    toy = [word for word in setting if word.startswith(("toy", "device", "output_dir"))]
    said = json.loads(call("score", str(tmp_path / "points" / id), *toy, *words, "--json").out)
    assert said["metrics"].keys() == record["metrics"].keys()
    for name, value in record["metrics"].items():
        expected = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
        assert said["metrics"][name] == expected, name


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A toy whose activations are as long as the layouts' are."""
    output_dir = tmp_path_factory.mktemp("outputs")
    return ["toy=small", "toy.d_vocab=5", "toy.k=2", "toy.steps=30", "toy.d_model=16", f"output_dir={output_dir}"]


@pytest.mark.parametrize("name", ALL)
def test_an_sae_of_any_library_is_measured_as_it_was_meant(name: str, toy: list[str], tmp_path: Path) -> None:
    layout = ALL[name]
    ended = call("score", str(layout.write(tmp_path)), *toy, "device=cpu", "distribution=uniform", "--json")
    assert ended.code == 0, ended.err
    said = json.loads(ended.out)
    assert (name.startswith(said["library"]), said["width"]) == (True, WIDTH)

    store = Store(toy[-1].removeprefix("output_dir="))
    (id,) = store.ids("toys")
    sequences = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    acts = load_toy(id, store.root).activations(sequences, "pre_unembed")
    codes = layout.codes(acts)
    error = (layout.reconstruction(acts) - acts).square().sum()
    assert said["metrics"]["l0"] == pytest.approx(float((codes > 0).sum(1).double().mean()))
    assert said["metrics"]["fvu"] == pytest.approx(float(error / (acts - acts.mean(0)).square().sum()), rel=1e-4)


def test_what_is_refused_is_one_line_and_exit_code_2(toy: list[str], tmp_path: Path) -> None:
    layout = ALL["SAELens-new"]
    tensors = {**layout.tensors, "b_enc": torch.full((WIDTH,), torch.nan)}
    folder = dataclasses.replace(layout, tensors=tensors).write(tmp_path)
    ended = call("score", str(folder), *toy, "device=cpu")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.strip().count("\n") == 0
    assert f"{folder}: sae_weights.safetensors: b_enc has 24 of 24 numbers that are nan or infinite" in ended.err


def test_wrong_folders_and_lengths_exit_2(tmp_path: Path) -> None:
    toy = ["toy=small", f"output_dir={tmp_path / 'out'}", "device=cpu"]
    missing = call("score", str(tmp_path / "nowhere"), *toy)
    assert (missing.code, "cfg.json" in missing.err) == (2, True)
    folder = ALL["SAELens-new"].write(tmp_path / "sae")
    short = call("score", str(folder), *toy)
    assert short.code == 2
    assert "activations of length 16, but pre_unembed of this toy has 32" in short.err
    two = call("score", str(folder), *toy, "site=pre_unembed,post_unembed")
    assert (two.code, "one setting at a time, got 2" in two.err) == (2, True)
