"""Products of matrices whose bits do not depend on where in memory the matrices lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor
else:
    F = lazy("torch.nn.functional")

# Numbers in 64 bytes of float32.
ALIGN = 16


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` [..., rows, columns] with each side's zeros added up to a multiple of ALIGN, and cut off again.

    For matrices that are not aligned, the CPU's library rounds differently by where in memory they lie and by how many
    threads share the rows: a toy's bits would depend on its place in the stack.
    """
    return (_padded(left) @ _padded(right))[..., : left.shape[-2], : right.shape[-1]]


def _padded(matrix: Tensor) -> Tensor:
    rows, columns = (-size % ALIGN for size in matrix.shape[-2:])
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix
