"""Writes what finished sweeps found into the pages that have a block for it: python scripts/results.py EXPERIMENT ...

The questions and what is made of the answers are written by hand; between `<!-- NAME -->` and `<!-- end -->` stands
what the program says of the sweep NAME: command, hardware, versions and verdicts. Every setting of it, with means and
standard deviations over toys and seeds, goes to docs/results/NAME.csv.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sae_sweep.config.columns import is_seed, is_setting
from sae_sweep.config.settings import MEASURE_VERSION, TRAIN_VERSION
from sae_sweep.reports.claims import Verdict, evaluate_all
from sae_sweep.reports.layout import plural
from sae_sweep.reports.sentences import number
from sae_sweep.store import results as frame
from sae_sweep.store.plateau import STILL_MOVING
from sae_sweep.store.store import Store

DOCS = Path(__file__).parents[1] / "docs"
PAGES = "results.md", "recipes.md", "paper.md"
# What the table of every sweep shows of a setting, beside what its claims measure.
MEASURES = (
    *("loss", "fvu", "l0", "live_latents", "owned_maxes", "distinct_splits_per_max", "duplicates_per_max"),
    *("label_mq", "found_mq", "found_mc", "found_mn", "found_mqnc", "plateau", "seconds"),
)


def main() -> None:
    """Rewrite the blocks and tables of the sweeps asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    store = Store(arguments.output_dir)
    for name in arguments.experiments:
        info = frame.sweep_info(store, name)
        results, untrained = frame.tables(store, name)
        if len(results) < info["points"]:
            raise SystemExit(f"{name}: {len(results)} of {info['points']} points are finished")
        page = next(page for page in (DOCS / each for each in PAGES) if f"<!-- {name} -->" in page.read_text())
        text = page.read_text()
        before, _, after = re.split(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- end -->)", text, maxsplit=1, flags=re.S)
        verdicts = evaluate_all(info, results, untrained)
        page.write_text(before + block(name, results, verdicts, hardware(store, results)) + after)
        every_setting(results, untrained, info["claims"]).to_csv(DOCS / "results" / f"{name}.csv", index=False)


def block(name: str, results: pd.DataFrame, verdicts: list[Verdict], machine: str) -> str:
    """What the program says of a finished sweep."""
    toys, minutes = results["toy_seed"].nunique(), results["seconds"].sum() / 60
    moving = (results["plateau"].dropna() > STILL_MOVING).mean()
    return "\n".join(
        [
            f"`sae-sweep run experiment={name}`: {plural(len(results), 'SAE')} over {plural(toys, 'toy')}, "
            f"{minutes:.0f} minutes on {machine}; training and measuring versions {TRAIN_VERSION} and "
            f"{MEASURE_VERSION}. Twice the steps would lower the loss of {moving:.0%} by more than 2%. "
            f"[Every setting](results/{name}.csv).\n",
            "| prediction | verdict | value | 95% interval | untrained | labels shuffled |",
            "|---|---|---|---|---|---|",
            *map(row, verdicts),
            "",
        ]
    )


def row(verdict: Verdict) -> str:
    """The row of a claim."""
    prediction = verdict.sentence.partition(f": {verdict.verdict}, ")[0]
    span = " to ".join(map(number, verdict.interval or (None, None)))
    nulls = number(verdict.untrained), number(verdict.shuffled)
    # Where the claim asks for more: a ladder that does not reach the level has no value.
    short = re.search(r"on (\d+ toys? × \d+ seeds?) where the claim asks", verdict.sentence)
    said = f"**{verdict.verdict}**" + (f", on {short[1]}" if short else "")
    return f"| {' | '.join([prediction, said, number(verdict.value), span, *nulls])} |"


def every_setting(results: pd.DataFrame, untrained: pd.DataFrame, claims: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row per setting: what tells it apart, how many SAEs, and of each measure mean and standard deviation; of shares
    found the mean of the untrained SAEs too."""
    means = frame.aggregate(results, "mean")
    shares = [m for m in map(str, results.columns) if m.startswith("found_") and untrained[m].notna().any()]
    before = untrained.set_index("point_id")[shares].reindex(results["point_id"])
    nulls = frame.aggregate(results.assign(**{m: before[m].to_numpy() for m in shares}), "mean")
    settings = [
        column
        for column in map(str, means.columns)
        if is_setting(column) and not is_seed(column) and means[column].nunique(dropna=False) > 1
    ]
    claimed = (column for claim in claims for column in claim["measure"].split(" - "))
    measures = [m for m in dict.fromkeys((*MEASURES, *claimed)) if means[m].notna().any()]
    table = means[[*settings, "n", *(each for measure in measures for each in (measure, f"{measure}_std"))]]
    return table.assign(**{f"{m}_untrained": nulls[m] for m in shares if m in measures}).map(rounded)


def rounded(value: Any) -> Any:
    """Four digits of a fraction; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def hardware(store: Store, results: pd.DataFrame) -> str:
    """The device that the records name, and the cores at hand."""
    device = store.read_record("points", results["point_id"][0])["provenance"]["device"]
    is_cpu = device in (platform.machine(), platform.processor())
    return f"{os.cpu_count()} cores ({device}), no GPU" if is_cpu else device


if __name__ == "__main__":
    main()
