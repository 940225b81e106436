"""Ceilings: what a perfect code scores by the rules of counting. No PyTorch or numba: configurations are checked by it.

A perfect code for a partition has one latent for each class that can be judged, on for all of the class and for nothing
else. For example, max-of-3 over 16 tokens has 1,056 cells; the perfect code for them has 1,055 splits, or 65.9 a
maximum, as maximum 0 is a single cell and its latent is a whole maximum. No claim can ask for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import LABELS, Column
from sae_sweep.config.settings import PARTITIONS, Distribution, Evaluation, Toy
from sae_sweep.lazy import lazy
from sae_sweep.metrics.evaluation_classes import FINER_THAN_M, ROUNDING, EvaluationClasses
from sae_sweep.metrics.metric import Measured, Metric, Value
from sae_sweep.registry import register
from sae_sweep.toys.classes import FACTORS, Cells
from sae_sweep.toys.sampler import inputs_of_cells

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sae_sweep.metrics.partitions import Floats, Ints
else:
    np = lazy("numpy")

# The counts that have a ceiling, by what its column is called.
COUNTED = {"owned": "owned_maxes", "splits": "splits_per_max", "distinct_splits": "distinct_splits_per_max"}


@dataclass(frozen=True)
class Ceiling:
    """What the perfect code for one partition scores.

    classes: how many occur; countable: how many of them can be judged, each of which has a live latent in the code;
    owned: the maxima that some latent owns; splits: the latents named finer than a maximum, each by a class of its own.
    """

    classes: int
    countable: int
    owned: int
    splits: int


def ceilings_of(toy: Toy, distribution: Distribution, evaluation: Evaluation) -> Mapping[str, Ceiling] | None:
    """The ceiling of every partition of a toy's inputs; None for a toy whose cells are known only once it is made.

    A file of weights is read for it. Rows and factors of one's own (toy=activations) are not: they may be gigabytes,
    and are read when the toy is made, so that planning stays quick; their ceilings are columns of the results.
    Raises UserError where the weights cannot be read.
    """
    found = toy.kind.cells(toy, distribution)
    if found is None:
        return None
    (cells, chance), limit = found, evaluation.inputs
    inputs = inputs_of_cells(cells, chance, limit) if isinstance(cells, Cells) else limit * chance
    return ceilings(EvaluationClasses(cells, chance, inputs, toy.kind.inputs(toy) > limit, evaluation))


@lru_cache(maxsize=4)
def ceilings(classes: EvaluationClasses) -> Mapping[str, Ceiling]:
    """The ceiling of every partition of an evaluation's inputs."""
    return {name: _ceiling(classes, name) for name in PARTITIONS}


def ceiling_metrics(found: Mapping[str, Ceiling], maxima: int, width: int) -> dict[str, float]:
    """The columns of ceilings for an SAE of `width` latents: the best that a perfect code for any one partition scores.

    Of a code with more latents than the SAE has, it is taken to hold those that count.
    """
    owned = max(min(ceiling.owned, width) for ceiling in found.values())
    splits = max(min(ceiling.splits, width) for ceiling in found.values()) / maxima
    return {"owned_ceiling": owned, "splits_ceiling": splits, "distinct_splits_ceiling": splits}


def beside_ceilings(
    counts: Mapping[str, NDArray[Any] | None], classes: EvaluationClasses, width: int
) -> dict[str, Value]:
    """The columns of ceilings for an SAE of `width` latents, its counts as shares of them, and what can be counted.

    counts: by column [1]. A share may exceed 1: latents may be copies, or name classes of several partitions.
    """
    found = ceilings(classes)
    metrics: dict[str, Value] = {**ceiling_metrics(found, classes.cells.d_vocab, width)}
    for name, column in COUNTED.items():
        value, ceiling = counts[column], metrics[f"{name}_ceiling"]
        metrics[f"{name}_share"] = float(value[0]) / ceiling if value is not None and ceiling else None
    return metrics | {f"countable_{name}": ceiling.countable for name, ceiling in found.items()}


def _ceiling(classes: EvaluationClasses, name: str) -> Ceiling:
    counts = classes.countable(name)
    scored = [_scores(classes, name, other) for other in PARTITIONS]
    label, _ = classes.labels(np.array([score for score, _ in scored]), np.array([best for _, best in scored]), counts)
    share, owner = _shares(classes, name, "m")
    pure = counts & (share >= classes.evaluation.purity - ROUNDING)
    splits = int(np.isin(label, FINER_THAN_M).sum())
    return Ceiling(int((classes.weights(name) > 0).sum()), int(counts.sum()), len(np.unique(owner[pure])), splits)


def _scores(classes: EvaluationClasses, name: str, other: str) -> tuple[Floats, Ints]:
    """Each class of `name`'s largest F1 with a class of `other`, and which class that is: two arrays [classes]."""
    common, mine, theirs = _common(classes, name, other)
    of_mine, of_theirs = classes.weights(name)[mine], classes.weights(other)[theirs]
    return _largest(2 * common / np.maximum(of_mine + of_theirs, np.finfo(np.float64).tiny), mine, theirs)


def _shares(classes: EvaluationClasses, name: str, other: str) -> tuple[Floats, Ints]:
    """The largest share of each class of `name` that lies in one class of `other`, and in which: arrays [classes]."""
    common, mine, theirs = _common(classes, name, other)
    return _largest(common / np.maximum(classes.weights(name)[mine], np.finfo(np.float64).tiny), mine, theirs)


def _common(classes: EvaluationClasses, name: str, other: str) -> tuple[Floats, Ints, Ints]:
    """Of all pairs of a class of `name` and one of `other` that share cells: the weight of these, and both classes."""
    both = "".join(factor for factor in FACTORS if factor in name + other)
    first = classes.classes(both).first
    return classes.weights(both), classes.classes(name).of_cell[first], classes.classes(other).of_cell[first]


def _largest(value: Floats, key: Ints, label: Ints) -> tuple[Floats, Ints]:
    """The largest `value` [n] of each key, and the first `label` that has it: two arrays [keys]."""
    value, keys = value.round(12), int(key.max()) + 1
    largest, first = np.zeros(keys), np.full(keys, np.iinfo(np.int64).max)
    np.maximum.at(largest, key, value)
    has_it = value == largest[key]
    np.minimum.at(first, key[has_it], label[has_it])
    return largest, first


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE; none of a toy without classes."""
    if measured.classes is None or measured.counts is None:
        return {}
    return beside_ceilings(measured.counts.metrics, measured.classes, measured.table.width)


COLUMNS = {
    "owned_ceiling": Column(
        "owned_maxes of the perfect code of so many latents for the best single partition", kind="Int64", since=11
    ),
    "splits_ceiling": Column("splits_per_max of the same perfect code", since=11),
    "distinct_splits_ceiling": Column("distinct_splits_per_max of the same perfect code", since=11),
    **{
        f"{name}_share": Column(f"{column} over {name}_ceiling: copies may take it beyond 1", since=11)
        for name, column in COUNTED.items()
    },
    **{f"countable_{name}": Column(f"classes of {name} that can be judged", kind="Int64", since=11) for name in LABELS},
}

register(
    Metric(
        name="ceilings",
        description="what a perfect code would score under the same rules, and counts as shares of it",
        columns=COLUMNS,
        measure=measure,
    )
)
