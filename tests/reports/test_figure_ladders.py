"""Measures along ladders: their means and ranges, and how the figure lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from sae_sweep.config.columns import table_columns
from sae_sweep.reports import figure_ladders
from sae_sweep.reports.figure_data import NAMES
from sae_sweep.reports.figure_ladders import MEASURES, draw, ladder

Rows = Sequence[tuple[dict[str, Any], Sequence[float]]]


def results(rows: Rows, **measured: float) -> pd.DataFrame:
    """A results table with names: a point per row and value of MCC, with the other measures as they are given."""
    given = {"given": "", "init_name": "random", "width": 8, "architecture": "relu", "penalty_name": "l1"}
    points = [
        {**given, "k": np.nan, **names, "mcc": mcc, "repeat": str(i)} for names, of in rows for i, mcc in enumerate(of)
    ]
    table = pd.DataFrame(points).assign(**measured)
    setting = table["k"].map("k={:.0f}".format).where(table["k"].notna(), table["coefficient"].map("{:g}".format))
    return table.assign(setting=setting, **{name: np.nan for name in MEASURES if name not in table})


def shown(figure: go.Figure) -> list[go.Scatter]:
    return [trace for trace in figure.data if trace.meta and trace.visible]


TWO = [({"coefficient": 0.1}, (0.5, 0.7)), ({"coefficient": 1.0}, (0.8, 0.9, 1.0))]


def test_a_row_is_the_mean_over_seeds_and_its_range() -> None:
    data = ladder(results(TWO))
    assert set(NAMES) <= set(data) and list(data["measure"]) == ["mcc", "mcc"]
    assert list(data["rung"]) == [0.1, 1.0] and set(data["along"]) == {"coefficient"}
    assert list(data["seeds"]) == [2, 3]
    assert list(data["value"]) == pytest.approx([0.6, 0.9])
    assert list(data["value_low"]) == [0.5, 0.8] and list(data["value_high"]) == [0.7, 1.0]


def test_what_does_not_differ_was_not_measured_or_has_one_rung_is_left_out() -> None:
    more = [*TWO, ({"coefficient": 0.3, "penalty_name": "sqrt"}, (0.2,)), ({"coefficient": 2.0}, (np.nan,))]
    table = results(more, owned_maxes=3.0)
    table["l0"] = 1 / table["coefficient"]
    data = ladder(table)
    assert list(zip(data["measure"], data["rung"], strict=True)) == [
        *(("mcc", 0.1), ("l0", 0.1), ("mcc", 1.0), ("l0", 1.0), ("l0", 2.0))
    ]
    assert set(data["penalty_name"]) == {"l1"}


def test_where_nothing_has_two_rungs_there_is_no_table_and_nothing_is_drawn() -> None:
    empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in table_columns().items()})
    # Nor has a coefficient of 0 a place on a logarithmic axis.
    for table in (empty, results(TWO[:1]), results([TWO[0], ({"coefficient": 0.0}, (1.0,))])):
        data = ladder(table)
        assert data.empty and not draw(data).data


def test_k_has_panels_of_its_own_and_a_fraction_is_another_rung() -> None:
    ks = [
        ({"architecture": "batchtopk", "penalty_name": "batchtopk", "k": k, "coefficient": 9.0}, (k / 4,))
        for k in (1.5, 2.0)
    ]
    data = ladder(results([*TWO, *ks]))
    assert list(data["rung"]) == [0.1, 1.0, 1.5, 2.0]
    figure = draw(data)
    assert [figure.layout[axis].title.text for axis in ("xaxis", "xaxis2")] == ["coefficient", "k"]
    assert {figure.layout[axis].type for axis in ("xaxis", "xaxis2")} == {"log"}
    assert [(trace.name, trace.xaxis, list(trace.y)) for trace in shown(figure)] == [
        ("l1", "x", pytest.approx([0.6, 0.9])),
        ("batchtopk", "x2", [0.375, 0.5]),
    ]


def test_one_measure_is_shown_and_each_can_be() -> None:
    table = results([({**names, "width": width}, of) for width in (8, 16) for names, of in TWO[::-1]])
    table["l0"], table["fvu"] = 1 / table["coefficient"], table["coefficient"] - 0.1
    figure = draw(ladder(table))
    assert {trace.meta["count"] for trace in shown(figure)} == {MEASURES["mcc"]}
    assert list(dict.fromkeys(trace.meta["count"] for trace in figure.data if trace.meta)) == [
        MEASURES[name] for name in ("mcc", "l0", "fvu")
    ]
    # Along the ladder, whatever the order of the points, with what the page's switches go by.
    first = shown(figure)[0]
    assert list(first.x) == [0.1, 1.0] and list(first.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert (first.meta["penalty"], first.meta["width"], first.meta["init"]) == ("l1", "8", "random")
    assert {trace.name for trace in figure.data if not trace.meta} == {"l1", "width 8", "width 16"}
    # An FVU of 0 has no logarithm.
    assert [axis["type"] for axis in figure.layout.meta] == ["linear", "log", "linear"]
    assert figure.layout.yaxis.title.text == MEASURES["mcc"] == figure.layout.meta[0]["count"]


def test_each_init_and_whatever_varies_has_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [("kmeans", ""), ("random", ""), ("random", "lomax")]
    rows = [({**names, "init_name": init, "given": given}, of) for init, given in places for names, of in TWO]
    data = ladder(results(rows))
    figure = draw(data)
    assert [title.text for title in figure.layout.annotations] == ["init kmeans", "init random", "init random, lomax"]
    assert [trace.xaxis for trace in shown(figure)] == ["x", "x2", "x3"]
    monkeypatch.setattr(figure_ladders, "MOST_PANELS", 2)
    figure = draw(data)
    assert [trace.xaxis for trace in shown(figure)] == ["x", "x2"]
    assert "2 of 3 panels are drawn; the figure's table has all" in {trace.name for trace in figure.data}
