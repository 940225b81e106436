"""The shape of a claim in an experiment's YAML: a prediction, and the threshold that was set before anything ran."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sae_sweep.config.columns import metric_columns, table_columns
from sae_sweep.config.keys import CHOSEN, coerce, nearest, point_keys, show
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

AGGREGATES = ("median", "mean", "min", "max", "share")
TESTS = ("threshold", "equivalence")
# Toys, and SAE seeds of each, that a claim rests on if it does not say: with fewer there is no interval.
LEAST = 2
DEFAULTS = {"test": "threshold", "toys": LEAST, "seeds": LEAST}
_WORDS = {"name": Setting(""), "prediction": Setting(""), "measure": Setting("")}
_CHOICES = {"aggregate": Setting("", choices=AGGREGATES), "test": Setting("", choices=TESTS)}
_OPTIONAL = {
    "at_least": Setting(0.0),
    "at_most": Setting(0.0),
    "threshold": Setting(0.0),
    "equals": Setting(0.0),
    "margin": Setting(0.0, gt=0),
    "toys": Setting(LEAST, ge=LEAST),
    "seeds": Setting(LEAST, ge=LEAST),
}
_KEYS = (*_WORDS, *_CHOICES, "where", "at", *_OPTIONAL, "versus", "best_of_seeds")


def check_claims(claims: Any, where: str) -> list[dict[str, Any]]:
    """The claims as given, checked. UserError: a key is unknown, missing or of the wrong type.

    A claim: `name`, `prediction` (text), `measure` (a column, or the difference of two: `label_mq - label_mn`), and
    `aggregate` of it over the points that match `where` ({column or dotted key: value or list}). With `versus:
    {where: …}`, the difference from the same aggregate there is what is tested. `at: {column: number}` reads the
    measure off each ladder of coefficients where that column has that value. `share` is the share of the points with
    measure ≥ `threshold`; `min` and `max` are those of the settings, each averaged over its seeds; `best_of_seeds`
    keeps the seed of lowest loss of each setting.

    `test: threshold` (the default) asks for one of `at_least` and `at_most`. `test: equivalence` says that the two
    sides of `versus` are the same within ± `margin` (left out: twice the standard deviation over seeds), or that the
    number is the published one, `equals`, within ± `margin`. `toys` and `seeds` are how many toys it rests on, and how
    many SAE seeds of each (left out: 2, the fewest that have a spread).
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
    claim = {**DEFAULTS, **claim}
    for key, rule in {**_WORDS, **_CHOICES, **_OPTIONAL}.items():
        if key in claim or key not in _OPTIONAL:
            coerce(f"{where}.{key}", rule, claim.get(key))
    _tests_something(claim, where)
    if (claim["aggregate"] == "share") != ("threshold" in claim):
        raise UserError(f"{where}: threshold belongs to aggregate: share, and share needs it")
    for column in claim["measure"].split(" - "):
        _known(column, table_columns(), f"{where}.measure")
    _condition(claim.get("where", {}), f"{where}.where")
    if "at" in claim:
        _level(claim["at"], f"{where}.at")
    if "versus" in claim:
        _mapping(claim["versus"], f"{where}.versus")
        if set(claim["versus"]) != {"where"}:
            raise UserError(f"{where}.versus takes where and nothing else")
        _condition(claim["versus"]["where"], f"{where}.versus.where")
    if "at" in claim and claim.get("best_of_seeds"):
        raise UserError(f"{where}: at reads a whole ladder, and best_of_seeds chooses points: one of the two")
    if not isinstance(claim.get("best_of_seeds", False), bool):
        raise UserError(f"{where}.best_of_seeds must be true or false, got {show(claim['best_of_seeds'])}")
    return claim


def _tests_something(claim: Mapping[str, Any], where: str) -> None:
    bounds = [key for key in ("at_least", "at_most") if key in claim]
    if claim["test"] == "equivalence":
        if bounds or ("versus" in claim) == ("equals" in claim):
            raise UserError(
                f"{where}: test: equivalence needs versus or equals, and takes margin in place of at_least and at_most"
            )
        if "equals" in claim and "margin" not in claim:
            raise UserError(f"{where}: equals needs the margin within which a number is the same")
        if claim["aggregate"] in ("min", "max"):
            raise UserError(f"{where}: test: equivalence is of a typical number: aggregate: median, mean or share")
    elif len(bounds) != 1:
        raise UserError(f"{where} needs one of at_least and at_most, or test: equivalence")
    elif stray := next((key for key in ("margin", "equals") if key in claim), None):
        raise UserError(f"{where}: {stray} belongs to test: equivalence")


def _mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} must be a mapping, got {show(value)}")


def _condition(value: Any, where: str) -> None:
    _mapping(value, where)
    for key in value:
        _known(key, (*table_columns(), *point_keys(), *CHOSEN), where)


def _level(value: Any, where: str) -> None:
    _mapping(value, where)
    if len(value) != 1:
        raise UserError(f"{where} takes one column and its value, got {show(value)}")
    ((column, level),) = value.items()
    _known(column, metric_columns(), where)
    coerce(f"{where}.{column}", Setting(0.0), level)


def _known(word: str, valid: Collection[str], where: str) -> None:
    if word not in valid:
        raise UserError(f"{where}: unknown key {show(word)}{nearest(word, valid)}")
