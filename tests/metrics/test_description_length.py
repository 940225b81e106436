"""Bits of codes whose entropy is known."""

from __future__ import annotations

import math

import pytest
import torch

from sae_sweep.metrics.description_length import STEP, bits


def entries(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    rows, latents = codes.nonzero(as_tuple=True)
    return latents, codes[rows, latents], len(codes)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[1.0, 0], [0, 1], [1, 1], [0, 0]], 2),  # each latent fires on half: one bit each
        ([[1.0, 1], [1, 1], [1, 1], [1, 1]], 0),  # nothing to say
        ([[0.0, 0], [0, 0], [0, 0], [0, 0]], 0),
        ([[1.0], [2], [3], [0]], 2),  # four levels alike
        ([[1e7], [2e7], [3e7], [0]], 2),  # the same, too far apart for a table
        ([[1.0], [1 + STEP / 4], [0], [0]], 1),  # a difference below the step is rounded away
        ([[STEP / 4], [0], [0], [0]], 0),  # and so is a contribution
        ([[1.0], [0], [0], [0]], -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)),
    ],
)
def test_bits_of_an_input(codes: list[list[float]], expected: float) -> None:
    assert bits(*entries(torch.tensor(codes))) == pytest.approx(expected, abs=1e-12)


def test_one_of_eight_at_a_time() -> None:
    assert bits(*entries(torch.eye(8))) == pytest.approx(4.349, abs=1e-3)


def test_of_what_is_not_a_number_nothing_is_said() -> None:
    assert bits(torch.tensor([0]), torch.tensor([torch.nan]), 1) is None
