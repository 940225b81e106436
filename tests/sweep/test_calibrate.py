"""Coefficients chosen by L0: on curves that are known, and from command to table."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from commandline import TINY, call, tables
from hypothesis import given
from hypothesis import strategies as st

from sae_sweep.config import overrides
from sae_sweep.config.calibration import COARSE, REFINEMENTS, Line, choose, coarse, line_of, refined
from sae_sweep.config.settings import Point
from sae_sweep.errors import UserError
from sae_sweep.store.store import Store
from sae_sweep.sweep.calibrate import calibrated

RUNGS = [0.25, 0.5, 1.0, 2.0]
RANGE = (1.5, 8.0)
EVEN = np.geomspace(*RANGE, 4)[::-1]
Curve = Callable[[float], float]


def trials(curve: Curve, short: Curve | None = None) -> tuple[dict[float, float], dict[float, float]]:
    """What short runs and whole runs on a known curve say; `short`: that of the short ones, if it is another."""
    of_short, of_whole = {c: (short or curve)(c) for c in coarse(RUNGS)}, dict[float, float]()
    for _ in range(REFINEMENTS):
        of_whole |= {c: curve(c) for c in refined(of_short, of_whole, RANGE, 4)}
    return of_short, of_whole


def chosen(curve: Curve, short: Curve | None = None) -> Line:
    return choose("line", *trials(curve, short), RANGE, 4, RUNGS)


CURVES: dict[str, Curve] = {
    "power": lambda c: 4 / c,
    "beyond what is tried first": lambda c: 1000 / c,
    "weak where it is tried first": lambda c: 0.01 / c,
    "steep": lambda c: 1 + 30 / (1 + (c / 0.7) ** 6),
    "nothing fires in the end": lambda c: max(0.0, 10 - 4 * c),
    "level for a while": lambda c: 6 / min(c, 2) if c < 4 else 12 / c,
}


@pytest.mark.parametrize("name", CURVES)
def test_l0_comes_out_even(name: str) -> None:
    line = chosen(CURVES[name])
    assert line.warning is None and line.coefficients == sorted(line.coefficients)
    # Where L0 falls to nothing at once, so many short runs come no nearer.
    loose = 1.4 if name == "nothing fires in the end" else 1.2
    for coefficient, target in zip(line.coefficients, EVEN, strict=True):
        assert 1 / loose < CURVES[name](coefficient) / target < loose
    assert line.l0 == pytest.approx(EVEN, rel=0.1)


@pytest.mark.parametrize("name", ["power", "steep", "level for a while"])
def test_short_runs_need_not_end_where_whole_ones_do(name: str) -> None:
    """After a quarter of the steps L0 is twice to four times what it comes to, the more the weaker the penalty."""
    curve = CURVES[name]
    line = chosen(curve, lambda c: curve(c) * (2 + 2 / (1 + c)))
    assert line.warning is None
    for coefficient, target in zip(line.coefficients, EVEN, strict=True):
        assert 1 / 1.25 < curve(coefficient) / target < 1.25


def test_a_whole_run_that_comes_near_is_taken_as_it_is() -> None:
    line = choose("line", {c: 4 / c for c in coarse(RUNGS)}, {0.52: 7.7, 2.6: 1.53}, RANGE, 4, RUNGS)
    assert line.coefficients[0] == 0.52 and line.coefficients[-1] == 2.6 and (line.l0[0], line.l0[-1]) == (7.7, 1.53)
    # But none for two of them, where they lie close.
    close = choose("line", {c: 4 / c for c in coarse(RUNGS)}, {1.0: 4.1}, (4.0, 4.4), 4, RUNGS)
    assert len(close.coefficients) == 4


def test_what_rises_again_is_levelled() -> None:
    noise = np.random.default_rng(0)
    bumps: dict[float, float] = {}

    def curve(c: float) -> float:
        return 4 / c * bumps.setdefault(c, float(np.exp(0.2 * noise.normal())))

    short, whole = trials(curve)
    rising = np.diff([l0 for _, l0 in sorted((short | whole).items())]) > 0
    assert rising.any(), "the curve is to be one that is not monotone"
    line = choose("line", short, whole, RANGE, 4, RUNGS)
    assert (np.diff(line.coefficients) > 0).all() and len(line.coefficients) == 4
    for coefficient, target in zip(line.coefficients, EVEN, strict=True):
        assert 0.6 < 4 / coefficient / target < 1.7


def test_a_coefficient_that_does_not_move_l0_is_named() -> None:
    line = chosen(lambda c: 3.1 - 0.01 * np.log(c))
    assert line.coefficients == RUNGS
    assert line.warning is not None and "leave L0 between 3.0" in line.warning and "does not move it" in line.warning


def test_a_range_that_is_not_reached_is_named() -> None:
    line = chosen(lambda c: 3 + 20 / (1 + c))
    assert line.warning is not None and "L0 from 1.5 to 8 was asked for, 3.0" in line.warning
    assert line.l0[0] == pytest.approx(8, rel=0.01) and 3 < line.l0[-1] < 3.2 and len(line.l0) == 4
    # Nothing of it: what is nearest.
    above = chosen(lambda c: 20 + 10 / (1 + c))
    assert above.warning is not None and len(above.coefficients) == 1 and above.l0 == pytest.approx([20], rel=0.05)


def test_short_runs_that_broke() -> None:
    line = choose("line", {1.0: 2.0}, {}, RANGE, 4, RUNGS)
    assert line.coefficients == RUNGS and line.warning is not None and "broke" in line.warning


@given(st.lists(st.floats(0, 300), min_size=COARSE, max_size=COARSE), st.integers(2, 9))
def test_whatever_the_curve_what_is_chosen_was_tried_around(l0: list[float], count: int) -> None:
    tried = dict(zip(coarse(RUNGS), l0, strict=True))
    line = choose("line", tried, {}, RANGE, count, RUNGS)
    assert 1 <= len(line.coefficients) <= max(count, len(RUNGS))
    assert all(a < b for a, b in zip(line.coefficients, line.coefficients[1:], strict=False))
    assert min(tried) <= line.coefficients[0] and line.coefficients[-1] <= max(tried)
    assert all(c == float(f"{c:.3g}") for c in line.coefficients)
    assert not tried.keys() & set(refined({}, tried, RANGE, count))


# -- from command to table --------------------------------------------------------------------------------------------

ASKED = [*TINY, "training.steps=60", "training.lr=0.02", "sae.init=random_unit"]
ASKED += ["penalty=l1,sqrt", "seed=0,1", "name=even"]
ASKED.remove("training.steps=25")
ASKED += ["grid.calibrate=l0", "grid.l0_range=[0.4,1.5]", "grid.coefficients=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a calibrated sweep."""
    root = tmp_path_factory.mktemp("calibrated")
    end = call("run", *ASKED, f"output_dir={root}")
    assert end.code == 0, end.err
    assert end.err.count("coefficient → expected L0: ") == 2 and "choosing coefficients by L0" in end.err
    return root


def test_a_plan_counts_points_and_trains_nothing(tmp_path: Path) -> None:
    end = call("plan", *ASKED, f"output_dir={tmp_path / 'none'}")
    assert end.code == 0 and not (tmp_path / "none").exists()
    words = " ".join(end.out.split())
    assert "penalty.coefficient not known yet" in words and "points 12 (0 finished)" in words
    assert "L0 0.4 to 1.5 are chosen by the run: 8 short SAEs, then up to 6 whole ones, for each of 2; about " in words
    planned = json.loads(call("plan", *ASKED, "--json", f"output_dir={tmp_path / 'none'}").out)
    assert planned["calibration"] == {"l0_range": [0.4, 1.5], "coefficients": 3, "known": False}
    assert planned["points"] == 12 and planned["estimate"]["seconds"] > 0


def test_what_is_chosen_is_what_is_trained(run: Path) -> None:
    info = yaml.safe_load((run / "sweeps" / "even" / "sweep.yaml").read_text())["calibration"]
    assert (info["l0_range"], info["coefficients"]) == ([0.4, 1.5], 3)
    results, _ = tables(run, "even")
    lines = {line["name"].split(", ")[1]: line for line in info["lines"].values()}
    assert lines.keys() == {"l1", "sqrt"}
    for penalty, line in lines.items():
        rows = results[results["penalty"] == penalty]
        assert sorted(set(rows["coefficient"])) == line["coefficients"]
        assert len(rows) == 2 * len(line["coefficients"])
        assert len(line["short"]) == COARSE and len(line["whole"]) >= 3
        # A steeper penalty leaves less on.
        first, last = line["short"][0][1], line["short"][-1][1]
        assert first > 1.5 > 0.4 > last and line["warning"] is None
        # Of the seed that was tried L0 is what was asked for, nearly.
        l0 = rows[rows["seed"] == 0].sort_values("coefficient")["l0"]
        assert np.abs(np.log(l0.to_numpy() / np.geomspace(1.5, 0.4, 3))).max() < 0.7
    assert "not known" not in call("plan", *ASKED, f"output_dir={run}").out
    report = " ".join(
        call("report", "even", "--full", "--output-dir", str(run), "--output", str(run / "page.html")).out.split()
    )
    assert report.count("coefficient → expected L0: ") == 2 and "Coefficients chosen for L0 0.4 to 1.5" in report
    assert (run / "page.html").read_text().count("coefficient → expected L0: ") == 2


def test_a_rerun_trains_nothing_with_or_without_what_was_written(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(run, root)
    ids, points = (root / "sweeps" / "even" / "points.txt").read_text(), Store(root).ids("points")
    for _ in range(2):
        found = json.loads(call("run", "--json", *ASKED, f"output_dir={root}").out)
        assert (found["ran"], found["failed"]) == (0, 0) and found["skipped"] == found["points"]
        assert (root / "sweeps" / "even" / "points.txt").read_text() == ids
        shutil.rmtree(root / "sweeps")
    # Another sweep, of more seeds, takes the same coefficients.
    wider = [word for word in ASKED if not word.startswith(("seed", "name"))]
    found = json.loads(call("run", "--json", *wider, "seed=0,1,2", "name=more", f"output_dir={root}").out)
    assert found["ran"] == found["points"] // 3
    assert set(ids.split()[:-1]) <= {*(root / "sweeps" / "more" / "points.txt").read_text().split()}
    assert points < Store(root).ids("points")


@pytest.mark.slow
def test_a_sweep_that_grows_keeps_what_was_chosen(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(run, root)
    before = yaml.safe_load((root / "sweeps" / "even" / "sweep.yaml").read_text())["calibration"]["lines"]
    shutil.rmtree(root / "points")
    wider = [word for word in ASKED if not word.startswith("sae.width")]
    assert call("run", "--json", *wider, "sae.width=5,7", f"output_dir={root}").code == 0
    after = yaml.safe_load((root / "sweeps" / "even" / "sweep.yaml").read_text())["calibration"]["lines"]
    assert len(after) == 4 and {id: after[id] for id in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["grid.calibrate=l1"], "grid.calibrate cannot be 'l1' (did you mean 'l0'?"),
        (["grid.l0_range=[8,1.5]"], "grid.l0_range=[8, 1.5] is empty"),
        (["grid.l0_range=[2]"], "grid.l0_range is from where to where, as [1,4], got [2]"),
        (["grid.l0_range=[0,2]"], "grid.l0_range must be at least 0.1"),
        (["grid.l0_range=[a,2]"], "grid.l0_range must be a number"),
        (["grid.l0_range=2"], "grid.l0_range must be a list"),
        (["grid.l0_range=2,8"], "grid.l0_range takes one value for the whole sweep"),
        (["grid.coefficients=1"], "grid.coefficients must be at least 2"),
        (["grid.callibrate=l0"], "did you mean 'grid.calibrate'?"),
        (["grid.calibrate=null", "grid.l0_range=[1,2]"], "grid.l0_range is read by grid.calibrate=l0 alone"),
        (["penalty.coefficient=0.5,1"], "grid.calibrate=l0 has nothing to choose"),
        (["sae=topk", "sae.k=2"], "grid.calibrate=l0 has nothing to choose"),
    ],
)
def test_what_cannot_be_meant_is_one_line(changes: list[str], message: str) -> None:
    given = {word.partition("=")[0] for word in changes} | {"grid.callibrate"}
    words = [word for word in [*TINY, "grid.calibrate=l0"] if word.partition("=")[0] not in given]
    with pytest.raises(UserError) as refused:
        overrides.load([*words, *changes])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_another_range_is_another_sweep(run: Path) -> None:
    words = [word for word in ASKED if not word.startswith("grid.l0_range")]
    end = call("run", *words, "grid.l0_range=[0.5,1.5]", f"output_dir={run}")
    assert end.code == 2 and "choose another name=" in end.err
    names = {overrides.load([word for word in each if word != "name=even"]).name for each in (ASKED, words)}
    assert len(names) == 2


def test_what_another_version_chose_is_refused(run: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(run, root)
    store = Store(root)
    info = store.info("even")
    for line in info["calibration"]["lines"].values():
        line["tried"] = line.pop("short")
    store.write_sweep_file("even", "sweep.yaml", yaml.safe_dump(info, allow_unicode=True).encode())
    end = call("run", *ASKED, f"output_dir={root}")
    assert end.code == 2 and "calibrated by another version" in end.err and "Traceback" not in end.err


def test_stand_ins_never_hide_what_is_given(run: Path) -> None:
    sweep = overrides.load([*ASKED, f"output_dir={run}"])
    calibration = sweep.calibration
    assert calibration is not None and set(calibration.rungs) == set(sweep.points)
    # Were the first stand-in asked for by itself as well, it would stay.
    first = sweep.points[0]
    both = dataclasses.replace(sweep, calibration=dataclasses.replace(calibration, given=frozenset([first])))
    filled, plain = (calibrated(each, Store(run), None).points for each in (both, sweep))
    assert first not in plain and filled == [first, *plain]


def test_a_line_is_told_apart_by_all_but_coefficient_and_seeds() -> None:
    points: list[Point] = overrides.load([*TINY, "toy.seed=0,1", "seed=0,1", "data_seed=0,1", "penalty=l1,sqrt"]).points
    assert len({line_of(point) for point in points}) == 2
