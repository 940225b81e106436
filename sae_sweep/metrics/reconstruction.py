"""How well an SAE reconstructs, how sparsely, and what that costs the toy's own output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_sweep.metrics import fused_reconstruction
    from sae_sweep.toys.model import Model
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")
    fused_reconstruction = lazy("sae_sweep.metrics.fused_reconstruction")

# What is summed over inputs in evaluation weights, in the order of fused_reconstruction.py.
OF_INPUTS = ("weight", "sized", "ratio", "square", "error", "active", "penalty")
OF_OUTPUTS = ("ce_original", "ce_reconstructed", "ce_zero", "kl")


class Reconstruction:
    """Sums over weighted inputs; `add` batches, then read `metrics`. All sums are float64.

    x is centred and scaled (E‖x‖² = d); r = x - x̂; means are over inputs in evaluation weights.
    """

    def __init__(
        self,
        model: Model,
        site: str,
        mean: Tensor,
        scale: float,
        penalty_value: Callable[[Tensor], Tensor],
    ) -> None:
        """`mean` [d] and `scale`: x = (raw - mean)·scale. `penalty_value`: a‖d‖ [b, width] to the penalty [b]."""
        self.model, self.site, self.mean, self.scale = model, site, mean, scale
        self.penalty_value = penalty_value
        d, device = len(mean), mean.device
        self._of_inputs, self._of_outputs = np.zeros(len(OF_INPUTS)), np.zeros(len(OF_OUTPUTS))
        # By maximum: Σ w and Σ w·x.
        self._weights = torch.zeros(model.toy.maxima, dtype=torch.float64, device=device)
        self._totals = torch.zeros(model.toy.maxima, d, dtype=torch.float64, device=device)
        # Whether it is known what the toy is to predict.
        self._predicts = True
        zero = model.logits(torch.zeros(1, d, device=device), site)
        self._zero_log_p = None if zero is None else zero[0].double().log_softmax(-1)

    def add(
        self,
        x: Tensor,
        active: Tensor,
        norms: Tensor,
        x_hat: Tensor,
        maximum: Tensor,
        weight: Tensor,
        truth: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        """Count a batch, all on the toy's device.

        Inputs `x` and reconstructions `x_hat` [b, d], how many latents are `active` [b], a‖d‖ `norms` of these and
        zeros [b, ·], true `maximum` [b] int64 and evaluation `weight` [b] float64. `truth`: what the toy is to predict
        (`Model.truth`); without it there is no loss to recover. `logits`: the toy's `logits_of` x, if they are known.
        """
        penalty = self.penalty_value(norms).double()
        if x.device.type == "cpu":
            parts = _arrays(x, x_hat, active, penalty, maximum, weight)
            fused_reconstruction.add_inputs(*parts, self._of_inputs, self._weights.numpy(), self._totals.numpy())
        else:
            self._add_inputs(x, x_hat, active, penalty, maximum, weight)
        logits = self.logits(x) if logits is None else logits
        logits_hat, zero = self.logits(x_hat), self._zero_log_p
        if logits is None or logits_hat is None or zero is None:
            return
        if truth is None:
            self._predicts, truth = False, torch.zeros_like(maximum)
        if x.device.type == "cpu":
            token, target = (truth, weight.new_zeros(0, 0)) if truth.dim() == 1 else (maximum, truth.double())
            fused_reconstruction.add_outputs(
                *_arrays(logits, logits_hat, zero, token, target, weight), self._of_outputs
            )
        else:
            self._add_outputs(logits, logits_hat, zero, truth, weight)

    def _add_inputs(
        self, x: Tensor, x_hat: Tensor, active: Tensor, penalty: Tensor, maximum: Tensor, weight: Tensor
    ) -> None:
        """As `fused_reconstruction.add_inputs`, on any device."""
        size = x.double().norm(dim=1)
        ratio = torch.where(size > 0, x_hat.double().norm(dim=1) / size, 0)
        error = (x - x_hat).double().square().sum(1)
        values = torch.ones_like(weight), (size > 0).double(), ratio, size.square(), error, active.double(), penalty
        self._of_inputs += _sums(weight, values)
        # A product with the indicator of the maximum: adding up by index has no fixed order on CUDA.
        least, most = int(maximum.min()), int(maximum.max())
        of_max = F.one_hot(maximum - least, most - least + 1).double() * weight[:, None]
        self._weights[least : most + 1] += of_max.sum(0)
        self._totals[least : most + 1] += of_max.T @ x.double()

    def _add_outputs(self, logits: Tensor, logits_hat: Tensor, zero: Tensor, truth: Tensor, weight: Tensor) -> None:
        """As `fused_reconstruction.add_outputs`, on any device."""
        log_p, log_q = (each.double().log_softmax(-1) for each in (logits, logits_hat))
        values = [_cross_entropy(each, truth) for each in (log_p, log_q, zero.expand_as(log_p))]
        self._of_outputs += _sums(weight, [*values, (log_p.exp() * (log_p - log_q)).sum(1)])

    def logits(self, x: Tensor) -> Tensor | None:
        """The toy's logits of normalised activations [b, d]."""
        return logits_of(self.model, self.site, x, self.mean, self.scale)

    @property
    def _sums(self) -> dict[str, float]:
        return dict(zip(OF_INPUTS + OF_OUTPUTS, [*self._of_inputs.tolist(), *self._of_outputs.tolist()], strict=True))

    @property
    def ceiling(self) -> float:
        """R²_m: the share of the variance between maxima, the most that a code constant on each maximum can explain."""
        total = self._weights.sum()
        centre = self._totals.sum(0) / total
        means = self._totals / self._weights.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
        between = float(self._weights @ (means - centre).square().sum(1))
        return between / self._variance if self._variance > 0 else math.nan

    @property
    def _variance(self) -> float:
        """Σ w‖x - x̄‖²."""
        sums = self._sums
        return sums["square"] - float(self._totals.sum(0).square().sum()) / sums["weight"]

    @property
    def metrics(self) -> dict[str, float | None]:
        """fvu, fvu_above_ceiling, l0, squared_error, penalty_mean, shrinkage, loss_recovered, kl over all batches.

        fvu = Σ w‖r‖²/Σ w‖x - x̄‖², pooled; fvu_above_ceiling = fvu - (1 - R²_m), may be negative; l0: mean count of
        z ≠ 0; squared_error = E‖r‖², penalty_mean = E penalty; shrinkage: mean ‖x̂‖/‖x‖ of centred x and x̂, over x ≠ 0;
        loss_recovered = (CE_reconstructed - CE_zero)/(CE_original - CE_zero) for the true maximum, where zero is raw
        activation 0, None if that denominator is 0 or nothing is to be predicted; kl = KL(original ‖ reconstructed) of
        the outputs, nats. A toy without an output has neither.
        """
        sums = self._sums
        mean = {name: total / sums["weight"] for name, total in sums.items()}
        fvu = sums["error"] / self._variance if self._variance > 0 else math.nan
        recovered, recoverable = mean["ce_reconstructed"] - mean["ce_zero"], mean["ce_original"] - mean["ce_zero"]
        return {
            "fvu": fvu,
            "fvu_above_ceiling": fvu - (1 - self.ceiling),
            "l0": mean["active"],
            "squared_error": mean["error"],
            "penalty_mean": mean["penalty"],
            "shrinkage": sums["ratio"] / sums["sized"] if sums["sized"] else math.nan,
            "loss_recovered": recovered / recoverable if recoverable and self._predicts else None,
            "kl": None if self._zero_log_p is None else mean["kl"],
        }


def logits_of(model: Model, site: str, x: Tensor, mean: Tensor, scale: float) -> Tensor | None:
    """The toy's logits [b, d_vocab] float32 from normalised activations [b, d] at `site`; None if it has no output."""
    return model.logits(torch.add(mean, x, alpha=1 / scale), site)


def _arrays(*tensors: Tensor) -> tuple[NDArray[Any], ...]:
    """Arrays that share the memory of tensors on the CPU, contiguous as compiled code takes them."""
    return tuple(tensor.contiguous().numpy() for tensor in tensors)


def _sums(weight: Tensor, values: Iterable[Tensor]) -> list[float]:
    # By numpy, in an order that does not depend on the number of threads.
    return [float((weight * value).cpu().numpy().sum()) for value in values]


def _cross_entropy(log_p: Tensor, truth: Tensor) -> Tensor:
    """−log p of a token [b] int64, or its mean under a distribution [b, d_vocab]: [b] from log p [b, d_vocab]."""
    if truth.dim() == 1:
        return F.nll_loss(log_p, truth, reduction="none")
    return -(truth * log_p).sum(1)


def reconstruction(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE. Without maxima there is no ceiling of codes that are constant on them."""
    found: dict[str, Value] = {**measured.reconstruction.metrics}
    return found if measured.classes is not None else found | {"fvu_above_ceiling": None}


COLUMNS = {
    "fvu": Column("Σ‖x − x̂‖² / Σ‖x − x̄‖², pooled over all inputs", "FVU", since=1),
    "fvu_above_ceiling": Column(
        "FVU less what the best code that is constant on each maximum would leave; not clipped",
        "FVU above the ceiling of one code per max",
        since=1,
    ),
    "l0": Column("mean number of activations that are not zero", "L0", since=1),
    "loss_recovered": Column(
        "of the toy's own output: (CE_reconstructed − CE_zero) / (CE_original − CE_zero)",
        "share of the toy's loss recovered",
        since=5,
    ),
    "kl": Column("KL(original ‖ reconstructed) of the toy's own output, nats", "KL", since=5),
    "shrinkage": Column("mean ‖x̂‖/‖x‖", since=5),
    "squared_error": Column("E‖x − x̂‖², summed over d"),
    "penalty_mean": Column("E penalty, summed over latents, before its coefficient"),
}

register(
    Metric(
        name="reconstruction",
        description="how well an SAE reconstructs, how sparsely, and what that costs the toy's own output",
        columns=COLUMNS,
        measure=reconstruction,
    )
)
