"""p-annealing: when p falls and how far, and that the penalty of the activations at hand does not jump."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stacks import batches, cpu_backend, points, stack_of

from sae_sweep.config.settings import Penalty, Point
from sae_sweep.saes.annealing import anneal, exponent_at
from sae_sweep.saes.penalties import penalty_value
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import BLOCK, AutogradBackend, train

ANNEALED = Penalty("lp_annealed", 0.5, p=1.0, p_end=0.2)


def penalty_of(stack: Stack, i: int, x: torch.Tensor, p: float) -> float:
    sae = stack.parameters(i)
    contributions = (x @ sae.W_enc.T + sae.b_enc).relu() * sae.norms()
    return float(penalty_value("lp_annealed", contributions, exponent=p).mean())


def test_p_falls_until_the_learning_rate_does() -> None:
    point = points([ANNEALED], steps=1000, lr_decay=0.2)[0]
    assert [exponent_at(point, step) for step in (0, 200, 400, 800, 999)] == pytest.approx([1, 0.8, 0.6, 0.2, 0.2])
    other = dataclasses.replace(point, penalty=Penalty("lp", 0.5, p=0.7))
    assert [exponent_at(other, step) for step in (0, 999)] == [0.7, 0.7]


def test_the_coefficient_makes_up_for_what_p_changes() -> None:
    chosen = points([ANNEALED, Penalty("l1", 1.0), ANNEALED], steps=100)
    stack, x = stack_of(chosen), batches(1)[0]
    anneal(stack, x)
    assert stack.rescale.tolist() == [1, 1, 1]
    stack.step = 40
    anneal(stack, x)
    assert stack.exponent.tolist() == pytest.approx([0.6, 1, 0.6])
    assert stack.rescale[1] == 1
    for i in (0, 2):
        assert stack.rescale[i] * penalty_of(stack, i, x, 0.6) == pytest.approx(penalty_of(stack, i, x, 1.0), rel=1e-5)


class Data:
    def batches(self, start_step: int, count: int) -> torch.Tensor:
        return batches(4 * BLOCK)[start_step : start_step + count]


def trained(chosen: list[Point], reference: bool = False) -> Stack:
    stack = stack_of(chosen)
    with cpu_backend() as backend:
        list(train(stack, Data(), AutogradBackend() if reference else backend))
    return stack


def test_backends_anneal_alike_and_company_changes_no_bit() -> None:
    chosen = points([ANNEALED, Penalty("l1", 1.0), ANNEALED.replace(p_end=0.5)], steps=4 * BLOCK)
    compiled, reference = trained(chosen), trained(chosen, reference=True)
    assert compiled.exponent.tolist() == pytest.approx([0.25, 1.0, 0.53125])
    torch.testing.assert_close(compiled.rescale, reference.rescale, rtol=2e-2, atol=0)
    torch.testing.assert_close(compiled.flat, reference.flat, atol=2e-2, rtol=0)
    alone = trained(chosen[2:])
    assert torch.equal(alone.flat[0], compiled.flat[2])
    assert alone.rescale[0] == compiled.rescale[2]


def test_annealing_differs_from_either_end() -> None:
    flats = [
        trained(points([penalty], steps=4 * BLOCK)).flat
        for penalty in (ANNEALED, Penalty("l1", 0.5), Penalty("lp", 0.5, p=0.2))
    ]
    for one, other in ((0, 1), (0, 2)):
        assert (flats[one] - flats[other]).abs().max() > 1e-2
