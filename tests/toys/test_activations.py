"""Activations of one's own: files of each kind, factors, and a sweep over a table whose classes are known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commandline import call
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from sae_sweep.config.overrides import load
from sae_sweep.config.settings import Distribution, Evaluation
from sae_sweep.errors import UserError
from sae_sweep.toys import model
from sae_sweep.toys.activations import Activations
from sae_sweep.toys.factors import cells_of, read_factors
from sae_sweep.toys.rows import open_rows
from sae_sweep.toys.sampling import EvaluationInputs, Stream

# Four letters in two casings, 8 rows of each: a direction for each letter, and a weaker one for each pair.
LETTERS, CASINGS, COPIES = 4, 2, 8
ROWS = LETTERS * CASINGS * COPIES


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    letter, casing = np.divmod(np.arange(ROWS) // COPIES, CASINGS)
    noise = np.random.default_rng(0).normal(size=(ROWS, 16)) * 0.01
    acts = 2 * np.eye(16)[letter] + np.eye(16)[LETTERS + letter * CASINGS + casing] + noise
    np.save("acts.npy", acts.astype(np.float32))
    names = {"letter": np.array(list("abcd"))[letter], "casing": np.array(["lower", "upper"])[casing]}
    pd.DataFrame(names).to_csv("factors.csv", index=False)
    return tmp_path


def test_every_kind_of_file_holds_the_same_rows(here: Path) -> None:
    acts = np.load("acts.npy")
    np.savez("acts.npz", acts=acts)
    save_file({"acts": acts}, "acts.safetensors")
    save_tensors({"acts": torch.from_numpy(acts).bfloat16()}, "half.safetensors")
    pd.DataFrame(acts, columns=[f"d{i}" for i in range(16)]).to_parquet("acts.parquet")
    for name in ("acts.npy", "acts.npz", "acts.safetensors", "acts.parquet"):
        rows = open_rows(Path(name))
        assert torch.equal(rows.read(np.array([3, 0, 3])), torch.from_numpy(acts[[3, 0, 3]])), name
    assert isinstance(open_rows(Path("acts.safetensors")).numbers, np.memmap)
    assert torch.equal(
        open_rows(Path("half.safetensors")).read(slice(0, 2)), torch.from_numpy(acts[:2]).bfloat16().float()
    )


def test_cells_are_what_differs_in_some_factor(here: Path) -> None:
    factors = read_factors(Path("factors.csv"), None)
    assert factors.names == ("letter", "casing") and factors.values == (("a", "b", "c", "d"), ("lower", "upper"))
    cells, of_row = cells_of(factors, "x")
    assert (cells.count, cells.d_vocab) == (8, 4) and np.bincount(of_row).tolist() == [COPIES] * 8
    assert [cells.partition(name).count for name in ("m", "q", "mq", "n", "c")] == [4, 2, 8, 1, 1]


def test_rows_are_enumerated_or_drawn_by_their_weights(here: Path) -> None:
    table = pd.read_csv("factors.csv")
    table["often"] = np.where(table["letter"] == "a", 3.0, 1.0)
    table.to_csv("factors.csv", index=False)
    words = ["toy=activations", "toy.file=acts.npy", "toy.factors=factors.csv", "toy.weights=often"]
    toy = load([*words, "penalty.coefficient=1"]).points[0].toy
    loaded = model.load(toy, model.train([toy], "cpu")[0])
    assert loaded.chance.tolist() == pytest.approx([0.25] * 2 + [1 / 12] * 6)
    (listed, _, weight), *more = loaded.weighted(ROWS)
    assert not more and listed.tolist() == list(range(ROWS)) and float(weight.sum()) == pytest.approx(1)
    assert loaded.inputs_of_cells(ROWS).tolist() == [COPIES] * 8
    drawn = loaded.draw(6000, torch.Generator().manual_seed(0))
    assert np.bincount(loaded.cell(drawn), minlength=8) / 6000 == pytest.approx(loaded.chance, abs=0.03)
    # Fewer than there are: drawn, the same at every pass.
    again = [next(loaded.weighted(32))[0] for _ in range(2)]
    assert torch.equal(*again) and len(again[0]) == loaded.count(32) == 32


def test_a_sweep_finds_the_letters_and_the_pairs(here: Path) -> None:
    words = ["toy=activations", "toy.file=acts.npy", "toy.factors=factors.csv", "penalty=l1", "sae.init=oracle"]
    words += ["penalty.coefficient=0.01", "training.steps=40", "training.batch_size=64", "logger=none", "name=own"]
    words += ["sae.width=${cells:mq}", "sae.partition=mq"]
    sweep = load(words)
    toy = sweep.points[0].toy
    assert (toy.names, toy.rows, toy.d_model, toy.maxima, sweep.points[0].sae.width) == (
        "letter, casing",
        ROWS,
        16,
        4,
        8,
    )
    end = call("run", *words)
    assert end.code == 0, end.err
    row = pd.read_parquet("outputs/sweeps/own/results.parquet").iloc[0]
    assert (row["label_mq"], row["live_latents"], row["fvu"] < 0.2) == (8, 8, True)
    # The same files elsewhere are the same toy; other numbers are another.
    (here / "moved").mkdir()
    for name in ("acts.npy", "factors.csv"):
        (here / "moved" / name).write_bytes((here / name).read_bytes())
    moved = ["toy.file=moved/acts.npy", "toy.factors=moved/factors.csv"]
    assert load([words[0], *moved, *words[3:]]).points[0].id == sweep.points[0].id
    np.save("moved/acts.npy", np.load("acts.npy") + 1)
    assert load([words[0], *moved, *words[3:]]).points[0].id != sweep.points[0].id


OWN = ["toy=activations", "toy.file=acts.npy", "toy.factors=factors.csv", "penalty=l1", "penalty.coefficient=0.01"]


def loaded(*words: str) -> Activations:
    toy = load([*OWN, *words]).points[0].toy
    return model.load(toy, model.train([toy], "cpu")[0])  # type: ignore[return-value]


@pytest.mark.parametrize("way", ["column", "share"])
def test_what_is_held_out_is_measured_on_and_never_trained_on(here: Path, way: str) -> None:
    table = pd.read_csv("factors.csv")
    table["late"] = np.arange(ROWS) % COPIES >= 6
    if way == "column":
        table.to_csv("factors.csv", index=False)
    words = ["toy.held_out=late" if way == "column" else "toy.held_out=0.25"]
    own = loaded(*words)
    held = own.params["held_out"].numpy()
    assert held.sum() == ROWS / 4 and own.toy.names == "letter, casing"
    stream = Stream(own, "pre_unembed", Distribution("uniform"), 0, 64, "cpu")
    trained, measured = (each(Distribution("uniform"), "cpu") for each in (own.population, own.measured_population))
    drawn = trained.draw(500, torch.Generator().manual_seed(0))
    assert not held[drawn].any() and len(drawn.unique()) == trained.total == ROWS * 3 / 4
    (listed, _, weight), *_ = measured.weighted(ROWS)
    assert listed.tolist() == np.flatnonzero(held).tolist() and float(weight.sum()) == pytest.approx(1)
    assert measured.inputs_of_cells(ROWS).sum() == measured.count(ROWS) == measured.total == ROWS / 4
    # Centre and scale are those of what is trained on.
    assert torch.allclose(stream.mean, own.activations(torch.from_numpy(np.flatnonzero(~held)), "").mean(0), atol=1e-6)
    inputs = EvaluationInputs(own, "pre_unembed", Distribution("uniform"), stream.mean, stream.scale, Evaluation())
    assert inputs.exact and torch.equal(torch.cat([chunk.inputs for chunk in inputs]), listed)


def test_a_share_is_another_with_another_seed_and_the_same_from_a_file(here: Path) -> None:
    first, again, other = (loaded("toy.held_out=0.5", f"toy.seed={seed}").params["held_out"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    Path("mine.yaml").write_text("# @package _global_\ntoy: {held_out: 0.5}\n")
    assert torch.equal(loaded("experiment=./mine.yaml").params["held_out"], first)
    assert loaded("toy.held_out=null").toy == loaded().toy


@pytest.mark.parametrize(
    ("value", "message"),
    [("caseing", "did you mean 'casing'"), ("1.5", "must lie between 0 and 1"), ("casing", "must be true or false")],
)
def test_what_cannot_hold_out_is_one_line(here: Path, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(f"toy.held_out={value}")


def readout(**changes: np.ndarray | None) -> None:
    """An output for each letter, right on all rows but those of the last letter, whose targets are the first."""
    letter = np.arange(ROWS) // (COPIES * CASINGS)
    found = {"W_U": 4 * np.eye(16)[:, :LETTERS], "b_U": np.zeros(LETTERS), "targets": letter % (LETTERS - 1)}
    np.savez("readout.npz", **{name: each for name, each in (found | changes).items() if each is not None})


@pytest.mark.slow
def test_a_read_out_gives_kl_loss_recovered_and_accuracy(here: Path) -> None:
    words = [*OWN, "toy.readout=readout.npz", "sae.init=oracle", "sae.partition=m", "sae.width=4", "training.steps=1"]
    words += ["training.batch_size=32", "logger=none"]
    found = {}
    for name, changes in {"whole": {}, "no targets": {"targets": None}}.items():
        readout(**changes)
        end = call("run", *words, f"name={name.replace(' ', '_')}")
        assert end.code == 0, end.err
        assert ("answers 75% of its inputs right" in end.err) == (name == "whole") and "warning" not in end.err
        found[name] = pd.read_parquet(f"outputs/sweeps/{name.replace(' ', '_')}/results.parquet").iloc[0]
    assert found["whole"]["toy_accuracy"] == pytest.approx(0.75) and pd.isna(found["no targets"]["toy_accuracy"])
    # Letters alone are what the read-out reads.
    assert found["whole"]["loss_recovered"] > 0.9 and pd.isna(found["no targets"]["loss_recovered"])
    assert 0 < found["whole"]["kl"] < 0.1 and found["whole"]["kl"] == pytest.approx(found["no targets"]["kl"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_U": np.zeros((15, 4))}, r"W_U is \[15, 4\], wanted \[16, outputs\]"),
        ({"W_U": np.full((16, 4), np.nan)}, "W_U holds nan or infinity"),
        ({"b_U": np.zeros(3)}, r"b_U is \[3\], wanted \[4\]"),
        ({"targets": np.full(ROWS, 4)}, "targets must be outputs, from 0 to 3"),
        ({"targets": np.zeros(3, int)}, "there are 3 targets and 64 rows"),
        ({"targets": np.zeros(ROWS)}, "wanted .N. whole numbers"),
        ({"W_U": None}, "holds b_U, targets, wanted W_U"),
        ({"W_E": np.zeros(3)}, "wanted W_U and"),
    ],
)
def test_a_read_out_that_cannot_be_meant_is_one_line(
    here: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    readout(**changes)
    with pytest.raises(UserError, match=message) as caught:
        loaded("toy.readout=readout.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("letter\na\nb\n", "has 2 rows"),
        ("letter\n" + "a\n" * ROWS, "letter is a in every row"),
        ("letter,casing\n" + "a,x\n" * (ROWS - 1) + "b,\n", "row 63 has no casing"),
        ("a,b,c,d,e\n" + "1,2,3,4,5\n" * ROWS, "wanted one to four"),
    ],
)
def test_factors_that_cannot_be_meant_are_one_line(here: Path, table: str, message: str) -> None:
    Path("factors.csv").write_text(table)
    with pytest.raises(UserError) as caught:
        load(["toy=activations", "toy.file=acts.npy", "toy.factors=factors.csv"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_meant_is_one_line(here: Path) -> None:
    acts = np.load("acts.npy")
    acts[5, 3] = np.nan
    np.save("acts.npy", acts)
    words = ["toy=activations", "toy.factors=factors.csv", "penalty.coefficient=1", "logger=none"]
    end = call("run", *words, "toy.file=acts.npy")
    assert end.code == 2 and "row 5 holds nan or infinity" in end.err
    Path("acts.txt").write_text("1 2")
    for file, message in (("acts.txt", "must end in"), ("missing.npy", "No such file"), ("factors.csv", "must end in")):
        with pytest.raises(UserError, match=message):
            load([*words, f"toy.file={file}"])
    with pytest.raises(UserError, match=r"needs toy\.file"):
        load(words)
