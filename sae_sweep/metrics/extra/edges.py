"""Absorption and hedging edge by edge of a planted tree, beside the latent that holds the child.

An example: in latents.parquet, the row of the latent that holds "dog" says that its parent is feature 0, "animal", and
that "animal"'s own latent is silent on all inputs with a dog.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.dictionary import held_edges
from sae_sweep.metrics.ground_truth import cosines
from sae_sweep.metrics.metric import Measured, Metric
from sae_sweep.registry import Setting, register

if TYPE_CHECKING:
    import numpy as np
else:
    np = lazy("numpy")

OF_LATENTS = ("edge_parent", "edge_child", "edge_absorption", "edge_cosine", "edge_hedging")


def edges(measured: Measured) -> dict[str, Any]:
    """`edges_held`, null without a planted tree, and for every latent [width] what OF_LATENTS say of the edge whose
    child it holds (`dictionary.edges`), nan where it holds none."""
    planted, W_dec = measured.inputs.model.planted, measured.sae.W_dec
    found: dict[str, Any] = {name: np.full(len(W_dec), np.nan) for name in OF_LATENTS} | {"edges_held": None}
    of_edges = getattr(planted, "edges", ())
    if planted is None or not of_edges or not bool(W_dec.isfinite().all()):
        return found
    held = held_edges(measured, of_edges, cosines(W_dec, planted.directions).cpu().numpy())
    for edge in held:
        absorption = np.nan if edge.absorption is None else edge.absorption
        values = edge.parent, edge.child, absorption, edge.cosine, edge.hedging
        for name, value in zip(OF_LATENTS, values, strict=True):
            found[name][edge.latent] = value
    return found | {"edges_held": len(held)}


register(
    Metric(
        name="edges",
        description="absorption and hedging edge by edge of a planted tree, in latents.parquet",
        source="SAELens #729; arXiv 2409.14507, 2505.11756",
        settings={
            "edges": Setting(False, "each edge of a planted tree beside the latent that holds its child", legacy=False)
        },
        columns={"edges_held": Column("edges of a planted tree whose two features have latents", kind="Int64")},
        of_latents=OF_LATENTS,
        measure=edges,
    )
)
