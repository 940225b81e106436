"""Claims that no SAE could fulfil are refused before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import Point
from sae_sweep.errors import UserError


def check_attainable(sweep: Sweep) -> None:
    """UserError, with both numbers, if a claim asks for more than the perfect code has (metrics/ceilings.py).

    For example, one latent per cell of max-of-3 over 16 tokens has 65.9 splits of a maximum: no claim can ask for 70.
    Of the points that a claim is about, the highest ceiling counts.
    """
    from sae_sweep.metrics.ceilings import COUNTED

    ceiling_of = {measure: f"{name}_ceiling" for name, measure in COUNTED.items()}
    asked = [claim for claim in sweep.claims if claim["measure"] in ceiling_of]
    if not asked:
        return
    from sae_sweep.store.results import column_of, matches, planned

    table = planned(sweep.points, sweep.varied)
    ceilings: dict[tuple[Any, ...], Mapping[str, float]] = {}
    for claim in asked:
        where, least = _needs(claim)
        if not all(column_of(key, table) in table for key in where):
            continue  # its verdict says which column there is none of
        meant = [point for point, is_meant in zip(sweep.points, matches(table, where), strict=True) if is_meant]
        name = ceiling_of[claim["measure"]]
        highest = max((_ceilings(point, sweep, ceilings)[name] for point in meant), default=least)
        if least > highest:
            raise UserError(
                f"claim {claim['name']} asks for {claim['measure']} of at least {least:g}, and the perfect code for "
                f"these inputs has {highest:.4g} (claims=[] leaves the claims out)"
            )


def _needs(claim: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
    """Where a claim needs how much of its measure at the least. The other side, if there is one, has 0 or more."""
    where = claim.get("where") or {}
    if claim["aggregate"] == "share":
        return where, claim["threshold"] if claim.get("at_least", 0) > 0 else 0.0
    if "at_most" in claim and "versus" in claim:
        return claim["versus"]["where"], -claim["at_most"]
    return where, claim.get("at_least", 0.0)


def _ceilings(point: Point, sweep: Sweep, known: dict[tuple[Any, ...], Mapping[str, float]]) -> Mapping[str, float]:
    """The ceilings' columns for a point; infinite for a toy whose cells are known only once it is made."""
    from sae_sweep.metrics.ceilings import COUNTED, ceiling_metrics, ceilings_of

    key = (point.toy, point.distribution, point.sae.width)
    if key not in known:
        found = ceilings_of(point.toy, point.distribution, sweep.evaluation)
        unknown = dict.fromkeys((f"{name}_ceiling" for name in COUNTED), float("inf"))
        known[key] = unknown if found is None else ceiling_metrics(found, point.toy.maxima, point.sae.width)
    return known[key]
