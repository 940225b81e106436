"""Claims: what the literature predicts, tested on the results table at a threshold set before anything ran.

The effect is `aggregate(measure over the points that match where)`, less the same over the points that match
`versus.where` if there is one. Its 95% interval is that of a hierarchical bootstrap over toys and their SAE seeds
(reports/bootstrap.py). A claim is

- *supported* if the interval lies beyond its threshold and beyond both nulls: the same number on the untrained SAEs
  of the same points, and with labels shuffled;
- *not supported* if the interval lies wholly on the other side of the threshold;
- else *undecided*, with the number of seeds that it would take if toys and seeds go on to vary as they did.

A claim that two sides are the same, or that a number is a published one, is supported if the interval of the difference
lies within ± its margin, and not supported if it lies wholly outside. With fewer toys or seeds than it asks for, every
claim is undecided.

`min` and `max` choose among settings, such as the coefficients of a ladder. Where the choice favours the claim ("the
best of these is at least …") the intervals of the settings are Holm-corrected; where it does not ("none of these is
more than …") the extreme is chosen anew in every resample, which favours it still less. With `at: {fvu: 0.02}` each
setting and seed gives one value, read off its ladder of coefficients where that column has that value, so that unlike
penalties compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sae_sweep.config.claims import DEFAULTS, LEAST
from sae_sweep.config.columns import COLUMN_OF, SEEDS, is_seed, is_setting, metric_columns, shuffled
from sae_sweep.reports import bootstrap, sentences
from sae_sweep.reports.bootstrap import Array, Draws, Sample
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.store.plateau import STILL_MOVING
from sae_sweep.store.results import column_of, matches
from sae_sweep.toys.limits import LEAST_ACCURACY

# The last bits of a difference do not decide a claim.
SLACK = 1e-9


@dataclass(frozen=True)
class Verdict:
    """What a sweep says of a claim.

    Attributes:
        verdict: "supported", "not supported" or "undecided".
        value: the number compared with the bound; None if nothing was measured.
        low, high: its range over single seeds, `seeds` of them.
        points: how many points it was measured on.
        untrained: the same number on the untrained SAEs of the same points.
        shuffled: the same number if labels were shuffled (for structure: vectors permuted); None if it uses none.
        sentence: all of it in one sentence.
        toys: how many toys the seeds belong to.
        interval: the 95% interval of the value; None for one toy.
        margin: within which the two sides count as the same, or the number as the published one; None for a claim with
            a threshold.
        nulls: the nulls that were measured, by name.
        seeds_needed: if it is undecided, how many seeds, over all toys, would decide it by the spread seen; None if it
            is decided, or if no number would.
        toy_accuracy: the lowest of its toys, as a share of their inputs; None if no toy answers anything.
        warning: what is to be said of a toy that answers too little right.
        share_still_moving: of the points whose training curve says so, the share whose loss twice the steps would
            lower by more than 2%; None if none says.
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
    toys: int = 0
    interval: tuple[float, float] | None = None
    margin: float | None = None
    nulls: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds_needed: int | None = None
    share_still_moving: float | None = None
    toy_accuracy: float | None = None
    warning: str = ""


@dataclass(frozen=True)
class _Compared:
    """The numbers of a claim on the toys that all its sides have.

    Attributes:
        claim: what they are of.
        sides: a table for each side, with the columns of `_measured`.
        toys: their seeds.
        seeds: how many SAE seeds each toy has at least; None if no side draws anything at random.
    """

    claim: Mapping[str, Any]
    sides: Sequence[pd.DataFrame]
    toys: Sequence[int]
    seeds: int | None

    @classmethod
    def on_shared_toys(cls, claim: Mapping[str, Any], sides: Sequence[pd.DataFrame]) -> _Compared:
        toys = sorted(set.intersection(*(set(side["toy"]) for side in sides)))
        shared = [side[side["toy"].isin(toys)] for side in sides]
        if claim["aggregate"] in ("min", "max"):
            # A setting that most toys lack would be chosen, or not, for its toys.
            least = min(claim["toys"], len(toys))
            shared = [side[side.groupby("setting")["toy"].transform("nunique") >= least] for side in shared]
        drawing = [side for side in shared if not _draws_nothing(side)]
        seeds = [int(side.groupby("toy")["seed"].nunique().min()) for side in drawing if len(side)]
        return cls(claim, shared, toys, min(seeds, default=None))

    @property
    def samples(self) -> list[Sample]:
        return [_sample(self.claim, side, self.toys) for side in self.sides]


@dataclass(frozen=True)
class _Effect:
    """A claim's number with its uncertainty, negated if the claim says "at most": the larger, the better for it.

    Attributes:
        value: the number.
        low, high: the ends of its 95% interval, at Holm's level if it was chosen among `rungs` settings.
        highest: the highest end of all those settings' intervals.
        toys: how many toys it rests on.
    """

    value: float
    low: float
    high: float
    highest: float
    rungs: int
    toys: int


@dataclass(frozen=True)
class _Decision:
    """`reason`: how its sentence ends; `toys_needed`: how many would decide it, None if none would or need."""

    verdict: str
    reason: str
    toys_needed: int | None = None


def evaluate(
    claim: Mapping[str, Any],
    frame: pd.DataFrame,
    untrained: pd.DataFrame,
    least_accuracy: float = LEAST_ACCURACY,
) -> Verdict:
    """The verdict on a claim (see `config.claims.check_claims` for its keys) from a sweep's two tables.

    least_accuracy: of its toys, below which its sentence warns
    """
    claim = {**DEFAULTS, **claim}
    conditions = [claim.get("where") or {}, *([claim["versus"]["where"]] if "versus" in claim else [])]
    missing = _missing_column(claim["measure"], conditions, frame)
    if missing:
        return _unmeasured(claim, f"this sweep has no column {missing}")
    chosen = [frame[matches(frame, where)] for where in conditions]
    measured = [_measured(claim, side) for side in chosen]
    compared = _Compared.on_shared_toys(claim, measured)
    if any(side.empty for side in compared.sides):
        return _unmeasured(claim, _why_nothing(claim, chosen, measured))
    before = untrained.set_index("point_id")
    nulls = {
        "untrained": _null(claim, [before.loc[side["point_id"]].reset_index() for side in chosen]),
        "labels shuffled": _null(claim, [_with_shuffled_labels(claim, side) for side in chosen]),
    }
    single = _single_seeds(claim, compared)
    accuracy = lowest_accuracy(pd.concat(chosen))
    verdict = Verdict(
        name=claim["name"],
        verdict="undecided",
        value=_best_of(claim, _statistic(claim, compared.samples, None)[0]),
        low=min(single, default=None),
        high=max(single, default=None),
        seeds=len(single),
        points=sum(map(len, chosen if "at" in claim else measured)),
        untrained=nulls["untrained"],
        shuffled=nulls["labels shuffled"],
        sentence="",
        toys=len(compared.toys),
        margin=_margin(claim, single),
        nulls={name: null for name, null in nulls.items() if null is not None},
        share_still_moving=share_still_moving(pd.concat(chosen)),
        toy_accuracy=accuracy,
        warning=sentences.toy_warning(accuracy, least_accuracy),
    )
    return _decided(claim, verdict, compared)


def evaluate_all(info: Mapping[str, Any], frame: pd.DataFrame, untrained: pd.DataFrame) -> list[Verdict]:
    """The verdict on each claim of a sweep, in order. `info`: its sweep.yaml."""
    names, found = FactorNames.of(info), []
    for claim in info["claims"]:
        verdict = evaluate(claim, frame, untrained, least_accuracy(info))
        prediction = sentences.prediction(claim)
        said = names.say(verdict.sentence.removeprefix(prediction))
        found.append(dataclasses.replace(verdict, sentence=prediction + said))
    return found


def least_accuracy(info: Mapping[str, Any]) -> float:
    """What the toys of a sweep should answer right at the least, as a share of their inputs."""
    return float(info.get("least_accuracy", LEAST_ACCURACY))


def lowest_accuracy(frame: pd.DataFrame) -> float | None:
    """Of the toys of some points, what the worst answers right; None if none answers anything, or it is not known."""
    known = frame["toy_accuracy"].dropna() if "toy_accuracy" in frame else pd.Series(dtype="float64")
    return float(known.min()) if len(known) else None


def share_still_moving(frame: pd.DataFrame) -> float | None:
    """Of the points whose training curve tells, the share that was still learning (`plateau` above 2%); or None."""
    known = frame["plateau"].dropna() if "plateau" in frame else pd.Series(dtype="float64")
    return float((known > STILL_MOVING).mean()) if len(known) else None


def _unmeasured(claim: Mapping[str, Any], why: str) -> Verdict:
    text = sentences.undecided(claim, why)
    return Verdict(claim["name"], "undecided", None, None, None, 0, 0, None, None, text)


def _why_nothing(claim: Mapping[str, Any], chosen: list[pd.DataFrame], measured: list[pd.DataFrame]) -> str:
    if any(side.empty for side in chosen):
        return "no finished point matches it"
    if any(side.empty for side in measured):
        return f"nothing reaches {sentences.level(claim)}" if "at" in claim else "its measure is null there"
    return "no toy is on both sides"


def _decided(claim: Mapping[str, Any], verdict: Verdict, compared: _Compared) -> Verdict:
    """The verdict with its interval, and what follows from that."""
    seeds = claim["seeds"] if compared.seeds is None else compared.seeds
    asked = f"{claim['toys']} toys × {claim['seeds']} seeds"
    there = sentences.sample(len(compared.toys), seeds)
    decision = _Decision("undecided", f"on {there} where the claim asks for {asked}", claim["toys"])
    rungs = 1
    if len(compared.toys) >= LEAST:
        effect = _effect(claim, compared)
        sign, rungs = _sign(claim), effect.rungs
        low, high = sorted((sign * effect.low, sign * effect.high))
        verdict = dataclasses.replace(verdict, value=sign * effect.value, interval=(low, high))
        if len(compared.toys) >= claim["toys"] and seeds >= claim["seeds"]:
            decide = _equal if claim["test"] == "equivalence" else _beyond
            decision = decide(claim, effect, verdict)
    needed = None if decision.toys_needed is None else decision.toys_needed * max(seeds, claim["seeds"])
    if needed is not None:
        told = f"about {needed} seeds over {decision.toys_needed} toys would decide it by the spread seen"
        decision = dataclasses.replace(decision, reason=f"{decision.reason}; {told}")
    verdict = dataclasses.replace(verdict, verdict=decision.verdict, seeds_needed=needed)
    return dataclasses.replace(verdict, sentence=sentences.sentence(claim, verdict, seeds, rungs, decision.reason))


def _beyond(claim: Mapping[str, Any], effect: _Effect, verdict: Verdict) -> _Decision:
    """Whether the interval lies beyond the threshold and the nulls."""
    sign, predicted = _sign(claim), sentences.predicted(claim)
    threshold = sign * _bound(claim)
    bound = threshold - SLACK * max(1.0, abs(threshold))
    if effect.highest < bound:
        return _Decision("not supported", f"not {predicted} as predicted")
    nulls = verdict.nulls if _is_held_against_nulls(claim) else {}
    short = {name: sign * null for name, null in nulls.items() if effect.low <= sign * null}
    if effect.low >= bound and not short:
        return _Decision("supported", f"as predicted {predicted}")
    if effect.value < bound:
        needed = bootstrap.toys_needed(effect.toys, effect.highest - effect.value, threshold - effect.value)
    else:
        distance = effect.value - max([threshold] * (effect.low < bound) + [*short.values()])
        needed = bootstrap.toys_needed(effect.toys, effect.value - effect.low, distance)
    if effect.low >= bound:
        # What a null has as well is no finding, however many toys show it.
        vain = "" if needed else ", so that no number of toys would decide it"
        return _Decision("undecided", f"{predicted} as predicted, but not beyond {' and '.join(short)}{vain}", needed)
    return _Decision("undecided", f"and the interval reaches to both sides of {predicted}", needed)


def _equal(claim: Mapping[str, Any], effect: _Effect, verdict: Verdict) -> _Decision:
    """Whether the interval lies within ± the margin (two one-sided tests; Schuirmann 1987)."""
    margin, equal = verdict.margin if verdict.margin is not None else np.nan, _bound(claim)
    within = sentences.predicted(claim, margin)
    limit = margin + SLACK * max(1.0, margin)
    if equal - limit <= effect.low and effect.high <= equal + limit:
        return _Decision("supported", f"{within} as predicted")
    if effect.low > equal + limit or effect.high < equal - limit:
        return _Decision("not supported", f"not {within} as predicted")
    half = max(effect.high - effect.value, effect.value - effect.low)
    needed = bootstrap.toys_needed(effect.toys, half, abs(margin - abs(effect.value - equal)))
    return _Decision("undecided", f"and the interval reaches to both sides of {within}", needed)


def _effect(claim: Mapping[str, Any], compared: _Compared) -> _Effect:
    """The number and its interval. The strongest of several settings has the most resamples beyond the bound, and of
    those that have as many the largest value."""
    samples, sign = compared.samples, _sign(claim)
    draws = bootstrap.draw(len(compared.toys), max(sample.values.shape[1] for sample in samples))
    values = sign * _statistic(claim, samples, None)[0]
    resampled = sign * _statistic(claim, samples, draws)
    beyond = (resampled >= sign * _bound(claim)).mean(axis=0)
    evidence = np.empty(len(values))
    evidence[np.lexsort((values, beyond))] = np.arange(len(values))
    levels = bootstrap.holm_levels([*evidence])
    intervals = [bootstrap.interval(resampled[:, rung], level) for rung, level in enumerate(levels)]
    best = int(evidence.argmax())
    highest = max(high for _, high in intervals)
    return _Effect(float(values[best]), *intervals[best], highest, len(values), len(compared.toys))


def _statistic(claim: Mapping[str, Any], samples: Sequence[Sample], draws: Draws | None) -> Array:
    """What is compared with the bound, for each resample: [resamples, 1], or, where the choice of an extreme setting
    favours the claim, for every setting that may be chosen: [resamples, settings]."""
    if claim["aggregate"] not in ("min", "max"):
        named = {"median": bootstrap.median, "mean": bootstrap.mean}
        aggregate = named.get(claim["aggregate"]) or bootstrap.share(claim["threshold"])
        first, *second = (bootstrap.over_all(sample, draws, aggregate) for sample in samples)
        return (first - second[0] if second else first)[:, None]
    extreme = np.max if claim["aggregate"] == "max" else np.min
    first, *second = (bootstrap.by_setting(sample, draws) for sample in samples)
    if (claim["aggregate"] == "max") == (_sign(claim) == 1):
        return first - extreme(second[0], axis=1, keepdims=True) if second else first
    return extreme(first, axis=1, keepdims=True) - (second[0] if second else 0.0)


def _best_of(claim: Mapping[str, Any], settings: Array) -> float:
    """Of the numbers of several settings the one that favours the claim."""
    return float(settings.max() if _sign(claim) == 1 else settings.min())


def _null(claim: Mapping[str, Any], tables: Sequence[pd.DataFrame]) -> float | None:
    """The claim's number on other tables of the same points; None where these have none."""
    compared = _Compared.on_shared_toys(claim, [_measured(claim, table) for table in tables])
    if any(side.empty for side in compared.sides):
        return None
    return _best_of(claim, _statistic(claim, compared.samples, None)[0])


def _is_held_against_nulls(claim: Mapping[str, Any]) -> bool:
    """Whether a claim is one of something found, which there must be more of than in the nulls.

    Counts of what is found are more the more there is, so "at most four splits" is no such claim: that nothing splits
    in the nulls either does not speak against it. What two settings' losses differ by before training is no null of
    what they differ by after it; what their counts differ by is.
    """
    counts = any(shuffled(name) in metric_columns() for name in claim["measure"].split(" - "))
    return counts if "versus" in claim else not (counts and "at_most" in claim)


def _margin(claim: Mapping[str, Any], single: Sequence[float]) -> float | None:
    """Within which two sides are the same: as stated, or twice the standard deviation over seeds."""
    if claim["test"] != "equivalence":
        return None
    if "margin" in claim:
        return float(claim["margin"])
    return 2 * float(np.std(single, ddof=1)) if len(single) > 1 else None


def _missing_column(measure: str, conditions: list[Mapping[str, Any]], frame: pd.DataFrame) -> str | None:
    named = [*measure.split(" - "), *(column_of(key, frame) for where in conditions for key in where)]
    return next((name for name in named if name not in frame), None)


def _with_shuffled_labels(claim: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the claim's measure as it is on shuffled labels, null where it has no such null."""
    names = claim["measure"].split(" - ")
    return rows.assign(**{name: rows.get(shuffled(name), np.nan) for name in names})


def _measured(claim: Mapping[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """`toy`, `seed`, `setting`, `init`, `loss` and `value`: a row per point where the measure is not null, or, at a
    level, per ladder that reaches it. `seed` tells the repetitions on a toy apart, `setting` all else."""
    columns = [rows[name].astype("float64") for name in claim["measure"].split(" - ")]
    table = rows.assign(value=columns[0] - columns[1] if len(columns) == 2 else columns[0]).dropna(subset=["value"])
    settings = [name for name in map(str, rows) if is_setting(name) and not is_seed(name)]
    if "at" in claim:
        ((column, level),) = claim["at"].items()
        settings = [name for name in settings if COLUMN_OF.get(name, name) != "coefficient"]
        groups = table.groupby([*settings, *SEEDS], dropna=False, sort=False)
        # Of each ladder the first row, but for the value. Taking all columns of every ladder would be most of the time.
        ladders = table[[column, "value"]].astype("float64")
        read = {rows[0]: _read_off(ladders.loc[rows], column, level) for rows in groups.groups.values()}
        table = table.loc[list(read)].assign(value=pd.Series(read, dtype="float64")).dropna(subset=["value"])
    repetition = pd.Series(list(zip(table["seed"], table["data_seed"], strict=True)), index=table.index, dtype="object")
    return pd.DataFrame(
        {
            "toy": table["toy_seed"],
            "seed": repetition,
            "setting": table.groupby(settings, dropna=False, sort=False).ngroup(),
            "init": table["init"],
            "loss": table["loss"].astype("float64"),
            "value": table["value"],
        }
    )


def _read_off(ladder: pd.DataFrame, column: str, level: float) -> float:
    """The value where `column` is `level`, on straight lines between neighbours in `column`; null outside its range."""
    place = ladder.dropna(subset=[column]).sort_values(column)
    return float(np.interp(level, place[column], place["value"], left=np.nan, right=np.nan))


def _sample(claim: Mapping[str, Any], side: pd.DataFrame, toys: Sequence[int]) -> Sample:
    """The rows of `_measured` as they are nested."""
    place = (
        side["toy"].map({toy: i for i, toy in enumerate(toys)}),
        side.groupby("toy")["seed"].transform(lambda seeds: pd.factorize(seeds, sort=True)[0]),
        pd.factorize(side["setting"])[0],
    )
    values = np.full([max(axis) + 1 for axis in place], np.nan)
    losses = values.copy()
    values[place] = side["value"]
    losses[place] = side["loss"]
    return Sample(values, losses if claim.get("best_of_seeds") else None)


def _single_seeds(claim: Mapping[str, Any], compared: _Compared) -> list[float]:
    """The value of each seed that is on every side, as if it were the only one; of each toy if seeds are chosen."""
    sides = []
    for side in compared.sides:
        once = claim.get("best_of_seeds") or (compared.seeds is not None and _draws_nothing(side))
        keys = [(toy, None if once else seed) for toy, seed in zip(side["toy"], side["seed"], strict=True)]
        sides.append(dict(list(side.groupby(pd.Series(keys, index=side.index, dtype="object"), sort=False))))
    repeated = [side for side in sides if any(seed is not None for _, seed in side)] or sides
    found = []
    for toy, seed in sorted(set.intersection(*map(set, repeated)), key=repr):
        rows = [side.get((toy, seed), side.get((toy, None))) for side in sides]
        samples = [_sample(claim, each, [toy]) for each in rows if each is not None]
        found.append(_best_of(claim, _statistic(claim, samples, None)[0]))
    return found


def _draws_nothing(side: pd.DataFrame) -> bool:
    """Whether all its SAEs start from an oracle: nothing is drawn at random, so that one seed says all."""
    return bool((side["init"] == "oracle").all())


def _sign(claim: Mapping[str, Any]) -> int:
    """−1 if the claim is the better, the smaller its number."""
    return -1 if "at_most" in claim else 1


def _bound(claim: Mapping[str, Any]) -> float:
    """The threshold, or the published number; of a claim that two sides are the same, no difference."""
    return float(claim.get("at_least", claim.get("at_most", claim.get("equals", 0.0))))
