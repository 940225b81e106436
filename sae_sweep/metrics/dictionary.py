"""Decoder rows against each other and against what was planted: the columns by which papers on toys are told apart.

An example: an SAE in which latent 0 fires on "animal but no dog" and latent 1's row is animal + dog has recovered one
feature at cosine .9, has an edge animal-dog that is wholly absorbed, and on that edge a cosine of .71.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.ground_truth import cosines
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_sweep.metrics import evaluation_batches
else:
    np, torch = lazy("numpy"), lazy("torch")
    evaluation_batches = lazy("sae_sweep.metrics.evaluation_batches")

# Beyond so many latents the pairs of rows are too many to go through: `c_dec` is null.
WIDEST = 8192
# Rows at a time.
CHUNK = 512
# Inputs on which edges are judged.
EDGE_INPUTS = 1 << 14

COLUMNS = {
    "c_dec": Column("mean |cos| of every two decoder rows"),
    "c_dec_signed": Column("mean cos of every two decoder rows"),
    "recovered_80": Column("planted features along which a decoder row lies, cosine above .8", kind="Int64"),
    "recovered_90": Column("planted features along which a decoder row lies, cosine above .9", kind="Int64"),
    "encoder_recovered_80": Column("planted features along which an encoder row lies, cosine above .8", kind="Int64"),
    "encoder_recovered_90": Column("planted features along which an encoder row lies, cosine above .9", kind="Int64"),
    "edge_absorption": Column("of the inputs with a planted child, on which its parent's latent is silent"),
    "edge_cosine": Column("cosine of a planted child's decoder row with its parent's direction"),
    "edge_hedging": Column("cosine of a planted child's direction with the row nearest to its parent's"),
    "bias_on_recovered": Column("how much of a feature's mean the decoder bias holds, of features recovered at .9"),
    "bias_on_missed": Column("how much of a feature's mean the decoder bias holds, of the other features"),
}


def dictionary(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE; null where they have no meaning, nan where its numbers are not finite.

    c_dec, c_dec_signed: mean |cos| of every two decoder rows (arXiv 2508.16560), and mean cos: below 0 where latents
    take away features that seldom come with theirs; null for one latent, and beyond WIDEST
    recovered_80, recovered_90: planted features along which some decoder row lies, cosine above .8, .9 (2602.14111);
    encoder_recovered_80, encoder_recovered_90: along which some encoder row does
    edge_absorption, edge_cosine, edge_hedging: of a planted tree, see `edges`
    bias_on_recovered, bias_on_missed: see `bias`
    """
    found: dict[str, Value] = dict.fromkeys(COLUMNS)
    W_dec, planted = measured.sae.W_dec, measured.inputs.model.planted
    found["c_dec"], found["c_dec_signed"] = mean_overlaps(W_dec)
    if planted is None:
        return found
    finite = bool(torch.isfinite(W_dec).all())
    cosine = _cosines(torch.nan_to_num(W_dec), planted.directions)
    nearest = cosine.max(0)
    if finite:
        found |= {f"recovered_{percent}": int((nearest > percent / 100).sum()) for percent in (80, 90)}
    W_enc = getattr(measured.sae, "W_enc", None)
    if W_enc is not None and bool(torch.isfinite(W_enc).all()):
        seen = _cosines(W_enc, planted.directions).max(0)
        found |= {f"encoder_recovered_{percent}": int((seen > percent / 100).sum()) for percent in (80, 90)}
    found |= bias(measured, planted.directions, nearest > 0.9)
    of_edges = getattr(planted, "edges", ())
    if of_edges and finite:
        found |= edges(measured, of_edges, cosine)
    return found


def mean_overlaps(W_dec: Tensor) -> tuple[float, float] | tuple[None, None]:
    """Mean |cos| and mean cos of every two rows [width, d], rows of zeros counting as orthogonal; None as above."""
    width = len(W_dec)
    if not 1 < width <= WIDEST:
        return None, None
    sizes = signed = 0.0
    for start in range(0, width, CHUNK):
        cosine = _cosines(W_dec[start : start + CHUNK], W_dec)
        sizes += float(np.abs(cosine).sum())
        signed += float(cosine.sum())
    alike, pairs = int((W_dec.norm(dim=1) != 0).sum()), width * (width - 1)
    return (sizes - alike) / pairs, (signed - alike) / pairs


def edges(measured: Measured, of_edges: list[tuple[int, int]], cosine: NDArray[np.float64]) -> dict[str, Value]:
    """Of the edges (parent, child) of a planted tree, means.

    edge_hedging: cosine of the child's direction with the row nearest to the parent's: above 0 where an SAE too narrow
    for the child mixes it into the parent's latent, by r/√(1 + r²) for a code that does not vary, r the child's rate
    given the parent (2505.11756).

    The others are of edges whose two features have latents of their own, by the one-to-one matching of rows and
    directions with the largest sum of cosines (Hungarian).

    edge_absorption: of the inputs with the child, the share on which the parent's latent is silent while the child's
    fires: absorption of arXiv 2409.14507 (§3), which it finds by probes, told here from the truth.
    edge_cosine: cosine of the child's decoder row with the parent's direction: 0 where it is the child's alone, .71
    where it is the sum of both.
    """
    from scipy.optimize import linear_sum_assignment

    rows, features = linear_sum_assignment(cosine, maximize=True)
    latent = dict(zip(features.tolist(), rows.tolist(), strict=True))
    held = [(parent, child) for parent, child in of_edges if parent in latent and child in latent]
    nearest = cosine.argmax(0)
    hedging: dict[str, Value] = {
        "edge_hedging": float(np.mean([cosine[nearest[parent], child] for parent, child in of_edges]))
    }
    if not held:
        return hedging
    x, true = evaluation_batches.labelled(measured.inputs, EDGE_INPUTS)
    fires = measured.contributions(x) > measured.evaluation.fires_above
    shares = []
    for parent, child in held:
        seen = true[:, child]
        absorbed = seen & ~fires[:, latent[parent]] & fires[:, latent[child]]
        if (inputs := int(seen.sum())) > 0:
            shares.append(int(absorbed.sum()) / inputs)
    return hedging | {
        "edge_absorption": float(np.mean(shares)) if shares else None,
        "edge_cosine": float(np.mean([cosine[latent[child], parent] for parent, child in held])),
    }


def bias(measured: Measured, directions: Tensor, recovered: NDArray[np.bool_]) -> dict[str, Value]:
    """How much of each feature's mean the decoder bias holds, averaged over features recovered at .9 and the others.

    Of raw activations: ⟨b, f⟩ / ⟨E[activation], f⟩ for the bias b = mean + b_dec/scale and the unit direction f. It is
    0 where latents say all of a feature, 1 where the bias stands in for it at its rate times its magnitude, as for what
    an SAE is too narrow to hold (arXiv 2505.11756). Without meaning where the mean has nothing of a feature: left out.
    """
    inputs, unit = measured.inputs, torch.nn.functional.normalize(directions.double(), dim=1)
    mean = inputs.mean.double()
    raw = mean + measured.sae.b_dec.double() / inputs.scale
    of_mean, of_bias = (_along(vector, unit) for vector in (mean, raw))
    there = np.abs(of_mean) > 1e-6 * float(mean.norm())
    shares = of_bias / np.where(there, of_mean, 1.0)
    groups = {"bias_on_recovered": there & recovered, "bias_on_missed": there & ~recovered}
    return {name: float(shares[group].mean()) if group.any() else None for name, group in groups.items()}


def _along(vector: Tensor, unit: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (unit * vector).sum(1).cpu().numpy()
    return found


def _cosines(rows: Tensor, others: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = cosines(rows, others).cpu().numpy()
    return found


register(
    Metric(
        name="dictionary",
        description="decoder rows against each other and against planted features; a planted tree's absorption",
        source="arXiv 2508.16560, 2602.14111, 2409.14507, 2505.11756",
        columns=COLUMNS,
        measure=dictionary,
    )
)
