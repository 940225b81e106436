"""Directions of features: orthonormal where they fit, random, or moved apart until they overlap least."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.aligned import product

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

DIRECTIONS = ("fitting", "orthonormal", "random", "least_overlap")
# Steps in which random directions are moved apart: their squared overlaps then sum to within a hundredth of the least.
STEPS = 200


def unit_vectors(count: int, d: int, generator: torch.Generator) -> Tensor:
    """[count, d] float64: orthonormal where they fit."""
    drawn = torch.randn(count, d, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn.T)[0].T.contiguous() if count <= d else F.normalize(drawn, dim=1)


def random_vectors(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Unit vectors [count, d] float64, each uniform on the sphere."""
    return F.normalize(torch.randn(count, d, dtype=torch.float64, generator=generator), dim=1)


def directions(name: str, count: int, d: int, generator: torch.Generator) -> Tensor:
    """Unit vectors [count, d] float64 of one of DIRECTIONS. UserError: orthonormal ones that do not fit."""
    if name == "orthonormal" and count > d:
        raise UserError(
            f"toy.directions=orthonormal: {count} directions do not fit into toy.d_model={d} numbers "
            "(toy.directions=random)"
        )
    if name in ("fitting", "orthonormal"):
        return unit_vectors(count, d, generator)
    found = random_vectors(count, d, generator)
    return found if name == "random" else moved_apart(found)


def moved_apart(vectors: Tensor) -> Tensor:
    """Unit vectors [count, d] float64 after STEPS of projected gradient descent on the sum of cos² of every two.

    The loss by which SynthSAEBench (arXiv 2602.14687) and the Linear Representation Bench (2512.05534) keep features
    apart. Its least, where more vectors than numbers overlap evenly, is count²/d - count (Welch 1974).
    """
    from sae_sweep.toys.sampling import one_thread

    count, d = vectors.shape
    # Half of the inverse of the largest eigenvalue of random vectors' overlaps: larger steps would overshoot.
    step = 0.5 / (1 + (count / d) ** 0.5) ** 2
    with one_thread():
        for _ in range(STEPS):
            overlaps = product(vectors, vectors.T).fill_diagonal_(0)
            vectors = F.normalize(vectors - step * product(overlaps, vectors), dim=1)
    return vectors
