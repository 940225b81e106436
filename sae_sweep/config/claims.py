"""The shape of a claim in an experiment's YAML: a prediction, and the threshold that was set before anything ran."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sae_sweep.config.columns import COLUMNS, METRICS
from sae_sweep.config.keys import CHOSEN, coerce, nearest, point_keys, show
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting, kinds

AGGREGATES = ("median", "mean", "min", "max", "share")
_WORDS = {"name": Setting(""), "prediction": Setting(""), "measure": Setting("")}
_NUMBERS = {"at_least": Setting(0.0), "at_most": Setting(0.0), "threshold": Setting(0.0)}
_AGGREGATE = Setting("", choices=AGGREGATES)
_KEYS = (*_WORDS, "aggregate", "where", "at", *_NUMBERS, "versus", "best_of_seeds")


def check_claims(claims: Any, where: str) -> list[dict[str, Any]]:
    """The claims as given, checked. UserError: a key is unknown, missing or of the wrong type.

    A claim: `name`, `prediction` (text), `measure` (a column, or the difference of two: `label_mq - label_mn`),
    `aggregate` of it over the points that match `where` ({column or dotted key: value or list}); one of `at_least`
    and `at_most`. With `versus: {where: …}`, the difference from the same aggregate there is what is compared.
    `at: {column: number}` reads the measure off each ladder of coefficients where that column has that value.
    `share` is the share of the points with measure ≥ `threshold`; `best_of_seeds` keeps the seed of lowest loss of
    each setting.
    """
    if not isinstance(claims, list):
        raise UserError(f"{where}: claims must be a list, got {show(claims)}")
    checked = [_claim(claim, f"{where}: claims[{i}]") for i, claim in enumerate(claims)]
    names = [claim["name"] for claim in checked]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise UserError(f"{where}: two claims are named {show(twice)}")
    return checked


def _claim(claim: Any, where: str) -> dict[str, Any]:
    _mapping(claim, where)
    for key in claim:
        _known(key, _KEYS, where)
    for key, rule in {**_WORDS, "aggregate": _AGGREGATE}.items():
        coerce(f"{where}.{key}", rule, claim.get(key))
    for key, rule in _NUMBERS.items():
        if key in claim:
            coerce(f"{where}.{key}", rule, claim[key])
    if ("at_least" in claim) == ("at_most" in claim):
        raise UserError(f"{where} needs one of at_least and at_most")
    if (claim["aggregate"] == "share") != ("threshold" in claim):
        raise UserError(f"{where}: threshold belongs to aggregate: share, and share needs it")
    for column in claim["measure"].split(" - "):
        _known(column, _columns(), f"{where}.measure")
    _condition(claim.get("where", {}), f"{where}.where")
    if "at" in claim:
        _level(claim["at"], f"{where}.at")
    if "versus" in claim:
        _mapping(claim["versus"], f"{where}.versus")
        if set(claim["versus"]) != {"where"}:
            raise UserError(f"{where}.versus takes where and nothing else")
        _condition(claim["versus"]["where"], f"{where}.versus.where")
    if not isinstance(claim.get("best_of_seeds", False), bool):
        raise UserError(f"{where}.best_of_seeds must be true or false, got {show(claim['best_of_seeds'])}")
    return dict(claim)


def _columns() -> list[str]:
    """The columns of the results table, and those of metrics from other packages."""
    return [*COLUMNS, *(column for metric in kinds("metric").values() for column in metric.columns)]


def _mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} must be a mapping, got {show(value)}")


def _condition(value: Any, where: str) -> None:
    _mapping(value, where)
    for key in value:
        _known(key, (*_columns(), *point_keys(), *CHOSEN), where)


def _level(value: Any, where: str) -> None:
    _mapping(value, where)
    if len(value) != 1:
        raise UserError(f"{where} takes one column and its value, got {show(value)}")
    ((column, level),) = value.items()
    _known(column, METRICS, where)
    coerce(f"{where}.{column}", Setting(0.0), level)


def _known(word: str, valid: Collection[str], where: str) -> None:
    if word not in valid:
        raise UserError(f"{where}: unknown key {show(word)}{nearest(word, valid)}")
