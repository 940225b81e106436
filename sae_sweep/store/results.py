"""The one results table of a sweep, built from the records in the store and from nothing else.

What compares points (the front, the oracle gap, means over seeds) is computed here and never stored in a record, so
a point's record says the same in every sweep that holds it.
"""

from __future__ import annotations

import functools
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from sae_sweep import registry
from sae_sweep.config.columns import (
    COLUMN_OF,
    FRONTS,
    KEYS,
    SETTINGS,
    is_seed,
    is_setting,
    metric_columns,
    table_columns,
)
from sae_sweep.config.gc import no_collection
from sae_sweep.config.settings import Penalty, Point, Toy, canonical, check_plugins
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.store.front import front
from sae_sweep.store.plateau import plateau
from sae_sweep.store.store import OF_TRAINING, NotThere, Store

Known = Mapping[str, dict[str, Any]]
_FRONT_WITHIN = {
    "on_front": ("toy", "site", "distribution", "architecture", "init", "penalty", "width"),
    "on_common_front": ("toy", "site", "distribution", "width"),
}
# Nothing is drawn for an oracle, so that one of any seed is that of all.
_ORACLE_SHARES = tuple(column for column in SETTINGS if column not in ("init", "partition", "seed"))


def sweep_info(store: Store, name: str) -> dict[str, Any]:
    """sweep.yaml of a sweep as a dict.

    Raises UserError with the sweeps there are if there is none of that name, EnvironmentProblem if it was taken away.
    """
    try:
        return store.info(name)
    except NotThere:
        if name in store.sweeps():
            path = store.sweep(name) / "sweep.yaml"
            raise EnvironmentProblem(f"{path} is gone; run the sweep again to write it anew") from None
        there = ", ".join(store.sweeps()) or "none yet"
        raise UserError(f"there is no sweep {name} in {store.root}; there are: {there}") from None


def sweep_ids(store: Store, name: str) -> list[str]:
    """The ids of a sweep's full grid, finished or not, in grid order."""
    try:
        return store.read_sweep_file(name, "points.txt").split()
    except NotThere:
        return []


def load(store: Store, name: str) -> pd.DataFrame:
    """The results table: a row per finished point in grid order, those of `table_columns`, then every further
    metric, then every key that the sweep varies (dotted)."""
    return tables(store, name)[0]


def untrained(store: Store, name: str) -> pd.DataFrame:
    """The same table, measured on the untrained starts; what is of training or compares points is null."""
    return tables(store, name)[1]


def together(store: Store, names: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of several sweeps under each other, with a first column `sweep`; a point of two sweeps is in both."""
    varied = list(dict.fromkeys(key for name in names for key in sweep_info(store, name).get("varied") or []))
    both = {name: tables(store, name, varied=varied) for name in names}
    trained, start = (pd.concat({name: each[i] for name, each in both.items()}, names=["sweep"]) for i in (0, 1))
    return _with_sweep(trained), _with_sweep(start)


def _with_sweep(table: pd.DataFrame) -> pd.DataFrame:
    # Copied into one piece: pandas warns of frames put together from many.
    return table.reset_index(level="sweep").reset_index(drop=True).astype({"sweep": "string"}).copy()


def tables(
    store: Store, name: str, known: Known | None = None, varied: Sequence[str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The results table and the untrained one, from one pass over the records. Damaged records: `store.damaged`.

    known: records of points by id that this process has just read and proved.
    varied: the keys that have a column; None: those that the sweep varies.
    """
    info = sweep_info(store, name)
    check_plugins(info.get("plugins", {}))
    records = measured(store, sweep_ids(store, name), info.get("measure_id"), known)
    with no_collection():
        settings = _settings(records, info.get("varied") or [] if varied is None else varied)
        trained = _table(settings, [{**record["metrics"], **of_the_run(record)} for record in records])
        start = _table(settings, [dict(record["untrained"]) for record in records])
    trained["oracle_gap"] = _oracle_gap(trained)
    for column, within in _FRONT_WITHIN.items():
        trained[column] = _on_front(trained, within)
    return trained, start


def write(
    store: Store, name: str, both: tuple[pd.DataFrame, pd.DataFrame] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write results.parquet and untrained.parquet of a sweep whole or not at all; returns the two tables.

    `both`: what `tables` returned, if it has been asked already.
    """
    both = both or tables(store, name)
    for filename, table in zip(("results.parquet", "untrained.parquet"), both, strict=True):
        buffer = io.BytesIO()
        table.to_parquet(buffer, engine="pyarrow", index=False)
        store.write_sweep_file(name, filename, buffer.getvalue())
    return both


def measured(
    store: Store, ids: Iterable[str], measure_id: str | None, known: Known | None = None
) -> list[dict[str, Any]]:
    """The records of the finished points among `ids` under the given evaluation settings (None: as first measured).

    Those in `known` are not read again.
    """
    found, known, ids = [], known or {}, list(ids)
    read = store.records("points", (id for id in ids if id not in known))
    for id in ids:
        record = known.get(id) or read.get(id)
        if record is None:
            continue
        if measure_id not in (None, record.get("measure_id")):
            other = store.measures(id).get(str(measure_id))
            if other is None:
                continue
            record = {**record, **{key: other[key] for key in ("metrics", "untrained", "per_max") if key in other}}
        found.append(record)
    return found


def aggregate(frame: pd.DataFrame, how: Literal["mean", "best"]) -> pd.DataFrame:
    """One row per setting in place of one per seed, in grid order.

    "mean": over the seeds of SAE, toy and data; every metric with its standard deviation (`<metric>_std`, null for one
    seed) and the number of points `n`; seeds and `point_id` are dropped.
    "best": the whole row of the SAE seed with the lowest loss, for each toy and data seed apart, since losses compare
    on one problem only; `n` counts the seeds chosen from.
    """
    settings = [column for column in _names(frame) if is_setting(column)]
    if how == "best":
        return _best(frame, [column for column in settings if column != "seed"])
    keys = [column for column in settings if not is_seed(column)]
    metrics = [column for column in _names(frame) if column not in {*settings, "point_id", *FRONTS}]
    # By the number of its group: an index of all settings would be built and compared for every column.
    number = frame.groupby(keys, dropna=False, sort=False).ngroup()
    groups = frame.groupby(number.to_numpy())
    mean, std = groups[metrics].mean(), groups[metrics].std().add_suffix("_std")
    first = frame[~number.duplicated()].reset_index(drop=True)
    constant = [column for column in keys if column in SETTINGS]
    swept = [column for column in keys if column not in SETTINGS]
    beside = [name for metric in metrics for name in (metric, f"{metric}_std")]
    both = pd.concat([mean, std], axis=1)[beside]
    size, fronts = groups.size().rename("n"), groups[[*FRONTS]].max()
    return pd.concat([first[constant], size, both, fronts, first[swept]], axis=1)


def column_of(key: str, frame: pd.DataFrame) -> str:
    """The column that a condition's key means: a column's own name, or the key that sets it."""
    return key if key in frame else COLUMN_OF.get(key, key)


def matches(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.Series:
    """Which rows have what `where` asks for: column or dotted key -> a value, or a list of them; None is null.

    A formula of the user's own is called by its text in the column `penalty`; "formula" means any of them.
    """
    match = pd.Series(True, index=frame.index)
    for key, wanted in where.items():
        column = frame[column_of(key, frame)]
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        given = [value for value in values if value is not None]
        chosen = column.isin(given)
        if column.name == "penalty" and "formula" in given:
            chosen |= ~column.isin([*registry.kinds("penalty")])
        match &= (chosen & column.notna()) | (column.isna() & (None in values))
    return match


def planned(points: Sequence[Point], varied: Iterable[str]) -> pd.DataFrame:
    """The results table of points that are yet to be trained, in their order: settings, and metrics all null."""
    records = [{"id": point.id, "settings": canonical(point).to_dict()} for point in points]
    return _table(_settings(records, varied), [{} for _ in points])


def _names(frame: pd.DataFrame) -> list[str]:
    return [str(column) for column in frame.columns]


def _best(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    numbered = frame.reset_index(drop=True)
    groups = numbered.groupby(keys, dropna=False, sort=False)
    # A group without any measured loss has no best.
    rows = sorted(numbered.dropna(subset=["loss"]).groupby(keys, dropna=False, sort=False)["loss"].idxmin())
    return numbered.assign(n=groups["seed"].transform("size")).loc[rows].reset_index(drop=True)


def _settings(records: list[dict[str, Any]], varied: Iterable[str]) -> list[dict[str, Any]]:
    """The setting columns of each record: the constant ones, and every key that the sweep varies."""
    flat = [_flatten(record["settings"]) for record in records]
    keys = _swept_keys(flat, varied)
    rows = []
    for record, setting in zip(records, flat, strict=True):
        row = {"point_id": record["id"], **_constant(setting)}
        row |= {key: setting.get(_source(key)) for key in keys}
        rows.append(row)
    return rows


def _flatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys: a point's settings are its parts' and its seeds."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            for name, each in value.items():
                flat[f"{key}.{name}"] = each
        else:
            flat[key] = value
    return flat


def _constant(setting: Mapping[str, Any]) -> dict[str, Any]:
    """The constant setting columns; what has no effect on the point is null."""
    row = {column: setting.get(key) for column, key in KEYS.items()}
    toy = _toy(tuple((key.partition(".")[2], value) for key, value in setting.items() if key.startswith("toy.")))
    row["toy"] = toy.title
    if not toy.kind.sites:
        row["site"] = None
    if not toy.kind.distributions:
        row["distribution"] = None
    if row["penalty"] == "sqrt":
        row["penalty_p"] = 0.5
    if setting.get("penalty.formula") is not None:
        row |= _of_formula(tuple((key, value) for key, value in setting.items() if key.startswith("penalty.")))
    return row


@functools.lru_cache(maxsize=2**10)
def _of_formula(settings: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    """A formula of the user's own stands for the penalty's name; settings that it does not name are null."""
    penalty = Penalty(**{key.partition(".")[2]: value for key, value in settings})
    kind = registry.get("penalty", penalty.name)
    columns = {"penalty_p": "p", "penalty_scale": "scale"}
    unread = {column: None for column, key in columns.items() if key not in kind.reads(penalty)}
    return {"penalty": kind.title(penalty), **unread}


@functools.lru_cache(maxsize=2**10)
def _toy(settings: tuple[tuple[str, Any], ...]) -> Toy:
    return Toy(**dict(settings))


# The column `penalty` holds a formula of one's own.
_IN_PENALTY = ("penalty.formula", "penalty.outer")


def _swept_keys(flat: list[dict[str, Any]], varied: Iterable[str]) -> list[str]:
    """The varied keys as dotted columns; for a swept group, those of its keys that differ between the points."""
    keys: dict[str, None] = {}
    for key in varied:
        leaves = [leaf for leaf in (flat[0] if flat else ()) if leaf.startswith(f"{key}.")]
        differing = [leaf for leaf in leaves if len({setting.get(leaf) for setting in flat}) > 1]
        keys |= dict.fromkeys(differing if leaves else [key])
    # A setting with a column of its own stands in the table once.
    return [key for key in keys if key not in table_columns() and key not in COLUMN_OF and key not in _IN_PENALTY]


def _source(key: str) -> str:
    """A weights file is known by its content: its path says nothing about the numbers and is not kept."""
    return "distribution.digest" if key == "distribution.file" else key


def _table(settings: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> pd.DataFrame:
    measured, constant = _columns(metrics), table_columns()
    given = _columns(settings) | measured
    further = sorted(measured.keys() - metric_columns().keys())
    swept = [column for column in (settings[0] if settings else ()) if column not in constant]
    columns: dict[str, Any] = {}
    for name in (*constant, *further, *swept):
        values = given.get(name, [None] * len(settings))
        kind = constant.get(name) or _swept_type(name, values)
        if name == "k" and any(isinstance(value, float) for value in values):  # of BatchTopK it is a mean
            kind = "float64"
        columns[name] = _numbers(values) if kind == "float64" else pd.Series(values, dtype=kind)
    return pd.DataFrame(columns)


def _numbers(values: Sequence[float | None]) -> np.ndarray[Any, Any]:
    """A column of numbers, as most are: pandas takes ten times as long."""
    return np.array([math.nan if value is None else value for value in values], float)


def _columns(rows: list[dict[str, Any]]) -> dict[str, Sequence[Any]]:
    """The values of each key, of all rows together: null where a row has no such key."""
    blank: dict[str, Any] = dict.fromkeys(key for keys in dict.fromkeys(map(tuple, rows)) for key in keys)
    return dict(zip(blank, zip(*((blank | row).values() for row in rows), strict=True), strict=True))


def _swept_type(name: str, values: Sequence[Any]) -> str:
    """The type of a column outside the constant ones, null where a point has no such setting."""
    if name in COLUMN_OF:
        return SETTINGS[COLUMN_OF[name]]
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, bool) for value in given):
        return "boolean"
    if given and "." in name and all(isinstance(value, int) for value in given):
        return "Int64"
    return "float64" if all(isinstance(value, int | float) for value in given) else "string"


def of_the_run(record: Mapping[str, Any]) -> dict[str, float | None]:
    """`seconds` and what training says of itself, which a record may be too old to know: columns of the table."""
    columns = {"seconds": record.get("seconds")}
    for part in OF_TRAINING:
        columns |= record.get(part, {})
    curve = [row for row in record.get("curve") or () if row.get("gradient") is not None]
    if not curve:
        return columns
    norms = [row["gradient"] for row in curve]
    late = [row["gradient"] for row in curve if 2 * row["step"] >= curve[-1]["step"]]
    usual = statistics.median(late)
    columns |= {"gradient_largest": max(norms), "gradient_late": usual}
    columns["gradient_spike"] = max(late) / usual if usual else math.nan
    # While p falls, so does what the loss means.
    annealed = record["settings"]["penalty"]["name"] == "lp_annealed"
    columns["plateau"] = math.nan if annealed else plateau(curve)
    return columns


def _on_front(frame: pd.DataFrame, shared: Iterable[str]) -> pd.Series:
    """Whether the point's setting is Pareto-optimal by its means over seeds, among those with the same `shared`."""
    if frame.empty:
        return pd.Series(dtype="boolean")
    keys = [column for column in _names(frame) if is_setting(column) and not is_seed(column)]
    means = frame.groupby(keys, dropna=False, sort=False)[["l0", "fvu"]].mean().reset_index()
    within = [*shared, *(key for key in keys if key.startswith(("toy.", "distribution.")))]
    optimal = pd.concat([front(group) for _, group in means.groupby(within, dropna=False, sort=False)]).sort_index()
    setting = frame.groupby(keys, dropna=False, sort=False).ngroup()
    return pd.Series(optimal.to_numpy()[setting.to_numpy()], index=frame.index, dtype="boolean")


def _oracle_gap(frame: pd.DataFrame) -> pd.Series:
    """loss − the lowest loss of the points that share every setting but init and seed, and start from an oracle."""
    if frame.empty:
        return frame["oracle_gap"]
    prefixes = ("toy.", "distribution.", "penalty.", "encoder.", "sae.bandwidth", "sae.levels")
    shared = [*_ORACLE_SHARES, *(key for key in _names(frame) if key.startswith(prefixes))]
    same = frame.groupby(shared, dropna=False, sort=False).ngroup()
    oracle = frame["loss"].where(frame["init"] == "oracle").groupby(same).transform("min")
    return frame["loss"] - oracle
