"""How much is left to learn: by how much, relative to its loss, twice the steps would still lower an SAE's loss.

An example: after 6,000 steps the loss is 3.07, and it has been falling as a + b·t^−0.6. At twice the steps the same law
gives 2.93, so the plateau is 0.046, and the SAE is still moving.

Only the part of the curve at the full learning rate and the full coefficient is extrapolated. While the learning rate
falls to zero at the end, the loss falls for that reason, and it would fall as much at the end of a longer run: so what
doubling the steps gains is what the law gains from the end of the full rate to twice as late.

The last two octaves of that part are fitted by least squares with a power of the step, a + b·t^−c (a + b·ln t for
c = 0), and with an exponential, a + b·e^(−t/τ), for a range of c and τ. What each foretells counts by its likelihood,
so that no one law is believed where the curve is full of noise. All this holds for losses that slow down; a drop that
has not begun yet, such as a latent that splits for the first time, no curve foretells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# A point whose loss would fall by more than this share is still moving.
STILL_MOVING = 0.02
# Rows of the curve that a fit needs, and how long, in octaves of the step, the part of the curve is that it is made to.
LEAST_ROWS, OCTAVES = 6, 2
_POWERS = [c / 8 for c in range(33)]
# Of an exponential, τ over the step at the end.
_TIMES = [2 ** (k / 4) for k in range(-16, 5)]

Array = npt.NDArray[np.float64]


def plateau(curve: Sequence[Mapping[str, Any]]) -> float:
    """By how much, relative to its last loss, twice the steps would lower the loss; negative if it has been rising.

    curve: rows of `step`, `loss`, `lr` and `coefficient`, where the loss is the mean since the row before. NaN where
    that is not known, or fewer than LEAST_ROWS rows are left to fit.
    """
    if len(curve) < LEAST_ROWS or any(row.get(key) is None for row in curve for key in ("lr", "coefficient")):
        return math.nan
    step, loss, lr, coefficient = (
        np.array([row[key] for row in curve], dtype=np.float64) for key in ("step", "loss", "lr", "coefficient")
    )
    # A row is the mean of what lies behind it.
    middle = (step + np.concatenate([[0.0], step[:-1]])) / 2
    full = np.isclose(lr, lr.max()) & np.isclose(coefficient, coefficient[-1]) & np.isfinite(loss)
    if full.any():
        full &= middle >= step[full][-1] / 2**OCTAVES
    if full.sum() < LEAST_ROWS or not loss[-1] > 0:
        return math.nan
    return still_to_gain(middle[full], loss[full], step[full][-1]) / float(loss[-1])


def still_to_gain(step: Array, loss: Array, end: float) -> float:
    """By how much the losses are likely to fall from step `end` to twice that: the mean over all laws, each with the
    weight (its squared error)^(−n/2), the likelihood of n rows with normal noise."""
    time = step / end
    errors, gains = [], []
    for shape, gain in _laws(time):
        design = np.stack([np.ones_like(time), shape], axis=1)
        (level, fall), *_ = np.linalg.lstsq(design, loss, rcond=None)
        errors.append(np.square(level + fall * shape - loss).sum())
        gains.append(fall * gain)
    # Below what float32 losses can tell, no law is likelier than another.
    error = np.maximum(errors, len(loss) * (1e-7 * np.abs(loss).max()) ** 2)
    weight = (error / error.min()) ** (-len(loss) / 2)
    return float(np.average(gains, weights=weight))


def _laws(time: Array) -> list[tuple[Array, float]]:
    """Shapes that a loss may fall along, and by how much each falls from time 1 to time 2."""
    powers = [(time**-c, 1 - 2**-c) if c else (-np.log(time), math.log(2)) for c in _POWERS]
    return powers + [(np.exp(-time / tau), math.exp(-1 / tau) - math.exp(-2 / tau)) for tau in _TIMES]
