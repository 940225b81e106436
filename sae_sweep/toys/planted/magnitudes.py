"""How strong an active feature is: laws of its magnitude, with their means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.config.keys import nearest, show
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.planted.text import call

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Magnitude:
    """How strong an active feature is.

    arguments: their defaults, in order; draw(arguments, shape, generator) -> Tensor; mean(*arguments): exact
    right(*arguments): whether they make sense
    """

    arguments: tuple[float, ...]
    draw: Callable[[Sequence[float], tuple[int, ...], torch.Generator], Tensor]
    mean: Callable[..., float]
    right: Callable[..., bool]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers uniform on (0, 1]."""
    return 1 - torch.rand(shape, generator=generator, device=generator.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _folded_mean(center: float, spread: float) -> float:
    """E|N(center, spread²)|."""
    ratio = center / spread
    return spread * math.sqrt(2 / math.pi) * math.exp(-(ratio**2) / 2) + center * math.erf(ratio / math.sqrt(2))


MAGNITUDES: Mapping[str, Magnitude] = {
    "constant": Magnitude(
        (1.0,),
        lambda of, shape, generator: torch.full(shape, of[0], device=generator.device),
        lambda value: value,
        lambda value: value > 0,
    ),
    "uniform": Magnitude(
        (1.0,),
        lambda of, shape, generator: 2 * of[0] * _uniform(shape, generator),
        lambda mean: mean,
        lambda mean: mean > 0,
    ),
    "exponential": Magnitude(
        (1.0,),
        lambda of, shape, generator: -of[0] * _uniform(shape, generator).log(),
        lambda mean: mean,
        lambda mean: mean > 0,
    ),
    # P(magnitude > x) = (1 + x/s)^-shape has the mean s / (shape - 1).
    "lomax": Magnitude(
        (3.0, 1.0),
        lambda of, shape, generator: of[1] * (of[0] - 1) * (_uniform(shape, generator) ** (-1 / of[0]) - 1),
        lambda shape, mean: mean,
        lambda shape, mean: shape > 1 and mean > 0,
    ),
    "lognormal": Magnitude(
        (0.0, 0.25),
        lambda of, shape, generator: (of[0] + of[1] * _normal(shape, generator)).exp(),
        lambda mu, sigma: math.exp(mu + sigma**2 / 2),
        lambda mu, sigma: sigma > 0,
    ),
    "folded": Magnitude(
        (1.0, 0.15),
        lambda of, shape, generator: (of[0] + of[1] * _normal(shape, generator)).abs(),
        _folded_mean,
        lambda center, spread: spread > 0,
    ),
    # The linear representation bench's (arXiv 2512.05534).
    "shifted": Magnitude(
        (1.0, 1.0),
        lambda of, shape, generator: of[0] - of[1] * _uniform(shape, generator).log(),
        lambda least, mean: least + mean,
        lambda least, mean: least >= 0 and mean > 0,
    ),
}


def read_magnitude(text: str) -> tuple[Magnitude, list[float]]:
    """`name` or `name(arguments)` of MAGNITUDES: which one, and its arguments. UserError in one line."""
    name, given = call("toy.magnitude", text)
    if name not in MAGNITUDES:
        raise UserError(f"toy.magnitude cannot be {show(text)}{nearest(name, MAGNITUDES)}")
    magnitude = MAGNITUDES[name]
    arguments = [*given, *magnitude.arguments[len(given) :]]
    if len(given) > len(magnitude.arguments) or not magnitude.right(*arguments):
        spelled = ", ".join(f"{argument:g}" for argument in magnitude.arguments)
        raise UserError(f"toy.magnitude={text}: its arguments are out of range or too many (such as {name}({spelled}))")
    return magnitude, arguments
