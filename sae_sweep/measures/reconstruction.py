"""How well an SAE reconstructs, how sparsely, and what that costs the toy's own output."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_sweep.toys.model import Model


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
        self._sums: dict[str, float] = {}
        # By maximum: Σ w and Σ w·x.
        self._weights = torch.zeros(model.toy.maxima, dtype=torch.float64, device=device)
        self._totals = torch.zeros(model.toy.maxima, d, dtype=torch.float64, device=device)
        self._zero_log_p = log_outputs(model, site, torch.zeros(1, d, device=device))

    def add(
        self,
        x: Tensor,
        active: Tensor,
        norms: Tensor,
        x_hat: Tensor,
        maximum: Tensor,
        weight: Tensor,
        truth: Tensor | None = None,
        log_p: Tensor | None = None,
    ) -> None:
        """Count a batch, all on the toy's device.

        Inputs `x` and reconstructions `x_hat` [b, d], how many latents are `active` [b], a‖d‖ `norms` of these and
        zeros [b, ·], true `maximum` [b] int64 and evaluation `weight` [b] float64. `truth`: what the toy is to predict
        (`Model.truth`), if not the maximum. `log_p`: the toy's `log_outputs` of x, if they are known.
        """
        size = x.double().norm(dim=1)
        ratio = torch.where(size > 0, x_hat.double().norm(dim=1) / size, 0)
        self._sum("weight", weight, torch.ones_like(weight))
        self._sum("sized", weight, (size > 0).double())
        self._sum("ratio", weight, ratio)
        self._sum("square", weight, size.square())
        self._sum("error", weight, (x - x_hat).double().square().sum(1))
        self._sum("active", weight, active.double())
        self._sum("penalty", weight, self.penalty_value(norms).double())
        # A product with the indicator of the maximum: adding up by index has no fixed order on CUDA.
        least, most = int(maximum.min()), int(maximum.max())
        of_max = F.one_hot(maximum - least, most - least + 1).double() * weight[:, None]
        self._weights[least : most + 1] += of_max.sum(0)
        self._totals[least : most + 1] += of_max.T @ x.double()
        if self._zero_log_p is not None:
            known = self._log_p(x) if log_p is None else log_p
            outputs = known, self._log_p(x_hat), self._zero_log_p.expand_as(known)
            self._add_outputs(*outputs, maximum if truth is None else truth, weight)

    def _add_outputs(self, log_p: Tensor, log_q: Tensor, log_zero: Tensor, truth: Tensor, weight: Tensor) -> None:
        self._sum("ce_original", weight, _cross_entropy(log_p, truth))
        self._sum("ce_reconstructed", weight, _cross_entropy(log_q, truth))
        self._sum("ce_zero", weight, _cross_entropy(log_zero, truth))
        self._sum("kl", weight, (log_p.exp() * (log_p - log_q)).sum(1))

    def _log_p(self, x: Tensor) -> Tensor:
        log_p = log_outputs(self.model, self.site, x / self.scale + self.mean)
        assert log_p is not None
        return log_p

    def _sum(self, name: str, weight: Tensor, values: Tensor) -> None:
        # Summed by numpy, in an order that does not depend on the number of threads.
        self._sums[name] = self._sums.get(name, 0.0) + float((weight * values).cpu().numpy().sum())

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
        return self._sums["square"] - float(self._totals.sum(0).square().sum()) / self._sums["weight"]

    @property
    def metrics(self) -> dict[str, float | None]:
        """fvu, fvu_above_ceiling, l0, squared_error, penalty_mean, shrinkage, loss_recovered, kl over all batches.

        fvu = Σ w‖r‖²/Σ w‖x - x̄‖², pooled; fvu_above_ceiling = fvu - (1 - R²_m), may be negative; l0: mean count of
        z ≠ 0; squared_error = E‖r‖², penalty_mean = E penalty; shrinkage: mean ‖x̂‖/‖x‖ of centred x and x̂, over x ≠ 0;
        loss_recovered = (CE_reconstructed - CE_zero)/(CE_original - CE_zero) for the true maximum, where zero is raw
        activation 0, None if that denominator is 0; kl = KL(original ‖ reconstructed) of the outputs, nats. A toy
        without an output has neither.
        """
        mean = {name: total / self._sums["weight"] for name, total in self._sums.items()}
        fvu = self._sums["error"] / self._variance if self._variance > 0 else math.nan
        recovered = recoverable = 0.0
        if self._zero_log_p is not None:
            recovered, recoverable = mean["ce_reconstructed"] - mean["ce_zero"], mean["ce_original"] - mean["ce_zero"]
        return {
            "fvu": fvu,
            "fvu_above_ceiling": fvu - (1 - self.ceiling),
            "l0": mean["active"],
            "squared_error": mean["error"],
            "penalty_mean": mean["penalty"],
            "shrinkage": mean["ratio"] * self._sums["weight"] / self._sums["sized"]
            if self._sums["sized"]
            else math.nan,
            "loss_recovered": recovered / recoverable if recoverable else None,
            "kl": mean.get("kl"),
        }


def log_outputs(model: Model, site: str, acts: Tensor) -> Tensor | None:
    """log p [b, d_vocab] float64 of the toy's output from raw activations [b, d] at `site`; None if it has none."""
    logits = model.logits(acts, site)
    return None if logits is None else logits.double().log_softmax(-1)


def _cross_entropy(log_p: Tensor, truth: Tensor) -> Tensor:
    """−log p of a token [b] int64, or its mean under a distribution [b, d_vocab]: [b] from log p [b, d_vocab]."""
    if truth.dim() == 1:
        return F.nll_loss(log_p, truth, reduction="none")
    return -(truth * log_p).sum(1)
