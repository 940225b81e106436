"""SAEBench's k-sparse probes and absorption (arXiv 2503.09532), as the absorption evaluation of sae-bench 0.6 has them.

Concepts take the place of its first letters: the maxima of a toy (leading features, parents, places), or the planted
features where there are no cells. All steps are those of its code: a linear probe of every concept on activations; an
L1-regularised probe on SAE codes, whose k largest weights choose the latents of a k-sparse probe; F1 on inputs held
out. Batches are smaller than its 4,096 and weights start at 0, not at random: with tens of latents and of dimensions,
its few steps would not leave the start behind. scripts/compare_saebench.py runs its code beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.limits import PROBE_BATCH, PROBE_EPOCHS, PROBE_TRAIN_SHARE
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import Setting, register

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_sweep.metrics.partitions import Floats

    Bools = NDArray[np.bool_]
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")

# A concept is probed where so many inputs of either part have it and as many do not.
FEWEST = 5
# Training of both linear probes: Adam, the learning rate falling from the first to the second over the epochs.
RATES = (1e-2, 1e-5)
# Weight decay of the linear probe; of the L1 probe, and its L1 decay.
DECAY, CODE_DECAY, CODE_L1 = 1e-4, 1e-6, 0.01
# The largest k, and by how much F1 must rise for one more latent to be a split.
LARGEST_K, F1_JUMP = 10, 0.03
# Concepts whose linear probe is worse than this are not counted.
PROBE_F1 = 0.6
# Full absorption: main latents below SILENT, the top projection's cosine at least FULL_COSINE. Fraction: absorbers have
# at least ABSORBER_COSINE, and there are at most ABSORBERS. Both: a share of at least PROJECTION of the probe's own.
SILENT, FULL_COSINE, ABSORBER_COSINE, ABSORBERS, PROJECTION = 1e-8, 0.025, 0.1, 3, 0.4
NEWTON_STEPS, NEWTON_TOLERANCE = 100, 1e-8


@dataclass(frozen=True)
class Concept:
    """What probes find of one concept: `latents` of the accepted k-sparse probe; F1 of the linear probe; of inputs that
    have the concept and on which the linear probe says so, the share fully absorbed and the mean absorbed fraction."""

    latents: list[int]
    probe_f1: float
    full: float
    fraction: float


def probing(encode: Callable[[Tensor], Tensor], W_dec: Tensor, x: Tensor, has: Tensor) -> dict[str, Value]:
    """The columns k_sparse_splits, absorption_full and absorption_fraction: means over concepts.

    encode: x [b, d] to contributions a‖d‖ [b, width]; W_dec [width, d]; x [n, d]; has [n, concepts] bool, the truth.
    k_sparse_splits counts the latents of the last accepted k beyond the first. None without a concept to be counted.
    """
    found = [concept for concept in probe(encode, W_dec, x, has) if concept.probe_f1 > PROBE_F1]
    columns = {
        "k_sparse_splits": [len(concept.latents) - 1.0 for concept in found],
        "absorption_full": [concept.full for concept in found],
        "absorption_fraction": [concept.fraction for concept in found],
    }
    return {name: math.fsum(values) / len(values) if values else None for name, values in columns.items()}


def probe(encode: Callable[[Tensor], Tensor], W_dec: Tensor, x: Tensor, has: Tensor) -> list[Concept]:
    """What there is to find of each concept that is neither too rare nor too common; arguments as for `probing`."""
    cut = int(PROBE_TRAIN_SHARE * len(x))
    counts = torch.stack([part.sum(0) for part in (has[:cut], ~has[:cut], has[cut:], ~has[cut:])])
    has = has[:, counts.amin(0) >= FEWEST]
    if not has.shape[1]:
        return []
    weight, bias = linear_probe(lambda rows: rows, x.shape[1], x[:cut], has[:cut], DECAY)
    chosen, _ = linear_probe(encode, len(W_dec), x[:cut], has[:cut], CODE_DECAY, CODE_L1)
    ranked = chosen.topk(min(LARGEST_K, len(W_dec)), dim=1).indices
    cosine = F.normalize(weight, dim=1) @ F.normalize(W_dec, dim=1).T
    columns = _columns(encode, x, ranked.unique())
    found = []
    for i, order in enumerate(ranked.tolist()):
        truth, score = has[:, i], x[cut:] @ weight[i] + bias[i]
        latents = splits(columns, order, truth.cpu().numpy(), cut)
        there = x[cut:][truth[cut:] & (score > 0)]
        full, fraction = absorption(encode(there), cosine[i], there @ F.normalize(weight[i], dim=0), latents)
        probe_f1 = f1((score > 0).cpu().numpy(), truth[cut:].cpu().numpy())
        found.append(Concept(latents, probe_f1, _mean(full), _mean(fraction)))
    return found


def linear_probe(
    see: Callable[[Tensor], Tensor], size: int, x: Tensor, has: Tensor, decay: float, l1: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Logistic regressions of each concept on see(x) [n, size], positives weighted as much as negatives.

    Weights [concepts, size] and biases [concepts]. `decay`: L2 added to the gradient; `l1`: times the mean over
    concepts of the sum of |weights|. The order of the inputs has a seed of its own.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(has.shape[1], size, device=x.device, requires_grad=True)
    bias = torch.zeros(has.shape[1], device=x.device, requires_grad=True)
    truth = has.float()
    positive_weight = (len(x) - truth.sum(0)) / truth.sum(0)
    optimiser = torch.optim.Adam([weight, bias], lr=RATES[0], weight_decay=decay)
    for epoch in range(PROBE_EPOCHS):
        optimiser.param_groups[0]["lr"] = RATES[0] * (RATES[1] / RATES[0]) ** (epoch / PROBE_EPOCHS)
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(PROBE_BATCH):
            with torch.no_grad():
                seen = see(x[rows])
            with torch.enable_grad():
                loss = F.binary_cross_entropy_with_logits(
                    F.linear(seen, weight, bias), truth[rows], pos_weight=positive_weight
                )
                loss = loss + l1 * weight.abs().sum(1).mean()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
    return weight.detach(), bias.detach()


def splits(columns: dict[int, Floats], order: list[int], truth: Bools, cut: int) -> list[int]:
    """The latents of the last k-sparse probe that raises F1 on held-out inputs by F1_JUMP over the best before it.

    columns: contributions [n] of each latent in `order`, the best first; the first `cut` inputs are trained on.
    """
    best, accepted = -math.inf, 0
    for k in range(1, len(order) + 1):
        codes = np.stack([columns[latent] for latent in order[:k]], 1)
        weight, bias = balanced_regression(codes[:cut], truth[:cut])
        score = f1(codes[cut:] @ weight + bias > 0, truth[cut:])
        if score <= best + F1_JUMP:
            break
        best, accepted = score, k
    return order[:accepted]


def absorption(codes: Tensor, cosine: Tensor, projection: Tensor, main: list[int]) -> tuple[Tensor, Tensor]:
    """Whether each input is fully absorbed, and by what fraction: two [b], bool and float32.

    codes: contributions [b, width]; cosine [width] of decoder rows with the probe; projection [b] of x on the unit
    probe; main: the concept's own latents. With π = code · cosine, P the projection and M = Σ π of the main latents:

    full: all main codes < 1e-8, and the latent of the largest π has a cosine ≥ 0.025, P ≥ 0 and π ≥ 0.4 P
    fraction: A = Σ of the 3 largest π > 0 of other latents with a cosine ≥ 0.1; 0 if M ≥ P or A/P < 0.4; 1 if M ≤ 0;
    else u/(u + M) with u = min(A, P − M)
    """
    shares = codes * cosine
    top, latent = shares.max(1)
    silent = (codes[:, main] < SILENT).all(1)
    full = silent & (cosine[latent] >= FULL_COSINE) & (projection >= 0) & (top / projection >= PROJECTION)
    of_main = shares[:, main].sum(1)
    others = cosine >= ABSORBER_COSINE
    others[main] = False
    absorbed = (shares * others).clamp_min(0).topk(min(ABSORBERS, len(cosine)), dim=1).values.sum(1)
    taken = torch.minimum(absorbed, projection - of_main)
    fraction = torch.where(of_main <= 0, 1.0, (taken / (taken + of_main)).clamp(0, 1))
    none = (of_main >= projection) | (absorbed / projection < PROJECTION)
    return full, torch.where(none, 0.0, fraction)


def balanced_regression(codes: Floats, truth: Bools) -> tuple[Floats, float]:
    """Weights [k] and bias of the logistic regression that scikit-learn fits with class_weight="balanced", C = 1.

    The minimum of ½‖w‖² + Σ sᵢ·log(1 + exp(−yᵢ(w·cᵢ + b))), each class's sᵢ summing to n/2: convex, by Newton's method.
    """
    n = len(truth)
    share = np.where(truth, n / (2 * truth.sum()), n / (2 * (n - truth.sum())))
    design = np.column_stack([codes, np.ones(n)])
    ridge = np.append(np.ones(codes.shape[1]), 0.0)
    sign = np.where(truth, 1.0, -1.0)

    def loss(theta: Floats) -> float:
        return float(ridge @ theta**2 / 2 + share @ np.logaddexp(0, -sign * (design @ theta)))

    theta, now = np.zeros(design.shape[1]), math.inf
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(-(design @ theta).clip(-500, 500)))
        slope = design.T @ (share * (chance - truth)) + ridge * theta
        if np.abs(slope).max() < NEWTON_TOLERANCE * n:
            break
        curve = (design * (share * chance * (1 - chance))[:, None]).T @ design + np.diag(ridge + 1e-9)
        step, length, now = np.linalg.solve(curve, slope), 1.0, loss(theta)
        while loss(theta - length * step) > now and length > 1e-9:
            length /= 2
        theta = theta - length * step
    return theta[:-1], float(theta[-1])


def f1(said: NDArray[Any], truth: NDArray[Any]) -> float:
    """2·TP/(said + true), 0 where neither ever is."""
    return float(2 * (said & truth).sum() / max(said.sum() + truth.sum(), 1))


def _columns(encode: Callable[[Tensor], Tensor], x: Tensor, latents: Tensor) -> dict[int, Floats]:
    """Contributions [n] float64 of some latents by latent, encoded in batches."""
    codes = torch.cat([encode(rows)[:, latents] for rows in x.split(PROBE_BATCH)]).double().cpu().numpy()
    return dict(zip(latents.tolist(), codes.T, strict=True))


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE."""
    return probing(measured.contributions, measured.sae.W_dec, *measured.probed)


COLUMNS = {
    "k_sparse_splits": Column(
        f"latents of a k-sparse probe beyond the first that each raise F1 by {F1_JUMP}, mean over concepts", since=4
    ),
    "absorption_full": Column(
        "of probed inputs, on which a concept's own latents are silent while another stands in, mean over concepts",
        since=4,
    ),
    "absorption_fraction": Column(
        "of the probe's projection, what others take over from a concept's own latents, mean over concepts", since=4
    ),
}

register(
    Metric(
        name="probing",
        description="k-sparse probes and absorption as SAEBench has them",
        source="arXiv 2503.09532, 2409.14507",
        settings={
            "probing": Setting(
                False, "true: also measure k-sparse probes and absorption, as SAEBench does; some seconds for each SAE"
            )
        },
        columns=COLUMNS,
        measure=measure,
    )
)
