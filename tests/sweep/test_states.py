"""A longer training that continues from a shorter one: the same bits as without it, where that can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import TINY

from sae_sweep.api import run
from sae_sweep.config.settings import Penalty, Point, Training
from sae_sweep.store.store import Store
from sae_sweep.sweep.states import continues

CONSTANT = {"schedule": "constant", "lr_warmup": 10.0}
WORDS = ["training.schedule=constant", "training.lr_warmup=10", "penalty.coefficient=0.1,1"]


def trained(root: Path, steps: int, *words: str) -> tuple[list[bytes], int]:
    """The weights of two points of so many steps, and rows of the first one's curve."""
    asked = [word for word in TINY if not word.startswith("training.steps")]
    table = run(*asked, *WORDS, f"training.steps={steps}", f"output_dir={root}", f"name=steps{steps}", *words).frame
    store, ids = Store(root), list(table["point_id"])
    weights = [store.read("points", id, "sae_weights.safetensors") for id in ids]
    return weights, len(store.read_record("points", ids[0])["curve"])


def test_it_continues_to_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (trained(tmp_path / "continued", steps, "training.keep_state=true") for steps in (50, 125))
    assert "go on from step 50 of 125" in capsys.readouterr().err
    whole = trained(tmp_path / "whole", 125)
    assert "go on" not in capsys.readouterr().err
    assert long == whole and short[0] != long[0]
    assert not (tmp_path / "whole" / "states").exists()


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (CONSTANT, True),
        ({**CONSTANT, "lr_warmup": 0.0}, True),
        ({**CONSTANT, "lr_warmup": 0.1}, False),
        ({**CONSTANT, "schedule": "linear"}, False),
        ({**CONSTANT, "coefficient_warmup": 0.1}, False),
        ({**CONSTANT, "revival": "resample"}, False),
        ({**CONSTANT, "revival": "resample", "revival_until": 1.0}, True),
        ({**CONSTANT, "k_start": 3}, False),
    ],
)
def test_only_where_nothing_goes_by_the_share_of_steps_done(training: dict[str, object], expected: bool) -> None:
    assert continues(Point(training=Training(**training))) is expected
    assert not continues(Point(training=Training(**training), penalty=Penalty("lp_annealed")))
    kept = Point(training=Training(**training, keep_state=True))
    assert kept.id == Point(training=Training(**training)).id
