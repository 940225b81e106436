"""Independent features: each comes and goes by itself; with more features than d_model, superposition."""

from __future__ import annotations

from sae_sweep.registry import Setting, register
from sae_sweep.toys.planted import MAGNITUDES, features
from sae_sweep.toys.planted.planted import preset

register(
    preset(
        lambda toy: {"features": toy.features, "rates": repr(toy.rate), "magnitude": toy.magnitudes},
        name="independent",
        description="features that come and go each by itself; in fewer numbers than features: superposition",
        source="arXiv 2209.10652",
        settings={
            **features(),
            "magnitudes": MAGNITUDES,
            "rate": Setting(0.05, "the chance that a feature is active on an input", gt=0, le=1),
        },
        independent=True,
        defaults={"magnitudes": "exponential"},
    )
)
