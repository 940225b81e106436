"""`import sae_sweep` in Python, and the notebook of docs/ run from its first cell to its last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from commandline import TINY, call
from layouts import DICTIONARY_LEARNING, X

import sae_sweep
from sae_sweep import load_sae, load_sweep, load_toy
from sae_sweep.errors import UserError

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("notebook") / "outputs"
    assert call("run", "--json", *TINY, "sae=relu,topk", "toy.seed=0,1", "name=tiny", f"output_dir={place}").code == 0
    return place


def test_importing_loads_nothing_heavy() -> None:
    heavy = {"torch", "pandas", "plotly", "typer", "hydra", "rich"}
    code = f"import sys, sae_sweep\nprint(sorted(set(sys.modules) & {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert set(sae_sweep.__all__) <= set(dir(sae_sweep))
    with pytest.raises(AttributeError, match="load_swep"):
        _ = sae_sweep.load_swep


def test_a_sweep_is_its_table(root: Path) -> None:
    table = load_sweep("tiny", root)
    pd.testing.assert_frame_equal(table, pd.read_parquet(root / "sweeps/tiny/results.parquet"))
    start = load_sweep("tiny", root, untrained=True)
    assert list(start["point_id"]) == list(table["point_id"]) and not start["fvu"].equals(table["fvu"])
    with pytest.raises(UserError, match="there are: tiny"):
        load_sweep("tini", root)


@pytest.mark.parametrize("architecture", ["relu", "topk"])
def test_an_sae_reconstructs_its_toys_activations_as_well_as_was_measured(root: Path, architecture: str) -> None:
    table = load_sweep("tiny", root)
    row = table[table["architecture"] == architecture].iloc[0]
    sae, toy = load_sae(row["point_id"], root), load_toy(row["point_id"], root)
    assert sae.point.sae.width == row["width"] == len(sae.latents) == len(sae.W_enc) == len(sae.b_enc)
    assert sae.metrics["fvu"] == row["fvu"]
    # Every input, weighted as declared: each maximum equally likely.
    sequences = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    maxima = sequences.amax(1)
    weight = 1 / (5 * torch.bincount(maxima)[maxima].double())
    acts = toy.activations(sequences, sae.point.site.name)
    codes = sae.encode(acts)
    assert codes.shape == (25, sae.point.sae.width)
    error, spread = sae.decode(codes) - acts, acts - (weight @ acts.double())
    fvu = (weight @ error.square().sum(1).double()) / (weight @ spread.square().sum(1))
    assert float(fvu) == pytest.approx(row["fvu"], rel=1e-4)
    assert row["point_id"] in repr(sae)


def test_figures_are_drawn_from_a_table_or_a_part_of_it(root: Path) -> None:
    df, start = load_sweep("tiny", root), load_sweep("tiny", root, untrained=True)
    whole, part = sae_sweep.plot_front(df), sae_sweep.plot_front(df[df["architecture"] == "relu"])
    assert len(whole.data) > len(part.data) > 0
    for drawn in (sae_sweep.plot_split_counts(df), sae_sweep.plot_phases(df)):
        assert drawn.data and drawn.layout.title.text
    for draw in (sae_sweep.plot_labels, sae_sweep.plot_information):
        assert draw(df, start).data


def test_stitching_finds_a_latent_in_another_sae(root: Path) -> None:
    table = load_sweep("tiny", root)
    one, other = (load_sae(id, root) for id in table["point_id"][:2])
    assert one.stitching(one).numpy() == pytest.approx(np.ones(len(one.W_dec)))
    a, b = one.W_dec.double().numpy(), other.W_dec.double().numpy()
    cosine = a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    assert one.stitching(other).numpy() == pytest.approx(cosine.max(1))
    assert one.stitching(other).shape == (one.point.sae.width,)


def test_an_sae_of_another_library_is_loaded_by_its_path(root: Path, tmp_path: Path) -> None:
    layout = DICTIONARY_LEARNING["AutoEncoderTopK"]
    folder = layout.write(tmp_path)
    for path in (folder, str(folder), folder / "ae.pt"):
        sae = load_sae(path)
        assert torch.allclose(sae.encode(X), layout.codes(X), atol=1e-5)
    assert "AutoEncoderTopK" in repr(sae)
    trained = load_sae(load_sweep("tiny", root)["point_id"][0], root)
    assert load_sae(root / "points" / trained.id).W_dec.allclose(trained.W_dec, atol=1e-6)
    with pytest.raises(UserError, match="activations of different length"):
        trained.stitching(sae)


def test_ids_are_found_by_how_they_begin(root: Path) -> None:
    table = load_sweep("tiny", root)
    id = table["point_id"][0]
    assert load_sae(id[:10], root).id == id
    toys = {load_toy(id, root).toy.seed for id in table["point_id"]}
    assert toys == set(table["toy_seed"]) == {0, 1}
    for each in (root / "toys").iterdir():
        assert load_toy(each.name, root).toy.seed in toys
    with pytest.raises(UserError, match="there is no finished point 'zz'"):
        load_sae("zz", root)
    with pytest.raises(UserError, match="there is no finished toy 'zz'"):
        load_toy("zz", root)
    with pytest.raises(UserError, match="holds none yet"):
        load_sae(id, root / "elsewhere")
    with pytest.raises(UserError, match="there is no finished point ''"):
        load_sae("", root)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "[16/16] done" in said
    (*_, answer) = (cell for cell in notebook.cells if cell.cell_type == "code")
    rebuilt, maxima = eval(answer.outputs[0]["data"]["text/plain"])
    assert rebuilt == maxima


def test_a_sweep_is_run_planned_and_compared_from_python(tmp_path: Path) -> None:
    tiny = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in TINY)}
    asked = {**tiny, "penalty.coefficient": 1, "name": "called", "output_dir": tmp_path}
    assert len(sae_sweep.plan(asked).packs) == 1
    results = sae_sweep.run(asked)
    pd.testing.assert_frame_equal(results.frame, load_sweep("called", tmp_path))
    assert repr(results) == "Results(called: 1 points, 0 claims)" and results.verdicts.empty
    assert results.front().data and results.report(tmp_path / "page.html").is_file()
    assert not sae_sweep.plan(asked).packs
    again = sae_sweep.run({**asked, "name": "again"})
    both = sae_sweep.compare("called", "again", output_dir=tmp_path)
    assert both["sweep"].tolist() == ["called", "again"] and both["fvu"].nunique() == 1
    assert again.failed == 0
    with pytest.raises(UserError, match=r"did you mean 'sae\.width'"):
        sae_sweep.run(sae__widht=3)
    with pytest.raises(UserError, match="sae-sweep submit"):
        sae_sweep.run(launcher="slurm")
