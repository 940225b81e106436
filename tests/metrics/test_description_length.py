"""Bits of codes whose entropy is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sae_sweep.metrics.code_levels import STEP, CodeLevels
from sae_sweep.metrics.description_length import bits
from sae_sweep.metrics.sparse_codes import Active


def bits_of(codes: list[list[float]], weight: list[float] | None = None) -> float:
    levels, weights = CodeLevels(), np.array(weight or [1.0] * len(codes))
    levels.add(Active.of(torch.tensor(codes)), weights)
    return bits(*levels.table, weights.sum())


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[1.0, 0], [0, 1], [1, 1], [0, 0]], 2),  # each latent fires on half: one bit each
        ([[1.0, 1], [1, 1], [1, 1], [1, 1]], 0),  # nothing to say
        ([[0.0, 0], [0, 0], [0, 0], [0, 0]], 0),
        ([[1.0], [2], [3], [0]], 2),  # four levels alike
        ([[1e7], [2e7], [3e7], [0]], 2),  # the same, far apart
        ([[1.0], [1 + STEP / 4], [0], [0]], 1),  # a difference below the step is rounded away
        ([[STEP / 4], [0], [0], [0]], 0),  # and so is a contribution
        ([[1.0], [0], [0], [0]], -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)),
    ],
)
def test_bits_of_an_input(codes: list[list[float]], expected: float) -> None:
    assert bits_of(codes) == pytest.approx(expected, abs=1e-12)


def test_inputs_count_by_their_weight() -> None:
    assert bits_of([[1.0], [2], [0]], [0.1, 0.1, 0.2]) == pytest.approx(1.5)  # shares of 1/4, 1/4 and 1/2


def test_one_of_eight_at_a_time() -> None:
    assert bits_of(torch.eye(8).tolist()) == pytest.approx(4.349, abs=1e-3)
