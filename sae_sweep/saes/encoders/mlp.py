"""MLP: a hidden layer beside the linear encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import pre_activations
from sae_sweep.saes.encoders import Encoder, compiles_by_tiles, has_no_rows_of_its_own

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from sae_sweep.config import settings
    from sae_sweep.config.settings import Point, Sae
    from sae_sweep.saes.encoders import Activate
    from sae_sweep.saes.parameters import Parameters
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

# A product of the hidden layer beside one of a latent, whose codes also pass an activation and a penalty: seen.
PRODUCT = 0.35


def _infer(x: Tensor, sae: Parameters, activate: Activate, chosen: settings.Encoder, of_sae: Sae) -> Tensor:
    hidden = (x @ sae.W_hidden.transpose(-1, -2) + sae.b_hidden[..., None, :]).relu()
    return pre_activations(x, sae) + hidden @ sae.W_out.transpose(-1, -2)


def _tensors(chosen: settings.Encoder, width: int, d: int) -> dict[str, tuple[int, ...]]:
    return {"W_hidden": (chosen.hidden, d), "b_hidden": (chosen.hidden,), "W_out": (width, chosen.hidden)}


def _completed(sae: Parameters, point: Point, generator: torch.Generator) -> Parameters:
    """Hidden rows uniform on the sphere, which nothing reads yet: it begins as the linear encoder of its init."""
    hidden, (width, d) = point.encoder.hidden, sae.W_dec.shape
    rows = F.normalize(torch.randn(hidden, d, generator=generator), dim=1)
    return sae.replace(W_hidden=rows, b_hidden=torch.zeros(hidden), W_out=torch.zeros(width, hidden))


def _revived(sae: Parameters, chosen: settings.Encoder, norm: float) -> Parameters:
    return sae.replace(W_out=sae.W_dec.new_zeros(len(sae.W_dec), chosen.hidden))


def _products(chosen: settings.Encoder, of_sae: Sae, d: int) -> float:
    return 1 + PRODUCT * chosen.hidden * (d + of_sae.width) / (2 * d * of_sae.width)


register(
    Encoder(
        name="mlp",
        infer=_infer,
        description="a hidden layer beside the linear encoder",
        formula="pre = W_enc·x + b_enc + W_out·max(W_hidden·x + b_hidden, 0)",
        source="arXiv 2411.13117, where nothing goes past the hidden layer",
        settings={"hidden": Setting(256, "how many units the hidden layer has", ge=1)},
        tensors=_tensors,
        rows=("W_out",),
        completed=_completed,
        revived=_revived,
        products=_products,
        suits=has_no_rows_of_its_own,
        compiles=compiles_by_tiles,
        version=2,
    )
)
