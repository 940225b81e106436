"""What a verdict says, in words: the claim's subject, its numbers, and what would decide it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae_sweep.config.columns import phrase

if TYPE_CHECKING:
    from sae_sweep.reports.claims import Verdict


def sentence(claim: Mapping[str, Any], verdict: Verdict, seeds: int, rungs: int, reason: str) -> str:
    """All that a verdict says in one sentence, and others if SAEs it rests on were still learning, or their toy was.

    seeds: of each toy; rungs: of how many settings the best was taken; reason: how it ends.
    """
    asides = [f"{name} {number(null)}" for name, null in verdict.nulls.items()]
    if verdict.interval is not None:
        low, high = map(number, verdict.interval)
        chosen = f", corrected for the choice among {rungs} settings" if rungs > 1 else ""
        asides.insert(0, f"95% interval {low} to {high} over {sample(verdict.toys, seeds)}{chosen}")
    aside = f" ({'; '.join(asides)})" if asides else ""
    found = f"the {subject(claim)} is {number(verdict.value)}{aside}, {reason}"
    share = verdict.share_still_moving
    moving = f" Twice the steps would lower the loss of {share:.0%} of its SAEs by more than 2%." if share else ""
    return f"{prediction(claim)}: {verdict.verdict}, since {found}.{moving} {verdict.warning}".rstrip()


def toy_warning(accuracy: float | None, least: float) -> str:
    """What is to be said of a toy that has not learnt enough; nothing of others."""
    if accuracy is None or accuracy >= least:
        return ""
    return f"A toy answers only {percent(accuracy)} of its inputs right, less than toy.least_accuracy={least:g}."


def percent(share: float) -> str:
    """A share for reading, to four digits: 99.97% is not 100%."""
    return f"{100 * share:.4g}%"


def undecided(claim: Mapping[str, Any], why: str) -> str:
    """The sentence where there is no number."""
    return f"{prediction(claim)}: undecided, since {why}."


def predicted(claim: Mapping[str, Any], margin: float | None = None) -> str:
    """What was predicted of the number: "at least 15", "the same within 0.5", or "2.73 within 0.2"."""
    if "at_least" in claim:
        return f"at least {number(claim['at_least'])}"
    if "at_most" in claim:
        return f"at most {number(claim['at_most'])}"
    same = number(claim["equals"]) if "equals" in claim else "the same"
    return same if margin is None else f"{same} within {number(margin)}"


def sample(toys: int, seeds: int) -> str:
    """What a number rests on: "5 toys × 2 seeds"."""
    return f"{toys} {'toy' if toys == 1 else 'toys'} × {seeds} {'seed' if seeds == 1 else 'seeds'}"


def subject(claim: Mapping[str, Any]) -> str:
    """What a claim is about, in words: "median number of splits per max"."""
    first, *second = map(phrase, claim["measure"].split(" - "))
    measure = f"{first} less the {second[0]}" if second else first
    if claim["aggregate"] == "share":
        measure = f"share of points with {measure} at least {number(claim['threshold'])}"
    else:
        adjective = {"min": "lowest", "max": "highest"}.get(claim["aggregate"], claim["aggregate"])
        measure = f"{adjective} {measure}"
    measure += f" at {level(claim)}" if "at" in claim else ""
    return f"{measure}, less that of the points compared with," if "versus" in claim else measure


def level(claim: Mapping[str, Any]) -> str:
    """Where a claim reads its measure, in words: "FVU 0.2"."""
    ((column, value),) = claim["at"].items()
    return f"{phrase(column)} {number(value)}"


def number(value: float | None) -> str:
    """A number for reading: three significant digits, whole numbers whole, "–" for null."""
    if value is None or pd.isna(value):
        return "–"
    if value == round(value) and abs(value) < 1e6:
        return f"{value + 0.0:.0f}"  # no "-0"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def prediction(claim: Mapping[str, Any]) -> str:
    """A claim's prediction without its full stop, as sentences begin with it."""
    return str(claim["prediction"]).strip().rstrip(".")
