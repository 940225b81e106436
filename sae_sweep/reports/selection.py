"""What `results` and `inspect` show of a table: which rows, in which order, and the columns that vary and matter."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

import pandas as pd
from rich.text import Text

from sae_sweep.config.columns import COLUMN_OF, SETTINGS, is_setting
from sae_sweep.config.keys import nearest
from sae_sweep.errors import UserError
from sae_sweep.reports.layout import Block, Row, columns

# Columns of a table that names none.
MOST = 12
# Of metrics, the first are shown first.
_METRICS = (
    *("l0", "fvu", "owned_maxes", "splits_per_max", "distinct_splits_per_max", "duplicates_per_max", "dead_latents"),
    *("mcc", "found_features", "feature_f1", "label_mq", "label_mn", "label_mc", "info_query", "loss", "oracle_gap"),
)
_LEAST_METRICS = 4
# Settings that others may follow from.
_LEADING = ("toy", "architecture", "init", "width", "penalty")
_COMPARISONS = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def where(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """The rows that meet all conditions, such as `width=16,136`, `penalty!=l1` or `fvu<0.1`.

    UserError: it is no condition, or there is no such column. A null meets `=` alone, written `init=null`.
    """
    for text in conditions:
        match = re.fullmatch(r"([\w.]+)\s*(!=|<=|>=|=|<|>)\s*(.+)", text.strip())
        if match is None:
            raise UserError(f"--where {text}: expected a column, one of = != < <= > >=, and a value, as width=16")
        column, sign, wanted = column_named(table, match[1], "--where"), match[2], match[3].split(",")
        values = table[column]
        if sign in ("=", "!="):
            kept = pd.concat([_equal(values, each) for each in wanted], axis=1).any(axis=1)
            table = table[kept if sign == "=" else ~kept]
            continue
        try:
            bound = float(match[3])
        except ValueError:
            raise UserError(f"--where {text}: {sign} compares with a number") from None
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        table = table[_COMPARISONS[sign](numbers, bound)]
    return table


def _equal(values: pd.Series, wanted: str) -> pd.Series:
    if wanted == "null":
        return values.isna()
    try:
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        return numbers == float(wanted)
    except ValueError:
        return (values.astype("string") == wanted).fillna(False).astype(bool)


def ordered(table: pd.DataFrame, by: str | None, top: int | None = None) -> pd.DataFrame:
    """The rows by a column, from the largest down where its name has a minus before it; the first `top` of them."""
    if by is not None:
        column = column_named(table, by.removeprefix("-"), "--sort")
        table = table.sort_values(column, ascending=not by.startswith("-"), kind="stable")
    return table if top is None else table.head(top)


def column_named(table: pd.DataFrame, name: str, option: str) -> str:
    """A column by its name, or by the key that sets it. UserError names the nearest."""
    for each in (name, COLUMN_OF.get(name)):
        if each in table:
            return str(each)
    raise UserError(f"{option} {name}: there is no such column{nearest(name, map(str, table))}")


def named(table: pd.DataFrame, names: str) -> pd.DataFrame:
    """The columns of a list with commas; all of them for `all`."""
    if names == "all":
        return table
    return table[[column_named(table, name.strip(), "--columns") for name in names.split(",")]]


def telling(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that vary and matter, MOST at the most: the point, settings that vary, then metrics."""
    varying = [str(name) for name in table if table[name].nunique(dropna=False) > 1] if len(table) > 1 else [*table]
    # A dotted key that has a column of its own would be there twice.
    settings = [name for name in varying if is_setting(name) and (name in SETTINGS or name not in COLUMN_OF)]
    settings = [name for name in (*SETTINGS, *settings) if name in settings]
    metrics = [name for name in _METRICS if name in varying and table[name].notna().any()]
    first = [name for name in ("sweep", "point_id") if name in table]
    settings = [name for name in settings if not _follows(table, name)][: MOST - len(first) - _LEAST_METRICS]
    count = [name for name in ("n",) if name in table]
    return table[list(dict.fromkeys([*first, *settings, *count, *metrics]))[:MOST]]


def _follows(table: pd.DataFrame, name: str) -> bool:
    """Whether a setting says nothing beside another that it follows from, as steps may from the width."""
    others = [other for other in _LEADING if other != name and other in table]
    return name not in _LEADING and any(
        table.groupby(other, dropna=False)[name].nunique(dropna=False).max() == 1 for other in others
    )


def as_text(table: pd.DataFrame, width: int) -> tuple[Text, list[str]]:
    """The table in at most `width` letters, and the names of the columns that it has no room for."""
    cells = {str(name): [_cell(str(name), value) for value in table[name]] for name in table}
    heads = {name: _broken(name, max(map(len, values), default=0)) for name, values in cells.items()}
    shown: list[str] = []
    room = width
    for name, values in cells.items():
        needs = max(len(line) for line in (*heads[name].split("\n"), *values)) + (2 if shown else 0)
        if needs <= room:
            shown.append(name)
            room -= needs
    rows = [Row(list(row)) for row in zip(*(cells[name] for name in shown), strict=True)]
    text = columns([heads[name] for name in shown], [Block("", rows)], width)
    return text, [name for name in cells if name not in shown]


def _cell(name: str, value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "–"
    if name == "point_id":
        return str(value)[:8]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _broken(name: str, least: int) -> str:
    """The name of a column in lines no longer than its longest word or cell."""
    words = name.replace("_", " ").split(" ")
    longest, lines = max(least, *map(len, words)), [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) <= longest:
            lines[-1] += f"_{word}"
        else:
            lines[-1] += "_"
            lines.append(word)
    return "\n".join(lines)
