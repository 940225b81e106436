"""Stores full of made-up results, for tests of what is built on records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sae_sweep.config.columns import BESIDE, metric_columns
from sae_sweep.config.settings import (
    Distribution,
    Encoder,
    Evaluation,
    Penalty,
    Point,
    Sae,
    Site,
    Toy,
    Training,
    canonical,
)
from sae_sweep.registry import kinds
from sae_sweep.store.checksums import SCHEMA
from sae_sweep.store.store import Store

SMALL = Toy(d_vocab=16, k=3)
MEASURED = {
    name: 0 if column.kind == "Int64" else 0.0
    for name, column in metric_columns().items()
    if name == "loss"
    or (
        name not in BESIDE
        and not any(
            name in kinds("metric")[other].columns for other in ("planted", "priors", "structure", "dictionary")
        )
    )
} | {"toy_accuracy": 1.0}


def point(
    toy: Toy = SMALL,
    site: str = "pre_unembed",
    distribution: Distribution = Distribution(),  # noqa: B008
    penalty: Penalty = Penalty(),  # noqa: B008
    training: Training = Training(),  # noqa: B008
    seed: int = 0,
    data_seed: int = 0,
    **sae: Any,
) -> Point:
    """A canonical point; keywords that are not a point's own are the SAE's."""
    parts = toy, Site(site), distribution, Sae(**sae), Encoder(), penalty, training
    return canonical(Point(*parts, seed=seed, data_seed=data_seed))


def record(at: Point, metrics: Mapping[str, Any], start: Mapping[str, Any] = {}, **more: Any) -> dict[str, Any]:
    """A record with the given metrics, every other one zero."""
    return {
        "schema": SCHEMA,
        "id": at.id,
        "settings": at.to_dict(),
        "measure_id": "e0",
        "evaluation": Evaluation().to_dict(),
        "metrics": {**MEASURED, **metrics},
        "untrained": {**MEASURED, **start},
        "seconds": 1.5,
        **more,
    }


def sweep(
    root: Path,
    results: Sequence[tuple[Point, Mapping[str, Any]]],
    name: str = "quick",
    more: Mapping[str, Mapping[str, Any]] = {},
    **info: Any,
) -> Store:
    """A store whose sweep holds the points with these metrics, in this order; `more` of a record, by point id."""
    store = Store(root)
    for at, metrics in results:
        store.commit("points", at.id, record(at, metrics, {"fvu": 0.9, "l0": 1.0}, **more.get(at.id, {})), {})
    whole = {
        "schema": SCHEMA,
        "name": name,
        "varied": [],
        "measure_id": "e0",
        "claims": [],
        "points": len(results),
        **info,
    }
    store.write_sweep_file(name, "sweep.yaml", yaml.safe_dump(whole).encode())
    store.write_sweep_file(name, "points.txt", "".join(f"{at.id}\n" for at, _ in results).encode())
    return store
