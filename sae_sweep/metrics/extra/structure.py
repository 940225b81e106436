"""Is there structure in the splitting (P5)? Decoder rows of split latents as parent + modifier + what is left.

Every figure comes with what it is after a permutation, since few rows in few dimensions always fit something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.config.settings import PARTITIONS
from sae_sweep.lazy import lazy
from sae_sweep.metrics.labels import NOTHING, Latents
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import Setting, register
from sae_sweep.toys.classes import Factored

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F

    from sae_sweep.metrics.partitions import Floats, Ints
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")

# Permutations behind a null.
PERMUTATIONS = 10
SEMI_NMF_STEPS = 200
META_STEPS, META_RATE, META_ACTIVE = 500, 1e-2, 2
TINY = 1e-12


def structure(rows: Floats, mean_code: Floats, latents: Latents, cells: Factored | None) -> dict[str, Value]:
    """The columns structure_* of one SAE; null where there is too little to look at.

    rows [width, d]: decoder rows; mean_code [width]: mean code z of a latent where it fires. Looked at are the latents
    labelled by maximum and one factor, that by which most are labelled, each as what it adds: mean_code · row.

    structure_parent, _modifier, _interaction: shares of their variance that parents explain, that modifiers explain
    beyond them, and that neither does; structure_cosine: of the difference that a modifier makes under one parent and
    under another; structure_semi_nmf, _meta_sae: variance of these vectors, at unit length, that semi-NMF and a TopK
    SAE explain with a component for each parent and each modifier. `_null`: the same with modifiers permuted within
    each parent (modifier, interaction, cosine), parents among all (parent), or each entry of the vectors (the others).
    """
    found: dict[str, Value] = dict.fromkeys(COLUMNS)
    if cells is None:
        return found
    chosen, parent, modifier = split_latents(latents, cells)
    vectors = mean_code[chosen, None] * rows[chosen]
    # In an order of their own, whatever that of the latents: what is drawn below goes by place.
    order = np.lexsort((*vectors.T, modifier, parent))
    vectors, parent, modifier = vectors[order], parent[order], modifier[order]
    parents, modifiers = len(np.unique(parent)), len(np.unique(modifier))
    if parents < 2 or modifiers < 2 or len(chosen) <= parents + modifiers:
        return found
    shares = two_way(vectors, parent, modifier)
    found |= dict(zip(("structure_parent", "structure_modifier", "structure_interaction"), shares, strict=True))
    found["structure_cosine"] = splitting_cosine(vectors, parent, modifier)
    alone = np.zeros_like(parent)
    found["structure_parent_null"] = _null(lambda other: two_way(vectors, other, modifier)[0], alone, parent)
    found["structure_modifier_null"] = _null(lambda other: two_way(vectors, parent, other)[1], parent, modifier)
    found["structure_interaction_null"] = _null(lambda other: two_way(vectors, parent, other)[2], parent, modifier)
    found["structure_cosine_null"] = _null(lambda other: splitting_cosine(vectors, parent, other), parent, modifier)
    unit = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + TINY)
    for name, explained in (("semi_nmf", semi_nmf), ("meta_sae", meta_sae)):
        found[f"structure_{name}"] = explained(unit, parents + modifiers)
        found[f"structure_{name}_null"] = explained(_shuffled(unit), parents + modifiers)
    return found


def split_latents(latents: Latents, cells: Factored) -> tuple[Ints, Ints, Ints]:
    """Latents labelled by maximum and one more factor, the most frequent: their numbers, parents and modifiers [n]."""
    labels = [PARTITIONS.index(name) for name in ("mq", "mn", "mc")]
    label = max(labels, key=lambda each: int((latents.label == each).sum()))
    chosen = np.flatnonzero(latents.label == label)
    example = np.where(latents.example == NOTHING, 0, latents.example)[chosen]
    parent, modifier = (cells.factors[factor][example].astype(np.int64) for factor in PARTITIONS[label])
    return chosen, parent, modifier


def two_way(vectors: Floats, parent: Ints, modifier: Ints) -> tuple[float, float, float]:
    """Shares of the variance of vectors [n, d]: of the parents' means, of modifiers beyond them, of the rest.

    Least squares of one effect per parent, then of one per modifier too (a two-way analysis of variance without
    repetition, its sums of squares in this order); the rest is interaction. They sum to 1.
    """
    centred = vectors - vectors.mean(0)
    parents = _dummies(parent)
    total = float((centred**2).sum()) + TINY
    after_parent = _left(parents, centred)
    after_both = _left(np.hstack([parents, _dummies(modifier)]), centred)
    return 1 - after_parent / total, (after_parent - after_both) / total, after_both / total


def _dummies(values: Ints) -> Floats:
    return (values[:, None] == np.unique(values)).astype(np.float64)


def _left(design: Floats, values: Floats) -> float:
    fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
    return float(((values - fitted) ** 2).sum())


def splitting_cosine(vectors: Floats, parent: Ints, modifier: Ints) -> float | None:
    """Mean cosine of v(parent, a) − v(parent, b) and v(other, a) − v(other, b), over all pairs that there are."""
    place = {(p, q): i for i, (p, q) in enumerate(zip(parent.tolist(), modifier.tolist(), strict=True))}
    parents, modifiers = np.unique(parent).tolist(), np.unique(modifier).tolist()
    cosines = []
    for i, a in enumerate(modifiers):
        for b in modifiers[i + 1 :]:
            pairs = [(place[p, a], place[p, b]) for p in parents if (p, a) in place and (p, b) in place]
            if len(pairs) > 1:
                steps = np.array([vectors[one] - vectors[other] for one, other in pairs])
                unit = steps / (np.linalg.norm(steps, axis=1, keepdims=True) + TINY)
                cosines += (unit @ unit.T)[np.triu_indices(len(unit), 1)].tolist()
    return float(np.mean(cosines)) if cosines else None


def _null(value: Callable[[Ints], float | None], group: Ints, factor: Ints) -> float | None:
    """The mean of `value` with a factor permuted within each group."""
    rng, values = np.random.default_rng(0), []
    for _ in range(PERMUTATIONS):
        other = factor.copy()
        for each in np.unique(group):
            other[group == each] = rng.permutation(factor[group == each])
        values.append(value(other))
    known = [each for each in values if each is not None]
    return float(np.mean(known)) if known else None


def _shuffled(rows: Floats) -> Floats:
    """Every column permuted by itself: the same numbers, and nothing that rows have in common but their mean."""
    return np.random.default_rng(0).permuted(rows, axis=0)


def semi_nmf(rows: Floats, components: int) -> float:
    """Explained variance of rows [n, d] ≈ G·H with G ≥ 0 (Ding, Li & Jordan 2010, their multiplicative updates)."""
    weight: Floats = np.random.default_rng(0).random((len(rows), components)) + 0.2
    basis: Floats = np.zeros((components, rows.shape[1]))
    for _ in range(SEMI_NMF_STEPS):
        basis = np.asarray(np.linalg.lstsq(weight, rows, rcond=None)[0], np.float64)
        toward, between = rows @ basis.T, basis @ basis.T
        gain = np.maximum(toward, 0) + weight @ np.maximum(-between, 0)
        loss = np.maximum(-toward, 0) + weight @ np.maximum(between, 0)
        weight *= np.sqrt((gain + TINY) / (loss + TINY))
    return _explained(rows, weight @ basis)


def meta_sae(rows: Floats, width: int) -> float:
    """Explained variance of rows [n, d] by a TopK SAE over them, META_ACTIVE of `width` latents each (2502.04878)."""
    data = torch.from_numpy(rows).float()
    centred = data - data.mean(0)
    # Each latent starts from the row that is farthest from those before.
    chosen = [int(centred.norm(dim=1).argmax())]
    while len(chosen) < width:
        chosen.append(int(torch.cdist(centred, centred[chosen]).amin(1).argmax()))
    encoder, decoder = (F.normalize(centred[chosen], dim=1).requires_grad_() for _ in range(2))
    biases = torch.zeros(width, requires_grad=True), data.mean(0).requires_grad_()
    optimiser = torch.optim.Adam([encoder, decoder, *biases], lr=META_RATE)

    def reconstruct() -> torch.Tensor:
        pre = torch.relu((data - biases[1]) @ encoder.T + biases[0])
        top = pre.topk(min(META_ACTIVE, width), dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values) @ decoder + biases[1]

    with torch.enable_grad():
        for _ in range(META_STEPS):
            optimiser.zero_grad()
            F.mse_loss(reconstruct(), data).backward()
            optimiser.step()
    return _explained(rows, reconstruct().detach().double().numpy())


def _explained(rows: Floats, fitted: Floats) -> float:
    return 1 - float(((rows - fitted) ** 2).sum() / (((rows - rows.mean(0)) ** 2).sum() + TINY))


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE."""
    W_dec, inputs = measured.sae.W_dec, measured.inputs
    mean_code = measured.table.mean_mass / W_dec.norm(dim=1).cpu().numpy()
    return structure(W_dec.double().cpu().numpy(), mean_code, measured.latents, inputs.cells)


# What each is, and what a sentence calls its null, if not by its name.
_PHRASES = {
    "parent": ("share of variance that the parent explains", ""),
    "modifier": ("share of variance that the modifier explains", ""),
    "interaction": ("share of variance that neither explains", ""),
    "cosine": ("cosine of what a modifier adds to two parents", ""),
    "semi_nmf": ("variance that semi-NMF explains", "variance that it explains of shuffled vectors"),
    "meta_sae": ("variance that a meta-SAE explains", "variance that it explains of shuffled vectors"),
}
COLUMNS = {
    f"structure_{name}{end}": Column(f"of split latents' rows, {what}{aside}", words, since=7)
    for name, (what, null) in _PHRASES.items()
    for end, words, aside in (("", what, ""), ("_null", null, ", once permuted"))
}

register(
    Metric(
        name="structure",
        version=2,
        description="decoder rows of split latents as parent + modifier + what is left",
        settings={
            "structure": Setting(
                False,
                "true: also measure how far decoder rows of split latents are a parent's direction plus a modifier's",
            )
        },
        columns=COLUMNS,
        measure=measure,
    )
)
