"""What a claim may say, and what is said of one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from sae_sweep.config.claims import check_claims
from sae_sweep.errors import UserError

CLAIM = {
    "name": "a",
    "prediction": "b",
    "measure": "owned_maxes",
    "aggregate": "median",
    "where": {"width": 16, "penalty.p": [1, 2]},
    "at_least": 3,
}


SAME = {**{key: value for key, value in CLAIM.items() if key != "at_least"}, "test": "equivalence"}
SAME["versus"] = {"where": {"init": "random"}}


def test_claims_pass_through_with_what_they_leave_to_the_defaults() -> None:
    share = {**CLAIM, "name": "b", "aggregate": "share", "threshold": 1, "versus": {"where": {"init": "oracle"}}}
    two = {**CLAIM, "name": "c", "measure": "label_mq - label_mn", "best_of_seeds": True}
    same = {**SAME, "name": "d", "margin": 0.5, "toys": 5, "seeds": 3}
    defaults = {"test": "threshold", "toys": 2, "seeds": 2}
    number = {**{key: value for key, value in same.items() if key != "versus"}, "name": "e", "equals": 2.73}
    given = [CLAIM, share, two, same, number]
    assert check_claims(given, "here") == [{**defaults, **claim} for claim in given]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesure": "loss"}, "did you mean 'measure'?"),
        ({"name": None}, "must be a word"),
        ({"measure": "owned_max"}, "did you mean 'owned_maxes'?"),
        ({"aggregate": "med"}, "did you mean 'median'?"),
        ({"at_most": 3}, "one of at_least and at_most"),
        ({"at_least": "3"}, "must be a number"),
        ({"aggregate": "share"}, "threshold"),
        ({"at": {"fvu": 0.1, "l0": 2}}, "one column and its value"),
        ({"at": {"fvy": 0.1}}, "did you mean 'fvu'?"),
        ({"at": {"fvu": "low"}}, "must be a number"),
        ({"threshold": 1}, "threshold"),
        ({"where": {"widht": 3}}, "did you mean 'width'"),
        ({"where": 3}, "must be a mapping"),
        ({"versus": {}}, "takes where"),
        ({"versus": {"where": {"x y": 1}}}, "unknown key"),
        ({"best_of_seeds": 1}, "true or false"),
        ({"best_of_seeds": True, "at": {"fvu": 0.1}}, "one of the two"),
        ({"test": "equality"}, "did you mean 'equivalence'?"),
        ({"test": "equivalence"}, "needs versus"),
        ({"margin": 0.5}, "margin belongs to test: equivalence"),
        ({"equals": 0.5}, "equals belongs to test: equivalence"),
        ({"toys": 1}, "at least 2"),
        ({"seeds": 2.5}, "must be a whole number"),
    ],
)
def test_a_wrong_claim_is_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_claims([{**CLAIM, **change}], "here")
    assert message in str(caught.value)
    with pytest.raises(UserError, match="two claims"):
        check_claims([CLAIM, CLAIM], "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_least": 3}, "margin in place of at_least"),
        ({"equals": 2.73, "margin": 0.1}, "versus or equals"),
        ({"margin": 0}, "above 0"),
        ({"margin": "wide"}, "must be a number"),
        ({"aggregate": "max"}, "of a typical number"),
    ],
)
def test_a_wrong_claim_of_sameness_is_refused(change: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_claims([{**SAME, **change}], "here")
    assert message in str(caught.value)
