"""What a verdict says, in words: the claim's subject, its numbers, and what would decide it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from sae_sweep.config.columns import LABELS

if TYPE_CHECKING:
    from sae_sweep.reports.claims import Verdict

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
    first, *second = (PHRASES.get(name, name) for name in claim["measure"].split(" - "))
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
    return f"{PHRASES.get(column, column)} {number(value)}"


def number(value: float | None) -> str:
    """A number for reading: three significant digits, whole numbers whole, "–" for null."""
    if value is None or pd.isna(value):
        return "–"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def prediction(claim: Mapping[str, Any]) -> str:
    """A claim's prediction without its full stop, as sentences begin with it."""
    return str(claim["prediction"]).strip().rstrip(".")
