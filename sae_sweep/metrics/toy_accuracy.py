"""How much the toy gets right of the inputs that its SAEs are measured on: what it has not learnt, no SAE can find."""

from __future__ import annotations

from sae_sweep.config.columns import Column
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register


def toy_accuracy(measured: Measured) -> dict[str, Value]:
    """The column of this metric."""
    # Imported here: that module needs PyTorch, which listings and plans do without.
    from sae_sweep.metrics.evaluation_batches import accuracy_of

    return {"toy_accuracy": accuracy_of(measured.inputs)}


register(
    Metric(
        name="toy_accuracy",
        description="the share of the evaluation inputs, by weight, that the toy answers right",
        columns={"toy_accuracy": Column("share of the evaluation inputs, by weight, that the toy answers right")},
        measure=toy_accuracy,
    )
)
