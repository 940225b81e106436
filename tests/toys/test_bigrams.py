"""Tokens in context: what is learnt against the tables it is learnt from, and a run from command to table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commandline import call

from sae_sweep.config.settings import Point, Site, Toy, canonical
from sae_sweep.toys import model
from sae_sweep.toys.bigrams import WORDS, Bigrams, draw, tables

TOY = Toy("bigrams", d_vocab=6, k=3, d_model=16, d_head=8, contexts=3, steps=800, batch_size=64, lr=1e-2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes a second thread is all waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(_one_thread: None) -> Bigrams:
    found = model.load(TOY, model.train([TOY], "cpu")[0])
    assert isinstance(found, Bigrams)
    return found


@pytest.mark.parametrize("contrast", [0.0, 0.2, 1.0])
def test_tables_correlate_as_asked(contrast: float) -> None:
    table = tables(Toy("bigrams", d_vocab=60, contexts=3, contrast=contrast))
    assert table.sum(-1).numpy() == pytest.approx(np.ones((3, 60)), abs=1e-5)
    logits = table.log()
    logits = (logits - logits.mean(-1, keepdim=True)).flatten(1)
    correlation = np.corrcoef(logits.numpy())
    assert correlation[np.triu_indices(3, 1)] == pytest.approx(np.full(3, 1 - contrast), abs=0.05)


def test_inputs_say_their_context_and_token(trained: Bigrams) -> None:
    inputs = draw(TOY, 20_000, torch.Generator().manual_seed(0))
    context = (inputs[:, :-1] - TOY.d_vocab) // WORDS
    assert (context == context[:, :1]).all() and inputs[:, -1].max() < TOY.d_vocab
    cells = trained.cells.factors
    cell = trained.cell(inputs).numpy()
    assert np.array_equal(cells["m"][cell], inputs[:, -1]) and np.array_equal(cells["q"][cell], context[:, 0])
    assert np.bincount(cell) / 20_000 == pytest.approx(trained.chance, abs=0.01)
    expected = tables(TOY)[context[:, 0], inputs[:, -1]]
    assert torch.equal(trained.truth(inputs), expected)
    for partition in ("m", "q", "mq"):
        assert trained.cells.partition(partition).count == TOY.kind.classes(partition, TOY)


def test_each_context_has_its_own_bigrams(trained: Bigrams) -> None:
    inputs = draw(TOY, 5_000, torch.Generator().manual_seed(1))
    truth = trained.truth(inputs).double()
    log_q = trained.logits(trained.activations(inputs, "pre_unembed"), "pre_unembed").double().log_softmax(-1)
    divergence = (truth * (truth.log() - log_q)).sum(1).mean().item()
    # What a model that does not see the context would be left with.
    blind = torch.stack([truth[inputs[:, -1] == token].mean(0) for token in range(TOY.d_vocab)])[inputs[:, -1]]
    assert divergence < 0.2 * (truth * (truth.log() - blind.log())).sum(1).mean().item()
    post = trained.activations(inputs, "post_unembed")
    assert post.double().log_softmax(-1).numpy() == pytest.approx(log_q.numpy(), abs=1e-5)


def test_settings_that_count() -> None:
    point = canonical(Point(TOY, Site("post_unembed")))
    assert (point.site.name, point.distribution.name, point.toy.title) == ("post_unembed", "uniform", "bigrams-6-3")


@pytest.mark.slow
def test_from_command_to_table(tmp_path: Path) -> None:
    words = ["toy=bigrams", "toy.d_vocab=5", "toy.contexts=2", "toy.steps=200", "toy.d_model=8", "sae.width=10"]
    words += ["site=pre_unembed,post_unembed", "sae.init=oracle", "sae.partition=mq", "penalty.coefficient=0.05"]
    words += ["training.steps=30", "training.batch_size=64", "evaluation.inputs=3000", "logger=none", "name=b"]
    end = call("run", "--json", *words, f"output_dir={tmp_path}")
    assert end.code == 0, end.err
    assert json.loads(end.out)["failed"] == 0
    table = pd.read_parquet(tmp_path / "sweeps" / "b" / "results.parquet")
    assert set(table["site"]) == {"pre_unembed", "post_unembed"} and table["distribution"].isna().all()
    measured = ["fvu", "kl", "loss_recovered", "owned_maxes", "info_query", "fvu_above_ceiling"]
    assert table[measured].notna().all(axis=None)
    assert table[["mcc", "info_runner_up"]].isna().all(axis=None)
    assert (table["loss_recovered"] > 0.5).all()
