"""Independent features: each comes and goes by itself; with more features than d_model, superposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting, register
from sae_sweep.toys.planted import MAGNITUDES, Synthetic, features, planted_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Independent(Synthetic):
    """Each feature is active with the chance `rate`. No cells: any features come together."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, features]."""
        shape = count, self.toy.features
        active = self._uniform(shape, generator) < self.toy.rate
        return active * self._magnitudes(shape, generator)


def _no_classes(partition: str, toy: Toy) -> int:
    raise UserError(f"${{cells:{partition}}}: toy=independent has no cells, its features come in any combination")


register(
    planted_kind(
        lambda: Independent,
        _no_classes,
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
