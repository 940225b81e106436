"""Which latents are active: one function per architecture, pre-activations in, codes out.

All share pre = W_enc·x + b_enc and x̂ = W_dec·z + b_dec. What chooses among latents or compares them with a threshold
does so by the contribution z‖d‖, so that a choice cannot be bought by rescaling a decoder row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_sweep.config.settings import EXTRAS, KERNELS, Sae
from sae_sweep.saes.parameters import Parameters

Activate = Callable[[Tensor, Parameters, Sae, bool], Tensor]
Penalised = Callable[[Tensor, Tensor, Parameters], Tensor]
Auxiliary = Callable[[Tensor, Tensor, Tensor, Parameters, Sae], Tensor]


def relu(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = max(pre, 0)."""
    return pre.relu()


def topk(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """Keep the k largest contributions of each input."""
    codes = pre.relu()
    chosen = (codes * sae.norms()[..., None, :]).topk(settings.k, dim=-1).indices
    return torch.zeros_like(codes).scatter(-1, chosen, codes.gather(-1, chosen))


def batchtopk(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """Keep the k·b largest contributions of the batch; at evaluation those that reach the learned threshold."""
    codes = pre.relu()
    contributions = codes * sae.norms()[..., None, :]
    threshold = sae.threshold
    if training:
        batch = contributions.flatten(-2)
        threshold = kth_largest(batch, min(settings.k * pre.shape[-2], batch.shape[-1]))
    return codes * (contributions >= threshold[..., None, None])


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of values [..., count] -> [...]."""
    if values.is_cuda:  # where `kthvalue` gives each row to one block of threads, and `topk` to all
        return values.topk(k, dim=-1, sorted=False).values.amin(-1)
    return values.kthvalue(values.shape[-1] - k + 1, dim=-1).values


class Step(torch.autograd.Function):
    """H(u) with the straight-through slope of a rectangle: 1/bandwidth where |u| < bandwidth/2 (arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx, u: Tensor, bandwidth: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(u)
        ctx.bandwidth = bandwidth
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (u,) = ctx.saved_tensors
        return gradient * (u.abs() < ctx.bandwidth / 2) / ctx.bandwidth, None


def jumps(pre: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """H(max(pre, 0)‖d‖ − θ): whether a latent's contribution exceeds its threshold.

    The slope reaches thresholds and pre-activations alike. Where thresholds alone have it (as in arXiv 2407.14435),
    Adam normalises away how large it is, and the coefficient hardly moves L0.
    """
    reach = pre.relu() * sae.norms()[..., None, :] - sae.thresholds[..., None, :]
    fires: Tensor = Step.apply(reach, settings.bandwidth)
    return fires


def jumprelu(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = max(pre, 0)·H(max(pre, 0)‖d‖ − θ)."""
    return pre.relu() * jumps(pre, sae, settings)


def gated(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = H(pre)·max(exp(r_mag)·(pre − b_enc) + b_mag, 0): pre is the gate, which no gradient of z passes."""
    magnitude = sae.r_mag.exp()[..., None, :] * (pre - sae.b_enc[..., None, :]) + sae.b_mag[..., None, :]
    return magnitude.relu() * (pre > 0)


def gate(pre: Tensor, codes: Tensor, sae: Parameters) -> Tensor:
    """max(gate, 0)‖d‖: what a Gated SAE's penalty acts on. No slope to ‖d‖, which magnitudes could make up for."""
    return pre.relu() * sae.norms().detach()[..., None, :]


def reconstructed_by_gate(x: Tensor, pre: Tensor, codes: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """E‖x − x̂(max(gate, 0))‖² through the decoder as it stands: what trains the gate (arXiv 2404.16014, eq. 8)."""
    reconstruction = pre.relu() @ sae.W_dec.detach() + sae.b_dec.detach()[..., None, :]
    return _error(x, reconstruction)


def reconstructed_by_prefixes(x: Tensor, pre: Tensor, codes: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """Σ E‖x − x̂ of the first latents alone‖² over the nested levels short of the whole (arXiv 2503.17547)."""
    total, begin = x.new_zeros(()), 0
    reconstruction = sae.b_dec[..., None, :]
    for end in prefixes(settings)[:-1]:
        reconstruction = reconstruction + codes[..., begin:end] @ sae.W_dec[..., begin:end, :]
        total, begin = total + _error(x, reconstruction), end
    return total


def prefixes(settings: Sae) -> list[int]:
    """Latents in each nested level, the whole last: each level is half of the next, rounded up."""
    sizes = {-(-settings.width // 2**level) for level in range(settings.levels)}
    return sorted(sizes)


def contributions(pre: Tensor, codes: Tensor, sae: Parameters) -> Tensor:
    """z‖d‖."""
    return codes * sae.norms()[..., None, :]


def unit_rows(sae: Parameters) -> Parameters:
    """W_enc = W_dec, with rows of unit norm."""
    rows = F.normalize(sae.W_dec, dim=-1)
    return dataclasses.replace(sae, W_enc=rows, W_dec=rows)


def _error(x: Tensor, reconstruction: Tensor) -> Tensor:
    return (reconstruction - x).square().sum(-1).mean(-1)


@dataclass(frozen=True)
class Architecture:
    """`activate(pre [..., b, width], sae, settings, training) -> codes [..., b, width]`; what else it has is below.

    formula: z of an input, for people; prior: the density on z that its sparsity is −log of, or why none
    learns_threshold: it chooses over a batch, and at evaluation by the smallest contribution chosen in training
    penalised: what its penalty acts on [..., b, width], from pre and codes
    auxiliary: what its objective has beside E‖x − x̂‖² and the penalty [...]
    fires: H with a slope, for the penalty `l0`
    effective: from what is trained to what is used
    """

    name: str
    activate: Activate
    description: str
    formula: str
    prior: str
    keys: tuple[str, ...]
    source: str
    learns_threshold: bool = False
    penalised: Penalised = contributions
    auxiliary: Auxiliary | None = None
    fires: Callable[[Tensor, Parameters, Sae], Tensor] | None = None
    effective: Callable[[Parameters], Parameters] | None = None

    @property
    def extras(self) -> tuple[str, ...]:
        """Fields of Parameters beyond weights and biases that it trains, [width] each."""
        return EXTRAS.get(self.name, ())

    @property
    def step(self) -> str:
        """What trains it, for people."""
        autograd = "autograd: slower, and batch × width numbers for each SAE at work"
        if self.name not in KERNELS["cpu"]:
            return autograd
        return "compiled, by active latents" + ("" if self.name in KERNELS["cuda"] else f"; on a GPU {autograd}")

    def codes(self, x: Tensor, sae: Parameters, settings: Sae, training: bool = False) -> Tensor:
        """Codes [..., b, width] of inputs x [b, d]."""
        return self.activate(pre_activations(x, sae), sae, settings, training)


def pre_activations(x: Tensor, sae: Parameters) -> Tensor:
    """W_enc·x + b_enc [..., b, width] of inputs x [b, d]."""
    return x @ sae.W_enc.transpose(-1, -2) + sae.b_enc[..., None, :]


_COUNT, _PENALTY = ("sae.k",), ("penalty",)
_BY_PENALTY = "that of its penalty"
_OF_BATCH = "flat on the codes of a batch of b in which at most k·b latents are active, none elsewhere"
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "relu", relu, "ReLU with a sparsity penalty", "max(pre, 0)", _BY_PENALTY, _PENALTY, "arXiv 2309.08600"
        ),
        Architecture(
            "topk",
            topk,
            "the k largest contributions of each input",
            "max(pre, 0) on the k latents of largest max(pre, 0)·‖d‖, else 0",
            "flat on codes of at most k active latents, none elsewhere",
            _COUNT,
            "arXiv 2406.04093",
        ),
        Architecture(
            "batchtopk",
            batchtopk,
            "the k·batch largest contributions of a batch; a learned threshold at evaluation",
            "max(pre, 0)·H(max(pre, 0)·‖d‖ ≥ θ), θ the (k·b)-th largest of a batch of b",
            _OF_BATCH,
            _COUNT,
            "arXiv 2412.06410",
            learns_threshold=True,
        ),
        Architecture(
            "jumprelu",
            jumprelu,
            "a threshold of each latent's own on its contribution; slopes pass straight through the jump. penalty=l0 "
            "counts what fires",
            "max(pre, 0)·H(max(pre, 0)·‖d‖ > θ)",
            f"{_BY_PENALTY}; of penalty=l0 a spike and a flat slab, improper",
            (*_PENALTY, "sae.bandwidth"),
            "arXiv 2407.14435",
            fires=jumps,
        ),
        Architecture(
            "gated",
            gated,
            "a gate decides what fires, a magnitude how strongly; the penalty acts on the gate, which learns from its "
            "own reconstruction through the frozen decoder",
            "H(pre > 0)·max(exp(r_mag)·W_enc·x + b_mag, 0)",
            "none: the penalty acts on max(pre, 0), not on z",
            _PENALTY,
            "arXiv 2404.16014",
            penalised=gate,
            auxiliary=reconstructed_by_gate,
        ),
        Architecture(
            "matryoshka",
            batchtopk,
            "BatchTopK of which also the first 1/2, 1/4, … of the latents must reconstruct x by themselves",
            "that of batchtopk; squared errors of x̂ from the first width/2, width/4, … latents are added to the loss",
            _OF_BATCH,
            (*_COUNT, "sae.levels"),
            "arXiv 2503.17547",
            learns_threshold=True,
            auxiliary=reconstructed_by_prefixes,
        ),
        Architecture(
            "tied",
            relu,
            "ReLU whose encoder is its decoder, rows of unit norm",
            "max(W_dec·x + b_enc, 0), ‖d‖ = 1",
            _BY_PENALTY,
            _PENALTY,
            "arXiv 2309.08600",
            effective=unit_rows,
        ),
    )
}
