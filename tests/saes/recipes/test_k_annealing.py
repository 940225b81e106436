"""k that falls in training: as plain PyTorch does it, in a stack as alone, and by the compiled step."""

from __future__ import annotations

import pytest
import torch
from stacks import PENALTIES, cpu_backend, points, stack_of
from test_revivals import Data

from sae_sweep.saes.recipes.k_annealing import k_at
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, AutogradBackend, train
from sae_sweep.sweep.cost import firing
from sae_sweep.sweep.plan import stack_key

STEPS = 4 * BLOCK
FALLING = {"steps": STEPS, "k_start": 12, "k_anneal": 0.5}
# At the blocks of 25 steps.
EXPECTED = [12, 7, 2, 2]


def by_pytorch(stack: Stack) -> torch.Tensor:
    """A TopK SAE under torch.optim.Adam with that k."""
    training = stack.points[0].training
    parameters = [view[0].clone().requires_grad_() for view in stack.split(stack.flat)]
    W_enc, W_dec, b_enc, b_dec = parameters
    optimizer = torch.optim.Adam(parameters)
    for step, x in enumerate(Data().all):
        rise, fall = (step + 1) / (training.lr_warmup * STEPS), (STEPS - step) / (training.lr_decay * STEPS)
        optimizer.param_groups[0]["lr"] = training.lr * min(1.0, rise, fall)
        codes = (x @ W_enc.T + b_enc).relu()
        kept = (codes * W_dec.norm(dim=1)).topk(EXPECTED[step // BLOCK], dim=1).indices
        codes = torch.zeros_like(codes).scatter(1, kept, codes.gather(1, kept))
        optimizer.zero_grad()
        (codes @ W_dec + b_dec - x).square().sum(1).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def test_as_plain_pytorch_and_stacked_as_alone() -> None:
    chosen = points(PENALTIES[-1:] * 2, "topk", k=2, **FALLING)
    together = stack_of(chosen)
    expected = by_pytorch(stack_of(chosen[:1]))
    list(train(together, Data(), AutogradBackend()))
    torch.testing.assert_close(together.flat[0], expected, rtol=1e-3, atol=1e-3)
    for i, point in enumerate(chosen):
        alone = stack_of([point])
        list(train(alone, Data(), AutogradBackend()))
        assert torch.equal(alone.flat[0], together.flat[i])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_the_compiled_step_has_as_many_active_latents(architecture: str) -> None:
    (point,) = points(PENALTIES[-1:], architecture, k=2, **FALLING)
    with cpu_backend(1) as backend:
        looks = list(train(stack_of([point]), Data(), backend))
    assert [float(look.l0) for look in looks] == pytest.approx(EXPECTED, rel=0.2)


def test_what_is_planned_and_what_is_whole() -> None:
    (falling,), (whole,) = points(PENALTIES[-1:], "topk", k=2, **FALLING), points(PENALTIES[-1:], "topk", k=2)
    assert [k_at(falling, step) for step in (0, 13, 50, 99)] == [12, 9, 2, 2]
    assert stack_key(falling) != stack_key(whole)
    assert list(firing(falling)) == [(50, 7.0), (50, 2)]
