"""The compiled sums of a reconstruction against the same by PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_sweep.config.settings import Toy
from sae_sweep.metrics import fused_reconstruction
from sae_sweep.metrics.reconstruction import OF_INPUTS, OF_OUTPUTS, Reconstruction
from sae_sweep.toys.max_of_k import MaxOfK

INPUTS, D, VOCAB = 60, 19, 21


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums(site: str = "post_unembed") -> Reconstruction:
    toy = Toy(d_vocab=VOCAB, k=3, d_model=D, d_head=D)
    return Reconstruction(MaxOfK(toy, {"W_U": random(D, VOCAB)}), site, torch.zeros(D), 1, lambda norms: norms.sum(1))


def test_exponentials_are_those_of_numpy() -> None:
    values = np.concatenate([-np.logspace(-300, 2.85, 4_001), [0, -708, np.nan, -np.inf]])
    found = values.copy()
    fused_reconstruction.exponentials(found, np.empty(len(values), np.int64))
    assert found[:-1] == pytest.approx(np.exp(values[:-1]), rel=1e-13, abs=1e-300, nan_ok=True)
    assert found[-1] < 1e-300


def test_sums_over_inputs() -> None:
    x, x_hat = random(INPUTS, D), random(INPUTS, D, seed=1)
    x[3], x_hat[5] = 0, 0
    maximum, weight = torch.arange(INPUTS) // 7, random(INPUTS, seed=2).abs().double()
    parts = x, x_hat, torch.arange(INPUTS), random(INPUTS, seed=3).double(), maximum, weight
    compiled, plain = sums(), sums()
    arrays = compiled._of_inputs, compiled._weights.numpy(), compiled._totals.numpy()
    fused_reconstruction.add_inputs(*(part.numpy() for part in parts), *arrays)
    plain._add_inputs(*parts)
    assert compiled._of_inputs == pytest.approx(plain._of_inputs, rel=1e-12)
    assert len(OF_INPUTS) == len(compiled._of_inputs) and compiled._of_inputs.all()
    torch.testing.assert_close(compiled._weights, plain._weights)
    torch.testing.assert_close(compiled._totals, plain._totals, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("soft", [False, True])
def test_sums_over_outputs(size: float, soft: bool) -> None:
    logits, weight = size * random(INPUTS, VOCAB), random(INPUTS, seed=2).abs().double()
    logits_hat = logits + 0.1 * size * random(INPUTS, VOCAB, seed=1)
    logits[0], logits_hat[1] = -size, 0
    zero, token = random(VOCAB, seed=4).double().log_softmax(0), torch.arange(INPUTS) % VOCAB
    target = random(INPUTS, VOCAB, seed=5).double().softmax(1)
    compiled, plain = sums(), sums()
    plain._add_outputs(logits, logits_hat, zero, target if soft else token, weight)
    parts = logits, logits_hat, zero, token, target if soft else target[:0], weight
    fused_reconstruction.add_outputs(*(part.numpy() for part in parts), compiled._of_outputs)
    assert compiled._of_outputs == pytest.approx(plain._of_outputs, rel=1e-11)
    assert len(OF_OUTPUTS) == len(compiled._of_outputs) and compiled._of_outputs.all()


@pytest.mark.parametrize("broken", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 7, VOCAB - 1])
def test_what_is_not_finite_stays_so(broken: float, at: int) -> None:
    logits = random(2, VOCAB)
    logits_hat = logits.clone()
    logits_hat[1, at] = broken
    found, token = np.zeros(4), np.zeros(2, np.int64)
    fused_reconstruction.add_outputs(
        logits.numpy(), logits_hat.numpy(), np.zeros(VOCAB), token, np.zeros((0, 0)), np.ones(2), found
    )
    assert not np.isfinite(found[3])
    assert np.isfinite(found[[0, 2]]).all()


def test_inputs_added_together_or_apart() -> None:
    x, x_hat, norms = random(INPUTS, D), random(INPUTS, D, seed=1), random(INPUTS, 5, seed=2).abs()
    parts = x, torch.full((INPUTS,), 5), norms, x_hat, torch.arange(INPUTS) % VOCAB, torch.ones(INPUTS).double()
    whole, cut = sums("pre_unembed"), sums("pre_unembed")
    whole.add(*parts)
    for rows in torch.arange(INPUTS).split(17):
        cut.add(*(part[rows] for part in parts))
    assert whole._of_inputs.tolist() == cut._of_inputs.tolist()
    known = {name: value for name, value in whole.metrics.items() if value is not None}
    assert {name: value for name, value in cut.metrics.items() if value is not None} == pytest.approx(known, rel=1e-6)
