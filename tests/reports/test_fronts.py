"""Fronts compared: areas worked out by hand, intervals that hold, and ladders that do nothing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commandline import TINY, call
from fabricated import point, sweep
from rich.console import Console

from sae_sweep.config.columns import table_columns
from sae_sweep.config.settings import Penalty, Toy
from sae_sweep.reports import fronts, terminal
from sae_sweep.reports.fronts import compare, gap, hypervolume, unmoved
from sae_sweep.reports.material import Finished, Material
from sae_sweep.store import results as frame


@pytest.fixture(autouse=True)
def every_resample(few_resamples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are what is tested here."""
    monkeypatch.setattr(fronts, "RESAMPLED", few_resamples)


def steps(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    l0, fvu = zip(*points, strict=True)
    return np.array(l0), np.minimum.accumulate(np.array(fvu))


def test_hypervolume_by_hand() -> None:
    # From L0 1 to 10 at FVU 0.1, from 10 to 100 at 0.01, below a reference of 1.
    assert hypervolume(steps((1, 0.1), (10, 0.01)), (100, 1.0)) == pytest.approx(1 * 1 + 1 * 2)
    assert hypervolume(steps((100, 1.0)), (100, 1.0)) == 0
    # A point that is no better adds nothing.
    assert hypervolume(steps((1, 0.1), (5, 0.5), (10, 0.01)), (100, 1.0)) == pytest.approx(3)


def test_gap_by_hand() -> None:
    one, other = steps((1, 0.1), (10, 0.01), (100, 0.001)), steps((1, 0.2), (10, 0.02), (100, 0.002))
    assert gap(one, other) == pytest.approx(-np.log10(2))
    assert gap(other, one) == pytest.approx(np.log10(2))
    assert gap(one, one) == 0
    # Only from 10 to 100 do both have points: there 0.01 against 0.02 for half of the way, then 0.002.
    late = steps((10, 0.02), (np.sqrt(1000), 0.002), (1000, 1e-9))
    assert gap(one, late) == pytest.approx((np.log10(0.5) + np.log10(5)) / 2)
    assert gap(steps((1, 0.1), (5, 0.01)), steps((6, 0.1), (9, 0.01))) is None


def table(tmp_path: Path, noise: float, factor: float, seeds: int = 8) -> pd.DataFrame:
    """Two penalties of four coefficients: FVU = factor/L0 for the second; the L0 of a third does not move."""
    rng, results = np.random.default_rng(0), []
    for name, scale in (("l1", 1.0), ("sqrt", factor)):
        for seed in range(seeds):
            for coefficient in (0.1, 0.2, 0.4, 0.8):
                metrics = {"l0": 1 / coefficient, "fvu": scale * 0.1 * coefficient * np.exp(noise * rng.normal())}
                results.append((point(seed=seed, penalty=Penalty(name, coefficient)), metrics))
    for coefficient in (0.1, 0.8):
        results.append((point(penalty=Penalty("tanh", coefficient)), {"l0": 3 + coefficient / 10, "fvu": 0.5}))
    return frame.load(sweep(tmp_path, results), "quick")


@pytest.mark.parametrize(("factor", "sure"), [(0.5, True), (1.0, False)])
def test_intervals_over_seeds(factor: float, sure: bool, tmp_path: Path) -> None:
    found = compare(table(tmp_path, 0.2, factor)).set_index("penalty")
    better = found.loc["sqrt"]
    assert better["gap"] == pytest.approx(np.log10(factor), abs=0.06)
    assert better["gap_low"] <= better["gap"] <= better["gap_high"]
    assert (better["gap_high"] < 0) == sure
    assert better["seeds"] == 8 and (better["l0_low"], better["l0_high"]) == pytest.approx((1.25, 10))
    assert found.loc["l1", "gap"] == 0
    for name in ("l1", "sqrt"):
        row = found.loc[name]
        assert row["hypervolume_low"] < row["hypervolume"] < row["hypervolume_high"]
    assert (found.loc["sqrt", "hypervolume"] > found.loc["l1", "hypervolume_high"]) == sure
    # One seed has no spread.
    assert np.isnan(found.loc["tanh", "gap_low"]) and found.loc["tanh", "gap"] > 0


@pytest.mark.slow
def test_fronts_are_compared_only_over_the_l0_that_both_reach(tmp_path: Path) -> None:
    """Twice as good where both are; outside of that the first is beyond compare, then the second."""
    planted = {
        "l1": [(8.0, 1.0, 1e-6), (1.0, 5.0, 1e-7), (0.5, 10.0, 1e-8)],
        "sqrt": [(1.0, 5.0, 5e-8), (0.5, 10.0, 5e-9), (0.1, 50.0, 1e-20)],
        "tanh": [(0.1, 60.0, 0.5), (0.2, 55.0, 0.6)],
    }
    results = [
        (point(seed=seed, penalty=Penalty(name, c)), {"l0": l0, "fvu": fvu})
        for name, front in planted.items()
        for c, l0, fvu in front
        for seed in (0, 1, 2)
    ]
    table = frame.load(sweep(tmp_path, results), "quick")
    found = compare(table).set_index("penalty")
    assert (found.loc["sqrt", "l0_low"], found.loc["sqrt", "l0_high"]) == (5, 10)
    for name in ("gap", "gap_low", "gap_high"):
        assert found.loc["sqrt", name] == pytest.approx(-np.log10(2))
    # None is shared with the first: no number, rather than one between ranges.
    assert found.loc["tanh", ["gap", "gap_low", "gap_high"]].isna().all()
    stream = io.StringIO()
    material = Material({}, Finished(table, table))
    terminal.show_all(Console(width=100, file=stream), material, tmp_path / "sweeps" / "quick")
    shown = stream.getvalue().partition("Fronts compared")[2].splitlines()
    (line,) = [line for line in shown if line.startswith("tanh")]
    assert line.split()[-3:] == ["–", "none", "shared"]


def test_a_coefficient_that_does_not_move_l0_is_named(tmp_path: Path) -> None:
    (warning,) = unmoved(table(tmp_path, 0.0, 1.0, seeds=1))
    assert warning.startswith("relu, tanh, width 64, kmeans: coefficients from 0.1 to 0.8 leave L0 between 3.01 and")


@pytest.mark.parametrize(
    ("l0", "named"),
    [
        ({0.1: 8.0, 0.4: 4.0, 0.8: 2.0}, False),
        ({0.1: 4.2, 0.4: 4.1, 0.8: 4.0}, True),
        # A tenth of it is a move, and a ladder of less than twice is none.
        ({0.1: 4.41, 0.4: 4.2, 0.8: 4.0}, False),
        ({0.1: 4.0, 0.15: 4.0}, False),
        ({0.1: 4.0}, False),
        # Whether up or down; dead from somewhere on is a move, dead throughout is not.
        ({0.1: 2.0, 0.8: 4.0}, False),
        ({0.1: 4.0, 0.8: 0.0}, False),
        ({0.1: 0.0, 0.8: 0.0}, True),
    ],
)
def test_ladders_that_do_and_that_do_not_move_l0(l0: dict[float, float], named: bool, tmp_path: Path) -> None:
    # Seeds differ by far more than coefficients do: it is the mean over them that counts.
    results = [
        (point(seed=seed, penalty=Penalty("l1", c)), {"l0": value * factor, "fvu": 0.1})
        for c, value in l0.items()
        for seed, factor in enumerate((0.5, 1.5))
    ]
    found = unmoved(frame.load(sweep(tmp_path, results), "quick"))
    assert len(found) == named and all("the coefficient does not steer sparsity here" in line for line in found)


def test_what_sets_a_line_apart_is_in_its_warning(tmp_path: Path) -> None:
    results = [
        (point(toy, penalty=penalty, init=init), {"l0": 3.0, "fvu": 0.1})
        for toy in (Toy(d_vocab=16, k=3), Toy(d_vocab=8, k=3))
        for init in ("kmeans", "random")
        for p in (0.3, 0.7)
        for penalty in (Penalty("lp", 0.1, p=p), Penalty("lp", 0.8, p=p))
    ]
    found = unmoved(frame.load(sweep(tmp_path, results), "quick"))
    assert len(set(found)) == 8 and any("max_of_k-8-3" in line and "penalty_p 0.3" in line for line in found)
    of_k = [(point(architecture="topk", k=k), {"l0": 2.0, "fvu": 0.1}) for k in (1, 4)]
    (line,) = unmoved(frame.load(sweep(tmp_path / "k", of_k), "quick"))
    assert "k from 1 to 4 leave" in line and "the k does not" in line


@pytest.mark.slow
def test_the_warning_stands_at_the_end_of_a_run_and_on_the_page(tmp_path: Path) -> None:
    # From clusters, so few steps change little.
    assert call("run", "--json", *TINY, "penalty=l1", "name=flat", f"output_dir={tmp_path}").code == 0
    end = call("report", "flat", "--full", "--output-dir", str(tmp_path))
    said = " ".join(end.out.split())
    assert end.code == 0 and "! relu, l1, width 5, kmeans: coefficients from 0.25 to 2 leave L0 between" in said
    page = (tmp_path / "sweeps" / "flat" / "report.html").read_text()
    assert "<p>relu, l1, width 5, kmeans: coefficients from 0.25 to 2 leave" in page


def test_what_is_swept_beside_the_penalty_makes_fronts_of_its_own(tmp_path: Path) -> None:
    """Toys of two kinds of magnitude are two comparisons; two margins of the start are two lines of one."""
    results = [
        (point(Toy("independent", magnitudes=kind), penalty=Penalty("l1", c), init="whitened", margin=margin), front)
        for kind, margin, fvu in [("constant", 0.5, 0.1), ("lomax", 0.5, 0.2), ("lomax", 0.6, 0.4)]
        for c, front in [(0.1, {"l0": 10, "fvu": fvu / 10}), (0.8, {"l0": 1, "fvu": fvu})]
    ]
    varied = ["toy.magnitudes", "sae.margin", "penalty.coefficient"]
    found = compare(frame.load(sweep(tmp_path, results, varied=varied), "quick"))
    assert list(found["toy.magnitudes"]) == ["constant", "lomax", "lomax"]
    assert list(found["gap"]) == pytest.approx([0, 0, np.log10(2)])


def test_nothing_measured() -> None:
    empty = pd.DataFrame(columns=[*table_columns()])
    assert compare(empty).empty and unmoved(empty) == []
