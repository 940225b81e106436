"""Edges of a planted tree one by one: two children of one parent, of which one is absorbed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_dictionary import NO_BIAS, by_hand, inputs_of

from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.evaluate import measure

EDGES = Evaluation(inputs=4096, edges=True)


def test_each_edge_stands_beside_the_latent_of_its_child() -> None:
    inputs = inputs_of(rates="0.5, 0.1, 0.1", tree="0>1:0.3|2:0.4")
    rows = torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # the children's latents first, the parent's last
    encoder = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, -1, 0]])
    sae = by_hand(inputs, rows, encoder, [0, 0, -0.001], NO_BIAS)
    found = measure(sae, inputs, lambda norms: norms.sum(1), EDGES, nulls=False)
    assert found.metrics["edges_held"] == 2
    table = found.latents.set_index("latent")
    assert table["edge_parent"].tolist()[:2] == [0, 0] and table["edge_child"].tolist()[:2] == [1, 2]
    assert np.isnan(table["edge_child"][2])
    assert table["edge_absorption"].tolist()[:2] == [1, 0]
    assert table["edge_cosine"].tolist()[:2] == pytest.approx([0.5**0.5, 0], abs=1e-5)
    assert table["edge_hedging"].tolist()[:2] == pytest.approx([0, 0], abs=1e-5)
    # The columns that everybody has are their means.
    assert found.metrics["edge_absorption"] == 0.5
    assert found.metrics["edge_cosine"] == pytest.approx(0.5**0.5 / 2, abs=1e-5)


def test_a_toy_without_a_tree_has_none() -> None:
    inputs = inputs_of(rates="0.4")
    sae = by_hand(inputs, torch.eye(3), torch.eye(3), [0.0] * 3, NO_BIAS)
    found = measure(sae, inputs, lambda norms: norms.sum(1), EDGES, nulls=False)
    assert found.metrics["edges_held"] is None and found.latents["edge_child"].isna().all()
