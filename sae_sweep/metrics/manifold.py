"""Whether a reconstruction holds the place on a manifold: R² of the best affine map from x̂ to the true coordinates.

An example: an SAE of points on a circle that shrinks all of them by half has an FVU of .25, and R² of 1: an affine map
undoes that. One that gives every arc one point has lost the place within an arc, and no map brings it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def manifold(measured: Measured) -> dict[str, Value]:
    """`manifold_r2` on the evaluation's first inputs; null where the toy has no manifold, nan for an SAE of nan."""
    model: Any = measured.inputs.model
    if not getattr(model, "manifolds", None):
        return {"manifold_r2": None}
    chunk, sae = next(iter(measured.inputs)), measured.sae
    reconstructed = torch.cat([part.decode(sae.W_dec, sae.b_dec) for part in sae.active(chunk.x)])
    return {"manifold_r2": affine_r2(reconstructed.double(), model.coordinates(chunk.inputs))}


def affine_r2(given: Tensor, wanted: Tensor) -> float:
    """The share of the variance of `wanted` [n, c] that the best affine map of `given` [n, d] explains."""
    if not bool(given.isfinite().all()):
        return float("nan")
    given, wanted = given - given.mean(0), wanted - wanted.mean(0)
    # Through the pseudo-inverse: reconstructions may all lie in fewer directions than there are.
    fitted = given @ (torch.linalg.pinv(given.T @ given, hermitian=True) @ (given.T @ wanted))
    return 1 - float((wanted - fitted).square().sum() / wanted.square().sum())


register(
    Metric(
        name="manifold",
        description="R² of the best affine map from the reconstruction to the place on a planted manifold",
        source="this project (metrics/manifold.py)",
        columns={"manifold_r2": Column("R² of the best affine map from the reconstruction to the place on a manifold")},
        measure=manifold,
    )
)
