"""The results table: constant columns and types, what is compared across points, bytes that repeat."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import MEASURED, SMALL, point, record, sweep

from sae_sweep.config.columns import table_columns
from sae_sweep.config.settings import Distribution, Penalty, Training
from sae_sweep.errors import UserError
from sae_sweep.store import results as frame
from sae_sweep.store.store import Store


def test_every_column_of_the_design_is_always_there_with_one_type(tmp_path: Path) -> None:
    design = """
        point_id toy toy_seed site distribution architecture init partition width k penalty coefficient penalty_p
        penalty_scale seed data_seed steps loss fvu fvu_above_ceiling l0 live_latents dead_latents pure_latents
        owned_maxes splits_per_max duplicates_per_max split_maxes label_q label_n label_c label_m label_mq label_mn
        label_mc label_mqn label_mqc label_mnc label_mqnc info_query info_runner_up info_copies unique_query
        unique_runner_up unique_copies distinct_splits_per_max winner_entropy oracle_gap k_sparse_splits absorption_full
        absorption_fraction loss_recovered kl shrinkage seconds on_front
    """
    named = design.split()
    further = """
        cofiring mcc uniqueness feature_precision feature_recall feature_f1 found_features
        killed_features killed_small_overlap
        prior_exponential prior_half_cauchy prior_student_t prior_lomax prior_exponential_power prior_spike_and_slab
        structure_parent structure_parent_null structure_modifier structure_modifier_null structure_interaction
        structure_interaction_null structure_cosine structure_cosine_null structure_semi_nmf
        structure_semi_nmf_null structure_meta_sae structure_meta_sae_null
    """
    shuffled = """
        splits_per_max distinct_splits_per_max split_maxes label_mq label_mn label_mc label_mqn label_mqc label_mnc
        label_mqnc info_query info_runner_up info_copies unique_query unique_runner_up unique_copies pure_latents
        owned_maxes duplicates_per_max label_m label_q label_n label_c mcc uniqueness feature_precision feature_recall
        feature_f1 found_features killed_features killed_small_overlap
    """
    of_training = ["gradient_largest", "gradient_late", "gradient_spike", "plateau"]
    of_training += ["revived", "revived_last", "revived_live", "final_coefficient"]
    named[-1:-1] = [*further.split(), *(f"shuffled_{name}" for name in shuffled.split()), *of_training]
    named.append("on_common_front")
    counted = """
        owned_ceiling splits_ceiling distinct_splits_ceiling owned_share splits_share distinct_splits_share pure_mq
        found_mq pure_mqnc found_mqnc below_cell shuffled_pure_mq shuffled_found_mq shuffled_label_mq_sd
        inferred_loss inferred_fvu inferred_l0 encoder_gap seed_agreement
    """
    assert not {*named, *counted.split()} - set(table_columns())
    store = sweep(tmp_path / "some", [(point(), {"l0": 1.0}), (point(seed=1), {"l0": None, "owned_maxes": None})])
    none = sweep(tmp_path / "none", [])
    for table in (*frame.tables(store, "quick"), *frame.tables(none, "quick")):
        assert list(table) == list(table_columns())
        assert {name: str(kind) for name, kind in table.dtypes.items()} == table_columns()
    assert len(frame.load(none, "quick")) == 0
    assert frame.load(store, "quick")["owned_maxes"].isna().tolist() == [False, True]


def test_the_gradients_norm_is_that_of_the_curve_and_null_where_that_is_older(tmp_path: Path) -> None:
    old, new, flat = (point(seed=seed) for seed in range(3))
    norms = [4.0, 40.0, 2.0, 4.0, 20.0]
    more = {
        old.id: {"curve": [{"step": 25, "loss": 1.0}]},
        new.id: {"curve": [{"step": i, "gradient": norm} for i, norm in enumerate(norms)]},
        flat.id: {"curve": [{"step": 25, "gradient": 0.0}]},
    }
    trained, start = frame.tables(sweep(tmp_path, [(at, {"l0": 1.0}) for at in (old, new, flat)], more=more), "quick")
    assert trained["gradient_largest"].fillna(-1).tolist() == [-1, 40, 0]
    assert trained["gradient_late"].fillna(-1).tolist() == [-1, 4, 0]
    assert trained["gradient_spike"].fillna(-1).tolist() == [-1, 5, -1]
    assert start[["gradient_largest", "gradient_late", "gradient_spike"]].isna().all(axis=None)


def test_settings_without_effect_are_null(tmp_path: Path) -> None:
    points = [
        point(width=16, init="oracle", partition="mq", penalty=Penalty("tanh", 0.5, scale=2.0)),
        point(width=16, init="random", penalty=Penalty("lp", 0.25, p=0.7), seed=3, data_seed=4),
        point(architecture="topk", k=2, width=17, penalty=Penalty("l1")),
        point(penalty=Penalty("lp", 1.0, p=0.5), site="post_unembed", training=Training(steps=7)),
    ]
    table = frame.load(sweep(tmp_path, [(p, {}) for p in points]), "quick")
    assert table["point_id"].tolist() == [p.id for p in points]
    expected = pd.DataFrame(
        {
            "toy": ["max_of_k-16-3"] * 4,
            "site": ["pre_unembed"] * 3 + ["post_unembed"],
            "architecture": ["relu", "relu", "topk", "relu"],
            "partition": ["mq", None, None, None],
            "width": [16, 16, 17, 64],
            "k": [None, None, 2, None],
            "penalty": ["tanh", "lp", "none", "sqrt"],
            "coefficient": [0.5, 0.25, 0.0, 1.0],
            "penalty_p": [None, 0.7, None, 0.5],
            "penalty_scale": [2.0, None, None, None],
            "seed": [0, 3, 0, 0],
            "data_seed": [0, 4, 0, 0],
            "steps": [3000, 3000, 3000, 7],
        }
    )
    pd.testing.assert_frame_equal(table[list(expected)], expected.astype({c: table_columns()[c] for c in expected}))


def test_varied_keys_are_columns(tmp_path: Path) -> None:
    weights = Distribution("weights", file=None, digest="abc")
    points = [
        point(toy=SMALL.replace(d_model=8, lr=0.1), width=8, distribution=weights),
        point(training=Training(lr=0.5), init="oracle", partition="mq"),
    ]
    varied = ["toy", "sae.width", "sae.partition", "training.lr", "distribution.file", "penalty", "seed"]
    table = frame.load(sweep(tmp_path, [(p, {}) for p in points], varied=varied), "quick")
    assert list(table)[len(table_columns()) :] == [
        "toy.d_model",
        "toy.lr",
        "training.lr",
        "distribution.file",
    ]
    assert table["width"].tolist() == [8, 64]
    assert table["partition"].isna().tolist() == [True, False]
    assert table["training.lr"].tolist() == [0.003, 0.5]
    assert table["toy.d_model"].tolist() == [8, 32]
    assert table["distribution.file"].fillna("").tolist() == ["abc", ""]


def test_further_metrics_follow_the_constant_columns(tmp_path: Path) -> None:
    table = frame.load(sweep(tmp_path, [(point(), {"zeta": 1.0}), (point(seed=1), {"live_floor": 8})]), "quick")
    assert list(table)[len(table_columns()) :] == ["live_floor", "zeta"]
    assert table["zeta"].fillna(-1).tolist() == [1.0, -1.0]


def test_only_finished_points_in_grid_order(tmp_path: Path) -> None:
    points = [point(seed=s) for s in (3, 1, 2)]
    store = sweep(tmp_path, [(p, {"l0": float(p.seed)}) for p in points])
    (store.path("points", points[1].id) / "record.json").write_bytes(b"")
    assert frame.load(store, "quick")["seed"].tolist() == [3, 2]
    assert len(store.damaged) == 1


def test_an_unknown_sweep_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep x .*quick"):
        frame.load(sweep(tmp_path, []), "x")


def test_measurements_of_the_sweeps_own_evaluation(tmp_path: Path) -> None:
    first, second = point(), point(seed=1)
    store = sweep(tmp_path, [(first, {"fvu": 0.1}), (second, {"fvu": 0.2})], measure_id="e1")
    store.commit_measure(second.id, "e1", {"metrics": {**MEASURED, "fvu": 0.3}, "untrained": {"fvu": 0.8}}, {})
    trained, start = frame.tables(store, "quick")
    assert trained[["seed", "fvu"]].to_numpy().tolist() == [[1, 0.3]]
    assert start["fvu"].tolist() == [0.8]


def test_the_front_is_over_means_across_seeds_within_what_is_compared(tmp_path: Path) -> None:
    def at(coefficient: float, l0: tuple[float, float], fvu: tuple[float, float], **more):
        penalty = Penalty("l1", coefficient)
        return [(point(penalty=penalty, seed=s, **more), {"l0": l0[s], "fvu": fvu[s]}) for s in (0, 1)]

    results = [
        *at(1.0, (1.0, 3.0), (0.2, 0.2)),  # mean L0 2
        *at(2.0, (1.5, 1.5), (0.3, 0.3)),
        *at(3.0, (2.0, 2.2), (0.1, 0.5)),  # dominated by the mean of the first, though its first seed is not
        *at(3.0, (9.0, 9.0), (0.9, 0.9), width=65),  # alone in its group
        *at(3.0, (9.0, 9.0), (0.9, 0.9), toy=SMALL.replace(d_model=9)),  # another toy of equal name
    ]
    table = frame.load(sweep(tmp_path, results, varied=["toy.d_model", "seed"]), "quick")
    assert table["on_front"].tolist() == [True] * 4 + [False] * 2 + [True] * 4
    means = frame.aggregate(table, "mean")
    assert means["on_front"].tolist() == [True, True, False, True, True]


def test_the_common_front_is_over_all_penalties_and_starts_of_a_width(tmp_path: Path) -> None:
    results = [
        (point(penalty=Penalty("l1")), {"l0": 1.0, "fvu": 0.3}),
        (point(penalty=Penalty("sqrt"), init="random"), {"l0": 1.0, "fvu": 0.2}),
        (point(architecture="topk"), {"l0": 2.0, "fvu": 0.1}),
        (point(width=9), {"l0": 9.0, "fvu": 0.9}),
    ]
    table = frame.load(sweep(tmp_path, results), "quick")
    assert table["on_front"].tolist() == [True] * 4
    assert table["on_common_front"].tolist() == [False, True, True, True]


def test_toy_and_data_seeds_are_merged_in_the_front(tmp_path: Path) -> None:
    def at(toy_seed: int, data_seed: int, coefficient: float, fvu: float):
        toy = SMALL.replace(seed=toy_seed)
        return (point(toy=toy, data_seed=data_seed, penalty=Penalty("l1", coefficient)), {"l0": 1.0, "fvu": fvu})

    results = [at(0, 0, 1.0, 0.1), at(1, 0, 1.0, 0.3), at(0, 1, 2.0, 0.3), at(1, 1, 2.0, 0.2)]
    table = frame.load(sweep(tmp_path, results, varied=["toy.seed", "data_seed"]), "quick")
    assert table["on_front"].tolist() == [True, True, False, False]


def test_the_oracle_gap_is_to_the_best_oracle_that_shares_every_other_setting(tmp_path: Path) -> None:
    slow, fast = Training(lr=1e-3), Training(lr=5e-3)
    results = [
        (point(init="oracle", partition="m", training=fast), {"loss": 3.0}),
        (point(init="oracle", partition="mq", training=fast), {"loss": 2.0}),
        (point(init="random", training=slow), {"loss": 2.5}),
        (point(init="random", seed=1), {"loss": 2.25}),
        (point(init="random", data_seed=1), {"loss": 2.5}),
        (point(init="random", penalty=Penalty("sqrt")), {"loss": 2.5}),
        (point(init="random", training=Training(steps=9)), {"loss": 2.5}),
        (point(init="whitened"), {"loss": None}),
    ]
    table = frame.load(sweep(tmp_path, results), "quick")
    gaps = table["oracle_gap"].tolist()
    # Nothing is drawn for an oracle: that of seed 0 is that of seed 1.
    assert gaps[:4] == [1.0, 0.0, 0.5, 0.25]
    assert np.isnan(gaps[4:]).all()


def test_aggregates_over_seeds(tmp_path: Path) -> None:
    results = []
    for width in (16, 8):
        for toy_seed in (0, 1):
            for seed in (0, 1, 2):
                toy = SMALL.replace(seed=toy_seed)
                loss = [[3.0, 1.0, 2.0], [30.0, 20.0, None]][toy_seed][seed]
                results.append((point(toy=toy, width=width, seed=seed), {"loss": loss, "owned_maxes": seed}))
    table = frame.load(sweep(tmp_path, results, varied=["toy.seed", "seed"]), "quick")
    mean = frame.aggregate(table, "mean")
    assert mean["width"].tolist() == [16, 8]
    assert mean["n"].tolist() == [6, 6]
    assert mean["loss"].tolist() == [56 / 5] * 2
    assert mean["loss_std"].tolist() == pytest.approx([np.std([3, 1, 2, 30, 20], ddof=1)] * 2)
    assert mean["owned_maxes"].tolist() == [1.0, 1.0]
    assert not {"seed", "toy_seed", "data_seed", "toy.seed", "point_id"} & set(mean)
    best = frame.aggregate(table, "best")
    assert best[["width", "toy_seed", "seed", "n"]].to_numpy().tolist() == [
        [16, 0, 1, 3],
        [16, 1, 1, 3],
        [8, 0, 1, 3],
        [8, 1, 1, 3],
    ]
    assert set(table) < set(best)
    for how in ("mean", "best"):
        assert len(frame.aggregate(table.iloc[:0], how)) == 0


def test_both_tables_are_written_the_same_whatever_order_the_points_came_in(tmp_path: Path) -> None:
    results = [(point(seed=s, penalty=Penalty("l1", c)), {"l0": s + c}) for s in (0, 1) for c in (0.5, 1.0)]
    store, other = sweep(tmp_path / "a", results), Store(tmp_path / "b")
    for at, metrics in reversed(results):
        other.commit("points", at.id, record(at, metrics, {"fvu": 0.9, "l0": 1.0}), {})
    for filename in ("sweep.yaml", "points.txt"):
        other.write_sweep_file("quick", filename, store.read_sweep_file("quick", filename).encode())
    trained, start = frame.write(store, "quick")
    frame.write(other, "quick")
    for filename, table in (("results.parquet", trained), ("untrained.parquet", start)):
        content = (store.sweep("quick") / filename).read_bytes()
        assert content == (other.sweep("quick") / filename).read_bytes()
        pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(content)), table)
    assert start["point_id"].tolist() == trained["point_id"].tolist()
    assert start["fvu"].tolist() == [0.9] * 4
    assert start[["on_front", "on_common_front", "oracle_gap", "seconds"]].isna().all(axis=None)


def test_any_formula_of_ones_own_is_called_formula() -> None:
    rows = pd.DataFrame({"penalty": ["l1", "a/(a + s)", "tanh(a)", None]})
    assert [*frame.matches(rows, {"penalty": "formula"})] == [False, True, True, False]
    assert [*frame.matches(rows, {"penalty": ["l1", "tanh(a)"]})] == [True, False, True, False]
