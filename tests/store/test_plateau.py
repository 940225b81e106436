"""What twice the steps would still gain, on curves whose law is known, and on the curve of an SAE that ran on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sae_sweep.store.plateau import STILL_MOVING, plateau, still_to_gain

STEPS = 6000


def curve(law: Callable[[float], float], noise: float = 0.0, steps: int = STEPS, **constant: Any) -> list[dict]:
    """Rows as sweep/pack.py keeps them. The rate falls to zero over the last fifth, as the default schedule has it; the
    loss is what the law says of the training done, and what the steps shake it by, a tenth of it at the full rate."""
    generator = np.random.default_rng(0)
    ends = sorted({max(25, round(steps * 2 ** (-k / 16) / 25) * 25) for k in range(130)})
    step = np.arange(1, steps + 1)
    rate = np.minimum(1.0, 5 * (steps - step) / steps)
    shaken = np.array([law(done) for done in rate.cumsum()]) + 0.1 * law(0.9 * steps) * rate
    rows = []
    for before, end in zip([0, *ends], ends, strict=False):
        loss = float(shaken[before:end].mean()) * (1 + noise * generator.normal())
        rows.append({"step": end, "loss": loss, "lr": 3e-3 * rate[end - 1], "coefficient": 0.5})
    return [{**row, **constant} for row in rows]


LAWS: dict[str, Callable[[float], float]] = {
    "power": lambda t: 2 + 40 * t**-0.5,
    "steep power": lambda t: 2 + 3e5 * t**-1.5,
    "power to nothing": lambda t: 40 * t**-0.3,
    "logarithm": lambda t: 12 - math.log(t),
    "exponential": lambda t: 2 + 5 * math.exp(-t / 2000),
    "slow exponential": lambda t: 2 + 5 * math.exp(-t / 8000),
    "a fall mostly over": lambda t: 2 + 5 / (1 + (t / 2700) ** 3),
    "a fall that is over": lambda t: 2 + 5 / (1 + (t / 1500) ** 6),
    "flat": lambda t: 3.0,
}


def truth(law: str) -> float:
    """What twice the steps gain: they do as much as nine tenths of them at the full rate."""
    before, after = LAWS[law](0.9 * STEPS), LAWS[law](1.8 * STEPS)
    return (before - after) / before


@pytest.mark.parametrize("law", LAWS)
def test_it_is_what_the_law_says(law: str) -> None:
    assert plateau(curve(LAWS[law])) == pytest.approx(truth(law), rel=0.25, abs=0.002)


@pytest.mark.parametrize("law", LAWS)
def test_noise_does_not_hide_whether_it_moves(law: str) -> None:
    found = plateau(curve(LAWS[law], noise=0.003))
    assert found == pytest.approx(truth(law), rel=0.35, abs=0.01)
    assert (found > STILL_MOVING) == (truth(law) > STILL_MOVING)


def test_a_loss_that_rises_has_a_negative_plateau() -> None:
    assert plateau(curve(lambda t: 2 + 0.1 * math.log(t))) == pytest.approx(-0.1 * math.log(2) / 2.85, rel=0.35)


def test_the_fall_of_the_rate_is_not_taken_for_learning() -> None:
    """Of a flat loss that falls by a tenth with the rate: whoever does not know of the rate sees it move."""
    rows = curve(LAWS["flat"])
    assert plateau(rows) == pytest.approx(0, abs=1e-3)
    assert plateau([{**row, "lr": 1.0} for row in rows]) > STILL_MOVING


def test_rows_before_the_coefficient_is_whole_do_not_count() -> None:
    rows = curve(LAWS["power"])
    warming = [{**row, "loss": 50.0, "coefficient": 0.1} if row["step"] < STEPS / 2 else row for row in rows]
    assert plateau(warming) == pytest.approx(plateau(rows), rel=0.2)


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
    time = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    # 2/t: 2 at the end, 1 at twice that; and the rate adds 1 for as long as it lasts.
    rate = np.array([1, 1, 1, 1, 1, 0.8, 0.4, 0.0])
    assert still_to_gain(time, 3 + 2 / time + rate, rate) == pytest.approx(1.0, rel=1e-4)
