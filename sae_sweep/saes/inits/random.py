"""Random directions: as the field begins, with short rows; with rows of norm 1; or with a quieter encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.architectures import architecture_of
from sae_sweep.saes.inits import Init, directions

if TYPE_CHECKING:
    import torch

    from sae_sweep.config.settings import Point
    from sae_sweep.saes.inits import Source
    from sae_sweep.saes.parameters import Parameters

# SAELens's `decoder_init_norm`.
SHORT = 0.1


def _unit(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    return directions(point.sae.width, source.covariance().shape[0], generator)


def _short(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    return _with_norms(_unit(point, source, generator), SHORT, SHORT, point)


def _scaled(point: Point, source: Source, generator: torch.Generator) -> Parameters:
    """Σ uᵢ·max(uᵢᵀx, 0) over directions u is x·width/(2d) on average, so that 2d/width of it is x."""
    sae = _unit(point, source, generator)
    width, d = sae.W_dec.shape
    return _with_norms(sae, 2 * d / width, 1.0, point)


def _with_norms(sae: Parameters, encoder: float, decoder: float, point: Point) -> Parameters:
    """Rows of these norms in place of 1, and thresholds, where there are any, as much lower as contributions are."""
    sae = architecture_of(point.sae.architecture).completed(sae, point.sae.width)
    by = {"W_enc": encoder, "W_dec": decoder, "thresholds": encoder * decoder}
    return sae.replace(**{name: factor * sae.tensors[name] for name, factor in by.items() if name in sae.tensors})


register(
    Init(
        name="random",
        make=_short,
        description=f"random directions, decoder and encoder rows of norm {SHORT}, no bias",
        source="SAELens 6 (`decoder_init_norm`); Anthropic, Circuits Updates April 2024",
        version=2,  # its rows had norm 1 before
    )
)
register(
    Init(
        name="random_unit",
        make=_unit,
        description="random directions, decoder and encoder rows of norm 1, no bias",
        source="arXiv 2309.08600",
    )
)
register(
    Init(
        name="random_scaled",
        make=_scaled,
        description="random directions, decoder rows of norm 1, encoder rows of 2d/width: of a wide SAE x̂ begins as x",
        source="this project (saes/inits/random.py)",
    )
)
