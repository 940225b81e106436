"""The columns of the results table, constant over every sweep. No heavy import: configs are checked against them.

Columns of metrics are those that the metrics declare (metrics/metric.py), ours and those of other packages. Here stand
the others: the settings, what a training says of itself, and what is computed when points are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sae_sweep import registry

# The edition of a column that came to the table after those that have a number.
LATEST = 1000


@dataclass(frozen=True)
class Column:
    """What a number in the results table is.

    description: for whoever reads the table; phrase: what a sentence calls it, as in "the median … is 3" (its name if
    it has none); kind: the pandas type that holds it; since: the edition of the table that first had it. Columns stand
    in the order in which they came, so that a later one moves none; the latest are in the order of their names.
    """

    description: str
    phrase: str = ""
    kind: str = "float64"
    since: int = LATEST


# Column: the pandas type that holds it. A float is null as NaN; whatever else may be null has a nullable type.
SETTINGS: dict[str, str] = {
    "toy": "string",
    "toy_seed": "int64",
    "site": "string",
    "distribution": "string",
    "architecture": "string",
    "init": "string",
    "partition": "string",
    "width": "int64",
    "k": "Int64",
    "penalty": "string",
    "coefficient": "float64",
    "penalty_p": "float64",
    "penalty_scale": "float64",
    "seed": "int64",
    "data_seed": "int64",
    "steps": "int64",
}
# The key that sets each setting column (the name of a toy is put together from several).
KEYS: dict[str, str] = {
    "toy_seed": "toy.seed",
    "site": "site.name",
    "distribution": "distribution.name",
    "architecture": "sae.architecture",
    "init": "sae.init",
    "partition": "sae.partition",
    "width": "sae.width",
    "k": "sae.k",
    "penalty": "penalty.name",
    "coefficient": "penalty.coefficient",
    "penalty_p": "penalty.p",
    "penalty_scale": "penalty.scale",
    "seed": "seed",
    "data_seed": "data_seed",
    "steps": "training.steps",
}
COLUMN_OF: dict[str, str] = {key: column for column, key in KEYS.items()}
# What only tells repetitions of one experiment apart.
SEEDS = ("toy_seed", "seed", "data_seed")
LABELS = ("q", "n", "c", "m", "mq", "mn", "mc", "mqn", "mqc", "mnc", "mqnc")
# Beside what metrics measure: what is known once a point is trained, and once it is compared with others.
BESIDE: dict[str, Column] = {
    "loss": Column("E‖x − x̂‖² + coefficient · E penalty, summed over d and over latents", since=1),
    "oracle_gap": Column(
        "loss less the lowest loss of the same SAE from an oracle init in the sweep",
        "loss above the best oracle init",
        since=3,
    ),
    "seconds": Column("of training, measuring and storing the point, as its share of its pack", since=6),
    # Norms are over all parameters of an SAE, and before it is clipped.
    "gradient_largest": Column("the largest norm of its gradient", "largest norm of a gradient", since=9),
    "gradient_late": Column(
        "over the second half of training, the median of the largest norm of the gradient in each stretch of the curve",
        "norm of the gradient late in training",
        since=9,
    ),
    "gradient_spike": Column(
        "the largest norm of the gradient in the second half of training over gradient_late",
        "largest norm of the gradient late in training over the usual",
        since=9,
    ),
    "plateau": Column("by how much, relative to the loss, twice the steps would still lower it", since=9),
    "revived": Column("how often a dead latent was revived", kind="Int64", since=9),
    "revived_last": Column("how many latents were revived the last time", kind="Int64", since=9),
    "revived_live": Column("how many of all the latents ever revived live at the end", kind="Int64", since=9),
    "final_coefficient": Column(
        "with training.target_l0, the coefficient that training came to: the loss is by it",
        "coefficient at the end of training",
    ),
    "stopped_at": Column(
        "with training.until=plateau, the step at which the loss had settled and training ended; null: after all steps",
        "step at which training ended",
        kind="Int64",
    ),
    "seed_agreement": Column("matched cosine between the dictionaries of seeds of one setting", since=12),
}
# Whether a setting is Pareto-optimal among its own penalty and init, and among all of its width.
FRONTS = {"on_front": "boolean", "on_common_front": "boolean"}


@registry.derived
def metric_columns() -> Mapping[str, Column]:
    """The columns that hold what was measured, in the order in which they stand."""
    found = dict(BESIDE)
    for metric in registry.kinds("metric").values():
        found |= metric.columns
    return dict(sorted(found.items(), key=lambda item: (item[1].since, item[0] * (item[1].since == LATEST))))


@registry.derived
def table_columns() -> Mapping[str, str]:
    """Every column that a results table always has, with the pandas type that holds it."""
    return dict(_table())


def _table() -> Iterator[tuple[str, str]]:
    yield "point_id", "string"
    yield from SETTINGS.items()
    measured = metric_columns()
    yield from ((name, column.kind) for name, column in measured.items() if column.since < LATEST)
    yield from FRONTS.items()
    yield from ((name, column.kind) for name, column in measured.items() if column.since == LATEST)


def phrase(column: str) -> str:
    """What a sentence calls a column."""
    known = metric_columns().get(column)
    return (known and known.phrase) or column


def shuffled(measure: str) -> str:
    """The column of a measure's null: what it is if labels are shuffled, or, of structure, vectors permuted."""
    null = f"{measure}_null"
    return null if null in metric_columns() else f"shuffled_{measure}"


def spread(measure: str) -> str:
    """The column of the standard deviation of a measure's null over permutations."""
    return f"{shuffled(measure)}_sd"


def is_setting(column: str) -> bool:
    """Whether a column of the table is a setting: a constant one, or a swept key, which alone are dotted; or the sweep,
    where several stand in one table."""
    return column in SETTINGS or "." in column or column == "sweep"


def is_seed(column: str) -> bool:
    """Whether a column only tells repetitions apart."""
    return column in SEEDS or column == "toy.seed"
