"""How much is left to learn: by how much, relative to its loss, twice the steps would still lower an SAE's loss.

An example: after 6,000 steps the loss is 3.05, and its curve foretells 2.97 after 12,000. The plateau is .025: the SAE
is still moving.

The curve is taken for the sum of two parts. One falls with the training done so far, τ, in steps at the full learning
rate: a step at half the rate counts for half. The other is the noise of the steps, in proportion to the rate; it is
gone where the schedule has taken the rate to zero, in a longer run as in this. So loss = a + b·g(τ) + d·rate with
d ≥ 0, and twice the steps gain b·(g(τ) − g(2τ)). It is fitted by least squares to the last one and a half octaves of τ,
where only steps at the final coefficient count. For g there are three families:

- a power, τ^−c (−ln τ for c = 0): ever slower, without an end in sight;
- an exponential, e^(−τ/τ₀): slowing down to an end;
- a Hill curve, 1/(1 + (τ/τ₀)^p): a fall whose steepest part is over.

What each foretells counts by its likelihood, so that no one law is believed where the curve is full of noise. A fall
that has not begun, such as a latent that splits for the first time, no curve foretells.

Held against what twice the steps did (L1 and √, from clusters and random directions; small toy, width 136; 1,500,
3,000 and 6,000 steps): eleven of twelve SAEs still moved, gaining .031 to .323, and were foretold .025 to .593; the
twelfth, in the last bend of a steep fall, gained .008 and was foretold .117. At 12,000 steps √ had settled: .001 and
.000.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

# A point whose loss would fall by more than this share is still moving.
STILL_MOVING = 0.02
# Rows of the curve that a fit needs, and over how many octaves it goes.
LEAST_ROWS, OCTAVES = 8, 1.5

Array = npt.NDArray[np.float64]
Law = Callable[[Array], Array]


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
    if not (lr.max() > 0 and loss[-1] > 0):
        return math.nan
    rate = lr / lr.max()
    rate = (rate + np.concatenate([[0.0], rate[:-1]])) / 2  # of the steps since the row before, on average
    done = np.diff(step, prepend=0.0) * rate
    end = float(done.sum())
    middle = (done.cumsum() - done / 2) / end
    fit = (middle >= 2**-OCTAVES) & np.isclose(coefficient, coefficient[-1]) & np.isfinite(loss)
    if fit.sum() < LEAST_ROWS:
        return math.nan
    return still_to_gain(middle[fit], loss[fit], rate[fit]) / float(loss[-1])


def still_to_gain(time: Array, loss: Array, rate: Array) -> float:
    """By how much the losses are likely to fall from time 1 to time 2: the mean over all laws, each with the weight
    (its squared error)^(−n/2), the likelihood of n rows with normal noise."""
    errors, gains = [], []
    for law in laws():
        fall, error = _fit(law(time), loss, rate)
        errors.append(error)
        gains.append(fall * float(law(np.array(1.0)) - law(np.array(2.0))))
    # What differs by less than the batches' noise ever is makes no law likelier than another.
    error = np.maximum(errors, len(loss) * (3e-4 * np.abs(loss).max()) ** 2)
    return float(np.average(gains, weights=(error / error.min()) ** (-len(loss) / 2)))


def laws() -> Iterator[Law]:
    """Shapes that a loss may fall along."""
    yield lambda time: -np.log(time)
    for c in np.arange(1, 33) / 8:
        yield functools.partial(_power, c)
    for start in 2 ** (np.arange(-16, 5) / 4):
        yield functools.partial(_exponential, start)
    for middle, p in itertools.product(2 ** (np.arange(-8, 1) / 4), (2, 3, 4, 6, 8)):
        yield functools.partial(_hill, middle, p)


def _power(c: float, time: Array) -> Array:
    return time**-c


def _exponential(start: float, time: Array) -> Array:
    return np.exp(-time / start)


def _hill(middle: float, p: int, time: Array) -> Array:
    return 1 / (1 + (time / middle) ** p)


def _fit(shape: Array, loss: Array, rate: Array) -> tuple[float, float]:
    """b and the squared error of a + b·shape + d·rate, d ≥ 0: noise does not lower a loss."""
    design = np.stack([np.ones_like(loss), shape, rate], axis=1)
    found, *_ = np.linalg.lstsq(design, loss, rcond=None)
    if found[2] < 0:
        design = design[:, :2]
        found, *_ = np.linalg.lstsq(design, loss, rcond=None)
    return float(found[1]), float(np.square(design @ found - loss).sum())
