"""The words of a verdict."""

from __future__ import annotations

import pytest

from sae_sweep.reports.sentences import number, predicted, sample


def test_numbers_are_short() -> None:
    assert [number(x) for x in (16.0, -0.0, 0.012345, 12345.6, 1.0e7, -0.5, None, float("nan"))] == [
        "16",
        "0",
        "0.0123",
        "12346",
        "10000000",
        "-0.5",
        "–",
        "–",
    ]


@pytest.mark.parametrize(
    ("claim", "margin", "expected"),
    [
        ({"at_least": 15}, None, "at least 15"),
        ({"at_most": -0.05}, None, "at most -0.05"),
        ({"test": "equivalence"}, 0.5, "the same within 0.5"),
        ({"test": "equivalence"}, None, "the same"),
        ({"test": "equivalence", "equals": 2.73}, 0.2, "2.73 within 0.2"),
    ],
)
def test_what_was_predicted(claim: dict, margin: float | None, expected: str) -> None:
    assert predicted(claim, margin) == expected


def test_what_it_rests_on() -> None:
    assert (sample(1, 1), sample(5, 2)) == ("1 toy × 1 seed", "5 toys × 2 seeds")
