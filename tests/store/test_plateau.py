"""What twice the steps would still gain, on curves whose law is known, and on the curve of an SAE that ran on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sae_sweep.store.plateau import plateau, still_to_gain

STEPS = 6000


def curve(law: Callable[[float], float], noise: float = 0.0, steps: int = STEPS, **constant: Any) -> list[dict]:
    """Rows as sweep/pack.py keeps them, at a rate that falls to zero over the last fifth, as the default schedule does;
    with it falls the loss, by a tenth."""
    generator = np.random.default_rng(0)
    ends = sorted({max(25, round(steps * 2 ** (-k / 16) / 25) * 25) for k in range(130)})
    rows = []
    for before, end in zip([0, *ends], ends, strict=False):
        rate = min(1.0, 5 * (steps - end) / steps)
        within = np.arange(before + 1, end + 1, dtype=float)
        mean = float(np.mean([law(step) for step in within])) * (0.9 + 0.1 * rate)
        rows.append({"step": end, "loss": mean * (1 + noise * generator.normal()), "lr": rate, "coefficient": 0.5})
    return [{**row, **constant} for row in rows]


# From the end of the full rate, at four fifths of the steps, to twice that.
LAWS = {
    "power": lambda t: 2 + 40 * t**-0.5,
    "steep power": lambda t: 2 + 3e5 * t**-1.5,
    "power to nothing": lambda t: 40 * t**-0.3,
    "logarithm": lambda t: 12 - math.log(t),
    "exponential": lambda t: 2 + 5 * math.exp(-t / 2000),
    "slow exponential": lambda t: 2 + 5 * math.exp(-t / 8000),
    "flat": lambda t: 3.0,
}


@pytest.mark.parametrize("law", LAWS)
def test_it_is_what_the_law_says(law: str) -> None:
    loss, end = LAWS[law], 0.8 * STEPS
    expected = (loss(end) - loss(2 * end)) / (0.9 * loss(STEPS))
    assert plateau(curve(loss)) == pytest.approx(expected, rel=0.15, abs=0.002)


@pytest.mark.parametrize("law", LAWS)
def test_noise_does_not_hide_whether_it_moves(law: str) -> None:
    loss, end = LAWS[law], 0.8 * STEPS
    expected = (loss(end) - loss(2 * end)) / (0.9 * loss(STEPS))
    assert plateau(curve(loss, noise=0.005)) == pytest.approx(expected, rel=0.25, abs=0.01)


def test_a_loss_that_rises_has_a_negative_plateau() -> None:
    assert plateau(curve(lambda t: 2 + 0.1 * math.log(t))) == pytest.approx(-0.1 * math.log(2) / 2.6, rel=0.2)


def test_the_fall_of_the_rate_is_not_taken_for_learning() -> None:
    """Of a flat loss that falls by a tenth with the rate: a fit to all rows would see it move."""
    rows = curve(lambda t: 3.0)
    assert plateau(rows) == pytest.approx(0, abs=1e-9)
    assert abs(plateau([{**row, "lr": 1.0} for row in rows])) > 0.01


def test_rows_before_the_coefficient_is_whole_do_not_count() -> None:
    rows = curve(LAWS["power"])
    warming = [{**row, "loss": 50.0, "coefficient": 0.1} if row["step"] < STEPS / 4 else row for row in rows]
    assert plateau(warming) == pytest.approx(plateau(rows), rel=0.1)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        curve(LAWS["power"], steps=100),  # too short
        curve(LAWS["power"], lr=None),  # trained before it was kept
        curve(LAWS["power"], loss=0.0),
        curve(LAWS["power"], loss=math.nan),
    ],
)
def test_it_is_null_where_nothing_is_known(rows: list[dict]) -> None:
    assert math.isnan(plateau(rows))


def test_a_power_law_by_hand() -> None:
    step = np.array([100.0, 200.0, 400.0, 800.0, 1600.0, 3200.0])
    # 6400/t: 2 at the end, 1 at twice that.
    assert still_to_gain(step, 3 + 6400 / step, 3200.0) == pytest.approx(1.0)
