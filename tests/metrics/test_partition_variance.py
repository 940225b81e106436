"""`variance`: the shares between classes are those of a sum over the inputs one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import TINY, call

from sae_sweep.config.settings import PARTITIONS, Distribution, Evaluation, Toy
from sae_sweep.metrics.partition_variance import classes_of
from sae_sweep.toys.max_of_k import MaxOfK, train
from sae_sweep.toys.sampling import EvaluationInputs

TOY = Toy(d_vocab=7, k=3, d_model=5, d_head=5, steps=3)


def inputs_of(distribution: str, limit: int) -> EvaluationInputs:
    """Activations neither centred nor scaled: the shares must not depend on it."""
    model = MaxOfK(TOY, train([TOY], "cpu")[0])
    weights = Distribution(distribution)
    return EvaluationInputs(model, "pre_unembed", weights, torch.ones(5), 3.0, Evaluation(inputs=limit))


@pytest.mark.parametrize("distribution", ["uniform", "cell_stratified"])
def test_shares_are_those_of_the_inputs_one_by_one(distribution: str) -> None:
    inputs = inputs_of(distribution, 7**3)
    chunks = list(inputs)
    x = torch.cat([chunk.x for chunk in chunks]).double().numpy()
    cell, weight = (torch.cat([getattr(chunk, name) for chunk in chunks]).numpy() for name in ("cell", "weight"))
    centre = np.average(x, axis=0, weights=weight)
    total = np.average(((x - centre) ** 2).sum(1), weights=weight)
    shares = {name: classes.r2 for name, classes in classes_of(inputs).items()}
    assert list(shares) == list(PARTITIONS)
    for name, share in shares.items():
        of_input = inputs.cells.partition(name).of_cell[cell]
        between = sum(
            weight[of_input == i].sum()
            * ((np.average(x[of_input == i], axis=0, weights=weight[of_input == i]) - centre) ** 2).sum()
            for i in np.unique(of_input)
        )
        assert share == pytest.approx(between / weight.sum() / total, rel=1e-9), name
    assert 0 < shares["c"] < shares["mc"] < shares["mqc"] < shares["mqnc"] <= 1


def test_a_sample_says_nothing_of_classes_it_hardly_holds() -> None:
    found = classes_of(inputs_of("uniform", 7**3 - 1))
    assert found["c"] is not None
    assert found["m"] is None and found["mqnc"] is None


@pytest.mark.slow
def test_variance_of_several_toys_and_sites(tmp_path: Path) -> None:
    words = [*(word for word in TINY if word.startswith("toy")), f"output_dir={tmp_path}", "device=cpu"]
    words += ["site=pre_unembed,post_unembed", "toy.seed=0,1"]
    said = json.loads(call("variance", *words, "--json").out)
    assert [(row["site"], row["toy_seed"]) for row in said["rows"]] == [
        (site, seed) for site in ("pre_unembed", "post_unembed") for seed in (0, 1)
    ]
    shown = call("variance", *words).out
    mean = (said["rows"][0]["r2"]["mq"] + said["rows"][1]["r2"]["mq"]) / 2
    assert f"{mean:.4f}" in shown
    words[-1] = "toy.seed=0"
    row = json.loads(
        call("variance", *words, "penalty=l1,lp", "penalty.p=0.3", "penalty.coefficient=0.5", "--json").out
    )
    costs = row["rows"][0]["least_loss"]
    assert list(costs) == ["l1 0.5", "lp p=0.3 0.5"]
    # Finer classes cost no more: what they share they may share.
    assert all(cost["mqnc"] <= cost["mq"] <= cost["m"] for cost in costs.values())
    assert "no partitions" in call("variance", "toy=parents", f"output_dir={tmp_path}").err
