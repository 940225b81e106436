"""Planted SAEs whose every count is known: max-of-3 over 6 tokens, pre-unembed, stratified by the maximum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from planted import LookUp, untrained

from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics.evaluate import measure
from sae_sweep.toys.sampling import EvaluationInputs, Stream

EVALUATION = Evaluation()


def inputs_of(d_vocab: int, k: int, evaluation: Evaluation = EVALUATION) -> EvaluationInputs:
    """All inputs of an untrained toy, stratified by the maximum."""
    toy, distribution = Toy(d_vocab=d_vocab, k=k, d_model=8, d_head=8), Distribution("max_stratified")
    stream = Stream(untrained(toy), "pre_unembed", distribution, 0, 64, "cpu")
    return EvaluationInputs(stream.model, "pre_unembed", distribution, stream.mean, stream.scale, evaluation)


def perfect(inputs: EvaluationInputs, partition: str) -> LookUp:
    """One latent for each class of a partition, on for all of it; decoder rows are the means of the classes."""
    chunks = list(inputs)
    x, cell, weight = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("x", "cell", "weight"))
    assert inputs.cells is not None
    classes = inputs.cells.partition(partition)
    member = torch.nn.functional.one_hot(torch.from_numpy(classes.of_cell)[cell], classes.count).double()
    means = (member * weight[:, None]).T @ x.double() / (member.T @ weight)[:, None].clamp_min(1e-300)
    return LookUp(x, member.float(), means.float(), torch.zeros(x.shape[1]))


def metrics_of(inputs: EvaluationInputs, sae: LookUp, evaluation: Evaluation = EVALUATION) -> dict[str, Any]:
    """All columns of an SAE."""
    return measure(sae, inputs, lambda norms: norms.sum(1), evaluation).metrics


SMALL = inputs_of(6, 3)


def test_one_latent_for_each_maximum() -> None:
    found = metrics_of(SMALL, perfect(SMALL, "m"))
    assert (found["live_latents"], found["owned_maxes"], found["label_m"]) == (6, 6, 6)
    assert found["l0"] == pytest.approx(1)
    assert found["winner_entropy"] == pytest.approx(math.log(6))
    for factor in ("query", "runner_up", "copies"):
        assert found[f"info_{factor}"] == pytest.approx(0, abs=1e-9)
    assert found["owned_share"] == 1 and found["splits_share"] == 0


def test_each_of_them_twice() -> None:
    sae = perfect(SMALL, "m")
    sae.codes, sae.W_dec = sae.codes.repeat(1, 2), sae.W_dec.repeat(2, 1) / 2
    found = metrics_of(SMALL, sae)
    assert found["duplicates_per_max"] == 1
    assert found["cofiring"] == pytest.approx(6 / 11)
    assert (found["owned_maxes"], found["splits_per_max"], found["split_maxes"]) == (6, 0, 0)


def test_one_for_each_maximum_and_query() -> None:
    """Of 21 classes, (0, 0) is all of maximum 0. (5, 5) is all of query 5 too, but no other latent has such a name."""
    found = metrics_of(SMALL, perfect(SMALL, "mq"))
    assert (found["live_latents"], found["label_mq"], found["label_m"]) == (21, 20, 1)
    assert found["distinct_splits_per_max"] == found["splits_per_max"] == pytest.approx(10 / 3)
    assert found["split_maxes"] == 5
    assert found["pure_mq"] == 21 and found["found_mq"] == 1


def test_one_for_each_query() -> None:
    """Query 5 owns maximum 5; its latent is named as the other queries' are."""
    found = metrics_of(SMALL, perfect(SMALL, "q"))
    assert (found["owned_maxes"], found["splits_per_max"], found["label_q"]) == (1, 0, 6)
    assert found["unique_query"] == pytest.approx(1)
    assert found["pure_q"] == 6 and found["found_q"] == 1


def test_all_off() -> None:
    sae = perfect(SMALL, "mq")
    sae.codes = torch.zeros_like(sae.codes)
    found = metrics_of(SMALL, sae)
    assert found["fvu"] == pytest.approx(1) and found["l0"] == 0
    assert (found["dead_latents"], found["live_latents"]) == (21, 0)
    assert found["shuffled_pure_mq"] == found["shuffled_owned_maxes"] == 0


def test_a_latent_for_every_cell_scores_its_ceiling() -> None:
    """At (16, 3) all 1,056 cells have an input; the latent of maximum 0, a single input, is no split."""
    inputs = inputs_of(16, 3)
    found = metrics_of(inputs, perfect(inputs, "mqnc"))
    assert found["live_latents"] == found["countable_mqnc"] == 1056
    assert found["distinct_splits_per_max"] == found["distinct_splits_ceiling"] == 1055 / 16
    assert found["splits_share"] == found["distinct_splits_share"] == found["owned_share"] == 1
    # Where one more copy of the maximum adds one input to 26 or more, naming the copies gains too little.
    assert (found["label_mqnc"], found["label_mqn"], found["label_m"]) == (1049, 6, 1)
    assert found["found_mqnc"] == 1 and found["below_cell"] == 0


def test_parts_of_cells_are_pure_and_have_no_label() -> None:
    """Each input of maximum 5 and query 0 has a latent of its own: no label, but pure, and below the cells."""
    sae = perfect(SMALL, "mq")
    cells = torch.cat([chunk.cell for chunk in SMALL]).numpy()
    assert SMALL.cells is not None
    factors = SMALL.cells.factors
    inputs = np.flatnonzero((factors["m"][cells] == 5) & (factors["q"][cells] == 0))
    sae.codes = torch.eye(len(cells))[:, torch.from_numpy(inputs)]
    sae.W_dec = torch.ones(len(inputs), 8)
    found = metrics_of(SMALL, sae)
    assert found["live_latents"] == found["pure_mq"] == found["pure_mqnc"] == len(inputs) == 11
    assert found["found_mq"] == pytest.approx(1 / 21)
    assert found["label_mq"] == found["label_mqn"] == 0
    # Only the cell (5, 0, none..., 2): both orders of (5, 5, 0) are one input.
    sizes = SMALL.cells.sizes[cells[inputs]]
    assert found["below_cell"] == int((sizes > 2).sum())
