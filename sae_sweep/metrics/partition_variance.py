"""How a toy's activations lie in the classes of a partition, and so what a code that is constant on them explains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_sweep.config.settings import PARTITIONS
from sae_sweep.toys.sampling import EvaluationInputs

# A sample must hold so many inputs to a class: its mean follows the noise of few.
INPUTS_PER_CLASS = 100


@dataclass(frozen=True)
class Classes:
    """The mean activation of each class [classes, d] around the mean of all, its chance [classes], both float64, and
    `within`: E‖x − mean of its class‖²."""

    means: Tensor
    chance: Tensor
    within: float

    @property
    def r2(self) -> float:
        """The share of the variance that lies between classes: Σ P(class)·‖E[x | class] − E x‖² / E‖x − E x‖²."""
        between = float(self.chance @ self.means.square().sum(1))
        return between / (between + self.within)


@torch.no_grad()
def classes_of(inputs: EvaluationInputs, names: Sequence[str] = PARTITIONS) -> dict[str, Classes | None]:
    """The classes of each partition under the weights of `inputs`, whose toy must have cells.

    None where the inputs are a sample too small for the partition's classes.
    """
    cells, d = inputs.cells, len(inputs.mean)
    assert cells is not None
    sums, mass = torch.zeros(cells.count, d, dtype=torch.float64), torch.zeros(cells.count, dtype=torch.float64)
    square = 0.0
    for chunk in inputs:
        # On the processor: adding up by index has no fixed order on CUDA.
        x, cell, weight = chunk.x.cpu().double(), chunk.cell.cpu(), chunk.weight.cpu()
        sums.index_add_(0, cell, x * weight[:, None])
        mass.index_add_(0, cell, weight)
        square += float(weight @ x.square().sum(1))
    total = mass.sum()
    centre = sums.sum(0) / total
    variance = square / float(total) - float(centre @ centre)
    found: dict[str, Classes | None] = {}
    for name in names:
        partition = cells.partition(name)
        if not inputs.exact and partition.count * INPUTS_PER_CLASS > inputs.count:
            found[name] = None
            continue
        of_cell = torch.as_tensor(partition.of_cell)
        totals = torch.zeros(partition.count, d, dtype=torch.float64).index_add_(0, of_cell, sums)
        chance = torch.zeros(partition.count, dtype=torch.float64).index_add_(0, of_cell, mass)
        means = (totals / chance.clamp_min(1e-300)[:, None] - centre) * (chance > 0)[:, None]
        chance = chance / total
        found[name] = Classes(means, chance, variance - float(chance @ means.square().sum(1)))
    return found
