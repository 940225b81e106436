"""Exclusive features: exactly one at a time, all equally likely, which is the cell m."""

from __future__ import annotations

from sae_sweep.registry import register
from sae_sweep.toys.planted import MAGNITUDES, features
from sae_sweep.toys.planted.planted import preset

register(
    preset(
        lambda toy: {"features": toy.features, "one_of": "all", "magnitude": toy.magnitudes},
        name="exclusive",
        description="one feature at a time, all equally likely",
        source="LessWrong comment EkibeZomncsPxfYwu (P6)",
        settings={**features(), "magnitudes": MAGNITUDES},
        defaults={"magnitudes": "exponential"},
    )
)
