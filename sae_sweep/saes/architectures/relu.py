"""ReLU: every positive pre-activation fires, and a penalty keeps them few."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.architectures import BY_PENALTY, Architecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters


def relu(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = max(pre, 0)."""
    return pre.relu()


register(
    Architecture(
        name="relu",
        activate=relu,
        description="ReLU with a sparsity penalty",
        formula="max(pre, 0)",
        prior=BY_PENALTY,
        source="arXiv 2309.08600",
        compiled=("cpu", "cuda"),
        listed=True,
    )
)
