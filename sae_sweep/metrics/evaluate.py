"""Everything that is measured on one SAE, from one pass over the evaluation inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_sweep.config.columns import INFERRED, INFORMATION
from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.metrics.ceilings import beside_ceilings
from sae_sweep.metrics.evaluation_batches import blocks, classes_of
from sae_sweep.metrics.evaluation_classes import LIVE_INPUTS, NOTHING
from sae_sweep.metrics.extra.inference import Objective, PerfectEncoder
from sae_sweep.metrics.extra.priors import priors
from sae_sweep.metrics.extra.probing import probing
from sae_sweep.metrics.extra.structure import structure
from sae_sweep.metrics.extra.token_order import token_order
from sae_sweep.metrics.firing import FiringCounter, FiringTable, Fold, fold_dense
from sae_sweep.metrics.ground_truth import Detection, DetectionCounter, planted_metrics
from sae_sweep.metrics.information import cofiring, information, winner_entropy
from sae_sweep.metrics.labels import Latents, class_name, count, describe, detectors, least_inputs, only_one
from sae_sweep.metrics.limits import BLOCK_INPUTS, BLOCK_NUMBERS, PROBE_INPUTS
from sae_sweep.metrics.metric import Measured
from sae_sweep.metrics.nulls import shuffled_cells, shuffled_features
from sae_sweep.metrics.reconstruction import Reconstruction
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.registry import kinds
from sae_sweep.toys.classes import Factored
from sae_sweep.toys.sampling import EvaluationInputs


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
    objective: Objective | None = None,
) -> Measurement:
    """Measure an SAE on the device where the inputs are; `evaluation` must be the one that `inputs` were made with.

    `penalty_value`: a‖d‖ [b, width] to the penalty of each input [b]. `nulls`: with the columns shuffled_*.
    `objective`: with the columns truth_*, and inferred_* if `evaluation.inference` asks for them.
    Metrics are nan where the SAE's own numbers are not finite, None where the toy gives them no meaning.
    """
    reconstruction = Reconstruction(inputs.model, inputs.site, inputs.mean, inputs.scale, penalty_value)
    classes = classes_of(inputs, evaluation)
    fold = None if classes is None else fold_dense(classes.cells, classes.chance, evaluation.f1)
    table, detection = _one_pass(sae, inputs, reconstruction, evaluation.fires_above, fold)
    metrics: dict[str, float | int | None] = {**reconstruction.metrics, "winner_entropy": winner_entropy(table)}
    metrics["cofiring"] = cofiring(table)
    per_max: dict[str, list[int]] = {}
    if classes is not None:
        latents = describe(table, classes)
        counts = count(latents, classes)
        metrics |= {"live_latents": int(latents.live.sum()), "dead_latents": int((~latents.live).sum())}
        metrics |= only_one(counts.metrics) | beside_ceilings(counts.metrics, classes, table.width)
        metrics |= {"live_floor_inputs": classes.live_inputs, "live_floor_mass": classes.live_mass}
        found = information(table, classes.cells, evaluation.permutations)
        metrics |= found if nulls else {name: found[name] for name in INFORMATION}
        if nulls:
            metrics |= shuffled_cells(table, classes)
        per_max = {"splits": counts.splits[0].tolist(), "duplicates": counts.duplicates[0].tolist()}
    if detection is not None and inputs.model.planted is not None:
        if classes is None:
            latents = detectors(detection)
            metrics |= {"live_latents": int(latents.live.sum()), "dead_latents": int((~latents.live).sum())}
            least = least_inputs(detection) / detection.total
            metrics |= {"live_floor_inputs": LIVE_INPUTS, "live_floor_mass": least, "fvu_above_ceiling": None}
        directions = inputs.model.planted.directions
        metrics |= planted_metrics(detection, sae.W_dec, directions, latents.live, evaluation.f1)
        if nulls:
            metrics |= shuffled_features(detection, sae.W_dec, directions, latents.live, evaluation)
    norms = sae.W_dec.norm(dim=1)
    described = _frame(latents, inputs.cells, norms)
    if evaluation.inference and objective is not None:
        metrics |= inferred(sae, inputs, objective, evaluation, metrics)
    if evaluation.order:
        metrics |= token_order(sae, inputs, evaluation)
    if evaluation.probing:
        metrics |= probing(lambda x: _contributions(sae, x), sae.W_dec, *inputs.labelled(PROBE_INPUTS))
    if evaluation.priors:
        of_priors, of_latents = priors(_contributions(sae, inputs.labelled(PROBE_INPUTS)[0]), evaluation.fires_above)
        metrics |= of_priors
        described = described.join(of_latents)
    if evaluation.structure:
        mean_code = table.mean_mass / norms.cpu().numpy()
        metrics |= structure(sae.W_dec.double().cpu().numpy(), mean_code, latents, inputs.cells)
    for metric in kinds("metric").values():
        metrics |= metric.measure(Measured(sae, inputs, evaluation, table, latents, metrics, objective))
    return Measurement(metrics, described, per_max)


def inferred(
    sae: MeasurableSAE,
    inputs: EvaluationInputs,
    objective: Objective,
    evaluation: Evaluation,
    own: Mapping[str, float | int | None],
) -> dict[str, float | int | None]:
    """The columns inferred_* of an SAE's dictionary with the best codes for it, and what they save of its loss."""
    reconstruction = Reconstruction(inputs.model, inputs.site, inputs.mean, inputs.scale, objective.penalty_value)
    classes = classes_of(inputs, evaluation)
    fold = None if classes is None else fold_dense(classes.cells, classes.chance, evaluation.f1)
    table, _ = _one_pass(PerfectEncoder(sae, objective), inputs, reconstruction, evaluation.fires_above, fold)
    found = {**reconstruction.metrics, "winner_entropy": winner_entropy(table)}
    loss = _loss(found, objective)
    counts: dict[str, float | int | None] = {}
    if classes is not None:
        latents = describe(table, classes)
        counts = {"live_latents": int(latents.live.sum()), **only_one(count(latents, classes).metrics)}
    columns = {f"inferred_{name}": {**found, **counts, "loss": loss}.get(name) for name in INFERRED}
    return columns | {"encoder_gap": _loss(own, objective) - loss}


def _loss(columns: Mapping[str, float | int | None], objective: Objective) -> float:
    """E‖r‖² + coefficient · E penalty, from columns."""
    error, penalty, entropy = (columns[name] for name in ("squared_error", "penalty_mean", "winner_entropy"))
    assert error is not None and penalty is not None and entropy is not None
    # A penalty that overflows must not turn a coefficient of 0 into nan.
    return error + (objective.coefficient * (penalty + entropy * objective.shares) if objective.coefficient else 0.0)


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
