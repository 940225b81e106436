"""scripts/bench_gpu.py: what it makes of its jobs and rows; that it runs is for --dry to see."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module("bench_gpu")


def test_constants_are_those_that_rows_were_made_with(bench: Any) -> None:
    def row(width: int, n: int, batch: int = 4096) -> Any:
        work = 2.0 * n * batch * width * bench.D / 3e13, n * (2 * bench.D + 2) * width * 2e-12
        return bench.Row("", "kernels", width, n, 1e-4 + sum(work), batch)

    shapes = (64, 16), (1024, 16), (1024, 16, 512), (16384, 16), (2**20, 1)
    found = bench.planner_constants([row(*shape) for shape in shapes])
    assert found["step"] == pytest.approx(1e-4) and found["product_flops"] == pytest.approx(3e13)
    assert found["parameter"] == pytest.approx(2e-12, rel=1e-3)
    assert bench.planner_constants([]) == {}


def test_a_job_that_breaks_or_hangs_loses_no_other(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import os, sys, time\n"
        "print('row ' + sys.argv[2].split('|')[1], flush=True)\n"
        "print('wrong gradient apart', flush=True)\n"
        "if sys.argv[2].startswith('breaks'): os.abort()\n"
        "if sys.argv[2].startswith('hangs'): time.sleep(60)\n"
    )
    row = json.dumps({"work": "w", "backend": "kernels", "width": 64, "n": 2, "seconds": 0.5})
    names = [f"{name} |{row}" for name in ("breaks", "hangs", "ends")]
    made: dict[str, tuple[float, Callable[[], None]]] = {name: (3.0, lambda: None) for name in names}
    monkeypatch.setattr(bench, "jobs", lambda: made)
    monkeypatch.setattr(bench, "__file__", str(script))
    wrong = bench.run_all(names, 60.0, tmp_path / "rows.json")
    assert [line.split(": ")[-1] for line in wrong if not line.startswith("gradient")] == [
        "it broke off with exit code -6",
        "it did not end within 3 s",
    ]
    assert wrong.count("gradient apart") == 3
    # Every row was kept, and stands in the table.
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3
    assert capsys.readouterr().out.count("| w | kernels | 500.000 | 4 |") == 3
    assert bench.run_all(names, 0.0, None) == [f"{name}: left out, as 0 s were over" for name in names]


def test_smoke_comes_first_and_whole_sweeps_last(bench: Any) -> None:
    firsts = list(dict.fromkeys(name.split()[0] for name in bench.jobs()))
    assert firsts == [
        "smoke", "kernels", "autograd", "penalties", "reference", "wide", "tf32", "quickstart", "grid", "long",
    ]  # fmt: skip
