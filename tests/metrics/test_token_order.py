"""What latents tell of the order of tokens: codes that know it, and codes that know all but it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import LookUp
from test_planted_saes import inputs_of, perfect

from sae_sweep.config.columns import shuffled, spread
from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.evaluation_batches import blocks
from sae_sweep.metrics.extra import token_order as module
from sae_sweep.metrics.extra.token_order import TOLD, token_order

EVALUATION = Evaluation(permutations=10, order=True)
INPUTS = inputs_of(6, 3, EVALUATION)


def test_a_latent_for_every_cell_knows_nothing_of_the_order_within_it() -> None:
    found = token_order(perfect(INPUTS, "mqnc"), INPUTS, EVALUATION)
    assert set(found) == {of(name) for name in TOLD for of in (str, shuffled, spread)}
    assert found["unique_order"] == pytest.approx(0, abs=1e-9)
    # The cell says whether the query is the maximum, and how many copies there are: little, as most cells are of few
    # inputs, of which a permutation seems to know as much.
    assert 0.05 < found["info_order"] < 0.95


def test_a_latent_for_each_place_of_the_maximum_knows_the_order_of_two_tokens() -> None:
    """Which of the first two tokens is the maximum, where one is."""
    sae = perfect(INPUTS, "m")
    inputs = torch.cat([chunk.inputs for chunk in INPUTS])
    maximum = inputs.max(1, keepdim=True).values
    place = ((inputs == maximum) * torch.tensor([1, 2, 4])).sum(1)
    code = torch.eye(6 * 8)[(maximum[:, 0] * 8 + place)]
    told = token_order(LookUp(sae.x, code, torch.ones(48, 8), sae.b_dec), INPUTS, EVALUATION)
    # Where the runner-up stands is left to tell, and in cells of two inputs a permutation seems to know as much.
    assert told["unique_order"] > 5 * told["shuffled_unique_order_sd"] > 0
    assert told["unique_order"] > 0.1 and told["info_order"] > 0.1


def test_the_numbers_of_orders_are_those_of_the_positions() -> None:
    (block,) = blocks(INPUTS, 1 << 11)
    keys = module._keys(block, INPUTS.cells)
    for tokens, key, cell in zip(block.inputs.tolist(), keys.tolist(), block.cell.tolist(), strict=True):
        m, below = max(tokens), [token for token in tokens if token < max(tokens)]
        n = max(below, default=None)
        standing = [2 if token == m else 1 if token == n else 0 for token in tokens]
        assert key == cell * 27 + standing[0] + 3 * standing[1] + 9 * standing[2]


def test_only_where_it_is_asked_for() -> None:
    sae, penalty = perfect(INPUTS, "mq"), lambda norms: norms.sum(1)
    assert set(TOLD) <= set(measure(sae, INPUTS, penalty, EVALUATION).metrics)
    assert not set(TOLD) & set(measure(sae, INPUTS, penalty, Evaluation(permutations=2)).metrics)
    assert np.isfinite([measure(sae, INPUTS, penalty, EVALUATION).metrics[name] for name in TOLD]).all()
