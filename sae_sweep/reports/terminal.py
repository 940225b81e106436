"""What a run says when it ends: the verdicts, the rows that matter and where the rest lies; or all of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, RenderableType
from rich.text import Text

from sae_sweep.config.calibration import chosen
from sae_sweep.config.columns import LABELS
from sae_sweep.config.settings import init_name
from sae_sweep.reports.charts import front_charts
from sae_sweep.reports.claims import Verdict, least_accuracy, lowest_accuracy, share_still_moving
from sae_sweep.reports.factor_names import FactorNames
from sae_sweep.reports.figure_data import choices
from sae_sweep.reports.fronts import LINE, compare, lines, unmoved, within
from sae_sweep.reports.layout import Block, Row, bar, columns, count, write
from sae_sweep.reports.material import Material
from sae_sweep.reports.results_table import (
    MOST_BEST,
    best_rows,
    context,
    context_words,
    init_words,
    penalty_name,
    representatives,
    results_table,
    seeds_note,
    telling,
)
from sae_sweep.reports.sentences import percent, toy_warning

_FACTORS = {"query": "q", "runner-up": "n", "copies": "c"}
_MARKS = {"supported": ("✓", "green"), "not supported": ("✗", "red"), "undecided": ("?", "yellow")}
_MOST_FAILURES = 5
_CLAIMS = "Claims, at thresholds set beforehand"
# Lines of the short report.
MOST_LINES = 50
# Of a bar at least, and what the numbers and names beside four bars take, in letters.
_BAR, _NUMBERS_BESIDE = 4, 48


def show(console: Console, material: Material, directory: Path | None) -> None:
    """Print the answer of a sweep in at most MOST_LINES lines: verdicts, the rows that matter, where the rest lies.

    directory: the sweep's folder; None where several sweeps are shown together.
    """
    frame, names = telling(material.finished.results), FactorNames.of(material.info)
    head = _headline(frame, material.info, material.failures)
    end = _whereabouts(directory, full=False) if directory else []
    table: list[RenderableType] = []
    if len(frame):
        title, note = "The rows that matter", Text(names.say(_rows_note(frame)), "dim")
        table = [_heading(title), best_rows(frame, console.width, names), note]
    left = MOST_LINES - sum(len(console.render_lines(part)) for part in (head, *table, *end))
    verdicts = _verdicts(material.verdicts, console, left)
    write(console, head, *verdicts, *table, *end)


def show_all(console: Console, material: Material, directory: Path | None) -> None:
    """Print the whole report of a sweep to `console` (see `layout.console`)."""
    info, untrained = material.info, material.finished.untrained
    frame, names = telling(material.finished.results), FactorNames.of(info)
    parts: list[RenderableType] = [_headline(frame, info, material.failures)]
    if material.verdicts:
        parts += [_heading(_CLAIMS), *map(_claim, material.verdicts)]
    if len(frame):
        parts += _results(frame, untrained, console.width, names)
        charts = front_charts(frame, console.width)
        parts += (
            [_heading("The front: reconstruction against sparsity, lower left is better"), charts] if charts else []
        )
        parts += _fronts(frame, console.width) + _chosen(info)
        # A toy whose features are independent of each other has no maxima to split.
        if frame["label_m"].notna().any():
            parts += _splits(frame, untrained, console.width, names)
    write(console, *parts, *(_whereabouts(directory, full=True) if directory else []))


def _verdicts(verdicts: Sequence[Verdict], console: Console, room: int) -> list[RenderableType]:
    """The verdicts in at most `room` lines: whole sentences, or else a line each, or else as many as fit."""
    if not verdicts:
        return []
    heading = _heading(_CLAIMS)
    room -= len(console.render_lines(heading))
    whole = [_claim(verdict) for verdict in verdicts]
    if sum(len(console.render_lines(each)) for each in whole) <= room:
        return [heading, *whole]
    lines = [Text(each.plain, no_wrap=True, overflow="ellipsis") for each in whole]
    for line in lines:
        line.truncate(console.width, overflow="ellipsis")
    if len(lines) > room:
        lines = [*lines[: room - 1], Text(f"… and {len(lines) - room + 1} more: --full", "dim")]
    return [heading, *lines]


def _rows_note(frame: pd.DataFrame) -> str:
    """How the rows were chosen."""
    chosen = representatives(frame)
    note = f"Each at its coefficient (or k) of the lowest FVU × max(L0, 1), {seeds_note(chosen['n'])}. "
    if len(chosen) > MOST_BEST:
        note = f"The best {MOST_BEST} of {len(chosen)}, of each width and init in turn. {note}"
    return note + "Splits: live latents labelled finer than their maximum; distinct: of one class once."


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold magenta")


def _headline(frame: pd.DataFrame, info: Mapping[str, Any], failures: Mapping[str, Mapping[str, Any]]) -> Text:
    text = Text()
    text.append(str(info.get("name", "sweep")), style="bold")
    total = info.get("points", len(frame))
    parts = [f"{len(frame)} of {total} points finished"]
    given = [column for column in ("toy", "site", "distribution") if frame[column].notna().all()]
    shared = [column for column in given if frame[column].nunique() == 1]
    parts += [str(frame[column].iloc[0]) for column in shared]
    parts += filter(None, [FactorNames.of(info).legend])
    moving = share_still_moving(frame)
    parts += [f"{moving:.0%} would still lose more than 2% of their loss in twice the steps"] if moving else []
    accuracy = lowest_accuracy(frame)
    parts += [] if accuracy is None else [f"toy right on {percent(accuracy)}"]
    text.append("  " + " · ".join(parts))
    if warning := toy_warning(accuracy, least_accuracy(info)):
        text.append(f"\n! {warning}", style="yellow")
    if failures:
        text.append(f"\n{len(failures)} failed; a rerun tries them again:", style="red")
    for id, failure in list(failures.items())[:_MOST_FAILURES]:
        text.append(f"\n  {id}  {failure.get('reason', 'no reason was noted')}")
    if len(failures) > _MOST_FAILURES:
        text.append(f"\n  … and {len(failures) - _MOST_FAILURES} more")
    return text


def _results(frame: pd.DataFrame, untrained: pd.DataFrame, width: int, names: FactorNames) -> list[RenderableType]:
    known = context(frame)
    others = [key for key in choices(frame) if key not in known]
    note = (
        f"Each row at the {', '.join(['coefficient (or k)', *others])} of the lowest FVU × max(L0, 1), "
        f"{seeds_note(representatives(frame)['n'])}. Splits: live latents labelled finer than their max; "
        "distinct: those of one class counted once; dupl.: further latents for a whole max"
    )
    gap = "; oracle gap: loss above the best oracle init's" if frame["oracle_gap"].notna().any() else ""
    table = results_table(frame, untrained, width, names)
    return [_heading("Results by width, init and penalty"), table, Text(names.say(f"{note}{gap}."), "dim")]


def _fronts(frame: pd.DataFrame, width: int) -> list[RenderableType]:
    """Fronts of one width and init against the first of them, and coefficients that do nothing.

    A single setting is no front.
    """
    found, keys = compare(frame), [*context(frame), "width", "init", "partition"]
    blocks = []
    for _, group in found.groupby(within(frame), dropna=False, sort=False) if len(found) else ():
        if len(group) > 1 and group["settings"].max() > 1:
            row = group.iloc[0]
            title = " · ".join([f"width {row['width']}", init_words(row), *context_words(row, keys[:-3])])
            # What sets apart lines of one penalty.
            apart = [key for key in lines(frame) if key not in LINE] if group.duplicated(list(LINE)).any() else []
            blocks.append(Block(title, [Row(_front_cells(line, apart)) for _, line in group.iterrows()]))
    warnings = [Text(f"! {line}", "yellow") for line in unmoved(frame)]
    if not blocks:
        return [*warnings]
    heads = ["penalty", "hyper-\nvolume", "\n95% of seeds", "FVU, times\nthe first's", "\n95% of seeds", "over\nL0"]
    note = "Means over the L0 that both fronts reach; hypervolume in decades of L0 times decades of FVU."
    return [_heading("Fronts compared"), columns(heads, blocks, width), Text(note, "dim"), *warnings]


def _chosen(info: Mapping[str, Any]) -> list[RenderableType]:
    """The coefficients that were chosen by trial."""
    lines = chosen(info)
    if not lines:
        return []
    low, high = info["calibration"]["l0_range"]
    parts: list[RenderableType] = [_heading(f"Coefficients chosen for L0 {low:g} to {high:g}")]
    for line in lines:
        parts += [Text(line.sentence), *([Text(f"! {line.warning}", "yellow")] if line.warning else [])]
    return parts


def _front_cells(line: pd.Series, apart: list[str]) -> list[str]:
    def interval(low: float, high: float) -> str:
        return f"{low:.2f} to {high:.2f}" if pd.notna(low) else "–"

    times = [10 ** float(line[name]) if pd.notna(line[name]) else np.nan for name in ("gap", "gap_low", "gap_high")]
    volume = interval(line["hypervolume_low"], line["hypervolume_high"])
    reached = f"{line['l0_low']:.2g}–{line['l0_high']:.2g}" if pd.notna(times[0]) else "none shared"
    shown = f"{times[0]:.2f}" if pd.notna(times[0]) else "–"
    name = " ".join([penalty_name(line), *(f"{key.partition('.')[2]}={line[key]:g}" for key in apart)])
    return [name, f"{line['hypervolume']:.2f}", volume, shown, interval(*times[1:]), reached]


def _splits(frame: pd.DataFrame, untrained: pd.DataFrame, width: int, names: FactorNames) -> list[RenderableType]:
    """By which factor latents split at the widest width: counts, information, and a sentence for each init."""
    keys = [*context(frame), "init", "partition"]
    widest = frame[frame["width"] == frame["width"].max()]
    inits = {
        _init(rows.iloc[0], keys): (_numbers(rows), _numbers(untrained[untrained["point_id"].isin(rows["point_id"])]))
        for _, rows in widest.groupby(keys, dropna=False, sort=False)
    }
    most = max(value for pair in inits.values() for counts, _ in pair for value in counts.values())
    longest = max(map(len, inits))
    # A name that would take the bars' room is a line of its own.
    apart = longest > width - 4 * _BAR - _NUMBERS_BESIDE
    cells = max(_BAR, min(20, (width - (0 if apart else longest) - _NUMBERS_BESIDE) // 4))
    blocks = []
    for name, (trained, before) in inits.items():
        rows = [
            Row(_split_cells("trained" if apart else name, trained, most, cells)),
            Row(_split_cells("  untrained", before, most, cells), "dim"),
        ]
        blocks.append(Block(name if apart else "", rows))
    heads = ["init", *(f"{factor}\nlabelled" for factor in (*_FACTORS, "max only")), "explained\nq", "\nn", "\nc"]
    note = (
        "Labelled: live latents whose label is a maximum with this factor (max only: a whole maximum). "
        "Explained: how much of the factor the top latent explains, beyond chance."
    )
    told = {name: names.say(_which(counts)) for name, ((counts, _), _) in inits.items()}
    sentences = [Text(f"Init {name}: {said}.") for name, said in told.items()]
    title = f"Which factor do latents split by? Width {frame['width'].max()}, mean over {len(widest)} points"
    table = columns(list(map(names.say, heads)), blocks, width)
    return [_heading(title), table, Text(names.say(note), "dim"), *sentences]


def _init(row: pd.Series, keys: list[str]) -> str:
    return ", ".join([init_name(row["init"], row["partition"]), *context_words(row, keys[:-2])])


def _numbers(rows: pd.DataFrame) -> tuple[dict[str, float], list[float]]:
    """Mean counts of latents by what their label names beside the max, and the mean information on each factor."""
    labels = [f"label_{label}" for label in LABELS if label.startswith("m")]
    counts = {}
    for factor, letter in _FACTORS.items():
        named = [label for label in labels if letter in label.removeprefix("label_")]
        counts[factor] = float(rows[named].sum(axis=1).mean())
    counts["max only"] = float(rows["label_m"].fillna(0).mean())
    return counts, [rows[f"info_{name}"].mean() for name in ("query", "runner_up", "copies")]


def _split_cells(name: str, numbers: tuple[dict[str, float], list[float]], most: float, cells: int) -> list[str]:
    counts, explained = numbers
    bars = [f"{bar(value, most, cells)} {count(round(value, 1)):>4}" for value in counts.values()]
    return [name, *bars, *("–" if pd.isna(value) else f"{max(value, 0):.0%}" for value in explained)]


def _which(counts: Mapping[str, float]) -> str:
    """The answer in words."""
    first, second = sorted(_FACTORS, key=lambda factor: -counts[factor])[:2]
    numbers = {factor: count(round(value, 1)) for factor, value in counts.items()}
    whole = f"{numbers['max only']} stand for a whole max"
    if counts[first] < 1:
        return f"latents do not split; {whole}"
    if numbers[first] == numbers[second]:
        return f"as many latents split by the {first} as by the {second}, {numbers[first]}; {whole}"
    more = f"{numbers[first]} of them against {numbers[second]} by the {second}"
    return f"latents split by the {first} most, {more}; {whole}"


def _claim(verdict: Verdict) -> Text:
    mark, colour = _MARKS[verdict.verdict]
    text = Text(f"{mark} ", style=f"bold {colour}")
    text.append(verdict.sentence, style="not bold default")
    return text


def _whereabouts(directory: Path, full: bool) -> list[RenderableType]:
    root = directory.parents[1]
    elsewhere = "" if root == Path("outputs") else f", {str(root)!r}"
    code = f"  from sae_sweep import load_sweep\n  df = load_sweep({directory.name!r}{elsewhere})"
    option = [] if root == Path("outputs") else ["--output-dir", str(root)]
    command = shlex.join(["sae-sweep", "report", directory.name, *option])
    page = directory / "report.html"
    lines = [
        f"{directory}/  results.parquet, untrained.parquet, sweep.yaml",
        f"{root / 'points'}/  every SAE, by point_id; sae-sweep inspect POINT shows its latents",
        f"{page}  figures, latents to browse" if page.exists() else f"{command}  makes report.html: figures, latents",
    ]
    lines += [] if full else [f"{command} --full  every width and init, fronts, labels"]
    # Never wrapped: paths and code are there to be copied.
    text = "\n".join([*lines, code])
    return [_heading("Where it lies"), Text(text, no_wrap=True, overflow="ignore")]
