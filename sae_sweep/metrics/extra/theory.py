"""What a code costs at best, whatever encoder would have to find it: where splitting pays, in theory.

A latent for each class of a partition, one at a time, is one problem of the decoder's bias (`least_loss_apart`).

Planted parents and modifiers of constant magnitude are as many classes as there are combinations, a point each. A code
says which latents an input of each class may use: the split one has a latent for each combination, the shared one for
each parent and each modifier. Its least loss is over all decoders and activations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_sweep.config.settings import Distribution, Penalty, Point, Toy
from sae_sweep.metrics.partition_variance import Classes
from sae_sweep.saes.penalties import formula_of, penalty_value
from sae_sweep.toys import model

# Adam's steps from each start, its first rates in units of an activation's usual length, and the classes that its
# bias starts from: where a penalty is not convex there are many minima.
STEPS, RATES, STARTS = 500, (0.1, 0.03), 6
# Lengths, and activations for each, among which the best activation of a latent by itself is looked up.
LENGTHS = 2048


@dataclass(frozen=True)
class Costs:
    """The least loss of the split code and of the shared one, as the results table's `loss`."""

    split: float
    shared: float


def compare(points: Iterable[Point]) -> dict[str, Costs]:
    """Both codes' costs at the width, penalty and coefficient of each point that has them, by its id.

    Where the width is too small for a code, of its most used latents.
    """
    problems: dict[tuple[Toy, Penalty], list[Point]] = defaultdict(list)
    for point in points:
        if point.toy.name == "parents" and point.toy.magnitudes == "constant" and point.penalty.name != "none":
            problems[_toy(point.toy), point.penalty.replace(coefficient=0.0)].append(point)
    found = {}
    for (toy, penalty), of_problem in problems.items():
        widths, coefficients = (
            sorted({value(point) for point in of_problem})
            for value in (lambda point: point.sae.width, lambda point: point.penalty.coefficient)
        )
        means, chance = classes(toy)
        losses = [least_losses(means, chance, code, widths, penalty, coefficients) for code in codes(toy, chance)]
        for point in of_problem:
            place = widths.index(point.sae.width), coefficients.index(point.penalty.coefficient)
            found[point.id] = Costs(*(float(loss[place]) for loss in losses))
    return found


def _toy(toy: Toy) -> Toy:
    """Toys whose directions are orthonormal differ in nothing that a code costs."""
    features = toy.features + toy.modifiers * (1 + toy.features)
    return toy.replace(seed=0) if features <= toy.d_model else toy


def classes(toy: Toy) -> tuple[Tensor, Tensor]:
    """Each combination's activation [classes, d], centred and scaled as SAEs see it, and its chance [classes]."""
    planted = model.load(toy, model.train([toy], "cpu")[0])
    chance = torch.from_numpy(planted.population(Distribution("uniform"), "cpu").chance)
    parent, modifier = _combinations(toy)
    inputs = torch.cat([parent, modifier * toy.modifier_magnitude], 1).float()
    x = planted.activations(inputs, "").double()
    x = x - chance @ x
    return x * math.sqrt(x.shape[1] / float(chance @ x.square().sum(1))), chance


def codes(toy: Toy, chance: Tensor) -> tuple[Tensor, Tensor]:
    """The split and the shared code [classes, latents] bool: who may use what, the most used latents first."""
    both = torch.eye(len(chance)), torch.cat(_combinations(toy), 1).double()
    split, shared = (code[:, torch.argsort(chance @ code.double(), descending=True, stable=True)] > 0 for code in both)
    return split, shared


def _combinations(toy: Toy) -> tuple[Tensor, Tensor]:
    """One-hot parent [classes, parents] and modifier [classes, modifiers], 0 for none, of every class."""
    combination = torch.arange(toy.features * (toy.modifiers + 1))
    modifier = F.one_hot(combination % (toy.modifiers + 1), toy.modifiers + 1)
    return F.one_hot(combination // (toy.modifiers + 1), toy.features), modifier[:, 1:]


def least_losses(
    means: Tensor,
    chance: Tensor,
    code: Tensor,
    widths: Sequence[int],
    penalty: Penalty,
    coefficients: Sequence[float],
) -> Tensor:
    """The least E‖x − x̂‖² + coefficient · E penalty with only a code's first latents there, at each of `widths`.

    means [classes, d], chance [classes], code [classes, latents] bool -> [widths, coefficients] float64. The least
    that descent finds from all its starts: at least what there is, and never more than a smaller width has.
    """
    size, heaviest = math.sqrt(means.shape[1]), means[torch.argsort(chance, descending=True, stable=True)[:STARTS]]
    there = torch.arange(code.shape[1]) < torch.tensor(widths)[:, None]
    # [width, coefficient, start, class, latent]
    mask = (there[:, None, None, None, :] & code).expand(-1, len(coefficients), len(heaviest) + 1, -1, -1).double()
    bias = torch.cat([torch.zeros_like(means[:1]), heaviest]).expand(*mask.shape[:3], -1)
    users = chance[:, None] * mask
    decoder = users.mT @ (means - bias[..., None, :]) / users.sum(-2).clamp_min(1e-12)[..., None]
    coefficient = torch.tensor(coefficients, dtype=torch.float64)[:, None, None]

    def losses(bias: Tensor, decoder: Tensor, activations: Tensor) -> Tensor:
        contributions = activations.relu() * mask
        error = contributions @ F.normalize(decoder, dim=-1) + bias[..., None, :] - means
        cost = penalty_value(formula_of(penalty), contributions, penalty.get("scale", 1.0), penalty.last_p)
        return (error.square().sum(-1) + coefficient * cost) @ chance

    found = [_descend(losses, (bias, decoder + 1e-6, mask * size), rate * size) for rate in RATES]
    return torch.minimum(*found).amin(-1).cummin(0).values


def _descend(losses: Callable[..., Tensor], start: Sequence[Tensor], rate: float) -> Tensor:
    """What Adam makes of problems that share nothing; each one's last loss."""
    parameters = [each.clone().requires_grad_() for each in start]
    adam = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, STEPS)
    for _ in range(STEPS):
        adam.zero_grad()
        losses(*parameters).sum().backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        return losses(*parameters)


def least_loss_apart(classes: Classes, penalty: Penalty) -> float:
    """The least E‖x − x̂‖² + coefficient · E penalty with one latent for each class, the same on all of it.

    Over all decoders and activations. An SAE may end below, where a latent's activation tells more than its class.
    """
    means, chance = classes.means, classes.chance
    reach = 2 * float(means.norm(dim=1).max())
    lengths = torch.linspace(0, reach, LENGTHS, dtype=torch.float64)
    cost = penalty.coefficient * penalty_value(
        formula_of(penalty), lengths[:, None], penalty.get("scale", 1.0), penalty.last_p
    )
    best = ((lengths[:, None] - lengths) ** 2 + cost).argmin(1)

    def loss(bias: Tensor) -> Tensor:
        length = ((means - bias).square().sum(1) + 1e-12).sqrt()
        # A latent lies along what is left of its class; how its best activation moves changes nothing at first order.
        at = best[(length.detach() / reach * (LENGTHS - 1)).round().long().clamp_max(LENGTHS - 1)]
        return ((length - lengths[at]) ** 2 + cost[at]) @ chance

    found = []
    for start in (torch.zeros_like(means[0]), means[chance.argmax()]):
        bias = start.clone().requires_grad_()
        descent = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

        def evaluate(bias: Tensor = bias, descent: torch.optim.LBFGS = descent) -> Tensor:
            descent.zero_grad()
            value = loss(bias)
            value.backward()
            return value

        descent.step(evaluate)
        found.append(float(loss(bias).detach()))
    return classes.within + min(found)
