"""Everything that is measured on one SAE, from one pass over the evaluation inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.metrics.evaluation_batches import blocks
from sae_sweep.metrics.extra.priors import priors
from sae_sweep.metrics.extra.probing import INPUTS, probing
from sae_sweep.metrics.extra.structure import structure
from sae_sweep.metrics.firing import FiringCounter, FiringTable, Fold, fold_dense
from sae_sweep.metrics.ground_truth import Detection, DetectionCounter, planted_metrics
from sae_sweep.metrics.information import cofiring, information, winner_entropy
from sae_sweep.metrics.labels import (
    LIVE_INPUTS,
    NOTHING,
    Latents,
    class_name,
    count_splits,
    describe,
    detectors,
    lightest,
    live_floor,
)
from sae_sweep.metrics.metric import Measured
from sae_sweep.metrics.nulls import shuffled_cells, shuffled_features
from sae_sweep.metrics.reconstruction import Reconstruction
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.registry import kinds
from sae_sweep.toys.classes import Factored
from sae_sweep.toys.sampling import EvaluationInputs

# Inputs at a time, so that what is computed of them stays in a cache; fewer where so many latents fire that a row for
# each input of all that fire would have more numbers than this. Fixed, as sums depend on where a block ends.
BLOCK_INPUTS, BLOCK_NUMBERS = 1 << 11, 1 << 22


class MeasurableSAE(Protocol):
    """What a pass needs of an SAE: x̂ = z @ W_dec + b_dec, where the code z is mostly zero."""

    @property
    def W_dec(self) -> Tensor:
        """Decoder rows [width, d] float32, as they are (not normalised)."""

    @property
    def b_dec(self) -> Tensor:
        """Decoder bias [d] float32."""

    def active(self, x: Tensor) -> Iterator[Active]:
        """Codes z ≥ 0 of normalised inputs x [b, d], of some inputs after the other; decoder norms not folded in."""


@dataclass(frozen=True)
class Measurement:
    """`metrics` by column of the results table; `latents`: a row per latent; `per_max`: counts of maxima by name."""

    metrics: dict[str, float | int | None]
    latents: pd.DataFrame
    per_max: dict[str, list[int]]


@torch.no_grad()
def measure(
    sae: MeasurableSAE,
    inputs: EvaluationInputs,
    penalty_value: Callable[[Tensor], Tensor],
    evaluation: Evaluation,
    *,
    nulls: bool = True,
) -> Measurement:
    """Measure an SAE on the device where the inputs are; `evaluation` must be the one that `inputs` were made with.

    `penalty_value`: a‖d‖ [b, width] to the penalty of each input [b]. `nulls`: with the columns shuffled_*.
    Metrics are nan where the SAE's own numbers are not finite, None where the toy gives them no meaning.
    """
    reconstruction = Reconstruction(inputs.model, inputs.site, inputs.mean, inputs.scale, penalty_value)
    fold = None if inputs.cells is None else fold_dense(inputs.cells, inputs.chance, evaluation.f1)
    table, detection = _one_pass(sae, inputs, reconstruction, evaluation.fires_above, fold)
    metrics: dict[str, float | int | None] = {**reconstruction.metrics, "winner_entropy": winner_entropy(table)}
    metrics["cofiring"] = cofiring(table)
    per_max: dict[str, list[int]] = {}
    if inputs.cells is not None and fold is not None:
        latents = describe(table, inputs.cells, evaluation)
        splitting = count_splits(latents, inputs.cells, evaluation)
        metrics |= splitting.metrics | information(table, inputs.cells, evaluation.permutations)
        metrics |= {"live_floor_inputs": LIVE_INPUTS, "live_floor_mass": live_floor(table)}
        if nulls:
            metrics |= shuffled_cells(table, inputs.cells, evaluation, fold)
        per_max = {"splits": splitting.splits.tolist(), "duplicates": splitting.duplicates.tolist()}
    if detection is not None and inputs.model.planted is not None:
        if inputs.cells is None:
            latents = detectors(detection)
            metrics |= {"live_latents": int(latents.live.sum()), "dead_latents": int((~latents.live).sum())}
            metrics |= {"live_floor_inputs": LIVE_INPUTS, "live_floor_mass": lightest(detection) / detection.total}
            metrics["fvu_above_ceiling"] = None
        directions = inputs.model.planted.directions
        for columns in (planted_metrics, shuffled_features) if nulls else (planted_metrics,):
            metrics |= columns(detection, sae.W_dec, directions, latents.live, evaluation.f1)
    norms = sae.W_dec.norm(dim=1)
    described = _frame(latents, inputs.cells, norms)
    if evaluation.probing:
        metrics |= probing(lambda x: _contributions(sae, x), sae.W_dec, *inputs.labelled(INPUTS))
    if evaluation.priors:
        of_priors, of_latents = priors(_contributions(sae, inputs.labelled(INPUTS)[0]), evaluation.fires_above)
        metrics |= of_priors
        described = described.join(of_latents)
    if evaluation.structure:
        mean_code = table.mean_mass / norms.cpu().numpy()
        metrics |= structure(sae.W_dec.double().cpu().numpy(), mean_code, latents, inputs.cells)
    for metric in kinds("metric").values():
        metrics |= metric.measure(Measured(sae, inputs, evaluation, table, latents, metrics))
    return Measurement(metrics, described, per_max)


def _one_pass(
    sae: MeasurableSAE, inputs: EvaluationInputs, reconstruction: Reconstruction, fires_above: float, fold: Fold | None
) -> tuple[FiringTable, Detection | None]:
    """The firing table, of one cell for a toy without any, and the counts of a toy with planted features."""
    cells, planted, width = inputs.cells, inputs.model.planted, len(sae.W_dec)
    decoder_norms = sae.W_dec.norm(dim=1)
    counter = FiringCounter(width, cells.count if cells is not None else 1, fires_above, fold)
    detections = None
    if planted is not None:
        detections = DetectionCounter(width, len(planted.directions), fires_above, inputs.mean.device)
    for block in blocks(inputs, BLOCK_INPUTS):
        begin = 0
        for active in sae.active(block.x):
            for part in active.split(BLOCK_NUMBERS // (width if planted is not None else max(1, active.most))):
                at = block.part(slice(begin, begin := begin + len(part)))
                norms, x_hat = part.contributions(decoder_norms), part.decode(sae.W_dec, sae.b_dec)
                seen = at.maximum, at.weight, at.truth, at.logits
                reconstruction.add(at.x, part.counts, norms.packed(), x_hat, *seen)
                counter.count(norms, at.cell.cpu().numpy(), at.weight.cpu().numpy())
                if detections is not None and planted is not None:
                    detections.add(norms.dense(width), planted.features(at.inputs))
    return counter.table, detections.detection if detections else None


def _contributions(sae: MeasurableSAE, x: Tensor) -> Tensor:
    """a‖d‖ of every latent [b, width]."""
    norms = sae.W_dec.norm(dim=1)
    return torch.cat([part.contributions(norms).dense(len(norms)) for part in sae.active(x)])


def _frame(latents: Latents, cells: Factored | None, decoder_norms: Tensor) -> pd.DataFrame:
    """A row per latent, as in latents.parquet; null where a latent never fires (owner, purity, F1) or has no label."""
    named = latents.label != NOTHING
    pairs = zip(latents.label.tolist(), latents.example.tolist(), strict=True)
    named_class = [class_name(cells, *pair) if cells is not None and pair[0] != NOTHING else None for pair in pairs]
    return pd.DataFrame(
        {
            "latent": np.arange(len(named)),
            "owner": pd.Series(latents.owner, dtype="Int64").mask(latents.owner == NOTHING),
            "purity": latents.purity,
            "label": [PARTITIONS[label] if label != NOTHING else None for label in latents.label],
            "label_class": named_class,
            "f1": latents.f1,
            "density": latents.density,
            "inputs": latents.inputs,
            "decoder_norm": decoder_norms.cpu().numpy(),
            "live": latents.live,
        }
    )
