"""Writes what finished sweeps found into docs/results.md: python scripts/results.py EXPERIMENT ...

The questions and what is made of the answers are written by hand; between `<!-- NAME -->` and `<!-- end -->` stands
what the program says of the sweep NAME: command, hardware, verdicts, and the medians over seeds that they rest on.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from pathlib import Path

import pandas as pd

from sae_sweep.reports.claims import Verdict, evaluate_all
from sae_sweep.reports.sentences import number
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
# What tells the rows of a sweep's table apart, and what is shown of them.
TABLES: dict[str, tuple[list[str], list[str]]] = {
    "one_per_max": (
        ["site", "distribution", "init", "architecture", "penalty", "coefficient"],
        ["owned_maxes", "l0", "fvu"],
    ),
    "one_per_max_paper": (
        ["site", "distribution", "toy.distribution", "init", "architecture", "penalty", "coefficient"],
        ["owned_maxes", "l0", "fvu"],
    ),
    "splitting": (
        ["site", "penalty", "init", "width"],
        [
            "splits_per_max",
            "distinct_splits_per_max",
            "duplicates_per_max",
            "unique_query",
            "unique_runner_up",
            "unique_copies",
            "l0",
            "fvu",
        ],
    ),
    "distributions": (
        ["site", "distribution", "penalty"],
        ["splits_per_max", "unique_query", "unique_runner_up", "unique_copies", "fvu"],
    ),
    "lp_versus_l1": (
        ["init", "penalty", "penalty_p", "coefficient"],
        ["fvu", "l0", "live_latents", "owned_maxes", "splits_per_max", "gradient_late", "gradient_spike"],
    ),
    "oracle": (
        ["penalty", "coefficient", "init", "partition"],
        ["loss", "oracle_gap", "fvu", "l0", "splits_per_max"],
    ),
    "objective": (["penalty", "coefficient", "partition"], ["loss", "fvu", "l0", "distinct_splits_per_max"]),
    "optimiser": (
        ["penalty", "init", "training.lr", "training.coefficient_warmup", "steps"],
        ["loss", "fvu", "l0", "distinct_splits_per_max", "duplicates_per_max"],
    ),
    "convergence": (
        ["architecture", "penalty", "coefficient", "init"],
        ["loss", "fvu", "l0", "live_latents", "owned_maxes", "distinct_splits_per_max", "duplicates_per_max"],
    ),
    "priors": (["toy", "toy.magnitudes", "penalty", "coefficient"], ["mcc", "found_features", "l0", "fvu"]),
    "phase_diagram": (
        ["penalty", "width", "coefficient"],
        ["label_m", "label_q", "label_mq", "live_latents", "l0", "fvu"],
    ),
    "structure": (
        ["toy", "toy.interaction", "toy.magnitudes", "penalty", "init", "partition"],
        [
            *("label_mq", "structure_parent", "structure_modifier", "structure_interaction", "structure_cosine"),
            *("structure_cosine_null", "structure_semi_nmf", "structure_semi_nmf_null", "structure_meta_sae"),
            *("structure_meta_sae_null", "loss", "l0", "fvu"),
        ],
    ),
    "manifold": (["init", "toy.spread", "width"], ["l0", "fvu", "mcc", "found_features", "live_latents"]),
    "pareto": (["architecture", "k", "penalty", "penalty_p", "coefficient"], ["fvu", "l0", "splits_per_max"]),
}


def main() -> None:
    """Rewrite the blocks of the sweeps asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="+", choices=list(TABLES), metavar="EXPERIMENT")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    text = PAGE.read_text()
    for name in arguments.experiments:
        before, _, after = re.split(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- end -->)", text, maxsplit=1, flags=re.S)
        text = before + block(Store(arguments.output_dir), name) + after
    PAGE.write_text(text)


def block(store: Store, name: str) -> str:
    """What the program says of a finished sweep."""
    info = frame.sweep_info(store, name)
    results, untrained = frame.tables(store, name)
    if len(results) < info["points"]:
        raise SystemExit(f"{name}: {len(results)} of {info['points']} points are finished")
    seeds = results["toy_seed"].nunique() * results["seed"].nunique()
    return "\n".join(
        [
            f"`sae-sweep run experiment={name}`: {len(results)} SAEs, {results['seconds'].sum() / 60:.1f} minutes of "
            f"training and measuring on {hardware(store, results)}. Medians over {seeds} seeds, and their range.\n",
            verdicts(evaluate_all(info, results, untrained)),
            "<details><summary>Every setting</summary>\n",
            table(results, *TABLES[name]),
            "\n</details>\n",
        ]
    )


def verdicts(found: list[Verdict]) -> str:
    """A row per claim."""
    rows = [
        "| prediction | verdict | value | 95% interval | untrained | labels shuffled |",
        "|---|---|---|---|---|---|",
    ]
    for verdict in found:
        prediction = verdict.sentence.partition(f": {verdict.verdict}, ")[0]
        span = " to ".join(map(number, verdict.interval or (None, None)))
        nulls = number(verdict.untrained), number(verdict.shuffled)
        rows.append(f"| {' | '.join([prediction, f'**{verdict.verdict}**', number(verdict.value), span, *nulls])} |")
    return "\n".join(rows) + "\n"


def table(results: pd.DataFrame, settings: list[str], measures: list[str]) -> str:
    """Medians and ranges over seeds of `measures`, a row per setting."""
    rows = [f"| {' | '.join([*settings, *measures])} |", "|" + "---|" * (len(settings) + len(measures))]
    for values, group in results.groupby(settings, dropna=False, sort=False):
        said = ["–" if pd.isna(value) else str(value) for value in values]
        for measure in measures:
            column = group[measure].astype("float64").dropna()
            if column.empty:
                said.append("–")
                continue
            span = number(column.min()), number(column.max())
            said.append(number(column.median()) + (f" ({span[0]}–{span[1]})" if span[0] != span[1] else ""))
        rows.append(f"| {' | '.join(said)} |")
    return "\n".join(rows)


def hardware(store: Store, results: pd.DataFrame) -> str:
    """The device that the records name, and the cores at hand."""
    device = store.read_record("points", results["point_id"][0])["provenance"]["device"]
    is_cpu = device in (platform.machine(), platform.processor())
    return f"{os.cpu_count()} cores ({device}), no GPU" if is_cpu else device


if __name__ == "__main__":
    main()
