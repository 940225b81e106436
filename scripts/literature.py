"""Writes the table of docs/literature.md from finished sweeps: python scripts/literature.py EXPERIMENT ...

A row for each claim of the presets that hold published numbers. What is made of them is written by hand around it; rows
of presets that are not named stay as they are.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from results import hardware

from sae_sweep.reports.claims import evaluate_all
from sae_sweep.reports.sentences import number, predicted
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store

PAGE = Path(__file__).parents[1] / "docs" / "literature.md"
PAPERS = {
    "published_absorption": "2409.14507",
    "published_l0": "2508.16560",
    "published_small_l0": "2508.16560",
    "published_sanity": "2602.14111",
    "published_hedging": "2505.11756",
    "published_matryoshka": "noanabeshima/matryoshka-saes",
    "published_circle": "2509.02565",
    "published_bench": "2512.05534",
}
AGREES = {"supported": "yes", "not supported": "**no**", "undecided": "undecided"}


def main() -> None:
    """Rewrite the rows of the sweeps asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", choices=PAPERS)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    arguments = parser.parse_args()
    store = Store(arguments.output_dir)
    text = PAGE.read_text()
    before, table, after = re.split(r"(?<=<!-- table -->\n)(.*?)(?=<!-- end -->)", text, maxsplit=1, flags=re.S)
    head, kept = table.splitlines()[:2], table.splitlines()[2:]
    for name in arguments.experiments:
        command = f"`sae-sweep run experiment={name}`"
        place = next((i for i, row in enumerate(kept) if command in row), len(kept))
        kept = [row for row in kept if command not in row]
        kept[place:place] = rows(name, command, store)
    PAGE.write_text(before + "\n".join([*head, *kept, ""]) + after)


def rows(name: str, command: str, store: Store) -> Iterator[str]:
    """A row for each claim of the sweep that has its experiment's name, but for those without any finished point."""
    info = frame.sweep_info(store, name)
    results, untrained = frame.tables(store, name)
    minutes = f"{results['seconds'].sum() / 60:.1f}"
    for claim, verdict in zip(info["claims"], evaluate_all(info, results, untrained), strict=True):
        if verdict.value is None:
            continue
        low, high = map(number, verdict.interval or (None, None))
        ours = f"{number(verdict.value)} ({low} to {high})"
        published = predicted(claim, claim.get("margin"))
        cells = [PAPERS[name], claim["prediction"], published, ours, AGREES[verdict.verdict], command, minutes]
        yield f"| {' | '.join([*cells, hardware(store, results)])} |"


if __name__ == "__main__":
    main()
