"""The loop: looks at the right steps, learns, and names the SAE that broke."""

from __future__ import annotations

import dataclasses

import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of

from sae_sweep.saes.train import BLOCK, train


class Data:
    """Batches by step, with a record of what was asked for."""

    def __init__(self, steps: int) -> None:
        self.all = batches(steps)
        self.asked: list[tuple[int, int]] = []

    def batches(self, start_step: int, count: int) -> torch.Tensor:
        self.asked.append((start_step, count))
        return self.all[start_step : start_step + count]


def test_training_reduces_the_loss_and_looks_once_a_block() -> None:
    steps = 4 * BLOCK + 7
    data, stack = Data(steps), stack_of(points(PENALTIES[:3], steps=steps))
    with cpu_backend() as backend:
        looks = list(train(stack, data, backend))
    assert [look.step for look in looks] == [BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK, steps]
    assert data.asked == [(i * BLOCK, BLOCK) for i in range(4)] + [(4 * BLOCK, 7)]
    assert (looks[-1].loss < 0.7 * looks[0].loss).all()
    assert (looks[-1].fvu < 1).all()


def test_fvu_of_a_dead_sae_is_one() -> None:
    point = points(PENALTIES[-1:], steps=BLOCK, lr=1e-12)[0]
    stack = stack_of([point])
    W_enc, _, b_enc, b_dec = stack.split(stack.flat)
    W_enc.zero_(), b_enc.fill_(-1), b_dec.zero_()
    with cpu_backend() as backend:
        (look,) = train(stack, Data(BLOCK), backend)
    torch.testing.assert_close(look.fvu, torch.ones(1))
    assert look.l0.tolist() == [0.0]


def test_a_broken_sae_is_named_with_the_step() -> None:
    chosen = points(PENALTIES[:3], steps=2 * BLOCK)
    chosen[1] = dataclasses.replace(chosen[1], training=chosen[1].training.replace(lr=1e30))
    stack = stack_of(chosen)
    with cpu_backend() as backend:
        list(train(stack, Data(2 * BLOCK), backend))
    assert stack.failed == {1: BLOCK}
