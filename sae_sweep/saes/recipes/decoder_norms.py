"""Norms of decoder rows: free, since penalties and choices count them in, held at 1, or rows that do not move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.registry import register
from sae_sweep.saes.recipes import DecoderNorm

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor
else:
    F = lazy("torch.nn.functional")


def _remove_parallel(gradient: Tensor, rows: Tensor) -> None:
    """Take from the gradient of each row its part along the row."""
    unit = F.normalize(rows, dim=-1)
    gradient.sub_((gradient * unit).sum(-1, keepdim=True) * unit)


def _renormalise(rows: Tensor) -> None:
    rows.copy_(F.normalize(rows, dim=-1))


def _remove(gradient: Tensor, rows: Tensor) -> None:
    gradient.zero_()


register(
    DecoderNorm(
        name="free",
        description="rows of any norm: penalties and choices act on activation · norm",
        source="arXiv 2406.17969",
        compiled=True,
    )
)
register(
    DecoderNorm(
        name="unit",
        description="rows of norm 1 after each step; the gradient's part along a row is removed",
        source="Bricken et al. 2023, Towards Monosemanticity, appendix",
        constrain=_remove_parallel,
        restore=_renormalise,
    )
)
register(
    DecoderNorm(
        name="frozen",
        description="rows stay as they begin: the encoder alone is trained (weight decay still shrinks them)",
        source="arXiv 2602.14111, the frozen decoder",
        constrain=_remove,
    )
)
