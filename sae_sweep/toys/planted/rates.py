"""A number for each feature: its chance, or what its magnitude is multiplied by."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from sae_sweep.config.keys import show
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.planted.text import call, number, words

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

# What leaves magnitudes as they are.
NO_SCALES = "1"
# Laws of two numbers each; what they mean is said by `read_rates`.
LAWS = ("linear", "zipf", "loguniform")


def read_rates(text: str, count: int, generator: torch.Generator | None) -> list[float]:
    """The chance of each feature. UserError in one line.

    `0.05`: of every feature; `0.25, 0.05, 0.05`: of each; `linear(a, b)`: evenly from a to b; `zipf(a, s)`: a/i^s of
    the i-th, from 1; `loguniform(a, b)`: drawn from `generator` (None: only checked, and the middle is returned).
    """
    return _numbers("toy.rates", text, count, generator, most=1)


def read_scales(text: str, count: int, generator: torch.Generator | None) -> list[float]:
    """What each feature's magnitude is multiplied by, written as rates are."""
    return _numbers("toy.scales", text, count, generator, most=math.inf)


def _numbers(key: str, text: str, count: int, generator: torch.Generator | None, most: float) -> list[float]:
    at_most = f" and at most {most:g}" if math.isfinite(most) else ""
    if re.match(r"\s*[a-z]", text):
        name, given = call(key, text)
        if name not in LAWS or len(given) != 2:
            raise UserError(f"{key} cannot be {show(text)}: one number, one for each, or {', '.join(LAWS)}(a, b)")
        if name == "loguniform" and not 0 < given[0] <= given[1] <= most:
            raise UserError(f"{key}={text}: from the lower to the higher, above 0{at_most}")
        found = _law(name, given[0], given[1], count, generator)
    else:
        numbers = [number(key, word) for word in words(text)]
        if len(numbers) not in (1, count):
            raise UserError(f"{key}={text}: {len(numbers)} {key[4:]} for toy.features={count}")
        found = numbers * count if len(numbers) == 1 else numbers
    if not all(0 < each <= most for each in found):
        raise UserError(f"{key}={text}: each must be above 0{at_most}")
    return found


def _law(name: str, a: float, b: float, count: int, generator: torch.Generator | None) -> list[float]:
    if name == "linear":
        return [a + (b - a) * i / max(1, count - 1) for i in range(count)]
    if name == "zipf":
        return [a * i**-b for i in range(1, count + 1)]
    drawn = [0.5] * count
    if generator is not None:
        drawn = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
    return [a * (b / a) ** each for each in drawn]
