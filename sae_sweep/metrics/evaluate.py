"""Everything that is measured on one SAE, from one pass over the evaluation inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.metrics.code_levels import CodeLevels
from sae_sweep.metrics.evaluation_batches import blocks, classes_of
from sae_sweep.metrics.evaluation_classes import NOTHING
from sae_sweep.metrics.extra.inference import Objective
from sae_sweep.metrics.firing import FiringCounter, fold_dense
from sae_sweep.metrics.ground_truth import DetectionCounter
from sae_sweep.metrics.labels import class_name
from sae_sweep.metrics.limits import BLOCK_INPUTS, BLOCK_NUMBERS
from sae_sweep.metrics.metric import MeasurableSAE, Measured, Value
from sae_sweep.metrics.reconstruction import Reconstruction
from sae_sweep.registry import kinds
from sae_sweep.toys.sampling import EvaluationInputs


@dataclass(frozen=True)
class Measurement:
    """`metrics` by column of the results table; `latents`: a row per latent; `per_max`: counts of maxima by name."""

    metrics: dict[str, Value]
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
    measured = see(sae, inputs, penalty_value, evaluation, nulls=nulls, objective=objective)
    of_latents: dict[str, Any] = {}
    for metric in kinds("metric").values():
        if metric.asked(evaluation):
            found = dict(metric.measure(measured))
            of_latents |= {name: found.pop(name) for name in metric.of_latents}
            measured.metrics.update(found)
    counts = measured.counts
    per_max = (
        {} if counts is None else {"splits": counts.splits[0].tolist(), "duplicates": counts.duplicates[0].tolist()}
    )
    return Measurement(measured.metrics, _frame(measured, of_latents), per_max)


def see(
    sae: MeasurableSAE,
    inputs: EvaluationInputs,
    penalty_value: Callable[[Tensor], Tensor],
    evaluation: Evaluation,
    **asked: Any,
) -> Measured:
    """What one pass over the inputs sees of an SAE, nothing measured yet; `asked`: `nulls`, `objective` of Measured."""
    cells, planted, width = inputs.cells, inputs.model.planted, len(sae.W_dec)
    decoder_norms, classes = sae.W_dec.norm(dim=1), classes_of(inputs, evaluation)
    reconstruction = Reconstruction(inputs.model, inputs.site, inputs.mean, inputs.scale, penalty_value)
    fold = None if classes is None else fold_dense(classes.cells, classes.chance, evaluation.f1)
    # A toy without cells has one.
    counter = FiringCounter(width, cells.count if cells is not None else 1, evaluation.fires_above, fold)
    levels, detections = CodeLevels(), None
    if planted is not None:
        detections = DetectionCounter(width, len(planted.directions), evaluation.fires_above, inputs.mean.device)
    for block in blocks(inputs, BLOCK_INPUTS):
        begin = 0
        for active in sae.active(block.x):
            for part in active.split(BLOCK_NUMBERS // (width if planted is not None else max(1, active.most))):
                at = block.part(slice(begin, begin := begin + len(part)))
                norms, x_hat = part.contributions(decoder_norms), part.decode(sae.W_dec, sae.b_dec)
                seen = at.maximum, at.weight, at.truth, at.logits
                reconstruction.add(at.x, part.counts, norms.packed(), x_hat, *seen)
                listed, weight = norms.cpu(), at.weight.cpu().numpy()
                counter.count(listed, at.cell.cpu().numpy(), weight)
                levels.add(listed, weight)
                if detections is not None and planted is not None:
                    detections.add(norms.dense(width), planted.features(at.inputs))
    detection = None if detections is None else detections.detection
    return Measured(sae, inputs, evaluation, counter.table, levels, detection, reconstruction, classes, **asked)


def _frame(measured: Measured, of_latents: Mapping[str, Any]) -> pd.DataFrame:
    """A row per latent, as in latents.parquet; null where a latent never fires (owner, purity, F1) or has no label."""
    latents, cells = measured.latents, measured.inputs.cells
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
            "decoder_norm": measured.sae.W_dec.norm(dim=1).cpu().numpy(),
            "live": latents.live,
            **of_latents,
        }
    )
