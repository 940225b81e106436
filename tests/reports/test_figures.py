"""The figures: that what they draw is what the results table says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import point, sweep

from sae_sweep.config.columns import table_columns
from sae_sweep.config.settings import Penalty, Toy, Training
from sae_sweep.metrics.extra.theory import Costs
from sae_sweep.reports import figure_data, figures
from sae_sweep.store import results as frame

Tables = tuple[pd.DataFrame, pd.DataFrame]
COEFFICIENTS = (0.1, 1.0, 10.0)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Two widths, two penalties, three coefficients, two starts, three seeds: 72 points."""
    results = []
    for width in (16, 136):
        for start in ("kmeans", "whitened"):
            for name in ("l1", "sqrt"):
                for i, c in enumerate(COEFFICIENTS):
                    for seed in range(3):
                        at = point(penalty=Penalty(name, coefficient=c), width=width, init=start, seed=seed)
                        metrics = {
                            "l0": 4.0 - i + 0.1 * seed,
                            "fvu": 0.01 * (1 + i) + 0.001 * seed,
                            "splits_per_max": 2.0 + seed if start == "whitened" else 0.0,
                            "distinct_splits_per_max": 1.5 if start == "whitened" else 0.0,
                            "shuffled_splits_per_max": 0.25,
                            "duplicates_per_max": 3.0 if start == "kmeans" and width == 136 else 0.0,
                            "split_maxes": 12 if start == "whitened" else 0,
                            "label_m": 0 if start == "whitened" else 16 if width == 16 else 64,
                            "label_mq": 40 if start == "whitened" else 0,
                            "live_latents": width - 1,
                            "dead_latents": 1,
                            "info_query": 0.5 + 0.1 * seed,
                        }
                        results.append((at, metrics))
    store = sweep(tmp_path_factory.mktemp("store"), results, varied=["sae.width", "seed"])
    return frame.tables(store, "quick")


def test_the_front_holds_every_point_and_the_means_of_seeds(tables: Tables) -> None:
    data = figure_data.front(tables[0])
    assert (data["repeat"] == "mean").sum() == 24 and data["point_id"].notna().sum() == 72
    mean = data[(data["repeat"] == "mean") & (data["setting"] == "1") & (data["width"] == 16)].iloc[0]
    assert (mean["l0"], mean["l0_low"], mean["l0_high"]) == pytest.approx((3.1, 3.0, 3.2))
    assert mean["seeds"] == 3


def test_the_front_shows_means_first_and_can_show_each_seed(tables: Tables) -> None:
    figure = figures.front(figure_data.front(tables[0]))
    drawn = [trace for trace in figure.data if trace.meta]
    assert {trace.meta["seed"] for trace in drawn if trace.visible} == {"mean"}
    assert {trace.meta["seed"] for trace in drawn} == {"mean", "0", "1", "2"}
    assert sum(np.isfinite(np.asarray(trace.x, float)).sum() for trace in drawn) == 72 + 24
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_a_setting_of_one_seed_stands_beside_the_means_of_others(tmp_path: Path) -> None:
    results = [
        (point(penalty=Penalty("l1", c), seed=seed), {"l0": 4.0 - c, "fvu": 0.01 * (c + 1)})
        for c, seeds in ((1.0, (0, 1)), (2.0, (0,)))
        for seed in seeds
    ]
    data = figure_data.front(frame.load(sweep(tmp_path, results, varied=["seed"]), "quick"))
    assert data[data["repeat"] == "mean"].set_index("setting")["seeds"].to_dict() == {"1": 2, "2": 1}


def test_splits_are_dark_at_the_ceiling(tables: Tables) -> None:
    data = figure_data.split_counts(tables[0].assign(splits_ceiling=8.0))
    assert {trace.zmax for trace in figures.split_counts(data).data} == {8.0}


def test_each_line_is_a_front_of_its_own(tmp_path: Path) -> None:
    """The points of one oracle's start are not measured against those of another's."""
    worse = {"m": 2.0, "mq": 1.0}
    results = [
        (
            point(penalty=Penalty("l1", c), init="oracle", partition=name),
            {"l0": 4.0 - c, "fvu": 0.01 * (c + 1) * factor},
        )
        for name, factor in worse.items()
        for c in (1.0, 2.0)
    ]
    results.append((point(penalty=Penalty("l1", 0.5), init="oracle", partition="m"), {"l0": 3.9, "fvu": 0.5}))
    data = figure_data.front(frame.load(sweep(tmp_path, results, varied=["sae.partition"]), "quick"))
    assert list(data["on_front"]) == [True, True, True, True, False]


def test_no_line_joins_what_is_not_on_the_front(tables: Tables) -> None:
    table = tables[0].assign(on_front=[i % 2 == 0 for i in range(len(tables[0]))])
    for trace in figures.front(figure_data.front(table)).data:
        if trace.meta:
            ids = [said for said, *_ in trace.customdata]
            on = np.asarray(trace.marker.opacity) == 1
            joined = [bool(ids[i]) and bool(ids[i + 1]) for i in range(len(ids) - 1)]
            assert all(on[i] and on[i + 1] for i, line in enumerate(joined) if line)


def test_heatmaps_put_each_setting_in_its_place(tables: Tables) -> None:
    data = figure_data.split_counts(tables[0])
    heatmap, distinct = figures.split_counts(data).data
    assert (heatmap.visible, distinct.visible) == (True, False)
    assert [y.rstrip("\u200b") for y in heatmap.y[1]] == ["width 16", "width 136"] * 2
    assert [x.rstrip("\u200b") for x in heatmap.x[1]] == ["0.1", "1", "10"] * 2
    starts = np.asarray(heatmap.y[0])
    assert np.all(np.asarray(heatmap.z, float)[starts == "whitened"] == 3.0)
    assert np.all(np.asarray(heatmap.z, float)[starts == "kmeans"] == 0.0)
    assert np.all(np.asarray(distinct.z, float)[starts == "whitened"] == 1.5)
    said = np.asarray(heatmap.text)[starts == "whitened"]
    assert all("splits per max 3.00, distinct 1.50 (labels shuffled 0.25)" in words for words in said.flat)


def test_a_missing_setting_is_a_gap_and_coefficients_are_in_order(tables: Tables) -> None:
    some = tables[0][~((tables[0]["penalty"] == "l1") & (tables[0]["coefficient"] == 0.1))]
    heatmap = figures.split_counts(figure_data.split_counts(some)).data[0]
    assert [x.rstrip("\u200b") for x in heatmap.x[1]] == ["1", "10", "0.1", "1", "10"]
    # Plotly sorts the second level by where a name is first seen: only names of their own keep this order.
    assert len(set(heatmap.x[1])) == 5


def test_phases(tables: Tables) -> None:
    data = figure_data.phases(tables[0]).set_index(["init_name", "width"])["phase"]
    assert set(data["whitened"]) == {"split"}
    assert set(data["kmeans", 16]) == {"found"}
    assert set(data["kmeans", 136]) == {"duplicated"}
    assert {trace.name for trace in figures.phases(figure_data.phases(tables[0])).data[1:]} == {
        "F found",
        "D duplicated",
        "S split",
    }


def test_phases_of_parents_and_where_splitting_pays(tmp_path: Path) -> None:
    parents = Toy(name="parents", features=2, modifiers=2, d_model=16)
    at = [point(toy=parents, penalty=Penalty(coefficient=c), width=6) for c in (0.25, 1.0, 4.0)]
    counts = {"label_m": 2, "split_maxes": 0, "l0": 1.0, "fvu": 0.1}
    own = [counts | {"label_q": q} for q in (2, 1, 0)]
    frame_, _ = frame.tables(sweep(tmp_path, list(zip(at, own, strict=True))), "quick")
    costs = {at[0].id: Costs(2.0, 1.0), at[2].id: Costs(1.0, 2.0)}
    data = figure_data.phases(frame_, costs).set_index("setting")
    assert data["phase"].to_dict() == {"0.25": "found", "1": "found", "4": "absorbed"}
    drawn = figures.phases(data.reset_index()).data
    ring, told = [trace for trace in drawn if "theory" in str(trace.legendgroup)]
    assert (ring.showlegend, told.showlegend) == (False, True) and "theory" in told.name
    assert list(ring.x[1]) == ["4"] and list(ring.y[1]) == ["width 6"]
    # Without a theory there are no rings.
    assert not any("theory" in str(trace.name) for trace in figures.phases(figure_data.phases(frame_)).data)


def test_a_setting_that_is_not_there_has_no_phase(tables: Tables) -> None:
    some = tables[0][~((tables[0]["penalty"] == "l1") & (tables[0]["width"] == 16))]
    heatmap = figures.phases(figure_data.phases(some)).data[0]
    missing = [[value is None for value in row] for row in heatmap.z]
    assert np.any(missing) and set(np.asarray(heatmap.text)[np.asarray(missing)]) == {""}


def test_labels_add_up_to_the_width(tables: Tables) -> None:
    data = figure_data.labels(*tables)
    trained = data[data["state"] == "trained"]
    assert np.allclose(trained[list(figure_data.KINDS)].sum(axis=1), trained["width"])
    assert set(data["state"]) == {"trained", "untrained"}
    drawn = figures.labels(data).data
    assert {trace.name for trace in drawn} == {"whole maximum", "maximum, query", "no label", "dead"}
    assert figures.labels(data).layout.barnorm is None
    assert figures.labels(data.replace({"width": {136: 1360}})).layout.barnorm == "percent"


def test_information_spans_the_points(tables: Tables) -> None:
    data = figure_data.information(*tables)
    row = data[(data["factor"] == "query") & (data["state"] == "trained")].iloc[0]
    assert tuple(row[["explained", "explained_low", "explained_high", "points"]]) == pytest.approx((0.6, 0.5, 0.7, 18))
    assert len(figures.information(data).data) == 6


def test_shares_found_are_drawn_beside_their_nulls(tables: Tables) -> None:
    none = {f"{of}found_{part}": None for of in ("", "shuffled_", "inferred_") for part in figure_data.FOUND}
    trained, untrained = (table.assign(**none).assign(found_mq=0.001 * table["width"]) for table in tables)
    trained = trained.assign(shuffled_found_mq=0.05, found_mn=0.5 + 0.1 * trained["seed"], inferred_found_mn=0.9)
    data = figure_data.found(trained, untrained)
    assert set(zip(data["part"], data["state"], strict=True)) == {
        *(("mq", state) for state in ("trained", "untrained", "labels shuffled")),
        *(("mn", state) for state in ("trained", "best codes")),
    }
    row = data[(data["part"] == "mn") & (data["state"] == "trained")].iloc[0]
    assert tuple(row[["value", "value_low", "value_high"]]) == pytest.approx((0.6, 0.5, 0.7))
    pairs = data[data["part"] == "mq"]
    expected = (0.001 * pairs["width"]).where(pairs["state"] != "labels shuffled", 0.05)
    assert pairs["value"].tolist() == pytest.approx(expected.tolist())
    shown = [trace.name for trace in figures.found(data).data if trace.showlegend]
    assert shown == ["maximum, query", "maximum, runner-up", "untrained", "labels shuffled", "best codes"]
    assert figure_data.found(trained.assign(found_mq=None), untrained).empty


def test_structure_is_drawn_beside_its_null_where_it_was_measured(tables: Tables) -> None:
    assert figure_data.structure(tables[0]).empty
    some = tables[0].assign(structure_cosine=0.1 * tables[0]["seed"], structure_cosine_null=-0.5)
    data = figure_data.structure(some)
    row = data[data["state"] == "found"].iloc[0]
    assert (row["value"], row["value_low"], row["value_high"], row["points"]) == pytest.approx((0.1, 0.0, 0.2, 18))
    found, null = figures.structure(data).data
    assert found.name.startswith("modifier's direction") and list(null.x) == pytest.approx([-0.5] * 4)


def test_distribution_and_curves_are_those_of_the_middle_coefficient(tables: Tables) -> None:
    chosen = figure_data.knees(tables[0])
    assert set(chosen["setting"]) == {"0.1"} and len(chosen) == 24
    per_max = {id: {"splits": [0, 1, seed], "duplicates": [1, 0, 0]} for id, seed in _seeds(tables[0])}
    data = figure_data.distribution(tables[0], per_max)
    assert list(data["splits"][:3]) == [0, 1, 1] and list(data["duplicates"][:3]) == [1, 0, 0]
    (heatmap,) = figures.distribution(data).data
    assert np.asarray(heatmap.z).shape == (8, 3)
    last = {"step": 2, "fvu": 0.1, "l0": 2.0}
    rows = {id: [{"step": 1, "fvu": 0.5, "l0": seed}, last] for id, seed in _seeds(tables[0])}
    traces = [trace for trace in figures.curves(figure_data.curves(tables[0], rows)).data if trace.meta]
    assert len(traces) == 16
    assert list(traces[1].y) == [1, 2]  # the median over seeds 0, 1, 2


def test_rows_of_one_block_lie_together_and_each_holds_its_own_counts(tables: Tables) -> None:
    """Points in the order of penalties, not of blocks, as a product of axes may give them."""
    table = tables[0].sort_values("penalty", kind="stable", ignore_index=True)
    per_max = {id: {"splits": [at, at], "duplicates": [0, 0]} for at, id in enumerate(table["point_id"])}
    (heatmap,) = figures.distribution(figure_data.distribution(table, per_max)).data
    blocks = list(heatmap.y[0])
    assert [block for i, block in enumerate(blocks) if blocks[i - 1] != block] == list(dict.fromkeys(blocks))
    chosen = figure_data.knees(table).assign(at=lambda rows: rows["point_id"].map(lambda id: per_max[id]["splits"][0]))
    means = chosen.groupby(["init_name", "width", "penalty_name"])["at"].mean()
    for block, name, row in zip(*heatmap.y, heatmap.z, strict=True):
        start, width = block.split(", ")
        assert row[0] == means[start, int(width), name.split()[0]]


def test_the_gradients_norm_is_drawn_where_it_is_known(tables: Tables) -> None:
    known = {id: [{"step": 1, "fvu": 0.5, "l0": 2.0, "gradient": 10.0 + seed}] for id, seed in _seeds(tables[0])}
    figure = figures.curves(figure_data.curves(tables[0], known))
    titles = [figure.layout[axis].title.text for axis in ("yaxis", "yaxis2", "yaxis3")]
    assert titles == ["FVU", "L0", "gradient's norm"]
    traces = [trace for trace in figure.data if trace.meta]
    assert len(traces) == 24 and list(traces[2].y) == [11.0]


def test_dead_latents_revivals_and_the_l0_aimed_at_are_drawn_where_they_are_known(tables: Tables) -> None:
    step = {"fvu": 0.5, "l0": 2.0, "gradient": 1.0}
    known = {
        id: [{"step": 1, **step, "dead": 9, "revived": 0}, {"step": 2, **step, "dead": 7 + seed, "revived": 2}]
        if seed
        else [{"step": at, **step} for at in (1, 2)]
        for id, seed in _seeds(tables[0])
    }
    (aimed, *_), rest = list(known), known
    data = figure_data.curves(tables[0], rest, {aimed: 3.0})
    figure = figures.curves(data)
    titles = [figure.layout[f"yaxis{row or ''}"].title.text for row in ("", 2, 3, 4, 5)]
    assert titles == ["FVU", "L0", "gradient's norm", "dead latents", "revived"]
    drawn = {
        axis: [trace for trace in figure.data if trace.meta and trace.yaxis == axis] for axis in ("y2", "y4", "y5")
    }
    # Of seeds 1 and 2; that of seed 0 has none to revive.
    assert list(drawn["y4"][0].y) == [9, 8.5] and list(drawn["y5"][0].y) == [0, 2]
    targets = [trace for trace in drawn["y2"] if trace.line.dash == "dot" and set(trace.y) == {3.0}]
    assert len(targets) == (aimed in set(data["point_id"]))


def test_the_plateau_is_drawn_at_the_steps_that_each_took(tables: Tables) -> None:
    assert figure_data.plateau(tables[0]).empty
    some = tables[0].assign(plateau=[0.01 * (1 + at % 3) for at in range(len(tables[0]))])
    some.loc[some.index[0], "stopped_at"] = 77
    data = figure_data.plateau(some)
    assert data["settled"].tolist() == (some["plateau"] <= 0.02).tolist() and data["stopped"].sum() == 1
    assert data["trained"].tolist() == [77, *some["steps"][1:]]
    figure = figures.plateau(data)
    marks = [trace for trace in figure.data if trace.meta]
    assert sum(len(trace.x) for trace in marks) == len(some)
    assert "settled and stopped" in marks[0].customdata[0] and marks[0].x[0] == 77
    assert [line.y0 for line in figure.layout.shapes] == [0.02]


def test_nothing_measured_draws_nothing() -> None:
    empty = pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in table_columns().items()})
    for name in ("front", "split_counts", "structure", "phases", "plateau"):
        getattr(figures, name)(getattr(figure_data, name)(empty))
    for name in ("labels", "information"):
        getattr(figures, name)(getattr(figure_data, name)(empty, empty))
    for name in ("distribution", "curves"):
        getattr(figures, name)(getattr(figure_data, name)(empty, {}))


def test_what_else_varies_is_told_but_not_what_follows_from_the_width(tmp_path: Path) -> None:
    settings = ((8, 0.5), (8, 0.6), (16, 0.5))
    results = [(point(width=w, margin=margin, init="whitened"), {"l0": 1.0, "fvu": 0.1}) for w, margin in settings]
    store = sweep(tmp_path / "a", results, varied=["sae.margin", "sae.width"])
    assert set(figure_data.front(frame.load(store, "quick"))["given"]) == {"margin=0.5", "margin=0.6"}
    store = sweep(tmp_path / "b", results[1:], varied=["sae.margin", "sae.width"])
    assert set(figure_data.front(frame.load(store, "quick"))["given"]) == {""}


def test_toys_with_ladders_of_their_own_are_no_line_together(tmp_path: Path) -> None:
    results = [
        (point(toy=Toy(name="planted", features=8, d_model=d_model), penalty=Penalty("l1", c)), {"l0": 1.0, "fvu": fvu})
        for d_model, c, fvu in ((8, 1.0, 0.1), (8, 2.0, 0.2), (4, 3.0, 0.9), (4, 4.0, 0.95))
    ]
    data = figure_data.front(frame.load(sweep(tmp_path, results, varied=["toy.d_model"]), "quick"))
    assert list(data["given"]) == ["planted-8-8"] * 2 + ["planted-8-4"] * 2
    assert list(data["on_front"]) == [True, False] * 2


def test_a_rate_that_goes_with_k_leaves_one_line(tmp_path: Path) -> None:
    results = [
        (point(architecture="topk", width=8, k=k, training=Training(lr=lr)), {"l0": k, "fvu": fvu})
        for k, lr, fvu in ((1.0, 1e-3, 0.3), (2.0, 5e-4, 0.2), (4.0, 2e-4, 0.25))
    ]
    data = figure_data.front(frame.load(sweep(tmp_path, results, varied=["sae.k", "training.lr"]), "quick"))
    assert set(data["given"]) == {""} and list(data["on_front"]) == [True, True, False]


def _seeds(table: pd.DataFrame) -> list[tuple[str, int]]:
    return list(zip(table["point_id"], table["seed"], strict=True))
