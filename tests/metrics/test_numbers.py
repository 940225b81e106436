"""What MEASURE_VERSION stands for: every column of three fixed SAEs, as tests/numbers.json has them.

Whoever changes one of these numbers raises MEASURE_VERSION, so that no store mixes old ones with new, and then writes
the file anew: `python tests/metrics/test_numbers.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import LookUp, untrained

from sae_sweep.config.columns import shuffled, spread
from sae_sweep.config.settings import MEASURE_VERSION, Distribution, Evaluation, Toy
from sae_sweep.metrics import evaluate, metric
from sae_sweep.metrics.labels import ACROSS, WITHIN
from sae_sweep.registry import kinds
from sae_sweep.toys import model
from sae_sweep.toys.sampling import EvaluationInputs, Stream

NUMBERS = Path(__file__).with_name("numbers.json")
TOYS = {
    "max_of_k": Toy(d_vocab=5, k=3, d_model=8, d_head=8),
    "parents": Toy(name="parents", features=4, modifiers=3, modifier_rate=0.7, d_model=12),
    "independent": Toy(name="independent", features=6, rate=0.25, magnitudes="exponential", d_model=8),
}
# Activations that repeat have no density, so that no prior is told: where magnitudes are constant, all do.
EVALUATION = {
    name: Evaluation(inputs=1_500, permutations=3, probing=True, priors=name == "independent", structure=True)
    for name in TOYS
}
# Metrics that came later have tests of their own.
HELD = ("reconstruction", "labels", "ceilings", "information", "planted", "probing", "priors", "structure")


def measured(name: str) -> dict[str, float | int | None]:
    """All columns of an SAE with a latent for each (m, q), or planted feature: noisy, sometimes silent, one dead."""
    toy, evaluation = TOYS[name], EVALUATION[name]
    loaded: Any = untrained(toy) if name == "max_of_k" else model.load(toy, model.train([toy], "cpu")[0])
    distribution = Distribution("max_stratified" if name == "max_of_k" else "uniform")
    stream = Stream(loaded, "pre_unembed", distribution, 0, 64, "cpu")
    inputs = EvaluationInputs(loaded, "pre_unembed", distribution, stream.mean, stream.scale, evaluation)
    chunks = list(inputs)
    x, cell, drawn = (torch.cat([getattr(chunk, part) for chunk in chunks]) for part in ("x", "cell", "inputs"))
    if inputs.cells is None:
        told = (loaded.features(drawn) != 0).numpy()
    else:
        classes = inputs.cells.partition("mq")
        told = np.eye(classes.count, dtype=bool)[classes.of_cell[cell.numpy()]]
    rng = np.random.default_rng(0)
    codes = told * rng.exponential(1.0, told.shape) * (rng.random(told.shape) > 0.05)
    codes += 0.3 * (rng.random(told.shape) < 0.02)
    codes[:, -1] = 0
    means = (told.T @ x.double().numpy()) / told.sum(0)[:, None]
    rows = torch.from_numpy(means + 0.1 * rng.normal(size=means.shape)).float()
    sae = LookUp(x, torch.from_numpy(codes).float(), rows, torch.zeros(len(x[0])))
    metrics = evaluate.measure(sae, inputs, lambda norms: norms.sqrt().sum(1), evaluation).metrics
    held = {column for metric in HELD for column in kinds("metric")[metric].columns}
    return {name: value for name, value in metrics.items() if name in held}


def drawn_by_numba(column: str) -> bool:
    """Cells are dealt anew by compiled code, which draws otherwise than the same lines do uncompiled."""
    if column.startswith(("info_", "unique_", "shuffled_info_", "shuffled_unique_")):
        return True
    return any(column in map(of, (*WITHIN, *ACROSS)) for of in (shuffled, spread))


@pytest.fixture(scope="module", params=TOYS)
def numbers(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of one SAE as they are and as they were."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric, "PROBE_INPUTS", 1_000)
        found = measured(request.param)
    return found, json.loads(NUMBERS.read_text())[request.param]


def same(found: Any, wanted: Any) -> bool:
    if found is None or wanted is None or math.isnan(wanted):
        return repr(found) == repr(wanted)
    # Products of matrices are rounded as a processor likes, and training goes on from that.
    return bool(found == pytest.approx(wanted, rel=1e-4, abs=1e-6))


def changed(numbers: tuple[dict[str, Any], dict[str, Any]], by_numba: bool) -> dict[str, Any]:
    found, wanted = numbers
    assert found.keys() == wanted.keys()
    columns = [name for name in wanted if drawn_by_numba(name) == by_numba]
    return {name: (found[name], wanted[name]) for name in columns if not same(found[name], wanted[name])}


def test_numbers_stay_what_they_are(numbers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert changed(numbers, by_numba=False) == {}


def test_numbers_of_cells_dealt_anew_stay(numbers: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert changed(numbers, by_numba=True) == {}


def test_they_are_those_of_this_version() -> None:
    assert json.loads(NUMBERS.read_text())["MEASURE_VERSION"] == MEASURE_VERSION


if __name__ == "__main__":
    metric.PROBE_INPUTS = 1_000
    NUMBERS.write_text(json.dumps({"MEASURE_VERSION": MEASURE_VERSION, **{n: measured(n) for n in TOYS}}, indent=1))
