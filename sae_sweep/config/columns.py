"""The columns of the results table, constant over every sweep. No heavy import: configs are checked against them."""

from __future__ import annotations

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
# The partitions in which pure latents and the classes they find are counted; for m these are pure_latents, owned_maxes.
PURE = tuple(label for label in LABELS if label != "m")
# Measured where features were planted.
PLANTED: dict[str, str] = {
    "mcc": "float64",
    "uniqueness": "float64",
    "feature_precision": "float64",
    "feature_recall": "float64",
    "feature_f1": "float64",
    "found_features": "Int64",
    "killed_features": "Int64",
    "killed_small_overlap": "Int64",
}
# Measured again on shuffled labels, as `shuffled_<measure>`: see `metrics/nulls.py`.
WITHIN = (
    *("splits_per_max", "distinct_splits_per_max", "split_maxes"),
    *(f"{kind}_{label}" for kind in ("label", "pure", "found") for label in PURE if label.startswith("m")),
    "below_cell",
)
ACROSS = (
    *("pure_latents", "owned_maxes", "duplicates_per_max", "label_m"),
    *(f"{kind}_{label}" for kind in ("label", "pure", "found") for label in PURE if not label.startswith("m")),
)
INFORMATION = tuple(f"{kind}_{factor}" for kind in ("info", "unique") for factor in ("query", "runner_up", "copies"))
# Measured on request: evaluation.priors, evaluation.structure.
PRIORS = tuple(
    f"prior_{family}"
    for family in ("exponential", "half_cauchy", "student_t", "lomax", "exponential_power", "spike_and_slab")
)
STRUCTURE = tuple(
    f"structure_{name}{kind}"
    for name in ("parent", "modifier", "interaction", "cosine", "semi_nmf", "meta_sae")
    for kind in ("", "_null")
)


def shuffled(measure: str) -> str:
    """The column of a measure's null: what it is if labels are shuffled, or for structure, vectors permuted."""
    return f"{measure}_null" if measure in STRUCTURE else f"shuffled_{measure}"


def spread(measure: str) -> str:
    """The column of the standard deviation of a measure's null over permutations."""
    return f"{shuffled(measure)}_sd"


# What a perfect code for one partition scores at best under the same rules, and counts as shares of it; how many
# classes of each partition can be judged.
CEILINGS: dict[str, str] = {
    "owned_ceiling": "Int64",
    "splits_ceiling": "float64",
    "distinct_splits_ceiling": "float64",
    **dict.fromkeys(("owned_share", "splits_share", "distinct_splits_share"), "float64"),
    **{f"countable_{label}": "Int64" for label in LABELS},
}
# Measured on request (evaluation.order): what latents tell of the order of the tokens.
ORDER = ("info_order", "unique_order")
# Measured on request (evaluation.inference), of the best codes for the SAE's dictionary: as `inferred_<measure>`.
INFERRED: dict[str, str] = {
    **dict.fromkeys(("loss", "fvu", "l0"), "float64"),
    **dict.fromkeys(("live_latents", "owned_maxes", "split_maxes"), "Int64"),
    **dict.fromkeys(("splits_per_max", "distinct_splits_per_max"), "float64"),
    **{f"found_{label}": "float64" for label in PURE if label.startswith("m")},
}
# Of training, from its curve: the largest norm of a gradient, over all parameters of an SAE and before it is clipped;
# of the second half of training, the median of the largest in each stretch of the curve, and the largest over that; by
# how much, relative to the loss, twice the steps would still lower it.
TRAINING = dict.fromkeys(("gradient_largest", "gradient_late", "gradient_spike", "plateau"), "float64")
# Where dead latents are revived: how often one was, how many the last time, and how many of all these live at the end.
TRAINING |= dict.fromkeys(("revived", "revived_last", "revived_live"), "Int64")
# Where training drove the mean L0 to a target: the coefficient that it came to.
TRAINING["final_coefficient"] = "float64"
METRICS: dict[str, str] = {
    "loss": "float64",
    "fvu": "float64",
    "fvu_above_ceiling": "float64",
    "l0": "float64",
    "live_latents": "Int64",
    "dead_latents": "Int64",
    "pure_latents": "Int64",
    "owned_maxes": "Int64",
    "splits_per_max": "float64",
    "duplicates_per_max": "float64",
    "split_maxes": "Int64",
    **{f"label_{label}": "Int64" for label in LABELS},
    "info_query": "float64",
    "info_runner_up": "float64",
    "info_copies": "float64",
    "unique_query": "float64",
    "unique_runner_up": "float64",
    "unique_copies": "float64",
    "distinct_splits_per_max": "float64",
    "winner_entropy": "float64",
    "oracle_gap": "float64",
    "k_sparse_splits": "float64",
    "absorption_full": "float64",
    "absorption_fraction": "float64",
    "loss_recovered": "float64",
    "kl": "float64",
    "shrinkage": "float64",
    "seconds": "float64",
    "cofiring": "float64",
    **PLANTED,
    **dict.fromkeys((*PRIORS, *STRUCTURE), "float64"),
    **dict.fromkeys(map(shuffled, (*WITHIN, *ACROSS, *INFORMATION, *PLANTED)), "float64"),
    **TRAINING,
    **dict.fromkeys(map(spread, (*WITHIN, *ACROSS, *INFORMATION, *PLANTED)), "float64"),
    **dict.fromkeys((f"pure_{label}" for label in PURE), "Int64"),
    **dict.fromkeys((f"found_{label}" for label in PURE), "float64"),
    "below_cell": "Int64",
    **CEILINGS,
    **{f"inferred_{name}": kind for name, kind in INFERRED.items()},
    "encoder_gap": "float64",
    **dict.fromkeys((*ORDER, *map(shuffled, ORDER), *map(spread, ORDER)), "float64"),
    # Of points with other seeds: see `store/results.py`.
    "seed_agreement": "float64",
}
# Whether a setting is Pareto-optimal among its own penalty and start, and among all of its width.
FRONTS = {"on_front": "boolean", "on_common_front": "boolean"}
COLUMNS: dict[str, str] = {"point_id": "string", **SETTINGS, **METRICS, **FRONTS}


def is_setting(column: str) -> bool:
    """Whether a column of the table is a setting: a constant one, or a swept key, which alone are dotted; or the sweep,
    where several stand in one table."""
    return column in SETTINGS or "." in column or column == "sweep"


def is_seed(column: str) -> bool:
    """Whether a column only tells repetitions apart."""
    return column in SEEDS or column == "toy.seed"
