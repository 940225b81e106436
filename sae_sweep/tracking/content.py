"""What a W&B run of ours holds: the run of a point from its record, the run of a sweep from its results table.

Keys are those of `keys`, constant over points and sweeps, since a W&B project takes about 10,000 names.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.config.settings import Encoder, Sae, Site, counts, init_name
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.tracking.keys import FIGURE, TRAINING, UNTRAINED, front_key, key
from sae_sweep.tracking.process import Run

if TYPE_CHECKING:
    import pandas as pd

# A row costs about 0.4 ms, most of the price of logging a point; the record in the store keeps every row.
CURVE_ROWS = 40

# In the fingerprint of a run that carries files: asked for later, it is logged anew.
WITH_FILES = "+files"

Rows = Sequence[Sequence[Any]]


def run_id(point_id: str, sweep: str) -> str:
    """The id of a point's run in a sweep."""
    return f"{point_id}-{_digest(sweep)[:8]}"


def point_run(record: Mapping[str, Any], sweep: str, folder: Path | None = None, job_type: str | None = None) -> Run:
    """The run of a finished point: all its settings, the training curve as `training/…`, its metrics, as `untrained/…`
    the same of its start, and the files of its `folder` if that is given."""
    from sae_sweep.store.results import of_the_run

    settings = record["settings"]
    curve = [
        (int(row["step"]), {key(name, TRAINING): _plain(value) for name, value in row.items() if name != "step"})
        for row in _thinned(record["curve"])
    ]
    # Of its training: how often latents were revived, where it ended, whether it had settled.
    of_all = {**record["metrics"], **of_the_run(record)}
    summary = {key(name): _plain(value) for name, value in of_all.items()}
    summary |= {key(name, UNTRAINED): _plain(value) for name, value in record["untrained"].items()}
    # W&B cannot draw some of the runs in one panel and others in the next: each penalty's FVU has a name of its own.
    sae = settings["sae"]
    counted = counts(sae["architecture"])
    summary[front_key(sae["architecture"] if counted else settings["penalty"]["name"])] = summary.get("fvu")
    return Run(
        id=run_id(record["id"], sweep),
        fingerprint=record["measure_id"] + (WITH_FILES if folder else ""),
        name=point_name(settings),
        job_type=job_type or "sae",
        config={
            **settings,
            "point_id": record["id"],
            "measure_id": record["measure_id"],
            "sweep": sweep,
            "provenance": record["provenance"],
        },
        history=curve,
        summary=summary,
        folder=str(folder) if folder else None,
    )


def _thinned(curve: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """At most `CURVE_ROWS` rows and the last, evenly spaced."""
    every = math.ceil(len(curve) / CURVE_ROWS) or 1
    return [row for at, row in enumerate(curve, start=1) if at % every == 0 or at == len(curve)]


def point_name(settings: Mapping[str, Any]) -> str:
    """A name for people, such as `width136-l1-0.5-s0`; an encoder, init or site other than the default is in it."""
    sae, penalty = settings["sae"], settings["penalty"]
    parts = [f"width{sae['width']}"]
    if sae["architecture"] != Sae().architecture:
        parts.append(sae["architecture"])
    if (encoder := settings.get("encoder", Encoder.legacy_kinds)["name"]) != Encoder().name:
        parts.append(encoder)
    if counts(sae["architecture"]):
        parts.append(f"k{sae['k']}")
    else:
        parts.append(f"{penalty['name']}{penalty['p']:g}" if penalty["name"] == "lp" else penalty["name"])
        parts.append(f"{penalty['coefficient']:g}")
    if sae["init"] != Sae().init:
        parts.append(init_name(sae["init"], sae.get("partition")).replace(" ", "-"))
    if settings["site"]["name"] != Site().name:
        parts.append(settings["site"]["name"])
    return "-".join([*parts, f"s{settings['seed']}"])


def sweep_run(
    sweep: str,
    frame: pd.DataFrame,
    untrained: pd.DataFrame | None,
    verdicts: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> Run:
    """The run of a sweep: its tables (results, untrained starts, verdicts) and figures, and a few numbers as summary.

    config: what was run; its `factors` are the user's names of factors, which the figures have too. The id follows from
    the name alone: a sweep that was interrupted and completed is one run.
    """
    content = repr([frame.to_csv(), None if untrained is None else untrained.to_csv(), [*map(dict, verdicts)], config])
    slug = re.sub(r"[^a-zA-Z0-9_-]+", "-", sweep)[:40]

    tables = {"results": _frame_table(frame)}
    if untrained is not None:
        tables["untrained"] = _frame_table(untrained)
    if verdicts:
        # What answers stands first.
        columns = list(dict.fromkeys(["verdict", "sentence", *verdicts[0]]))
        tables["verdicts"] = _table(columns, [[row[column] for column in columns] for row in verdicts])
    return Run(
        id=f"sweep-{slug}-{_digest(sweep)}",
        fingerprint=_digest(content),
        name=sweep,
        job_type="sweep",
        config={**config, "sweep": sweep},
        history=(),
        summary=_sweep_summary(frame),
        media=tables | _figures(frame, frame.iloc[:0] if untrained is None else untrained, FactorNames.of(config)),
    )


def _sweep_summary(frame: pd.DataFrame) -> dict[str, Any]:
    """Numbers to compare sweeps by; null where nothing was measured."""
    counts = ("owned_maxes", "splits_per_max", "distinct_splits_per_max", "duplicates_per_max")
    best = {"fvu": "lowest", "l0": "lowest", **dict.fromkeys(counts, "most")}
    how = {"lowest": "min", "most": "max"}
    values = {
        f"{word}_{key(column)}": _plain(frame[column].astype(float).agg(how[word])) for column, word in best.items()
    }
    return {"points": len(frame), "points_on_front": int(frame["on_front"].astype(float).sum()), **values}


def _figures(frame: pd.DataFrame, untrained: pd.DataFrame, names: FactorNames) -> dict[str, Any]:
    """The figures of the report page, but for those that need records."""
    from sae_sweep.reports.figures import FIGURES
    from sae_sweep.reports.material import Finished

    finished = Finished(frame, untrained)
    tables = {figure: figure.table(finished) for figure in FIGURES} if len(frame) else {}
    drawn = {figure.key: names.figure(figure.draw(table)) for figure, table in tables.items() if len(table)}
    return {f"{FIGURE}/{name}": {"figure": json.loads(figure.to_json())} for name, figure in drawn.items()}


def _frame_table(frame: pd.DataFrame) -> dict[str, Any]:
    return _table([*frame.columns], frame.astype(object).where(frame.notna(), None).to_numpy().tolist())


def _table(columns: Sequence[Any], rows: Rows) -> dict[str, Any]:
    return {"columns": [str(name) for name in columns], "rows": [[_plain(value) for value in row] for row in rows]}


def _plain(value: Any) -> Any:
    """A value that W&B takes as it is: not-a-number and infinite become null, NumPy's scalars Python's own."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
