"""Which latents are active: one function per architecture, pre-activations in, codes out.

All share pre = W_enc·x + b_enc and x̂ = W_dec·z + b_dec. TopK and BatchTopK choose by the contribution
z‖d‖, so that a choice cannot be bought by rescaling a decoder row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """`activate(pre [..., b, width], norms [..., width], k, threshold [...] or None) -> codes [..., b, width]`.

    `threshold` is the smallest contribution that fires at evaluation, for architectures that choose over a batch.
    """

    name: str
    activate: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
    description: str
    keys: tuple[str, ...]
    source: str
    learns_threshold: bool = False


def relu(pre: Tensor, norms: Tensor, k: int, threshold: Tensor | None = None) -> Tensor:
    """z = max(pre, 0)."""
    return pre.relu()


def topk(pre: Tensor, norms: Tensor, k: int, threshold: Tensor | None = None) -> Tensor:
    """Keep the k largest contributions of each input."""
    codes = pre.relu()
    chosen = (codes * norms[..., None, :]).topk(k, dim=-1).indices
    return torch.zeros_like(codes).scatter(-1, chosen, codes.gather(-1, chosen))


def batchtopk(pre: Tensor, norms: Tensor, k: int, threshold: Tensor | None = None) -> Tensor:
    """Keep the k·b largest contributions of the batch; with a threshold, those that reach it."""
    codes = pre.relu()
    contributions = codes * norms[..., None, :]
    if threshold is None:
        batch = contributions.flatten(-2)
        # The (k·b)-th largest: topk on [n, b·width] would also sort what nobody reads.
        rank = batch.shape[-1] - min(k * pre.shape[-2], batch.shape[-1]) + 1
        threshold = batch.kthvalue(rank, dim=-1).values
    return codes * (contributions >= threshold[..., None, None])


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("relu", relu, "ReLU with a sparsity penalty", ("penalty",), "arXiv 2309.08600"),
        Architecture("topk", topk, "the k largest contributions of each input", ("sae.k",), "arXiv 2406.04093"),
        Architecture(
            "batchtopk",
            batchtopk,
            "the k·batch largest contributions of a batch; a learned threshold at evaluation",
            ("sae.k",),
            "arXiv 2412.06410",
            learns_threshold=True,
        ),
    )
}
