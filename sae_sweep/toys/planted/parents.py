"""Parents and modifiers: (math, physics, …) × (topology, high dimensions), or no modifier.

One parent, all equally likely, and with the chance `modifier_rate` one modifier: the cell (m, q). The features are the
parents, the modifiers' shared directions (unless interaction is 1), and the parents' own (unless it is 0), parent by
parent.
"""

from __future__ import annotations

from typing import Any

from sae_sweep.config.settings import Toy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.planted import MAGNITUDES, features
from sae_sweep.toys.planted.planted import preset


def _parts(toy: Toy) -> dict[str, Any]:
    last = toy.features + toy.modifiers - 1
    modifiers = f"{toy.features}-{last}:{toy.modifier_rate!r}:{toy.co_occurrence!r}"
    return {
        "features": last + 1,
        "one_of": f"0-{toy.features - 1}, {modifiers}",
        "interaction": toy.interaction,
        "magnitude": toy.magnitudes,
        "scales": ", ".join(["1"] * toy.features + [repr(toy.modifier_magnitude)] * toy.modifiers),
    }


register(
    preset(
        _parts,
        name="parents",
        description="one of several parents, and with some chance a modifier: is it a latent of its own, or are the "
        "parents split?",
        source="LessWrong comment EkibeZomncsPxfYwu (P4)",
        settings={
            **features(8, 32),
            "magnitudes": MAGNITUDES,
            "modifiers": Setting(2, "how many modifiers there are: features that come only with a parent", ge=1),
            "modifier_rate": Setting(0.5, "the chance that an input has a modifier beside its parent", ge=0, le=1),
            "modifier_magnitude": Setting(1.0, "mean magnitude of an active modifier; a parent's is 1", gt=0),
            "co_occurrence": Setting(
                0.0,
                "which modifiers come with which parents: 0: any with any; 1: parent i only with modifier i mod "
                "modifiers",
                ge=0,
                le=1,
            ),
            "interaction": Setting(
                0.0,
                "share of a modifier's squared norm that lies along a direction that it has with one parent alone; 0: "
                "the same direction with every parent",
                ge=0,
                le=1,
            ),
        },
    )
)
