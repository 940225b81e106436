"""What a metric says of itself: the columns that it brings, and how it computes them from what was seen of an SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.limits import PROBE_INPUTS
from sae_sweep.registry import Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config.settings import Evaluation
    from sae_sweep.metrics import evaluation_batches, labels
    from sae_sweep.metrics.code_levels import CodeLevels
    from sae_sweep.metrics.evaluation_classes import EvaluationClasses
    from sae_sweep.metrics.extra.inference import Objective
    from sae_sweep.metrics.firing import FiringTable
    from sae_sweep.metrics.ground_truth import Detection
    from sae_sweep.metrics.reconstruction import Reconstruction
    from sae_sweep.metrics.sparse_codes import Active
    from sae_sweep.toys.sampling import EvaluationInputs
else:
    torch, labels = lazy("torch"), lazy("sae_sweep.metrics.labels")
    evaluation_batches = lazy("sae_sweep.metrics.evaluation_batches")

Value = float | int | None


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
class Measured:
    """What one pass over the inputs has seen of an SAE, and the columns that metrics have made of it so far.

    table: firing by latent and class; levels: how large contributions are, and how often; classes: the ground truth,
    None for a toy without; detection: counts by planted feature, None for a toy without; nulls: whether columns of
    nulls are asked for; objective: what the SAE's codes were to minimise, None if nobody asks what better ones would
    reach.
    """

    sae: MeasurableSAE
    inputs: EvaluationInputs
    evaluation: Evaluation
    table: FiringTable
    levels: CodeLevels
    detection: Detection | None
    reconstruction: Reconstruction
    classes: EvaluationClasses | None
    nulls: bool = True
    objective: Objective | None = None
    metrics: dict[str, Value] = field(default_factory=dict)

    @cached_property
    def latents(self) -> labels.Latents:
        """What each latent stands for."""
        if self.classes is not None:
            return labels.describe(self.table, self.classes)
        assert self.detection is not None
        return labels.detectors(self.detection)

    @cached_property
    def counts(self) -> labels.Counts | None:
        """What is counted over them; None for a toy without classes."""
        return None if self.classes is None else labels.count(self.latents, self.classes)

    @cached_property
    def probed(self) -> tuple[Tensor, Tensor]:
        """Inputs for probes [n, d], and which concepts each has [n, concepts] bool."""
        return evaluation_batches.labelled(self.inputs, PROBE_INPUTS)

    def contributions(self, x: Tensor) -> Tensor:
        """a‖d‖ of every latent [b, width] for inputs x [b, d]."""
        norms = self.sae.W_dec.norm(dim=1)
        return torch.cat([part.contributions(norms).dense(len(norms)) for part in self.sae.active(x)])


@dataclass(frozen=True, kw_only=True)
class Metric(Kind):
    """`measure(measured)`: a value for each of `columns`; None, or left out, where it has no meaning.

    It is measured on every SAE while its package is installed; if it has a setting of its own name, a key of
    `evaluation` as all its settings are, only where that is true. of_latents: columns of latents.parquet for which it
    gives a value per latent [width] beside.
    """

    family = "metric"
    columns: Mapping[str, Column]
    measure: Callable[[Measured], Mapping[str, Any]]
    of_latents: tuple[str, ...] = ()

    def asked(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation measures it."""
        return bool(evaluation.get(self.name, True))


def with_nulls(columns: Mapping[str, Column], names: Iterable[str], first: int, second: int) -> dict[str, Column]:
    """The columns of the nulls of measures, and of their standard deviations (`nulls.summary`).

    names: in their order; first, second: the editions of the two.
    """
    asked = {name: columns[name].description for name in names}
    nulls = {
        f"shuffled_{name}": Column(f"{what}, were labels shuffled: mean over permutations", since=first)
        for name, what in asked.items()
    }
    spreads = {
        f"shuffled_{name}_sd": Column(f"standard deviation of shuffled_{name} over permutations", since=second)
        for name in asked
    }
    return nulls | spreads
