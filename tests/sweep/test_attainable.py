"""Claims that ask for more than the perfect code has, on toys whose ceilings are counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import call

from sae_sweep.config import overrides
from sae_sweep.errors import UserError
from sae_sweep.sweep.attainable import check_attainable

CLAIM = {"name": "much", "prediction": "p", "measure": "distinct_splits_per_max", "aggregate": "median"}


def check(claim: dict[str, Any], *words: str) -> None:
    """Of max-of-3 over 6 tokens with every maximum as likely, at widths 6 and 64, or of another toy."""
    sweep = overrides.load(words or ["toy.d_vocab=6", "toy.k=3", "sae.width=6,64"])
    sweep.claims.append({**CLAIM, **claim})
    check_attainable(sweep)


def refused(claim: dict[str, Any], *words: str) -> str:
    with pytest.raises(UserError) as caught:
        check(claim, *words)
    return str(caught.value)


def test_more_maxima_than_there_are_are_refused_with_both_numbers() -> None:
    owned = {"measure": "owned_maxes"}
    check({**owned, "at_least": 6})
    assert "claim much asks for owned_maxes of at least 7, and the perfect code for these inputs has 6" in refused(
        {**owned, "at_least": 7}
    )


def test_more_splits_than_cells_are_refused() -> None:
    """66 cells: 1, 4, 8, 12 … of a maximum; the one cell of maximum 0 is a whole maximum."""
    cells = 1 + sum(1 + 2 * 2 * m + m * (m - 1) // 2 for m in range(1, 6))
    check({"at_least": (min(cells - 1, 64)) / 6, "where": {"width": 64}})
    refused({"at_least": (min(cells - 1, 64) + 1) / 6, "where": {"width": 64}})


def test_planted_features_have_a_ceiling_too() -> None:
    """Four parents with two modifiers: three cells of each, so three splits of a parent at most."""
    toy = ["toy=parents", "toy.features=4", "toy.modifiers=2", "sae.width=40"]
    check({"at_least": 3}, *toy)
    assert "and the perfect code for these inputs has 3 (" in refused({"at_least": 3.5}, *toy)


def test_the_width_bounds_it_too() -> None:
    check({"at_least": 5, "where": {}})  # at width 64
    assert "has 1 (" in refused({"at_least": 5, "where": {"width": 6}})


def test_a_comparison_needs_its_difference_on_one_side() -> None:
    wide, narrow = {"width": 64}, {"width": 6}
    check({"at_least": 5, "where": wide, "versus": {"where": narrow}})
    refused({"at_least": 5, "where": narrow, "versus": {"where": wide}})
    check({"at_most": -5, "where": narrow, "versus": {"where": wide}})
    refused({"at_most": -5, "where": wide, "versus": {"where": narrow}})


def test_a_share_needs_its_threshold() -> None:
    share = {"measure": "owned_maxes", "aggregate": "share", "at_least": 0.5}
    check({**share, "threshold": 6})
    refused({**share, "threshold": 7})
    check({"measure": "owned_maxes", "aggregate": "share", "at_most": 0.5, "threshold": 7})


def test_what_has_no_ceiling_is_let_through() -> None:
    check({"measure": "loss", "at_least": 1e9})
    check({"measure": "owned_maxes", "at_least": 99, "where": {"training.lr": 1}})  # no such column
    check({"measure": "owned_maxes", "at_least": 99, "where": {"width": 7}})  # no such point
    check({"measure": "owned_maxes", "at_least": 99}, "toy=independent")


@pytest.mark.parametrize("command", ["run", "plan", pytest.param("submit", marks=pytest.mark.slow)])
def test_every_command_that_trains_refuses_it(command: str, tmp_path: Path) -> None:
    words = ["experiment=one_per_max", "toy.d_vocab=8", f"output_dir={tmp_path}"]
    end = call(command, *words)
    assert end.code == 2
    assert "at least 15" in end.err and "has 8" in end.err
    assert not list(tmp_path.iterdir())


def test_claims_can_be_left_out(tmp_path: Path) -> None:
    end = call("plan", "experiment=one_per_max", "toy.d_vocab=8", "claims=[]", "--json", f"output_dir={tmp_path}")
    assert end.code == 0, end.err
    assert json.loads(end.out)["points"] > 0
