"""Beginning from a trained SAE: it begins as that one ended, and is another point for another SAE."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import TINY

from sae_sweep.api import plan, run
from sae_sweep.errors import UserError
from sae_sweep.store.store import Store
from sae_sweep.sweep.plan import stack_key

POINT = "0123456789abcdef"
ONE = [*TINY, "penalty.coefficient=1"]


def test_it_begins_as_the_other_ended(tmp_path: Path) -> None:
    place = f"output_dir={tmp_path}"
    first = run(*ONE, place, "name=first").frame.iloc[0]
    folder = tmp_path / "points" / first["point_id"]
    begun = run(*ONE, place, "name=second", f"sae.init={first['point_id']},{folder}").untrained
    for column in ("loss", "fvu", "l0"):
        assert begun[column].tolist() == pytest.approx([first[column]] * 2, rel=1e-4)
    narrower = [word.replace("width=5", "width=3") for word in ONE]
    assert run(*narrower, place, "name=third", f"sae.init={first['point_id']}").failed == 1
    (failure,) = Store(tmp_path).failures("third").values()
    assert "has 5 latents of" in failure["reason"] and "wanted sae.width=3" in failure["reason"]


def test_what_it_begins_from_is_in_the_identity() -> None:
    points = plan(*ONE, f"sae.init=random,{POINT},{POINT[::-1]}").points
    assert [point.sae.init for point in points] == ["random", "trained", "trained"]
    assert len({point.id for point in points}) == 3 and len({stack_key(point) for point in points}) == 1
    for init, says in (("./nowhere", "No such file"), ("trained", "cannot be 'trained'"), ("rndom", "'random'")):
        with pytest.raises(UserError, match=says):
            plan(*ONE, f"sae.init={init}")
