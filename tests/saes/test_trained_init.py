"""Beginning from a trained SAE: it begins as that one ended, and is another point for another SAE."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import TINY, call

from sae_sweep.api import run
from sae_sweep.config.overrides import load
from sae_sweep.errors import UserError
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
    with pytest.raises(UserError, match=r"has 5 latents, wanted sae\.width=3"):
        run(*narrower, place, "name=third", f"sae.init={first['point_id']}")


def test_what_is_no_sae_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("no SAE")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for init, says in (("../x", "holds no SAE"), ("../x/notes.txt", "is no SAE's file"), (POINT, "there is no")):
        end = call("run", "--json", *ONE, f"sae.init={init}", "output_dir=outputs")
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1) and says in end.err, end.err
    assert list(Path().iterdir()) == []


def test_what_it_begins_from_is_in_the_identity() -> None:
    points = load([*ONE, f"sae.init=random,{POINT},{POINT[::-1]}"]).points
    assert [point.sae.init for point in points] == ["random", "trained", "trained"]
    assert len({point.id for point in points}) == 3 and len({stack_key(point) for point in points}) == 1
    for init, says in (("./nowhere", "No such file"), ("trained", "cannot be 'trained'"), ("rndom", "'random'")):
        with pytest.raises(UserError, match=says):
            load([*ONE, f"sae.init={init}"])
