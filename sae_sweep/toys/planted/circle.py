"""Circle: many close discrete features (spread 0), a manifold cut into pieces (spread 1), or what lies between.

One feature that is always there and is a circle of d_model / 2 harmonics, all numbers of an activation. Where there are
more places than numbers, neighbours are alike. The cell m is the nearest place.
"""

from __future__ import annotations

from typing import Any

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting, register
from sae_sweep.toys.planted import features
from sae_sweep.toys.planted.planted import preset


def _parts(toy: Toy) -> dict[str, Any]:
    circle = f"0:circle({toy.features}, {toy.spread!r}, {toy.d_model // 2})"
    return {"features": 1, "rates": "1", "manifolds": circle}


def _check(toy: Toy) -> None:
    if toy.d_model % 2:
        raise UserError(f"toy=circle has a sine for every cosine: toy.d_model={toy.d_model} must be even")


register(
    preset(
        _parts,
        name="circle",
        description="many close discrete features, a manifold cut into pieces, or what lies between",
        source="LessWrong comment EkibeZomncsPxfYwu (P8)",
        settings={
            **features(32, 8),
            "spread": Setting(
                0.0,
                "how far inputs lie from the features' places on the circle: 0: at them; 1: anywhere on the circle "
                "alike",
                ge=0,
                le=1,
            ),
        },
        check=_check,
    )
)
