"""Optimisers, schedules and decoder norms, against plain PyTorch doing the same."""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stacks import PENALTIES, batches, points, stack_of

from sae_sweep.config.settings import Point, Training, point_from
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.registry import kinds
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend
from sae_sweep.sweep.backend import pick_backend
from sae_sweep.sweep.cost import by_autograd
from sae_sweep.sweep.hardware_profile import SPEEDS
from sae_sweep.sweep.plan import stack_key

L1 = PENALTIES[0]
RECIPES: list[dict[str, Any]] = [
    {"optimizer": "adam", "beta1": 0.5, "beta2": 0.99, "eps": 1e-3},
    {"optimizer": "adamw", "weight_decay": 0.5},
    {"schedule": "cosine", "lr_warmup": 0.2},
    {"schedule": "constant"},
    {"decoder_norm": "unit"},
    {"decoder_norm": "frozen"},
    {"optimizer": "adamw", "schedule": "cosine", "decoder_norm": "unit"},
]


def by_pytorch(stack: Stack, data: torch.Tensor) -> torch.Tensor:
    """A ReLU SAE under L1 trained by torch.optim and its schedulers: its parameters in the order of the stack."""
    training, steps = stack.points[0].training, len(data)
    parameters = [view[0].clone().requires_grad_() for view in stack.split(stack.flat)]
    W_enc, W_dec, b_enc, b_dec = parameters
    moments = {"lr": training.lr, "betas": (training.beta1, training.beta2), "eps": training.eps}
    decay = training.get("weight_decay")
    optimizer = (
        torch.optim.Adam(parameters, **moments)
        if decay is None
        else torch.optim.AdamW(parameters, weight_decay=decay, **moments)
    )
    warm = max(1.0, training.lr_warmup * steps)

    def share(step: int) -> float:
        rise = min(1.0, (step + 1) / warm)
        if training.schedule == "constant":
            return rise
        if training.schedule == "linear":
            return min(rise, (steps - step) / max(1.0, training.lr_decay * steps), 1.0)
        after = training.lr_warmup * steps
        return min(rise, (1 + math.cos(math.pi * max(0.0, step + 1 - after) / (steps + 1 - after))) / 2)

    for step, x in enumerate(data):
        codes = (x @ W_enc.T + b_enc).relu()
        error = (codes @ W_dec + b_dec - x).square().sum(1).mean()
        loss = error + stack.points[0].penalty.coefficient * (codes * W_dec.norm(dim=1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        if training.decoder_norm == "unit":
            with torch.no_grad():
                unit = W_dec / W_dec.norm(dim=1, keepdim=True)
                W_dec.grad -= (W_dec.grad * unit).sum(1, keepdim=True) * unit  # type: ignore[operator, misc]
        if training.decoder_norm == "frozen":
            W_dec.grad = torch.zeros_like(W_dec)
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        optimizer.param_groups[0]["lr"] = training.lr * share(step)
        optimizer.step()
        if training.decoder_norm == "unit":
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=1, keepdim=True)
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_plain_pytorch(recipe: dict[str, Any]) -> None:
    data, (point,) = batches(40), points([L1], **recipe)
    stack, plain = stack_of([point]), stack_of(points([L1]))
    expected = by_pytorch(stack, data)
    AutogradBackend().advance(stack, data), AutogradBackend().advance(plain, data)
    torch.testing.assert_close(stack.flat[0], expected, rtol=1e-3, atol=2e-5)
    assert (plain.flat[0] - expected).abs().max() > 1e-2, "the ingredient is to make a difference"


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_steps_train_what_they_know_and_the_reference_the_rest(recipe: dict[str, Any]) -> None:
    (point,) = points([L1], **recipe)
    known = set(recipe) <= {"schedule", "lr_warmup"}
    assert by_autograd(point, SPEEDS["cpu"]) is not known
    assert (stack_key(point) == stack_key(points([L1])[0])) is known
    with ThreadPoolExecutor(1) as pool:
        chosen = pick_backend(stack_of([point]), pool, 1)
    assert isinstance(chosen, CpuBackend if known else AutogradBackend)


@pytest.mark.parametrize("recipe", RECIPES)
def test_stacked_as_alone(recipe: dict[str, Any]) -> None:
    data, chosen = batches(10), points(PENALTIES[:3], **recipe)
    together = stack_of(chosen)
    AutogradBackend().advance(together, data)
    for i, point in enumerate(chosen):
        alone = stack_of([point])
        AutogradBackend().advance(alone, data)
        assert torch.equal(alone.flat[0], together.flat[i])


def test_no_ingredient_is_left_out() -> None:
    for key in ("optimizer", "schedule", "decoder_norm"):
        family, default = Training.choices[key]
        assert {recipe.get(key, default) for recipe in RECIPES} == set(kinds(family))


def test_of_an_ingredient_that_is_not_chosen_nothing_is_in_the_identity() -> None:
    assert Training(1000).steps == 1000
    assert (
        Training(weight_decay=0.3) == Training() and Training(schedule="constant", lr_decay=0.5).get("lr_decay") is None
    )
    recipes = [Training(), Training(optimizer="adamw"), Training(schedule="cosine"), Training(beta1=0.8)]
    assert len({Point(training=training).id for training in recipes}) == len(recipes)
    record = Point().to_dict()
    # A record from before there were recipes.
    for key in ("optimizer", "schedule", "decoder_norm", "beta1", "beta2", "eps"):
        del record["training"][key]
    assert point_from(record) == Point() and point_from(record).id == Point().id
    assert dataclasses.replace(Point(), training=recipes[1]) != Point()
