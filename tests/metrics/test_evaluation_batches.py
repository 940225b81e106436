"""Blocks of evaluation inputs: every input once, its parts side by side, kept while they are few."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics import evaluation_batches
from sae_sweep.metrics.evaluation_batches import accuracy_of, blocks
from sae_sweep.toys import model
from sae_sweep.toys.max_of_k import shapes
from sae_sweep.toys.sampling import EvaluationInputs

SCALE = 3.0
SIZE = 50


def inputs_of(
    toy: Toy, distribution: str = "uniform", params: dict[str, torch.Tensor] | None = None
) -> EvaluationInputs:
    loaded = model.load(toy, params or model.train([toy], "cpu")[0])
    mean = torch.linspace(-1, 1, loaded.width("pre_unembed"))
    return EvaluationInputs(loaded, "pre_unembed", Distribution(distribution), mean, SCALE, Evaluation(inputs=343))


@pytest.fixture(scope="module")
def inputs() -> EvaluationInputs:
    """All 343 inputs of a toy of seven tokens."""
    return inputs_of(Toy(d_vocab=7, k=3, d_model=5, d_head=5, steps=3))


def test_a_block_is_a_part_of_the_inputs_in_the_order_of_their_cells(inputs: EvaluationInputs) -> None:
    (chunk,) = inputs
    made = list(blocks(inputs, SIZE))
    assert [len(block.x) for block in made] == [SIZE] * 6 + [43]
    for number, block in enumerate(made):
        of_chunk = range(number * SIZE, min((number + 1) * SIZE, 343))
        # Sorted by cell; those of one cell stay in their order.
        order = sorted(of_chunk, key=lambda row: int(chunk.cell[row]))
        for name in ("x", "cell", "weight", "inputs"):
            assert torch.equal(getattr(block, name), getattr(chunk, name)[order])
        assert torch.equal(block.maximum, block.inputs.amax(1))
        assert block.truth is not None and torch.equal(block.truth, block.maximum)
        logits = inputs.model.logits(block.x / SCALE + inputs.mean, "pre_unembed")
        assert logits is not None and block.logits is not None
        torch.testing.assert_close(block.logits, logits)


def test_a_part_of_a_block_is_the_same_rows_of_everything(inputs: EvaluationInputs) -> None:
    block = next(iter(blocks(inputs, SIZE)))
    for name, whole in vars(block).items():
        assert torch.equal(getattr(block.part(slice(3, 9)), name), whole[3:9])


def test_blocks_are_kept_up_to_the_numbers_that_they_hold(
    inputs: EvaluationInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every input its x, and the logit of each token."""
    assert blocks(inputs, SIZE) is blocks(inputs, SIZE)
    for numbers, kept in ((343 * (5 + 7), True), (343 * (5 + 7) - 1, False)):
        monkeypatch.setattr(evaluation_batches, "KEPT_NUMBERS", numbers)
        assert (blocks(inputs, SIZE) is blocks(inputs, SIZE)) == kept


@pytest.mark.parametrize("distribution", ["uniform", "max_stratified"])
def test_accuracy_is_the_share_of_inputs_whose_answer_has_the_largest_logit(distribution: str) -> None:
    toy = Toy(d_vocab=4, k=2, d_model=3, d_head=3)
    # The residual is the query's embedding and the logits its own: right where the query is the largest token.
    params = {name: torch.zeros(shape) for name, shape in shapes(toy).items()}
    angles = torch.arange(4) * torch.pi / 2
    params["W_E"] = torch.stack([angles.cos(), angles.sin(), angles * 0], 1)
    params["W_U"] = params["W_E"].T.contiguous()
    inputs = inputs_of(toy, distribution, params)
    # Of m, 2m + 1 pairs have it as their maximum, and m + 1 of them as their query.
    expected = 10 / 16 if distribution == "uniform" else sum((m + 1) / (2 * m + 1) for m in range(4)) / 4
    assert accuracy_of(inputs) == pytest.approx(expected)
    # Logits that are all alike answer nothing, though none is above that of the answer.
    assert accuracy_of(inputs_of(toy, distribution, {**params, "W_U": torch.zeros(3, 4)})) == 0


def test_a_toy_that_answers_with_chances_or_not_at_all_has_no_accuracy() -> None:
    for toy in (Toy(name="parents", features=4, d_model=5, modifiers=2), Toy(name="bigrams", d_vocab=4, steps=1)):
        assert accuracy_of(inputs_of(toy)) is None


@pytest.mark.parametrize("name", ["independent", "parents"])
def test_toys_without_an_output(name: str) -> None:
    found = inputs_of(Toy(name=name, features=4, d_model=5, modifiers=2))
    for block in blocks(found, SIZE):
        assert block.truth is None and block.logits is None
        assert block.part(slice(0, 2)).logits is None
        expected = torch.zeros_like(block.cell)
        if found.cells is not None:
            expected = torch.from_numpy(found.cells.factors["m"]).long()[block.cell]
        assert torch.equal(block.maximum, expected)
        assert (block.cell.diff() >= 0).all()
    assert all(len(one.x) == SIZE for one, _ in pairwise(blocks(found, SIZE)))
