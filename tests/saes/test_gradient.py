"""The norm of the gradient that training reports: that of the reference, whatever computes it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of

from sae_sweep.config.settings import Point
from sae_sweep.saes.curve import ROWS_AN_OCTAVE, curve
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, AutogradBackend, Look, PenaltyGroup, penalties


def by_autograd(stack: Stack, x: torch.Tensor) -> torch.Tensor:
    """‖∇‖ [n] of each SAE of a ReLU stack on x [b, d], written out again."""
    flat = stack.flat.clone().requires_grad_()
    W_enc, W_dec, b_enc, b_dec = stack.split(flat)
    codes = (x @ W_enc.mT + b_enc[:, None]).relu()
    error = (codes @ W_dec + b_dec[:, None] - x).square().sum(-1).mean(-1)
    coefficients = torch.tensor([stack.schedule(i, stack.step)[1] for i in range(len(stack.points))])
    loss = error + coefficients * penalties(PenaltyGroup.of(stack), codes * W_dec.norm(dim=-1)[:, None], None)
    (gradient,) = torch.autograd.grad(loss.sum(), flat)
    return gradient.norm(dim=1)


def of_backend(name: str, stack: Stack, data: torch.Tensor) -> torch.Tensor:
    if name == "dense":
        return AutogradBackend().advance(stack, data).gradient
    # One thread takes its steps without Python between them; where much fires they are matrix products.
    with cpu_backend(1 if name == "compiled" else 4) as backend:
        return backend.advance(stack, data).gradient


@pytest.mark.parametrize("name", ["dense", "compiled", "threads"])
@pytest.mark.parametrize("width", [40, 600])
def test_it_is_the_norm_before_clipping(name: str, width: int) -> None:
    chosen: list[Point] = points(PENALTIES[:4], width=width, clip=0.1)
    data = batches(1)
    expected = by_autograd(stack_of(chosen), data[0])
    assert (expected > 0.1).all(), "it is to be clipped"
    torch.testing.assert_close(of_backend(name, stack_of(chosen), data), expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dense", "compiled"])
def test_of_several_steps_it_is_the_largest(name: str) -> None:
    data, chosen = batches(6), points(PENALTIES[:3])
    stack, norms = stack_of(chosen), []
    for step in range(len(data)):
        norms.append(of_backend(name, stack, data[step : step + 1]))
    together = of_backend(name, stack_of(chosen), data)
    assert torch.equal(together, torch.stack(norms).amax(0))
    assert not torch.equal(together, norms[0]) or not torch.equal(together, norms[-1])


def test_a_curve_has_as_many_rows_for_every_doubling_and_keeps_every_peak() -> None:
    blocks, peak = 1000, 77
    stack = stack_of(points(PENALTIES[:2], steps=BLOCK * blocks))
    looks = [
        Look(
            BLOCK * (i + 1),
            *(torch.full((2,), float(i)) for _ in range(3)),
            torch.tensor([1.0, 90.0 if i == peak else 2.0]),
            *(torch.zeros(2) for _ in range(3)),
        )
        for i in range(blocks)
    ]
    first, second = (list(curve(stack, looks, i)) for i in (0, 1))
    steps = [row["step"] for row in first]
    assert steps[-1] == BLOCK * blocks
    for octave in range(5):
        late, early = steps[-1] / 2**octave, steps[-1] / 2 ** (octave + 1)
        assert sum(early < step <= late for step in steps) == ROWS_AN_OCTAVE
    assert [row["gradient"] for row in first] == [1.0] * len(first)
    assert [row["step"] for row in second if row["gradient"] == 90.0] == [
        min(row["step"] for row in second if row["step"] >= BLOCK * (peak + 1))
    ]
    # Each row is the mean of the looks since the row before, so that together they are the mean of all.
    lengths = [now - before for before, now in zip([0, *steps], steps, strict=False)]
    whole = sum(row["loss"] * length for row, length in zip(first, lengths, strict=True)) / steps[-1]
    assert whole == pytest.approx((blocks - 1) / 2)
    assert (first[-1]["lr"], first[-1]["coefficient"]) == stack.schedule(0, steps[-1] - 1)


def test_the_steeper_the_penalty_at_zero_the_larger_the_norm() -> None:
    # Small positive codes everywhere: ε + a under the root, so that its slope is far above that of L1.
    of_sqrt, of_l1 = (dataclasses.replace(points(PENALTIES[i : i + 1])[0], seed=0) for i in (1, 0))
    coefficient = of_sqrt.penalty.replace(coefficient=1.0)
    norms = {}
    for point in (dataclasses.replace(of_sqrt, penalty=coefficient), of_l1):
        stack = stack_of([point])
        W_enc, W_dec, b_enc, b_dec = stack.split(stack.flat)
        W_enc.zero_(), b_enc.fill_(1e-4), b_dec.zero_()
        W_dec /= W_dec.norm(dim=-1, keepdim=True)
        norms[point.penalty.name] = float(of_backend("dense", stack, torch.zeros(1, 64, 16)))
    # Slopes at a = 10⁻⁴: 0.5 / √(a + 10⁻³) = 15.1 against 1; both also pull the decoder's norm, by a.
    assert norms["sqrt"] / norms["l1"] == pytest.approx(0.5 / math.sqrt(1.1e-3), rel=0.01)
