"""The compact results table: a row per penalty under each width and init, the untrained one above them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import pandas as pd
from rich.text import Text

from sae_sweep.config.columns import COLUMN_OF, LABELS, SETTINGS, is_setting
from sae_sweep.config.settings import counts, init_name
from sae_sweep.reports.factor_names import NO_NAMES, FactorNames
from sae_sweep.reports.layout import Block, Row, columns, count, fraction
from sae_sweep.store.results import aggregate

# More rows than this are for `sae-sweep results`.
MOST_ROWS = 80
# Rows of the short report.
MOST_BEST = 10
# Letters of a penalty's name there at least, and of what stands beside it.
_LEAST_NAME, _BESIDE = 8, 67
_INIT = ["width", "init", "partition"]
_PENALTY = ["architecture", "penalty", "penalty_p", "penalty_scale"]
_LADDER = ["coefficient", "k"]
# The widths from which the table has room for a column per label, and for the spread over seeds.
_LABELS_APART, _SPREAD = 110, 150
# Fine labels last, in the order in which a whole max breaks up.
_LABEL_ORDER = ("m", "mq", "mn", "mc", "mqn", "mqc", "mnc", "mqnc", "q", "n", "c")


def context(frame: pd.DataFrame) -> list[str]:
    """The columns beside width and init that set sections apart because this sweep varies them."""
    swept = [
        column
        for column in frame.columns
        # The kind of toy is told by the column of that name.
        if column.startswith(("toy.", "distribution.")) and column not in ("toy.seed", "toy.name")
    ]
    known = {COLUMN_OF.get(column, column) for column in swept} | {"toy", "site", "distribution"}
    found = [column for column in (*SETTINGS, *swept) if column in known and frame[column].nunique() > 1]
    found = ["sweep", *found] if "sweep" in frame else found
    # What follows from the kind of toy is no choice of its own either.
    kinds = frame.groupby("toy", dropna=False)
    found = [column for column in found if column == "toy" or (kinds[column].nunique(dropna=False) > 1).any()]
    # Steps that follow from the width or the init are no choice of their own.
    chosen = frame.groupby(_INIT, dropna=False)["steps"].nunique()
    return [*found, "steps"] if (chosen > 1).any() else found


def context_words(row: pd.Series, keys: list[str]) -> list[str]:
    """The values of those columns, named where the value alone would not say what it is; a null says nothing."""
    return [_word(key, row[key]) for key in keys if pd.notna(row[key])]


def _word(key: str, value: Any) -> str:
    shown = value if isinstance(value, str) else f"{value:g}"
    return shown if key in ("sweep", "toy", "site", "distribution") else f"{key.rpartition('.')[2]}={shown}"


def choice_word(column: str, value: Any) -> str:
    """A setting's value in a word: a kind by its name, a number with that of its column; what is not says nothing."""
    if pd.isna(value) or value == "none":
        return ""
    return value if isinstance(value, str) else f"{column.rpartition('.')[2].removesuffix('_seed')}={value:g}"


def telling(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with the keys of toys null where a kind of toy does not vary them: there they say nothing."""
    keys = [name for name in map(str, frame.columns) if name.startswith("toy.")]
    kinds = frame.groupby("toy", dropna=False)
    return frame.assign(**{key: frame[key].where(kinds[key].transform("nunique", dropna=False) > 1) for key in keys})


def representatives(frame: pd.DataFrame) -> pd.DataFrame:
    """For each width, init and penalty the setting (coefficient, or k) with the lowest FVU × max(L0, 1), as means
    over seeds: a middle of the ladder that neither pays for many active latents nor gives reconstruction up.

    `chosen` says what else was chosen so: "resample" where other SAEs of the row's width, init and penalty were
    trained without revival.
    """
    means = aggregate(frame, "mean")
    knee = (means["fvu"] * means["l0"].clip(lower=1)).fillna(float("inf"))
    keys = [*context(frame), *_INIT, *_PENALTY]
    chosen = knee.groupby([means[key] for key in keys], dropna=False, sort=False).idxmin()
    apart = _apart(means, keys)
    varied = means.groupby(keys, dropna=False, sort=False)[apart].transform("nunique", dropna=False) > 1
    words = [
        [choice_word(key, row[key]) for key in apart if one[key]]
        for (_, row), (_, one) in zip(means.iterrows(), varied.iterrows(), strict=True)
    ]
    said = [" ".join(filter(None, each)) for each in words]
    return means.assign(chosen=said).loc[sorted(chosen)].reset_index(drop=True)


def _apart(means: pd.DataFrame, keys: list[str]) -> list[str]:
    """The settings that differ within a width, init and penalty; not those that follow from another, as a learning
    rate may from the kind of revival."""
    found: list[str] = []
    named = {*keys, *_LADDER, *COLUMN_OF}
    free = [name for name in map(str, means.columns) if is_setting(name) and name not in named and name != "point_id"]
    # Few settings have two values at all, and most groups have one.
    free = [name for name in free if means[name].nunique(dropna=False) > 1]
    for name in sorted(free, key=lambda name: pd.api.types.is_numeric_dtype(means[name])):  # kinds before numbers
        groups = means.groupby([*keys, *_LADDER, *found], dropna=False, sort=False)
        found += [name] if (groups[name].nunique(dropna=False) > 1).any() else []
    return found


def best_rows(frame: pd.DataFrame, width: int, names: FactorNames = NO_NAMES) -> Text:
    """MOST_BEST representatives at the most, a line each: the best of each width and init, then the second best, …"""
    chosen, keys = representatives(frame), context(frame)
    knee = (chosen["fvu"] * chosen["l0"].clip(lower=1)).fillna(float("inf"))
    groups = knee.groupby([chosen[key] for key in [*keys, *_INIT]], dropna=False, sort=False)
    order = pd.DataFrame({"place": groups.rank(method="first"), "knee": knee, "group": groups.ngroup()})
    best = chosen.loc[order.sort_values(["place", "knee"]).head(MOST_BEST).sort_values(["group", "place"]).index]
    shown = [
        _Column("width, init", lambda row: " ".join([str(row["width"]), _init(row), *context_words(row, keys)])),
        _Column("penalty", lambda row: shorten(recipe_name(row), max(_LEAST_NAME, width - _BESIDE), placeholder="…")),
        _Column("coef-\nficient", coefficient),
        _Column("L0", _cell("l0", _two, False)),
        _Column("FVU", _cell("fvu", fraction, False)),
        _Column("owned", _cell("owned_maxes", count, False)),
        _Column("splits\nper max", _cell("splits_per_max", _two, False)),
        _Column("\ndistinct", _cell("distinct_splits_per_max", _two, False)),
        _Column("\ndupl.", _cell("duplicates_per_max", _two, False)),
        _Column("dead", _cell("dead_latents", count, False)),
    ]
    rows = [Row([column.cell(row) for column in shown]) for _, row in best.iterrows()]
    return columns([names.say(column.header) for column in shown], [Block("", rows)], width)


def results_table(frame: pd.DataFrame, untrained: pd.DataFrame, width: int, names: FactorNames = NO_NAMES) -> Text:
    """The table as text of at most `width` columns."""
    chosen = representatives(frame)
    spread = width >= _SPREAD and bool((chosen["n"] > 1).any())
    shown = _columns(frame, chosen, untrained, width, spread)
    keys = [*context(frame), *_INIT]
    blocks: list[Block] = []
    total = 0
    for _, rows in chosen.groupby(keys, dropna=False, sort=False):
        lines = _section(frame, untrained, rows, shown)
        total += len(lines)
        if total <= MOST_ROWS:
            blocks.append(Block(_title(rows.iloc[0], keys), lines))
    text = columns(
        [names.say(column.header) for column in shown], blocks, width, last_left=shown[-1].header == "labels"
    )
    if total > MOST_ROWS:
        text.append(f"\n… {total - sum(len(block.rows) for block in blocks)} more rows: sae-sweep results", style="dim")
    return text


def _init(row: pd.Series) -> str:
    return init_name(row["init"], row["partition"])


def init_words(row: pd.Series) -> str:
    """An init in words: "init kmeans", "init oracle, one latent per mq"."""
    if row["init"] == "oracle":
        return f"init oracle, one latent per {row['partition']}"
    return f"init {row['init']}"


def penalty_name(row: pd.Series) -> str:
    """What makes the code sparse, in one word or two: "l1", "lp p=.3", "log1p s=2", "topk"."""
    if counts(row["architecture"]):
        return str(row["architecture"])
    name = str(row["penalty"]) if row["architecture"] == "relu" else f"{row['architecture']} {row['penalty']}"
    if row["penalty"] == "lp":
        name += f" p={row['penalty_p']:g}"
    if pd.notna(row["penalty_scale"]) and row["penalty_scale"] != 1:
        name += f" s={row['penalty_scale']:g}"
    return name


def recipe_name(row: pd.Series) -> str:
    """The penalty of a representative, and what was chosen beside its coefficient: "topk resample"."""
    return f"{penalty_name(row)} {row['chosen']}".rstrip()


def coefficient(row: pd.Series) -> str:
    """The coefficient, or the number of active latents where that is what is set."""
    return f"k={row['k']:g}" if counts(row["architecture"]) else f"{row['coefficient']:g}"


@dataclass(frozen=True)
class _Column:
    header: str
    cell: Callable[[pd.Series], str]


def _columns(
    frame: pd.DataFrame, chosen: pd.DataFrame, untrained: pd.DataFrame, width: int, spread: bool
) -> list[_Column]:
    maxima = {toy.rsplit("-", 2)[1] for toy in frame["toy"].unique()}
    of = f"of {maxima.pop()}" if len(maxima) == 1 else "in all"
    wide = width >= _LABELS_APART
    found = [
        _Column("penalty", lambda row: row["name"]),
        _Column("coef-\nficient", lambda row: row["setting"]),
        _Column("L0", _cell("l0", _two, spread)),
        _Column("FVU", _cell("fvu", fraction, spread, "{:.4f}")),
    ]
    if frame["owned_maxes"].notna().any():
        found.append(_Column(f"owned\n{of}", _cell("owned_maxes", count, spread)))
        found.append(_Column("splits\n/ max", _cell("splits_per_max", _two, spread)))
        if frame["distinct_splits_per_max"].notna().any():
            found.append(_Column("dis-\ntinct", _cell("distinct_splits_per_max", _two, spread)))
        found.append(_Column("dupl.\n/ max", _cell("duplicates_per_max", _two, spread)))
    else:
        found.append(_Column(f"found\n{of}", _cell("found_features", count, spread)))
    if frame["mcc"].notna().any():
        found.append(_Column("MCC", _cell("mcc", _two, spread)))
    gap = [_Column("oracle\ngap", _cell("oracle_gap", _signed, spread))] if frame["oracle_gap"].notna().any() else []
    if not wide:
        return [*found, _Column("dead", _cell("dead_latents", count, False)), *gap, _Column("labels", _labels)]
    apart = [
        _Column(f"{'label' if i == 0 else ''}\n{label}", _cell(f"label_{label}", count, False))
        for i, label in enumerate(_present(chosen, untrained))
    ]
    live = [_Column("live", _cell("live_latents", count, False)), _Column("dead", _cell("dead_latents", count, False))]
    return [*found, *gap, *live, *apart]


def _present(*frames: pd.DataFrame) -> list[str]:
    return [label for label in _LABEL_ORDER if any((frame[f"label_{label}"].fillna(0) > 0).any() for frame in frames)]


def _section(frame: pd.DataFrame, untrained: pd.DataFrame, rows: pd.DataFrame, shown: list[_Column]) -> list[Row]:
    """The rows of one width and init: the untrained one as each architecture reads it, then one per penalty."""
    above: list[Row] = []
    lines: list[Row] = []
    for architecture, trained in rows.groupby("architecture", sort=False):
        means = _untrained_means(frame, untrained, trained)
        means["name"], means["setting"] = f"  as {architecture}" if above else "untrained", "–"
        above.append(Row([column.cell(means) for column in shown], "dim"))
        for _, row in trained.iterrows():
            named = pd.concat([row, pd.Series({"name": recipe_name(row), "setting": coefficient(row)})])
            lines.append(Row([column.cell(named) for column in shown]))
    return [*above, *lines]


def _untrained_means(frame: pd.DataFrame, untrained: pd.DataFrame, trained: pd.DataFrame) -> pd.Series:
    """The untrained SAEs of the points behind these rows, as one mean."""
    settings = [
        key for key in trained.columns if key in frame.columns and (key in _KEYS or "." in key or key == "sweep")
    ]
    behind = frame[["point_id", *settings]].merge(trained[settings], on=settings)["point_id"]
    return untrained[untrained["point_id"].isin(behind)].mean(numeric_only=True).astype(object)


_KEYS = {"sweep", *_INIT, *_PENALTY, "toy", "site", "distribution", "steps", "k", "coefficient"}


def _title(row: pd.Series, keys: list[str]) -> str:
    varied = context_words(row, [key for key in keys if key not in _INIT])
    return " · ".join([f"width {row['width']}", init_words(row), *varied])


def _cell(metric: str, show: Callable[[float], str], spread: bool, plus: str = "{:.2f}") -> Callable[[pd.Series], str]:
    """How a metric is shown: `plus` formats its spread over seeds."""

    def cell(row: pd.Series) -> str:
        value, deviation = row.get(metric), row.get(f"{metric}_std")
        if value is None or pd.isna(value):
            return "–"
        if spread and deviation is not None and pd.notna(deviation):
            return f"{show(value)} ±{plus.format(deviation).removeprefix('0')}"
        return show(value)

    return cell


def _labels(row: pd.Series) -> str:
    """The labels as one cell, the most frequent first: "61 mq, 8 m"."""
    counts = {label: row.get(f"label_{label}") for label in LABELS}
    held = {label: float(n) for label, n in counts.items() if n is not None and pd.notna(n) and n > 0}
    return ", ".join(f"{count(n)} {label}" for label, n in sorted(held.items(), key=lambda item: -item[1])) or "none"


def _two(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}"


def seeds_note(chosen: Iterable[int]) -> str:
    """How many points stand behind a row."""
    found = sorted(set(chosen)) or [0]
    if found[-1] <= 1:
        return "one SAE each"
    return f"means over {found[0]} to {found[-1]} SAEs" if len(found) > 1 else f"means over {found[0]} SAEs"
