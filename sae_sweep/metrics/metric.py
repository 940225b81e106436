"""A metric of one's own: what it is given, and which columns it brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.registry import Kind

if TYPE_CHECKING:
    from sae_sweep.config.settings import Evaluation
    from sae_sweep.metrics.evaluate import MeasurableSAE
    from sae_sweep.metrics.extra.inference import Objective
    from sae_sweep.metrics.firing import FiringTable
    from sae_sweep.metrics.labels import Latents
    from sae_sweep.toys.sampling import EvaluationInputs

Value = float | int | None


@dataclass(frozen=True)
class Measured:
    """What has been measured of an SAE: the SAE itself, the inputs, firing by latent and class, and each latent.

    metrics: the columns so far; objective: what the SAE's codes were to minimise, None if there is none to compare by
    """

    sae: MeasurableSAE
    inputs: EvaluationInputs
    evaluation: Evaluation
    table: FiringTable
    latents: Latents
    metrics: Mapping[str, Value]
    objective: Objective | None = None


@dataclass(frozen=True, kw_only=True)
class Metric(Kind):
    """`measure(measured)`: a value for each of `columns` {name: pandas type}; None where it has no meaning.

    It is measured on every SAE while its package is installed, and its settings are keys of `evaluation`.
    """

    family = "metric"
    columns: Mapping[str, str]
    measure: Callable[[Measured], Mapping[str, Value]]
