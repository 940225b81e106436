"""What each latent stands for, and how many latents share a maximum: functions of the firing table.

Rules of counting: only live latents count; a latent is named by the predicate on the cell's factors that predicts best
where it fires, and only if it does so with F1 ≥ 0.8 and well above the base rate; a finer name must be worth it. A
latent named finer than its maximum is a split; several named by the whole of one maximum are duplicates. A latent that
holds a part of a class has no F1 to speak of: it counts as pure in every class that has 80% of its mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_sweep.config.columns import LABELS, Column
from sae_sweep.config.settings import PARTITIONS
from sae_sweep.lazy import lazy
from sae_sweep.metrics.evaluation_classes import FINER_THAN_M, LIVE_INPUTS, NOTHING, ROUNDING, EvaluationClasses
from sae_sweep.metrics.metric import Measured, Metric, Value, with_nulls
from sae_sweep.registry import register
from sae_sweep.toys.classes import NONE, Factored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sae_sweep.metrics import class_scores, nulls
    from sae_sweep.metrics.class_scores import Fits
    from sae_sweep.metrics.firing import FiringTable
    from sae_sweep.metrics.ground_truth import Detection
    from sae_sweep.metrics.partitions import Floats, Ints
else:
    np = lazy("numpy")
    class_scores, nulls = lazy("sae_sweep.metrics.class_scores"), lazy("sae_sweep.metrics.nulls")

M, CELLS = PARTITIONS.index("m"), PARTITIONS.index("mqnc")
# Partitions of which latents with merged rows are in no class: they name the query or the runner-up.
FINER_THAN_FOLDED = [bool(set("qn") & set(name)) for name in PARTITIONS]
# The partitions in which pure latents and the classes they find are counted; for m these are pure_latents, owned_maxes.
PURE = tuple(label for label in LABELS if label != "m")
# A latent that is pure in a cell is below it if it fires on less than this share of the cell.
WHOLE_CELL = 0.5


@dataclass(frozen=True)
class Latents:
    """A row per latent, arrays [latents]; NOTHING in the integer columns and nan in the others where undefined.

    `owner`: the maximum with most of the latent's mass, `purity`: its share. `label`: index in PARTITIONS of the
    predicate that names the latent (of live latents only), `label_class`: which class of that partition, `example`: a
    cell of it. `f1`: the best F1 of any predicate (an upper bound for dense latents whose rows are merged:
    `fold_dense`). `density`: share of the evaluation weight on which it fires, `inputs`: on how many inputs.
    pure_class [partitions, latents]: the class of each partition that has at least `evaluation.purity` of a live
    latent's mass. `below_cell`: whether a live latent is pure in a cell and fires on less than half of it.
    """

    owner: Ints
    purity: Floats
    live: NDArray[np.bool_]
    label: Ints
    label_class: Ints
    example: Ints
    f1: Floats
    density: Floats
    inputs: Ints
    pure_class: Ints
    below_cell: NDArray[np.bool_]


def describe(table: FiringTable, classes: EvaluationClasses) -> Latents:
    """Owner, purity, life, label and density of every latent."""
    fits = class_scores.fitted(table, classes)
    return described(fits, table.inputs, table.folded, table.total, classes)


def described(
    fits: Fits,
    inputs: Ints,
    folded: NDArray[np.bool_],
    total: float,
    classes: EvaluationClasses,
    trial: Ints | None = None,
) -> Latents:
    """The latents that have these `fits`.

    inputs, folded [latents]: on how many inputs each fires, and whether its rows are merged; total: the evaluation
    weight of all inputs; trial [latents]: to which of several SAEs each belongs, if there are several.
    """
    live = (inputs >= classes.live_inputs) & (fits.fired >= classes.live_mass * total * (1 - ROUNDING))
    label, label_class = classes.labels(fits.f1, fits.f1_class, live, trial)
    example = np.full(len(label), NOTHING)
    for i, name in enumerate(PARTITIONS):
        example[label == i] = classes.classes(name).first[label_class[label == i]]
    pure_class = np.where(live & (fits.share >= classes.evaluation.purity - ROUNDING), fits.share_class, NOTHING)
    # Of a latent with merged rows only maximum and copies are known, and it is too dense for any finer class.
    pure_class[np.array(FINER_THAN_FOLDED)[:, None] & folded] = NOTHING
    fires, owner = fits.fired > 0, fits.share_class[M]
    purity, f1 = (np.where(fires, each, np.nan) for each in (fits.share[M], fits.f1.max(0)))
    below_cell = (pure_class[CELLS] != NOTHING) & (fits.held < WHOLE_CELL - ROUNDING)
    density = fits.fired / total
    return Latents(owner, purity, live, label, label_class, example, f1, density, inputs, pure_class, below_cell)


def detectors(detection: Detection) -> Latents:
    """The latents of a toy without cells, each by the planted feature that it detects with the best F1.

    `owner` is that feature, `purity` the share of the inputs it fires on that have the feature; there are no labels.
    """
    f1, width = detection.f1, len(detection.fired)
    latents, owner = np.arange(width), f1.argmax(1)
    fires, nothing = detection.fired > 0, np.full(width, NOTHING)
    live = (detection.fired >= LIVE_INPUTS) & (detection.fired >= least_inputs(detection))
    purity, best = (np.where(fires, each, np.nan) for each in (detection.precision(latents, owner), f1.max(1)))
    density = detection.fired / detection.total
    owner = np.where(fires, owner, NOTHING)
    nowhere = np.full((len(PARTITIONS), width), NOTHING), np.zeros(width, np.bool_)
    return Latents(owner, purity, live, nothing, nothing, nothing, best, density, detection.fired, *nowhere)


def least_inputs(detection: Detection) -> float:
    """Half the inputs that have the rarest planted feature that was seen."""
    return float(detection.active[detection.active > 0].min(initial=detection.total) / 2)


def class_name(cells: Factored, label: int, example: int) -> str:
    """The class of partition PARTITIONS[label] that holds the cell `example`, as in "m=5,q=3" or "m=5,n=none"."""
    values = ((factor, int(cells.factors[factor][example])) for factor in PARTITIONS[label])
    spelled = getattr(cells, "spelled", _spelled)
    return ",".join(filter(None, (spelled(*each) for each in values)))


def _spelled(factor: str, value: int) -> str:
    return f"{factor}={'none' if value == NONE else value}"


@dataclass(frozen=True)
class Counts:
    """Counts over the live latents of several SAEs: by column [SAEs], and splits and duplicates [SAEs, maxima]."""

    metrics: dict[str, NDArray[Any] | None]
    splits: Ints
    duplicates: Ints


def count(latents: Latents, classes: EvaluationClasses, trial: Ints | None = None, trials: int = 1) -> Counts:
    """Owned maxes, splits, duplicates, labels and pure latents of each of `trials` SAEs.

    trial [latents]: to which SAE each latent belongs. Owned: a maximum with a live latent of purity ≥
    `evaluation.purity`. Split: a latent labelled finer than m, of the maximum that its label names; distinct splits are
    the classes that so many splits name, since latents may share one, and a maximum is split that has two distinct
    ones. Duplicate: one more latent labelled by the whole of a maximum already held. Pure in a partition: a live latent
    with `evaluation.purity` of its mass in one class; found: the share of the countable classes that have such a
    latent. None for a partition of one class, or without a countable one.
    """
    trial = np.zeros(len(latents.live), np.int64) if trial is None else trial
    maxima = classes.cells.d_vocab
    factor = classes.cells.factors["m"]
    label, owned_by = latents.label, latents.pure_class[M]
    finer, whole = np.isin(label, FINER_THAN_M), label == M
    by_maximum = trial * maxima + np.where(label == NOTHING, 0, factor[latents.example])
    splits, wholes = (np.bincount(by_maximum[which], minlength=trials * maxima) for which in (finer, whole))
    most = classes.cells.count * len(PARTITIONS)
    named = np.unique(by_maximum[finer] * most + latents.label_class[finer] * len(PARTITIONS) + label[finer])
    distinct = np.bincount(named // most, minlength=trials * maxima)
    duplicates = np.maximum(wholes - 1, 0)
    metrics: dict[str, NDArray[Any] | None] = {
        "pure_latents": np.bincount(trial[owned_by != NOTHING], minlength=trials),
        "owned_maxes": _found(trial, owned_by, trials),
        "splits_per_max": splits.reshape(trials, maxima).sum(1) / maxima,
        "distinct_splits_per_max": distinct.reshape(trials, maxima).sum(1) / maxima,
        "duplicates_per_max": duplicates.reshape(trials, maxima).sum(1) / maxima,
        "split_maxes": (distinct.reshape(trials, maxima) >= 2).sum(1),
        **{f"label_{name}": np.bincount(trial[label == i], minlength=trials) for i, name in enumerate(PARTITIONS)},
        "below_cell": np.bincount(trial[latents.below_cell], minlength=trials),
    }
    for name in PURE:
        pure, countable = latents.pure_class[PARTITIONS.index(name)], classes.countable(name)
        told_apart = len(countable) > 1 and bool(countable.any())
        metrics[f"pure_{name}"] = np.bincount(trial[pure != NOTHING], minlength=trials) if told_apart else None
        judged = np.where((pure != NOTHING) & countable[pure], pure, NOTHING)
        metrics[f"found_{name}"] = _found(trial, judged, trials) / countable.sum() if told_apart else None
    return Counts(metrics, splits.reshape(trials, maxima), duplicates.reshape(trials, maxima))


def _found(trial: Ints, of_class: Ints, trials: int) -> Ints:
    """How many distinct classes the latents of each SAE have [trials]; NOTHING is none."""
    known, most = of_class != NOTHING, int(of_class.max(initial=0)) + 1
    return np.bincount(np.unique(trial[known] * most + of_class[known]) // most, minlength=trials)


def only_one(metrics: dict[str, NDArray[Any] | None]) -> dict[str, Value]:
    """The columns of `count` for a single SAE."""
    return {name: None if values is None else values[0].item() for name, values in metrics.items()}


def labels(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE: of a toy whose features come by themselves, what is live alone."""
    live, classes = measured.latents.live, measured.classes
    found: dict[str, Value] = {"live_latents": int(live.sum()), "dead_latents": int((~live).sum())}
    if classes is None or measured.counts is None:
        assert measured.detection is not None
        least = least_inputs(measured.detection) / measured.detection.total
        return found | {"live_floor_inputs": LIVE_INPUTS, "live_floor_mass": least}
    found |= {"live_floor_inputs": classes.live_inputs, "live_floor_mass": classes.live_mass}
    found |= only_one(measured.counts.metrics)
    return found | (nulls.shuffled_cells(measured.table, classes) if measured.nulls else {})


COUNTS = {
    "live_latents": Column(
        "latents that fire on enough to be judged: see live_floor_inputs and live_floor_mass",
        "number of live latents",
        "Int64",
        since=1,
    ),
    "dead_latents": Column("latents that do not", "number of dead latents", "Int64", since=1),
    "pure_latents": Column(
        "live latents with at least evaluation.purity of their activation mass on one maximum",
        "number of pure latents",
        "Int64",
        since=1,
    ),
    "owned_maxes": Column("maxima that have a pure latent", "number of owned maxes", "Int64", since=1),
    "splits_per_max": Column(
        "live latents labelled finer than their maximum, over the maxima", "number of splits per max", since=1
    ),
    "distinct_splits_per_max": Column(
        "the same with latents of one label counted once", "number of distinct splits per max", since=2
    ),
    "duplicates_per_max": Column(
        "live latents labelled by a whole maximum beyond its first, over the maxima",
        "number of duplicates per max",
        since=1,
    ),
    "split_maxes": Column("maxima with two distinct splits or more", "number of split maxes", "Int64", since=1),
    **{
        f"label_{name}": Column(
            f"live latents that a class of {name} describes best",
            f"number of latents labelled {name}",
            "Int64",
            since=1,
        )
        for name in LABELS
    },
    **{
        f"pure_{name}": Column(
            f"live latents with at least evaluation.purity of their mass in one class of {name}", kind="Int64", since=11
        )
        for name in PURE
    },
    **{
        f"found_{name}": Column(f"share of the classes of {name} that can be judged that have such a latent", since=11)
        for name in PURE
    },
    "below_cell": Column("latents pure in one finest cell that fire on less than half of it", kind="Int64", since=11),
}
# Measured again on shuffled labels (`nulls.py`), within each maximum and among all inputs.
WITHIN = (
    *("splits_per_max", "distinct_splits_per_max", "split_maxes"),
    *(f"{kind}_{name}" for kind in ("label", "pure", "found") for name in PURE if name.startswith("m")),
    "below_cell",
)
ACROSS = (
    *("pure_latents", "owned_maxes", "duplicates_per_max", "label_m"),
    *(f"{kind}_{name}" for kind in ("label", "pure", "found") for name in PURE if not name.startswith("m")),
)
COLUMNS = {
    **COUNTS,
    **with_nulls(COUNTS, (*WITHIN, *ACROSS), 8, 10),
    "live_floor_inputs": Column("on how many inputs a live latent fires at the least", kind="Int64"),
    "live_floor_mass": Column("on which share of the evaluation weight a live latent fires at the least"),
}

register(
    Metric(
        name="labels",
        description="what latents stand for: live, dead and pure ones, owned maxima, splits and duplicates",
        columns=COLUMNS,
        measure=labels,
    )
)
