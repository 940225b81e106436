"""How much of the variance lies between a partition's classes: the ceiling of a code that is constant on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sae_sweep.schema import PARTITIONS
from sae_sweep.toys.stream import EvaluationInputs

# A sample must hold so many inputs to a class: its mean follows the noise of few.
INPUTS_PER_CLASS = 100


@torch.no_grad()
def between_classes(inputs: EvaluationInputs, names: Sequence[str] = PARTITIONS) -> dict[str, float | None]:
    """R² = Σ P(class)·‖E[x | class] - E x‖² / E‖x - E x‖² of each partition, under the weights of `inputs`.

    None where the inputs are a sample too small for the partition's classes. The toy must have cells.
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
    centre = sums.sum(0) / mass.sum()
    variance = square - float(mass.sum() * (centre @ centre))
    shares: dict[str, float | None] = {}
    for name in names:
        classes = cells.partition(name)
        if not inputs.exact and classes.count * INPUTS_PER_CLASS > inputs.count:
            shares[name] = None
            continue
        of_cell = torch.as_tensor(classes.of_cell)
        totals = torch.zeros(classes.count, d, dtype=torch.float64).index_add_(0, of_cell, sums)
        chance = torch.zeros(classes.count, dtype=torch.float64).index_add_(0, of_cell, mass)
        means = totals / chance.clamp_min(1e-300)[:, None]
        shares[name] = float(chance @ (means - centre).square().sum(1)) / variance
    return shares
