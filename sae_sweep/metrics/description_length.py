"""How many bits an input's code takes: sparsity counted as what it costs to say which latents fire and how much.

An example: eight latents of which each fires on half of the inputs, always alike, take 8 bits an input; eight that
exclude each other, each on an eighth of them, take 8·0.54 = 4.3, since each latent is coded by itself. L0 would say 4
and 1.

Each latent's contribution a‖d‖ is rounded to whole multiples of STEP = .25 (`code_levels.py`), and its entropy over
the evaluation inputs, each with its weight, is what an optimal code for that latent takes (Ayonrinde, Pearce & Sharkey
2024, arXiv 2410.11179, there with steps of 8-bit numbers). Rounding adds STEP²/12 to the squared error for each
active latent, where E‖x‖² = d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register

if TYPE_CHECKING:
    import numpy as np

    from sae_sweep.metrics.partitions import Floats, Ints
else:
    np = lazy("numpy")


def description_length(measured: Measured) -> dict[str, Value]:
    """Bits an input; null where codes are not finite."""
    if not measured.levels.finite:
        return {"description_length": None}
    return {"description_length": bits(*measured.levels.table, measured.table.total)}


def bits(latents: Ints, weights: Floats, total: float) -> float:
    """Σ over latents of the entropy of their rounded codes.

    latents, weights [pairs]: on how much weight each latent has each code but 0, codes in any order; total: of all
    inputs.
    """
    silent = 1 - np.bincount(latents, weights) / total
    return float(_surprise(weights / total).sum() + _surprise(silent).sum())


def _surprise(share: Floats) -> Floats:
    """−p·log₂ p, 0 at 0 and where rounding left less than nothing."""
    return -share * np.log2(share, where=share > 0, out=np.zeros_like(share))


register(
    Metric(
        name="description_length",
        description="bits that say which latents fire on an input and how much, each latent coded by itself",
        source="arXiv 2410.11179",
        version=2,  # 1 counted on inputs of its own
        columns={"description_length": Column("bits that say which latents fire on an input and how much")},
        measure=description_length,
    )
)
