"""The table of levels against sums by hand, and however inputs are divided."""

from __future__ import annotations

import numpy as np
import torch

from sae_sweep.metrics.code_levels import PLACES, STEP, CodeLevels
from sae_sweep.metrics.sparse_codes import Active


def filled(codes: torch.Tensor, weight: np.ndarray, batch: int) -> CodeLevels:
    levels = CodeLevels()
    for begin in range(0, len(codes), batch):
        part = slice(begin, begin + batch)
        levels.add(Active.of(codes[part]), weight[part])
    return levels


def test_weights_by_latent_and_level() -> None:
    codes = STEP * torch.tensor([[2.0, 0, 0.4], [2.4, 5, 0], [1.0, 0, 0], [0, 0, 0]])
    latents, weights = filled(codes, np.array([0.1, 0.2, 0.3, 0.4]), 2).table
    assert latents.tolist() == [0, 0, 1]
    np.testing.assert_allclose(weights, [0.3, 0.1 + 0.2, 0.2])  # of levels 1 and 2 of latent 0, and 5 of latent 1


def test_a_table_that_grows_is_the_same_however_inputs_are_divided() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = 20 * torch.rand(600, 40, generator=generator) * (torch.rand(600, 40, generator=generator) < 0.3)
    weight = np.random.default_rng(0).random(600)
    rows, latents = (each.numpy() for each in codes.nonzero(as_tuple=True))
    level = np.rint(codes[rows, latents].double().numpy() / STEP).astype(np.int64)
    pairs, of = np.unique((latents * 1000 + level)[level > 0], return_inverse=True)
    assert len(pairs) > PLACES
    whole = filled(codes, weight, 600).table
    assert np.array_equal(whole[0], pairs // 1000)
    np.testing.assert_allclose(whole[1], np.bincount(of, weight[rows[level > 0]]), rtol=1e-12)
    for batch in (1, 7):
        assert all(map(np.array_equal, filled(codes, weight, batch).table, whole))


def test_what_is_not_a_number_is_seen() -> None:
    levels = filled(torch.tensor([[1.0], [torch.nan], [1.0]]), np.ones(3), 1)
    assert not levels.finite
