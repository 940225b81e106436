"""What latents tell of the order of the tokens, which the cells of max-of-K leave out.

For example, (5, 2, 3, 0) and (2, 5, 3, 0) are one cell: maximum 5, query 0, runner-up 3, one copy. Their activations
differ, since attention adds a vector for each position, so that a wide dictionary may split a cell by it. The order of
an input is at which positions the maximum stands and at which the runner-up; other tokens are all alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.config.settings import Evaluation
from sae_sweep.lazy import lazy
from sae_sweep.metrics.information import shares_told
from sae_sweep.metrics.limits import BLOCK_INPUTS
from sae_sweep.metrics.metric import MeasurableSAE, Measured, Metric, Value, with_nulls
from sae_sweep.registry import Setting, register
from sae_sweep.toys.classes import Cells

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sae_sweep.metrics import evaluation_batches, firing, partitions
    from sae_sweep.metrics.evaluation_batches import Block
    from sae_sweep.metrics.partitions import Classes, Ints
    from sae_sweep.toys.sampling import EvaluationInputs
else:
    np, torch = lazy("numpy"), lazy("torch")
    evaluation_batches, firing = lazy("sae_sweep.metrics.evaluation_batches"), lazy("sae_sweep.metrics.firing")
    partitions = lazy("sae_sweep.metrics.partitions")


def token_order(sae: MeasurableSAE, inputs: EvaluationInputs, evaluation: Evaluation) -> dict[str, Value]:
    """The columns info_order, given the maximum, and unique_order, given the cell, each with its null; None elsewhere
    than for max-of-K."""
    cells = inputs.cells
    if not isinstance(cells, Cells):
        return {}
    parts = list(evaluation_batches.blocks(inputs, BLOCK_INPUTS))
    keys, of_input = np.unique(np.concatenate([_keys(part, cells) for part in parts]), return_inverse=True)
    norms, begin = sae.W_dec.norm(dim=1), 0
    counter = firing.FiringCounter(len(norms), len(keys), evaluation.fires_above)
    for part in parts:
        weight, done = part.weight.cpu().numpy(), 0
        for codes in sae.active(part.x):
            at = slice(done, done := done + len(codes))
            counter.count(codes.contributions(norms), of_input[begin:][at], weight[at])
        begin += len(part.x)
    cell = keys // 3**cells.k
    maximum = cells.factors["m"][cell]
    by_maximum, by_cell = _classes(maximum.astype(np.int64)), _classes(cell)
    of_maximum, of_cell = _classes(maximum * 3**cells.k + keys % 3**cells.k), _classes(keys)
    asked = {"info_order": (of_maximum, by_maximum), "unique_order": (of_cell, by_cell)}
    ordered = {name: (*of, np.lexsort((of[0].of_cell, of[1].of_cell))) for name, of in asked.items()}
    return shares_told(counter.table, ordered, evaluation.permutations)


def _keys(block: Block, cells: Cells) -> Ints:
    """A number for cell and order of each input [b]: cell · 3^k + Σ 3^i · (2 for the maximum, 1 for the runner-up)."""
    tokens, cell = block.inputs.cpu(), block.cell.cpu()
    m, n = (torch.from_numpy(cells.factors[factor]).long()[cell, None] for factor in "mn")
    standing = 2 * (tokens == m).long() + (tokens == n).long()
    place = torch.tensor([3**i for i in range(cells.k)])
    found: Ints = (cell * 3**cells.k + (standing * place).sum(1)).numpy()
    return found


def _classes(labels: Ints) -> Classes:
    """Cells [T] told apart by their labels."""
    _, first, of_cell = np.unique(labels, return_index=True, return_inverse=True)
    return partitions.Classes(of_cell.astype(np.int64), first.astype(np.int64))


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE."""
    return token_order(measured.sae, measured.inputs, measured.evaluation)


TOLD = {
    "info_order": Column("share of the order of the tokens given the maximum that the top latent tells", since=11),
    "unique_order": Column("share of the order of the tokens given the cell that the top latent tells", since=11),
}
COLUMNS = TOLD | with_nulls(TOLD, TOLD, 11, 11)

register(
    Metric(
        name="order",
        description="what latents tell of the order of the tokens",
        settings={
            "order": Setting(
                False,
                "true: also measure what latents tell of the order of the tokens, beyond which tokens there are",
                legacy=False,
            )
        },
        columns=COLUMNS,
        measure=measure,
    )
)
