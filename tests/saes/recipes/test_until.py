"""Training until the loss has settled: each SAE at its own step, by its own losses, whoever trains beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import TINY, call
from stacks import cpu_backend, points, stack_of
from torch import Tensor

from sae_sweep.config import overrides as config
from sae_sweep.config.settings import Penalty, Point, Training
from sae_sweep.errors import UserError
from sae_sweep.saes.curve import curve
from sae_sweep.saes.limits import BLOCK
from sae_sweep.saes.recipes import until
from sae_sweep.saes.stack import ROWS, Stack
from sae_sweep.saes.train import Look, train
from sae_sweep.store.plateau import STILL_MOVING, plateau

STEPS = 1700
RECIPE: dict[str, Any] = {"until": "plateau", "schedule": "constant", "lr_warmup": 20.0, "steps": STEPS, "lr": 1e-2}
PENALTY = [Penalty("l1", 0.3), Penalty("l1", 3.0), Penalty("sqrt", 1.0)]


class Clusters:
    """Inputs about five means, so that an SAE soon has nothing left to learn."""

    def __init__(self, d: int = 16, b: int = 32) -> None:
        self.means, self.b = 3 * torch.randn(5, d, generator=torch.Generator().manual_seed(0)), b

    def batches(self, start_step: int, count: int) -> Tensor:
        drawn = []
        for step in range(start_step, start_step + count):
            generator = torch.Generator().manual_seed(step)
            chosen = torch.randint(5, (self.b,), generator=generator)
            drawn.append(self.means[chosen] + 0.1 * torch.randn(self.b, self.means.shape[1], generator=generator))
        return torch.stack(drawn)


def chosen(**training: Any) -> list[Point]:
    return points(PENALTY, width=12, **{**RECIPE, **training})


def trained(some: Sequence[Point], threads: int = 1) -> tuple[Stack, list[Look]]:
    stack = stack_of(some)
    with cpu_backend(threads) as backend:
        return stack, list(train(stack, Clusters(), backend))


@pytest.fixture(scope="module")
def together() -> tuple[Stack, list[Look]]:
    return trained(chosen(), threads=2)


def test_each_stops_once_its_own_loss_has_settled_for_a_doubling(together: tuple[Stack, list[Look]]) -> None:
    stack, looks = together
    assert len(set(stack.stopped.values())) > 1, "they are to stop at different steps"
    for i, step in stack.stopped.items():
        own = [look for look in looks if look.step <= step]
        asked = [n for n, look in enumerate(own, 1) if until._asked(stack.points[i].training, look.step)]
        settled = [plateau(list(curve(stack, own[:n], i))) <= STILL_MOVING for n in asked]
        lasted = [all(settled[at - until.CHECKS : at + 1]) for at in range(until.CHECKS, len(asked))]
        assert lasted == [False] * (len(lasted) - 1) + [True] and asked[-1] == len(own)
        assert not any(look.loss[i].isnan() for look in own)
        assert all(look.loss[i].isnan() for look in looks[len(own) :])


def test_alone_or_with_others_it_has_the_same_bits(together: tuple[Stack, list[Look]]) -> None:
    stack, _ = together
    for i, point in enumerate(stack.points):
        alone, looks = trained([point])
        assert alone.stopped.get(0) == stack.stopped.get(i)
        assert looks[-1].step == alone.stopped.get(0, STEPS)
        for name in ROWS:
            assert torch.equal(getattr(alone, name)[0], getattr(stack, name)[i]), name


def test_it_ends_as_if_so_many_steps_had_been_asked_for(together: tuple[Stack, list[Look]]) -> None:
    stack, _ = together
    (i, step), *_ = stack.stopped.items()
    point = stack.points[i]
    plain, _ = trained([dataclasses.replace(point, training=point.training.replace(until="steps", steps=step))])
    assert torch.equal(plain.flat[0], stack.flat[i])
    assert not plain.stopped


def test_what_breaks_ends_too() -> None:
    some = chosen()
    some[1] = dataclasses.replace(some[1], training=some[1].training.replace(lr=1e30, clip=1e38))
    stack, looks = trained(some)
    assert stack.failed.keys() == {1} and stack.stopped[1] == stack.failed[1] < looks[-1].step


def asked(**training: Any) -> list[int]:
    made = Training(**{**RECIPE, "steps": 100_000, **training})
    return [step for step in range(BLOCK, 100_001, BLOCK) if until._asked(made, step)]


def test_it_is_asked_so_often_a_doubling_and_before_a_revival() -> None:
    steps = asked()
    for low in (800, 6400, 25_600):
        assert sum(low <= step < 2 * low for step in steps) == until.CHECKS
    assert min(asked(lr_warmup=0.05)) >= 5000 and min(asked(coefficient_warmup=300.0)) >= 300
    revived = asked(revival="resample", revival_every=250)
    assert all((step + BLOCK) % 250 == 0 for step in revived)
    assert sum(25_000 <= step < 50_000 for step in revived) == until.CHECKS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.schedule=linear"], "(did you mean training.schedule=constant?)"),
        (["training.schedule=cosine"], "training.schedule=cosine falls over all steps"),
        (["training.schedule=constant", "training.target_l0=2"], "which training.target_l0 changes in training"),
        (["training.schedule=constant", "sae=topk", "training.k_start=3"], "which training.k_start changes"),
        (["training.schedule=constant", "penalty=lp_annealed"], "which penalty.p_end changes"),
    ],
)
def test_what_goes_by_all_steps_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config.load([*TINY, "training.until=plateau", *words])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_it_is_part_of_the_identity_only_where_it_is_asked_for() -> None:
    assert Point(training=Training(until="steps")).id == Point(training=Training()).id
    assert Point(training=Training(until="plateau")).id != Point(training=Training()).id


def test_a_plan_says_that_it_counts_all_steps(tmp_path: Path) -> None:
    words = [*TINY, "training.schedule=constant", "seed=0,1", f"output_dir={tmp_path}"]
    assert "stop earlier" not in call("plan", *words).out
    assert "8 of the points stop earlier" in " ".join(call("plan", *words, "training.until=plateau").out.split())
