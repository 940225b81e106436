"""Toys that are presets of `planted`: the same numbers, to the bit, as formulas of their own give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commandline import call
from torch import Tensor

from sae_sweep.config.settings import Toy
from sae_sweep.toys import model
from sae_sweep.toys.aligned import product
from sae_sweep.toys.planted.directions import unit_vectors

COUNT = 2000
SETTINGS: dict[str, dict[str, Any]] = {
    "independent": {"features": 6, "d_model": 16, "rate": 0.3, "magnitudes": "lomax"},
    "superposition": {"features": 40, "d_model": 8, "rate": 0.1, "magnitudes": "exponential"},
    "exclusive": {"features": 6, "d_model": 16, "magnitudes": "uniform"},
    "parents": {"features": 5, "d_model": 32, "modifiers": 3, "modifier_rate": 0.6, "co_occurrence": 0.4,
                "interaction": 0.25, "modifier_magnitude": 1.7, "magnitudes": "exponential"},
    "circle": {"features": 12, "d_model": 8, "spread": 0.5},
}  # fmt: skip


def made(kind: str) -> tuple[Toy, Any]:
    toy = Toy("independent" if kind == "superposition" else kind, seed=3, **SETTINGS[kind])
    return toy, model.load(toy, model.train([toy], "cpu")[0])


def magnitudes(law: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    tail = 1 - torch.rand(shape, generator=generator)
    laws = {"uniform": 2 * tail, "exponential": -tail.log(), "lomax": 2 * (tail ** (-1 / 3) - 1)}
    return laws[law]


def strengths(toy: Toy, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """How active each direction is, and the cell, as each kind said before it was a preset."""
    if toy.name == "independent":
        active = torch.rand((COUNT, toy.features), generator=generator) < toy.rate
        drawn = active * magnitudes(toy.magnitudes, (COUNT, toy.features), generator)
        return drawn, torch.zeros(COUNT, dtype=torch.int64)
    leading = torch.randint(toy.features, (COUNT,), generator=generator)
    first = F.one_hot(leading, toy.features) * magnitudes(toy.magnitudes, (COUNT, 1), generator)
    if toy.name == "exclusive":
        return first, leading
    there, matched = torch.rand((2, COUNT), generator=generator)
    other = torch.randint(toy.modifiers, (COUNT,), generator=generator)
    which = torch.where(matched < toy.co_occurrence, leading % toy.modifiers, other)
    strength = toy.modifier_magnitude * magnitudes(toy.magnitudes, (COUNT, 1), generator)
    present = there < toy.modifier_rate
    second = F.one_hot(which, toy.modifiers) * strength * present[:, None]
    own = ((first > 0)[:, :, None] * second[:, None, :]).flatten(1)
    parts = [first, second * math.sqrt(1 - toy.interaction), own * math.sqrt(toy.interaction)]
    return torch.cat(parts, 1), leading * (toy.modifiers + 1) + torch.where(present, which + 1, 0)


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind != "circle"])
def test_a_preset_draws_what_its_kind_always_drew(kind: str) -> None:
    toy, planted = made(kind)
    found, cell = strengths(toy, torch.Generator().manual_seed(7))
    inputs = planted.draw(COUNT, torch.Generator().manual_seed(7))
    directions = unit_vectors(found.shape[1], toy.d_model, torch.Generator().manual_seed(3)).float()
    assert torch.equal(planted.directions, directions) and set(planted.params) == {"directions"}
    assert torch.equal(planted.features(inputs), found)
    assert torch.equal(planted.activations(inputs, ""), product(found, directions))
    assert torch.equal(planted.cell(inputs), cell)


def test_a_circle_draws_what_it_always_drew() -> None:
    toy, planted = made("circle")
    generator = torch.Generator().manual_seed(7)
    place = torch.randint(toy.features, (COUNT,), generator=generator)
    place = place + toy.spread * (torch.rand(COUNT, generator=generator) - 0.5)
    inputs = planted.draw(COUNT, torch.Generator().manual_seed(7))

    def points(places: Tensor) -> Tensor:
        angles = (2 * math.pi / toy.features * places.double())[:, None] * torch.arange(1, toy.d_model // 2 + 1)
        return math.sqrt(2 / toy.d_model) * torch.cat([angles.cos(), angles.sin()], -1).float()

    axes = unit_vectors(toy.d_model, toy.d_model, torch.Generator().manual_seed(3)).float()
    assert torch.equal(planted.directions, product(points(torch.arange(toy.features)), axes))
    assert torch.equal(planted.activations(inputs, ""), product(points(place), axes))
    assert torch.equal(planted.cell(inputs), place.round().long() % toy.features)
    assert torch.equal(planted.features(inputs), F.one_hot(planted.cell(inputs), toy.features).float())
    theta = 2 * math.pi / toy.features * place.double()
    assert torch.equal(planted.coordinates(inputs), torch.stack([theta.cos(), theta.sin()], -1))


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_planted_toy_that_a_preset_stands_for_has_its_numbers(kind: str) -> None:
    toy, preset = made(kind)
    parts = toy.kind.parts(toy)
    assert parts.name == "planted"
    parts.kind.check(parts)
    planted = model.load(parts, model.train([parts], "cpu")[0])
    inputs = [each.draw(COUNT, torch.Generator().manual_seed(7)) for each in (preset, planted)]
    assert torch.equal(*inputs)
    assert torch.equal(preset.activations(inputs[0], ""), planted.activations(inputs[0], ""))  # type: ignore[attr-defined]
    assert preset.cells == planted.cells and np.array_equal(preset.chance, planted.chance)  # type: ignore[attr-defined]


def test_the_listing_says_which_parts_a_preset_is_made_of() -> None:
    assert "toy=planted toy.one_of=all" in call("toys", "exclusive").out
    assert "same as" not in call("toys", "planted").out
