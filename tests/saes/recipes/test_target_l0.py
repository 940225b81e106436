"""A mean L0 as the target of training: as plain PyTorch does it, reached, and by every SAE for itself."""

from __future__ import annotations

import math

import pytest
import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of
from test_revivals import Data

from sae_sweep.api import plan
from sae_sweep.config.settings import Penalty
from sae_sweep.errors import UserError
from sae_sweep.saes.recipes.target_l0 import GAIN, missed
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, AutogradBackend, train

STEPS = 4 * BLOCK


def by_pytorch(stack: Stack) -> tuple[torch.Tensor, float]:
    """A ReLU SAE under L1 and torch.optim.Adam, its coefficient moved after every 25 steps; and where that ends."""
    point = stack.points[0]
    training, coefficient = point.training, point.penalty.coefficient
    parameters = [view[0].clone().requires_grad_() for view in stack.split(stack.flat)]
    W_enc, W_dec, b_enc, b_dec = parameters
    optimizer, active = torch.optim.Adam(parameters), 0.0
    for step, x in enumerate(batches(STEPS)):
        rise, fall = (step + 1) / (training.lr_warmup * STEPS), (STEPS - step) / (training.lr_decay * STEPS)
        optimizer.param_groups[0]["lr"] = training.lr * min(1.0, rise, fall)
        codes = (x @ W_enc.T + b_enc).relu()
        error = (codes @ W_dec + b_dec - x).square().sum(1).mean()
        optimizer.zero_grad()
        (error + coefficient * (codes * W_dec.norm(dim=1)).sum(1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.step()
        active += float((codes > 0).sum(1).float().mean()) / BLOCK
        if (step + 1) % BLOCK == 0:
            coefficient *= math.exp(GAIN * max(-1.0, min(1.0, math.log(active / training.target_l0))))
            active = 0.0
    return torch.cat([parameter.detach().flatten() for parameter in parameters]), coefficient


def test_as_plain_pytorch_and_stacked_as_alone() -> None:
    chosen = points([Penalty("l1", 0.3), *PENALTIES[1:3]], steps=STEPS, target_l0=2.0)
    expected, coefficient = by_pytorch(stack_of(chosen[:1]))
    together = stack_of(chosen)
    looks = list(train(together, Data(), AutogradBackend()))
    torch.testing.assert_close(together.flat[0], expected, rtol=1e-3, atol=1e-4)
    assert 0.3 * float(together.rescale[0]) == pytest.approx(coefficient, rel=1e-3)
    assert looks[0].rescale.tolist() == [1.0] * 3 and coefficient > 0.4
    for i, point in enumerate(chosen):
        alone = stack_of([point])
        list(train(alone, Data(), AutogradBackend()))
        assert torch.equal(alone.flat[0], together.flat[i]) and alone.rescale[0] == together.rescale[i]


class Endless:
    """As many batches as are asked for."""

    def batches(self, start_step: int, count: int) -> torch.Tensor:
        return batches(start_step + count)[start_step:]


def test_an_sae_reaches_its_target_from_either_side_by_the_compiled_step() -> None:
    steps = 60 * BLOCK
    chosen = points([Penalty("l1", 1.0), Penalty("l1", 12.0)], steps=steps, target_l0=4.0)
    with cpu_backend() as backend:
        looks = list(train(stack_of(chosen), Endless(), backend))
    assert looks[-1].l0.tolist() == pytest.approx([4.0, 4.0], rel=0.2)
    assert looks[-1].rescale[0] > 1 > looks[-1].rescale[1]
    assert missed(chosen[0], 4.3) is None and "a mean L0 of 5, its target was 4" in str(missed(chosen[0], 5.0))


def test_without_a_penalty_thresholds_move() -> None:
    (point,) = points([Penalty("none", 0.0)], "jumprelu", steps=STEPS, target_l0=1.0)
    stack = stack_of([point])
    before = stack.parameters(0).thresholds.clone()
    (look, *_) = train(stack, Data(), AutogradBackend())
    assert (stack.parameters(0).thresholds > before).float().mean() > 0.9 and look.rescale.tolist() == [1.0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sae=topk"], "told its L0 by sae.k"),
        (["penalty=none"], "needs a penalty"),
        (["sae.width=2"], "more than sae.width"),
    ],
)
def test_what_no_training_could_reach_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan("toy=small", "training.target_l0=3", *overrides)
