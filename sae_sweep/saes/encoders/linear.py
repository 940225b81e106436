"""Linear: W_enc·x + b_enc."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.architectures import pre_activations
from sae_sweep.saes.encoders import Encoder

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config import settings
    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.encoders import Activate
    from sae_sweep.saes.parameters import Parameters


def _infer(x: Tensor, sae: Parameters, activate: Activate, chosen: settings.Encoder, of_sae: Sae) -> Tensor:
    return pre_activations(x, sae)


register(
    Encoder(
        name="linear",
        infer=_infer,
        description="a row and a bias of each latent",
        formula="pre = W_enc·x + b_enc",
        source="arXiv 2309.08600",
        products=lambda chosen, of_sae, d: 1.0,
        is_product=lambda of_sae: True,
        suits=lambda architecture: True,
        compiles=lambda point, device: True,
    )
)
