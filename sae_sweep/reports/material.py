"""What reports are made of: a sweep's results, its records, and the verdicts on its claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae_sweep.config.settings import point_from
from sae_sweep.reports.claims import Verdict
from sae_sweep.reports.figure_data import named

if TYPE_CHECKING:
    from sae_sweep.metrics.extra.theory import Costs


@dataclass(frozen=True)
class Finished:
    """What figures are drawn from: a sweep's two results tables, and its records by point id, where they are known."""

    results: pd.DataFrame
    untrained: pd.DataFrame
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def named(self) -> pd.DataFrame:
        """The results with the names that figures give to settings."""
        return named(self.results)

    @cached_property
    def per_max(self) -> dict[str, Any]:
        """Counts of each maximum, of the points whose record has them."""
        return {id: record["per_max"] for id, record in self.records.items() if record.get("per_max")}

    @cached_property
    def curves(self) -> dict[str, Sequence[Mapping[str, Any]]]:
        """The training curve of each point."""
        return {id: record.get("curve") or () for id, record in self.records.items()}

    @cached_property
    def targets(self) -> dict[str, float]:
        """The mean L0 that training drives to or a loss pulls to, of the points that have one."""
        keys = (("training", "target_l0"), ("sae", "l0_target"))
        found = {id: [record["settings"][part].get(key) for part, key in keys] for id, record in self.records.items()}
        return {id: next(filter(None, targets)) for id, targets in found.items() if any(targets)}

    @cached_property
    def costs(self) -> dict[str, Costs]:
        """What the split and the shared code cost in theory, of the points of which there is a theory."""
        from sae_sweep.metrics.extra import theory

        return theory.compare(point_from(record["settings"]) for record in self.records.values())


@dataclass(frozen=True)
class Material:
    """What the report of a sweep shows: sweep.yaml, its results, its verdicts, and what is known of failed points."""

    info: Mapping[str, Any]
    finished: Finished
    verdicts: Sequence[Verdict] = ()
    failures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
