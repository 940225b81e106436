"""LISTA: the steps of ISTA with encoder rows of their own, the same in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.encoders import Encoder, compiles_by_tiles
from sae_sweep.saes.encoders.ista import STEPS, first_gains, suits_iteration, unrolled

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")


def _completed(sae: Parameters, point: Point, generator: torch.Generator) -> Parameters:
    """It begins as ISTA does."""
    gains = first_gains(sae, point)
    return sae.replace(W_enc=gains[:, None] * sae.W_dec, b_enc=torch.where(gains > 0, 0.0, sae.b_enc))


register(
    Encoder(
        name="lista",
        infer=unrolled,
        description="ISTA with encoder rows of its own, that begin as the decoder's",
        formula="z ← f(z + W_enc·(x − z·W_dec) + b_enc) from z = 0, f the architecture's",
        source="Gregor & LeCun 2010; weights coupled as in Chen et al. 2018, arXiv 1808.10038",
        settings=STEPS,
        completed=_completed,
        products=lambda chosen, of_sae, d: 1.0 + chosen.steps,
        suits=suits_iteration,
        compiles=compiles_by_tiles,
        version=2,
    )
)
