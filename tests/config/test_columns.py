"""The columns of the results table: in the order in which they came, each declared once and described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sae_sweep.config import columns
from sae_sweep.registry import kinds


def test_columns_stand_where_they_stood() -> None:
    """Whoever adds a column adds it behind these, so that a table read by place stays what it was."""
    before = Path(__file__).with_name("columns.txt").read_text().split()
    found = list(columns.table_columns())
    assert found[: len(before)] == before
    assert found[len(before) :] == sorted(found[len(before) :])


def test_each_column_is_declared_once_and_described() -> None:
    declared = [(name, column) for metric in kinds("metric").values() for name, column in metric.columns.items()]
    names = [name for name, _ in [*declared, *columns.BESIDE.items()]]
    assert len(names) == len(set(names)) == len(columns.metric_columns())
    for name, column in columns.metric_columns().items():
        assert column.description and column.kind in ("float64", "Int64"), name


def test_nulls_are_named_after_what_they_are_nulls_of() -> None:
    assert columns.shuffled("splits_per_max") == "shuffled_splits_per_max"
    assert columns.spread("splits_per_max") == "shuffled_splits_per_max_sd"
    assert columns.shuffled("structure_cosine") == "structure_cosine_null"
    nulls = [name for name in columns.metric_columns() if name.startswith("shuffled_") and not name.endswith("_sd")]
    assert all({name.removeprefix("shuffled_"), f"{name}_sd"} <= set(columns.metric_columns()) for name in nulls)


def test_a_sentence_calls_a_column_by_its_phrase_or_else_its_name() -> None:
    assert columns.phrase("splits_per_max") == "number of splits per max"
    assert columns.phrase("oracle_gap") == "loss above the best oracle init"
    assert [columns.phrase(name) for name in ("mcc", "width")] == ["mcc", "width"]


def test_declarations_import_nothing_heavy() -> None:
    code = "import sys; from sae_sweep.config.columns import table_columns; table_columns(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numba", "sympy", "scipy", "pandas", "numpy"} & set(loaded)
