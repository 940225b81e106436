"""The numbers behind each figure, as tidy tables: what the report saves beside its pictures, loadable with pandas.

Every table names its rows in the same words: `penalty_name`, `setting` (the coefficient, or k), `init_name`, `width`,
and `given`, whatever else the sweep varies but for seeds ("" if nothing).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sae_sweep.config.columns import COLUMN_OF, LABELS, SETTINGS, is_seed, is_setting, shuffled
from sae_sweep.config.settings import init_name
from sae_sweep.reports.results_table import choice_word, coefficient, penalty_name, telling
from sae_sweep.store.front import front as optimal
from sae_sweep.store.plateau import STILL_MOVING

if TYPE_CHECKING:
    from sae_sweep.metrics.extra.theory import Costs

# Setting columns that run along a line, are in the name of a penalty or an init, or are said by another column.
NAMED = frozenset(
    (
        *("width", "coefficient", "k", "architecture", "penalty", "penalty_p", "penalty_scale", "init", "partition"),
        *("toy.d_vocab", "toy.k", *COLUMN_OF),
    )
)
_INITS = ["given", "init_name", "width"]
NAMES = [*_INITS, "architecture", "penalty_name", "setting"]
FACTORS = {"query": "query", "runner_up": "runner-up", "copies": "copies"}
# What a latent may stand for, the coarsest first, and those that have no label or do not live.
KINDS = {
    "m": "whole maximum",
    "mq": "maximum, query",
    "mn": "maximum, runner-up",
    "mc": "maximum, copies",
    "mqn": "maximum, query, runner-up",
    "mqc": "maximum, query, copies",
    "mnc": "maximum, runner-up, copies",
    "mqnc": "one cell",
    "other": "another factor only",
    "none": "no label",
    "dead": "dead",
}
# Classes of inputs that wide SAEs are to have a latent for each of.
FOUND = ("mq", "mqc", "mn", "mqnc")
# A phase: which maxima most latents of a setting stand for. See `phases`.
PHASES = ("found", "absorbed", "duplicated", "split", "mixed", "unnamed")
_HOVERED = ["splits_per_max", "distinct_splits_per_max", "duplicates_per_max", "owned_maxes", "live_latents"]
# What is kept of a training step.
CURVES = ("step", "loss", "fvu", "l0", "gradient", "dead", "revived")
# What structure in split latents is looked for by: a column `structure_…`, and how a figure calls it.
STRUCTURES = {
    "parent": "parent, share of variance",
    "modifier": "modifier, share of variance",
    "interaction": "neither, share of variance",
    "cosine": "modifier's direction under two parents, cosine",
    "semi_nmf": "semi-NMF, variance explained",
    "meta_sae": "meta-SAE, variance explained",
}


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """The results table with the columns NAMES, and `repeat`, which tells repetitions (seeds) apart; as it is if it has
    them."""
    if {*NAMES, "repeat"} <= {*frame.columns}:
        return frame
    frame = frame.copy()  # in as few pieces as it has types: pandas warns of columns added to many
    if frame.empty:
        missing = [name for name in (*NAMES, "repeat") if name not in frame]
        return pd.concat([frame, pd.DataFrame(columns=missing, index=frame.index, dtype=object)], axis=1)
    frame = telling(frame)
    seeds = [name for name in ("toy_seed", "seed", "data_seed") if frame[name].nunique() > 1] or ["seed"]
    rows = frame[[*NAMED & {*frame}]]
    names = {
        "penalty_name": rows.apply(penalty_name, axis=1),
        "setting": rows.apply(coefficient, axis=1),
        "init_name": [*map(init_name, frame["init"], frame["partition"])],
        "given": _words(frame, choices(frame)),
        "repeat": _words(frame, seeds) if len(seeds) > 1 else frame[seeds[0]].astype(str),
    }
    # At once: put in one by one, pandas would copy the table each time, or warn of its many pieces.
    return pd.concat([frame, pd.DataFrame(names)], axis=1)


def front(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per point and, if some setting has several seeds, one per setting (`repeat` "mean"), its range in `_low`
    and `_high`.

    Columns: NAMES, `repeat`, `seeds` (how many), `point_id` (null for means), `coefficient`, `l0`, `fvu` with `_low`
    and `_high`, counts of splits, duplicates and owned maxes, `on_front` (by the means over seeds, among the settings
    of the same NAMES but `setting`).
    """
    table = named(frame)
    groups = table.groupby(_setting_keys(table), dropna=False, sort=False)
    means = groups.agg(
        **{name: (name, "first") for name in NAMES},
        seeds=("l0", "size"),
        **{name: (name, "mean") for name in ("l0", "fvu", *_HOVERED)},
        **{f"{name}_low": (name, "min") for name in ("l0", "fvu")},
        **{f"{name}_high": (name, "max") for name in ("l0", "fvu")},
        coefficient=("coefficient", "first"),
    ).reset_index(drop=True)
    lines = [optimal(rows) for _, rows in means.groupby(NAMES[:-1], dropna=False, sort=False)]
    means = means.assign(on_front=pd.concat([pd.Series(dtype=bool), *lines]).astype(bool), repeat="mean")
    columns = [*NAMES, "repeat", "point_id", "coefficient", "l0", "fvu", *_HOVERED]
    points = table[columns].assign(seeds=1, on_front=means["on_front"].to_numpy()[groups.ngroup()])
    # Where some settings have several seeds, one of a single seed is its own mean: it stands beside theirs.
    whole = pd.concat([means, points], ignore_index=True) if (means["seeds"] > 1).any() else points
    return whole.astype(dict.fromkeys(["l0", "fvu", *_HOVERED], float))


def split_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per setting: the means over seeds of splits (all, distinct, with labels shuffled, and of a perfect code)
    and duplicates per maximum and of owned maxes, and `seeds`."""
    groups = named(frame.dropna(subset=["splits_per_max"])).groupby(NAMES, dropna=False, sort=False)
    return groups.agg(
        seeds=("l0", "size"),
        coefficient=("coefficient", "first"),
        **{name: (name, "mean") for name in (*_HOVERED, shuffled("splits_per_max"), "splits_ceiling")},
    ).reset_index()


def phases(frame: pd.DataFrame, costs: Mapping[str, Costs] = {}) -> pd.DataFrame:
    """A row per setting with its `phase`, from the means over seeds of what latents are labelled.

    "split": at least half of the maxima have two latents or more with a finer label. Else, where at least half have a
    latent for the whole maximum: "duplicated" if those have as many copies again, "absorbed" if they are parents and no
    modifier has a latent of its own, or else "found". "mixed": half have the one or the other. "unnamed": fewer have.
    `split_code`, `shared_code`: what those codes cost by `costs`, of each point id; null where there is nothing.
    """
    whole = named(frame.dropna(subset=["split_maxes"]))
    maxima = pd.Series([float(toy.rsplit("-", 2)[1]) for toy in whole["toy"]], whole.index, dtype=float)
    copies = whole["duplicates_per_max"] * maxima
    table = whole[NAMES].assign(
        maxima=maxima,
        whole=whole["label_m"].astype(float) - copies,
        copies=copies,
        split_maxes=whole["split_maxes"],
        modifiers=whole["label_q"].where(whole["toy"].str.startswith("parents-")).astype(float),
        split_code=[getattr(costs.get(id), "split", np.nan) for id in whole["point_id"]],
        shared_code=[getattr(costs.get(id), "shared", np.nan) for id in whole["point_id"]],
    )
    means = table.groupby(NAMES, dropna=False, sort=False).mean().astype(float).reset_index()
    half = means["maxima"] / 2
    held = means["whole"] >= half
    conditions = {
        "split": means["split_maxes"] >= half,
        "duplicated": held & (means["copies"] >= means["whole"]),
        "absorbed": held & (means["modifiers"] < 1),
        "found": held,
        "mixed": means["whole"] + means["split_maxes"] >= half,
    }
    means["phase"] = np.select([*conditions.values()], [*conditions], "unnamed")
    return means


def distribution(frame: pd.DataFrame, per_max: Mapping[str, Mapping[str, Sequence[int]]]) -> pd.DataFrame:
    """A row per maximum of each width, init and penalty at its knee (`knees`): `splits` and
    `duplicates`, means over seeds. `per_max`: of each point id, the counts [d_vocab] of its record."""
    rows = []
    for names, group in knees(frame).groupby(NAMES, dropna=False, sort=False):
        found = [per_max[id] for id in group["point_id"] if id in per_max]
        if not found:
            continue
        counts = {kind: np.mean([counted[kind] for counted in found], axis=0) for kind in ("splits", "duplicates")}
        rows.append(
            pd.DataFrame(
                {**dict(zip(NAMES, names, strict=True)), "maximum": np.arange(len(counts["splits"])), **counts}
            )
        )
    columns = [*NAMES, "maximum", "splits", "duplicates"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def labels(frame: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """A row per width and init, trained and not: the mean number of latents of each of KINDS over all their points."""
    counts = {}
    for state, whole in (("trained", frame), ("untrained", untrained)):
        table = whole.dropna(subset=["label_m"])
        kinds = {kind: table[f"label_{kind}"].astype(float) for kind in KINDS if f"label_{kind}" in table}
        others = [f"label_{name}" for name in LABELS if "m" not in name]
        kinds["other"] = table[others].astype(float).sum(axis=1)
        kinds["none"] = table["live_latents"].astype(float) - sum(kinds.values())
        kinds["dead"] = table["dead_latents"].astype(float)
        inits = named(table)[[*_INITS, "l0"]]
        counts[state] = inits.assign(**{kind: kinds[kind] for kind in KINDS}, state=state)
    groups = pd.concat(counts.values(), ignore_index=True).groupby([*_INITS, "state"], dropna=False, sort=False)
    return groups.agg(points=("l0", "size"), **{kind: (kind, "mean") for kind in KINDS}).reset_index()


def information(frame: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """A row per width, init, factor and state, beyond chance and as means over points.

    `explained`: how much of the factor the top latent explains given the maximum, with `explained_low` and
    `explained_high`; `alone`: given the other factors too.
    """
    parts = []
    for state, whole in (("trained", frame), ("untrained", untrained)):
        table = named(whole)
        for column, factor in FACTORS.items():
            explained, alone = (table[f"{kind}_{column}"].astype(float) for kind in ("info", "unique"))
            parts.append(table[_INITS].assign(explained=explained, alone=alone, factor=factor, state=state))
    groups = pd.concat(parts, ignore_index=True).groupby([*_INITS, "state", "factor"], dropna=False, sort=False)
    return (
        groups.agg(
            points=("explained", "count"),
            explained=("explained", "mean"),
            explained_low=("explained", "min"),
            explained_high=("explained", "max"),
            alone=("alone", "mean"),
        )
        .reset_index()
        .dropna(subset=["explained"])
    )


def found(frame: pd.DataFrame, untrained: pd.DataFrame) -> pd.DataFrame:
    """A row per width, init and penalty at its knee (`knees`), `part` of FOUND and `state`: `value`, the share of that
    part's classes that have a latent, as a mean over points with `value_low` and `value_high`.

    States: "trained", "untrained", "labels shuffled", and where they were searched "best codes" of the dictionary.
    """
    trained = knees(frame.dropna(subset=["found_mq"]))
    # What an SAE is called follows from the whole table, and is not asked for twice.
    before = trained[[*NAMES, "point_id"]].merge(untrained[["point_id", *(f"found_{part}" for part in FOUND)]])
    parts = [
        table[NAMES].assign(value=table[column].astype(float), part=part, state=state)
        for part in FOUND
        for table, column, state in (
            (trained, f"found_{part}", "trained"),
            (before, f"found_{part}", "untrained"),
            (trained, shuffled(f"found_{part}"), "labels shuffled"),
            (trained, f"inferred_found_{part}", "best codes"),
        )
    ]
    whole = pd.concat(parts, ignore_index=True).dropna(subset=["value"])
    groups = whole.groupby([*NAMES, "part", "state"], dropna=False, sort=False)["value"]
    return groups.agg(points="size", value="mean", value_low="min", value_high="max").reset_index()


def structure(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per width, init, `part` of STRUCTURES and `state` ("found", or "permuted", its null): the mean over
    points, `value`, with `value_low` and `value_high`; empty where it was not measured."""
    table = named(frame)
    parts = [
        table[_INITS].assign(value=table[column].astype(float), part=part, state=state)
        for part, name in ((words, f"structure_{key}") for key, words in STRUCTURES.items())
        for state, column in (("found", name), ("permuted", shuffled(name)))
    ]
    whole = pd.concat(parts, ignore_index=True).dropna(subset=["value"])
    groups = whole.groupby([*_INITS, "part", "state"], dropna=False, sort=False)["value"]
    return groups.agg(points="size", value="mean", value_low="min", value_high="max").reset_index()


def curves(
    frame: pd.DataFrame,
    curves_of: Mapping[str, Iterable[Mapping[str, Any]]],
    targets: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """A row per step that was kept of the training of each point at its penalty's knee (`knees`): NAMES,
    `repeat`, `point_id`, the columns of CURVES, `target`. `curves_of`: the `curve` of each id's record; `targets`: the
    L0 that its recipe or its loss aims at."""
    chosen = knees(frame)[[*NAMES, "repeat", "point_id"]]
    rows = [
        {**names, **{key: row.get(key) for key in CURVES}, "target": (targets or {}).get(names["point_id"])}
        for names in chosen.to_dict("records")
        for row in curves_of.get(names["point_id"], ())
    ]
    found = pd.DataFrame(rows, columns=[*chosen.columns, *CURVES, "target"])
    return found.astype(dict.fromkeys(("gradient", "dead", "revived", "target"), "float64"))


def plateau(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per point whose curve says by how much twice the steps would lower its loss: NAMES, `repeat`, `point_id`,
    `trained` (steps), `plateau`, and whether it is `settled` and by itself `stopped` there."""
    table = named(frame).dropna(subset=["plateau"])
    stopped = table["stopped_at"].notna()
    return table[[*NAMES, "repeat", "point_id", "plateau"]].assign(
        trained=table["stopped_at"].where(stopped, table["steps"]).astype(int),
        settled=table["plateau"] <= STILL_MOVING,
        stopped=stopped,
    )


def knees(frame: pd.DataFrame) -> pd.DataFrame:
    """The named points of one setting per width, init and penalty: the lowest FVU × max(L0, 1) by means over seeds,
    which neither pays for many active latents nor gives reconstruction up."""
    table = named(frame)
    knee = (table["fvu"] * table["l0"].clip(lower=1)).fillna(np.inf)
    mean = knee.groupby([table[name] for name in NAMES], dropna=False, sort=False).transform("mean")
    best = mean.groupby([table[name] for name in NAMES[:-1]], dropna=False, sort=False).transform("min")
    first = table[mean == best].groupby(NAMES[:-1], dropna=False, sort=False)["setting"].transform("first")
    return table[(mean == best) & (table["setting"] == first.reindex(table.index))]


def choices(frame: pd.DataFrame) -> list[str]:
    """The keys that this sweep varies for their own sake: not those that follow from the names, such as a learning
    rate that goes with the width.

    A toy that follows from the coefficient or k is told too: with a ladder of its own it is another line.
    """
    names = [name for name in SETTINGS if name in NAMED]
    for name in map(str, frame.columns):
        if is_setting(name) and name not in NAMED and not is_seed(name) and frame[name].nunique(dropna=False) > 1:
            aside = ("coefficient", "k") if name.split(".")[0] == "toy" else ()
            groups = frame.groupby([each for each in names if each not in aside], dropna=False, sort=False)
            if (groups[name].nunique(dropna=False) > 1).any():
                names.append(name)
    return [name for name in names if name not in NAMED]


def _setting_keys(table: pd.DataFrame) -> list[str]:
    known = [name for name in map(str, table.columns) if is_setting(name) and not is_seed(name)]
    return [*known, *(name for name in NAMES if name not in known)]


def _words(frame: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """The values of some columns in one string."""
    parts = [frame[name].map(lambda value, name=name: choice_word(name, value)) for name in columns]
    said = [" ".join(filter(None, words)) for words in zip(*parts, strict=True)] if parts else ""
    return pd.Series(said, index=frame.index, dtype=object)
