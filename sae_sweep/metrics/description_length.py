"""How many bits an input's code takes: sparsity counted as what it costs to say which latents fire and how much.

An example: eight latents of which each fires on half of the inputs, always alike, take 8 bits an input; eight that
exclude each other, each on an eighth of them, take 8·0.54 = 4.3, since each latent is coded by itself. L0 would say 4
and 1.

Each latent's contribution a‖d‖ is rounded to whole multiples of STEP, and its entropy over inputs is what an optimal
code for that latent takes (Ayonrinde, Pearce & Sharkey 2024, arXiv 2410.11179, there with steps of 8-bit numbers).
Rounding adds STEP²/12 to the squared error for each active latent, where E‖x‖² = d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

STEP = 0.25
# Inputs that codes are counted on, and codes beyond which they are fewer: entropies of few inputs come out too small.
INPUTS, CODES = 1 << 14, 1 << 24
LARGEST_TABLE = 1 << 22


def description_length(measured: Measured) -> dict[str, Value]:
    """Bits an input; null where codes are not finite."""
    x, _ = measured.inputs.labelled(max(1, min(INPUTS, CODES // len(measured.sae.W_dec))))
    norms = measured.sae.W_dec.norm(dim=1)
    latents, codes = [], []
    for part in measured.sae.active(x):
        active = part.contributions(norms)
        latents.append(active.latents)
        codes.append(active.codes)
    return {"description_length": bits(torch.cat(latents), torch.cat(codes), len(x))}


def bits(latents: Tensor, codes: Tensor, inputs: int) -> float | None:
    """Σ over latents of the entropy of their rounded codes, from the active ones: `latents` and `codes` [entries]."""
    if not bool(codes.isfinite().all()):
        return None
    level = (codes.double() / STEP).round().long()
    latents, level = latents[level != 0], level[level != 0]
    fired = torch.bincount(latents).double() if len(latents) else torch.zeros(1, dtype=torch.float64)
    # Latent and level as one number, counted in a table where that is no larger than the codes: else by sorting.
    span = int(level.max()) + 1 if len(level) else 1
    pair = latents * span + level
    table = len(fired) * span <= max(LARGEST_TABLE, len(pair))
    counts = torch.bincount(pair) if table else torch.unique(pair, return_counts=True)[1]
    return float(_surprise(counts.double() / inputs).sum() + _surprise(1 - fired / inputs).sum())


def _surprise(share: Tensor) -> Tensor:
    """−p·log₂ p, 0 at 0."""
    return -torch.xlogy(share, share) / torch.log(torch.tensor(2.0, dtype=torch.float64))


register(
    Metric(
        name="description_length",
        description="bits that say which latents fire on an input and how much, each latent coded by itself",
        source="arXiv 2410.11179",
        columns={"description_length": Column("bits that say which latents fire on an input and how much")},
        measure=description_length,
    )
)
