"""From activations to codes: an encoder a file, chosen by `encoder=`.

An encoder finds the pre-activations that the architecture makes codes of. A linear one has W_enc·x + b_enc. One that
iterates has these too, as its first step, and corrects them by what its codes so far reconstruct: it asks the
architecture for codes at each step, so that TopK keeps k latents in every one of them.

What is trained may be other numbers than are used: encoders that are tied to the decoder use it for W_enc. An SAE is
measured and stored as it is used, and `infer` gives the same codes for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.registry import Kind, get
from sae_sweep.saes.limits import UNROLLED, UNROLLED_CHOSEN
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes import revival_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config import settings
    from sae_sweep.config.settings import Point, Sae
    from sae_sweep.saes.architectures import Architecture
    from sae_sweep.saes.parameters import Parameters

    Activate = Callable[[Tensor], Tensor]


def _nothing(chosen: settings.Encoder, width: int, d: int) -> Mapping[str, tuple[int, ...]]:
    return {}


def _as_begun(sae: Parameters, point: Point, generator: torch.Generator) -> Parameters:
    return sae


def _as_revived(sae: Parameters, chosen: settings.Encoder, norm: float) -> Parameters:
    return sae


@dataclass(frozen=True, kw_only=True)
class Encoder(Kind):
    """`infer(x [b, d], sae, activate, chosen, settings)`: pre-activations [..., b, width]; what else it has is below.

    activate: from pre-activations to codes, by the architecture; chosen: the encoder's settings; settings: the SAE's
    formula: for people
    tensors(chosen, width, d): what it trains beside W_enc and b_enc, name → shape; rows: those of a row a latent
    completed(sae, point, generator): an init made one of its own, on the CPU
    revived(sae, chosen, norm): likewise of latents that start again with unit decoder rows and encoder rows `norm`
    times these
    effective: from what is trained to what is used
    products(chosen, settings, d): its work for an input and a latent, where 1 is that of a linear encoder and decoder
    suits(architecture): whether the two go together
    is_product(settings): whether its codes are those that the architecture makes of W_enc·x + b_enc
    compiles(point, device): whether the compiled steps of a device know it, beside a recipe that they know
    """

    family = "encoder"
    infer: Callable[[Tensor, Parameters, Activate, settings.Encoder, Sae], Tensor]
    formula: str
    tensors: Callable[[settings.Encoder, int, int], Mapping[str, tuple[int, ...]]] = _nothing
    rows: tuple[str, ...] = ()
    completed: Callable[[Parameters, Point, torch.Generator], Parameters] = _as_begun
    revived: Callable[[Parameters, settings.Encoder, float], Parameters] = _as_revived
    effective: Callable[[Parameters], Parameters] | None = None
    products: Callable[[settings.Encoder, Sae, int], float]
    suits: Callable[[Architecture], bool]
    is_product: Callable[[Sae], bool] = lambda settings: False
    compiles: Callable[[Point, str], bool] = lambda point, device: False


def encoder_of(name: str) -> Encoder:
    """An encoder. KeyError if there is none of that name."""
    encoder: Encoder = get("encoder", name)
    return encoder


def has_no_rows_of_its_own(architecture: Architecture) -> bool:
    """Whether an architecture leaves it to the encoder which rows it has: all but `tied`."""
    return architecture.effective is None


def compiles_by_tiles(point: Point, device: str) -> bool:
    """Whether the compiled step of encoders that iterate or have a hidden layer trains a point (on a CPU, by
    kernels/cpu/unrolled_step.py): of ReLU and TopK, without AuxK, under penalties that weigh no latents by how often
    they win, and where the codes of all steps fit."""
    encoder, sae = point.encoder, point.sae
    within = (1 + encoder.get("steps", 0)) * sae.width <= UNROLLED and encoder.get("hidden", 0) <= UNROLLED
    chosen = sae.architecture == "relu" or (sae.architecture == "topk" and sae.k <= UNROLLED_CHOSEN)
    plain = not revival_of(point.training).auxiliary and not formula_of(point.penalty).weighs
    return device == "cpu" and within and chosen and plain
