"""What the truth costs by an SAE's objective: the planted dictionary with the planted codes, beside the SAE itself.

An example: where 11 features are active and five latents may be, five true codes leave an error of 4.9, and an SAE that
mixes features one of 2.7. The wrong SAE has the lower loss (arXiv 2508.16560).

An SAE that may have k latents active gets of the true codes the k·b largest of all b inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from sae_sweep.toys.model import Planted
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

COLUMNS = {
    "raw_error": Column("mean squared error in the units of raw activations"),
    "truth_error": Column("the same of the planted dictionary with the planted codes"),
    "truth_loss": Column("loss of the planted dictionary with the planted codes, by the SAE's objective"),
    "truth_fvu": Column("FVU of the planted dictionary with the planted codes"),
    "truth_l0": Column("planted features active on an input, of those that the SAE's objective allows"),
}


def truth(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS; null where they have no meaning.

    raw_error: E‖x − x̂‖² of the SAE in the units of raw activations
    truth_error, truth_loss, truth_fvu, truth_l0: of the true dictionary with the true codes, on the evaluation's first
    inputs: the error in raw units, and what `loss`, `fvu` and `l0` would be. Null where there is nothing to compare by:
    of untrained SAEs, of SAEs with neither a penalty nor a count, and the loss under a penalty on shares of wins.
    """
    inputs, objective, planted = measured.inputs, measured.objective, measured.inputs.model.planted
    found: dict[str, Value] = dict.fromkeys(COLUMNS)
    error = measured.metrics["squared_error"]
    found["raw_error"] = None if error is None else error / inputs.scale**2
    if planted is None or objective is None:
        return found
    chunk = next(iter(inputs))
    codes = planted.features(chunk.inputs).double() * inputs.scale
    codes *= planted.directions.double().norm(dim=1)
    if objective.k is not None:
        codes = largest(codes, objective.k)
    x = chunk.x.double()
    squared = (x - decoded(codes, planted, inputs.mean, inputs.scale)).square().sum(1).mean()
    found["truth_error"] = float(squared) / inputs.scale**2
    found["truth_fvu"] = float(squared / (x - x.mean(0)).square().sum(1).mean())
    found["truth_l0"] = float((codes > 0).sum(1).double().mean())
    if not objective.shares:
        cost = objective.penalty_value(codes.float()).double().mean() if objective.coefficient else 0.0
        found["truth_loss"] = float(squared + objective.coefficient * cost)
    return found


def largest(codes: Tensor, k: float) -> Tensor:
    """Codes [b, features] with all but the k·b largest set to 0."""
    flat = codes.flatten()
    kept = flat.topk(min(len(flat), round(k * len(codes)))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(codes)


def decoded(codes: Tensor, planted: Planted, mean: Tensor, scale: float) -> Tensor:
    """x [b, d] float64 that codes [b, features] of unit directions stand for."""
    unit = F.normalize(planted.directions.double(), dim=1)
    return codes @ unit + (planted.origin.double() - mean.double()) * scale


register(
    Metric(
        name="truth",
        description="loss, error and L0 of the planted dictionary with the planted codes, beside the SAE's own",
        source="arXiv 2508.16560",
        columns=COLUMNS,
        measure=truth,
    )
)
