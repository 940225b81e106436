"""Claims: what the literature predicts, checked against the results table at a threshold set before anything ran.

`value = aggregate(measure over the points that match where)`, less the same over the points that match `versus.where`
if there is one; both conditions stand on their own. `measure` is a column or the difference of two ("label_mq -
label_mn"). The claim is supported if the value and the value of every single seed keep the bound, not supported if
none does, and undecided if the seeds disagree or nothing was measured. With `at: {fvu: 0.02}` each setting and seed
gives one value, read off its ladder of coefficients where that column has that value, so that unlike penalties compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_sweep.config.columns import COLUMN_OF, LABELS, is_setting, shuffled
from sae_sweep.store.results import aggregate

# How a sentence calls a column; others are called by their name.
PHRASES = {
    "fvu": "FVU",
    "fvu_above_ceiling": "FVU above the ceiling of one code per max",
    "l0": "L0",
    "live_latents": "number of live latents",
    "dead_latents": "number of dead latents",
    "pure_latents": "number of pure latents",
    "owned_maxes": "number of owned maxes",
    "splits_per_max": "number of splits per max",
    "distinct_splits_per_max": "number of distinct splits per max",
    "duplicates_per_max": "number of duplicates per max",
    "split_maxes": "number of split maxes",
    "oracle_gap": "loss above the best oracle start",
    "info_query": "information on the query",
    "info_runner_up": "information on the runner-up",
    "info_copies": "information on the copies",
    "unique_query": "information on the query alone",
    "unique_runner_up": "information on the runner-up alone",
    "unique_copies": "information on the copies alone",
    "loss_recovered": "share of the toy's loss recovered",
    "kl": "KL",
    "structure_parent": "share of variance that the parent explains",
    "structure_modifier": "share of variance that the modifier explains",
    "structure_interaction": "share of variance that neither explains",
    "structure_cosine": "cosine of what a modifier adds to two parents",
    "structure_semi_nmf": "variance that semi-NMF explains",
    "structure_semi_nmf_null": "variance that it explains of shuffled vectors",
    "structure_meta_sae": "variance that a meta-SAE explains",
    "structure_meta_sae_null": "variance that it explains of shuffled vectors",
    "gradient_largest": "largest norm of a gradient",
    "gradient_late": "norm of the gradient late in training",
    "gradient_spike": "largest norm of the gradient late in training over the usual",
    **{f"label_{label}": f"number of latents labelled {label}" for label in LABELS},
}


@dataclass(frozen=True)
class Verdict:
    """What a sweep says of a claim.

    Attributes:
        verdict: "supported", "not supported" or "undecided".
        value: the number compared with the bound; None if nothing was measured.
        low, high: its range over single seeds, `seeds` of them.
        points: how many points it was measured on.
        untrained: the same number on the untrained starts of the same points.
        shuffled: the same number if labels were shuffled (for structure: vectors permuted); None if it uses none.
        sentence: all of it in one sentence.
    """

    name: str
    verdict: str
    value: float | None
    low: float | None
    high: float | None
    seeds: int
    points: int
    untrained: float | None
    shuffled: float | None
    sentence: str


def evaluate(claim: Mapping[str, Any], frame: pd.DataFrame, untrained: pd.DataFrame) -> Verdict:
    """The verdict on a claim (see `sweep.claims.check_claims` for its keys) from a sweep's two tables."""
    rows = aggregate(frame, "best") if claim.get("best_of_seeds") else frame
    conditions = [claim.get("where") or {}, *([claim["versus"]["where"]] if "versus" in claim else [])]
    missing = _missing_column(claim["measure"], conditions, frame)
    if missing:
        return _undecided(claim, f"this sweep has no column {missing}")
    chosen = [rows[_matches(rows, where)] for where in conditions]
    sides = [_measured(claim, side) for side in chosen]
    if any(side.empty for side in sides):
        reason = f"nothing reaches {_level(claim)}" if "at" in claim else "its measure is null there"
        matched = not any(side.empty for side in chosen)
        return _undecided(claim, reason if matched else "no finished point matches it")
    value = _value(claim, sides)
    single = _per_seed(claim, sides)
    start = untrained.set_index("point_id")
    nulls = (
        _value(claim, [_measured(claim, start.loc[side["point_id"]].reset_index()) for side in chosen]),
        _value(claim, [_measured(claim, _with_shuffled_labels(claim, side)) for side in chosen]),
    )
    keeps = {_keeps(claim, number) for number in (value, *single)}
    verdict = "undecided" if len(keeps) > 1 else "supported" if keeps == {True} else "not supported"
    low, high = (min(single), max(single)) if single else (value, value)
    before, by_chance = (None if pd.isna(null) else null for null in nulls)
    sentence = _sentence(claim, verdict, value, (low, high), len(single), (before, by_chance))
    points = sum(len(side) for side in (chosen if "at" in claim else sides))
    return Verdict(claim["name"], verdict, value, low, high, len(single), points, before, by_chance, sentence)


def evaluate_all(claims: list[dict[str, Any]], frame: pd.DataFrame, untrained: pd.DataFrame) -> list[Verdict]:
    """The verdict on each claim, in order."""
    return [evaluate(claim, frame, untrained) for claim in claims]


def _undecided(claim: Mapping[str, Any], why: str) -> Verdict:
    sentence = f"{_prediction(claim)}: undecided, since {why}."
    return Verdict(claim["name"], "undecided", None, None, None, 0, 0, None, None, sentence)


def _column(key: str, frame: pd.DataFrame) -> str:
    """The column that a condition's key means: a column's own name, or the key that sets it."""
    return key if key in frame else COLUMN_OF.get(key, key)


def _missing_column(measure: str, conditions: list[Mapping[str, Any]], frame: pd.DataFrame) -> str | None:
    named = [*measure.split(" - "), *(_column(key, frame) for where in conditions for key in where)]
    return next((name for name in named if name not in frame), None)


def _matches(rows: pd.DataFrame, where: Mapping[str, Any]) -> pd.Series:
    match = pd.Series(True, index=rows.index)
    for key, wanted in where.items():
        column = rows[_column(key, rows)]
        values = wanted if isinstance(wanted, list | tuple) else [wanted]
        given = [value for value in values if value is not None]
        match &= (column.isin(given) & column.notna()) | (column.isna() & (None in values))
    return match


def _with_shuffled_labels(claim: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the claim's measure as it is on shuffled labels, null where it has no such null."""
    names = claim["measure"].split(" - ")
    return rows.assign(**{name: rows.get(shuffled(name), np.nan) for name in names})


def _measured(claim: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """`value` and seeds: a row per point where the measure is not null, or, at a level, per ladder that reaches it."""
    columns = [rows[name].astype("float64") for name in claim["measure"].split(" - ")]
    value = columns[0] - columns[1] if len(columns) == 2 else columns[0]
    seeds = ["toy_seed", "data_seed"] if claim.get("best_of_seeds") else ["toy_seed", "data_seed", "seed"]
    table = rows.assign(value=value).dropna(subset=["value"])
    if "at" in claim:
        ((column, level),) = claim["at"].items()
        given = [name for name in map(str, rows) if is_setting(name)]
        ladder = [name for name in given if COLUMN_OF.get(name, name) != "coefficient"]
        groups = table.groupby(ladder, dropna=False, sort=False)
        read = [{**group.iloc[0], "value": _read_off(group, column, level)} for _, group in groups]
        table = pd.DataFrame(read, columns=table.columns).dropna(subset=["value"])
    return table[[*seeds, "value"]]


def _read_off(ladder: pd.DataFrame, column: str, level: float) -> float:
    """The value where `column` is `level`, on straight lines between neighbours in `column`; null outside its range."""
    place = ladder.dropna(subset=[column]).astype({column: "float64"}).sort_values(column)
    return float(np.interp(level, place[column], place["value"], left=np.nan, right=np.nan))


def _value(claim: Mapping[str, Any], sides: list[pd.DataFrame]) -> float:
    numbers = [_aggregates(claim)[claim["aggregate"]](side["value"]) for side in sides]
    return float(numbers[0] - numbers[1]) if len(numbers) == 2 else float(numbers[0])


def _aggregates(claim: Mapping[str, Any]) -> dict[str, Callable[[pd.Series], float]]:
    return {
        "median": lambda values: values.median(),
        "mean": lambda values: values.mean(),
        "min": lambda values: values.min(),
        "max": lambda values: values.max(),
        "share": lambda values: (values >= claim["threshold"]).mean(),
    }


def _per_seed(claim: Mapping[str, Any], sides: list[pd.DataFrame]) -> list[float]:
    """The value of each seed that is on every side, as if it were the only one."""
    seeds = [str(column) for column in sides[0] if column != "value"]
    groups = [dict(list(side.groupby(seeds, sort=True))) for side in sides]
    shared = [seed for seed in groups[0] if all(seed in group for group in groups)]
    return [_value(claim, [group[seed] for group in groups]) for seed in shared]


def _keeps(claim: Mapping[str, Any], value: float) -> bool:
    """Whether a value keeps the bound; the last bits of a difference do not decide a claim."""
    slack = 1e-9 * max(1.0, abs(_bound(claim)))
    return value >= _bound(claim) - slack if "at_least" in claim else value <= _bound(claim) + slack


def _bound(claim: Mapping[str, Any]) -> float:
    return float(claim["at_least"] if "at_least" in claim else claim["at_most"])


def _prediction(claim: Mapping[str, Any]) -> str:
    return str(claim["prediction"]).strip().rstrip(".")


def subject(claim: Mapping[str, Any]) -> str:
    """What a claim is about, in words: "median number of splits per max"."""
    first, *second = (PHRASES.get(name, name) for name in claim["measure"].split(" - "))
    measure = f"{first} less the {second[0]}" if second else first
    if claim["aggregate"] == "share":
        measure = f"share of points with {measure} at least {number(claim['threshold'])}"
    else:
        adjective = {"min": "lowest", "max": "highest"}.get(claim["aggregate"], claim["aggregate"])
        measure = f"{adjective} {measure}"
    measure += f" at {_level(claim)}" if "at" in claim else ""
    return f"{measure}, less that of the points compared with," if "versus" in claim else measure


def _level(claim: Mapping[str, Any]) -> str:
    ((column, level),) = claim["at"].items()
    return f"{PHRASES.get(column, column)} {number(level)}"


def _sentence(
    claim: Mapping[str, Any],
    verdict: str,
    value: float,
    span: tuple[float, float],
    seeds: int,
    nulls: tuple[float | None, float | None],
) -> str:
    asides = []
    low, high = map(number, span)
    if seeds > 1:
        asides.append(f"{low} on each of {seeds} seeds" if low == high else f"{low} to {high} over {seeds} seeds")
    named = zip(("untrained", "labels shuffled"), nulls, strict=True)
    asides += [f"{name} {number(null)}" for name, null in named if null is not None]
    aside = f" ({'; '.join(asides)})" if asides else ""
    bound = f"{'at least' if 'at_least' in claim else 'at most'} {number(_bound(claim))}"
    ending = {
        "supported": f"as predicted {bound}",
        "not supported": f"not {bound} as predicted",
        "undecided": f"and the seeds do not agree on {bound}",
    }[verdict]
    return f"{_prediction(claim)}: {verdict}, since the {subject(claim)} is {number(value)}{aside}, {ending}."


def number(value: float | None) -> str:
    """A number for reading: three significant digits, whole numbers whole, "–" for null."""
    if value is None or pd.isna(value):
        return "–"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
