"""penalty=formula on the command line: taken as typed, canonical in the identity, its settings as axes, its errors."""

from __future__ import annotations

import pytest

from sae_sweep.config import overrides
from sae_sweep.config.settings import Penalty, Point, canonical
from sae_sweep.errors import UserError

OWN = ["experiment=null", "toy=small", "penalty=formula", "penalty.coefficient=1"]


def penalties(*words: str) -> list[Penalty]:
    return [point.penalty for point in overrides.load([*OWN, *words]).points]


@pytest.mark.parametrize(
    ("typed", "formulas"),
    [
        ("a/(a+s)", ["a/(a+s)"]),
        ("a/(a+s),tanh(a)", ["a/(a+s)", "tanh(a)"]),
        ("'a/(a+s)','tanh(a)'", ["a/(a+s)", "tanh(a)"]),
        ("'a/(a+s),tanh(a)'", ["a/(a+s)", "tanh(a)"]),
        ("where(a<=s, a, s), a", ["where(a<=s, a, s)", "a"]),
        ("a,", ["a", ""]),
    ],
)
def test_formulas_are_split_at_commas_that_stand_in_no_bracket(typed: str, formulas: list[str]) -> None:
    assert overrides.as_typed(typed) == formulas


def test_several_formulas_are_an_axis_and_one_formula_written_twice_is_one_point() -> None:
    found = penalties("penalty.formula=a/(a+s),log(1 + a / s),a/((s + a))")
    assert [(each.formula, each.outer) for each in found] == [("a/(a + s)", "T"), ("log(1 + a/s)", "T")]


def test_scale_and_p_are_axes_where_the_formula_reads_them() -> None:
    assert [each.scale for each in penalties("penalty.formula=a/(a+s)", "penalty.scale=0.5,2", "penalty.p=1,2")] == [
        0.5,
        2,
    ]
    assert [each.p for each in penalties("penalty.formula=(a+eps)**p - eps**p", "penalty.p=0.3,0.5")] == [0.3, 0.5]
    (coupled,) = penalties("penalty.formula=log(1+a/s)", "penalty.outer='exp(T) - 1'", "penalty.scale=2")
    assert (coupled.title, coupled.words) == ("exp(Σ[log(1 + a/s)]) - 1", "exp(Σ[log(1 + a/s)]) - 1 scale=2")


def test_the_canonical_formula_is_the_identity() -> None:
    def identity(formula: str, **settings: object) -> str:
        return Point(penalty=Penalty("formula", 1.0, formula=formula, **settings)).id

    assert (
        identity("a/(a+s)")
        == identity(" a / (s + a)")
        == identity("a/(a+s)", p=3.0)
        == identity("a/(a+s)", outer="(T)")
    )
    assert (
        len({identity("a/(a+s)"), identity("tanh(a)"), identity("a/(a+s)", scale=2), identity("a", outer="T+T^2")}) == 4
    )
    point = canonical(Point(penalty=Penalty("formula", 1.0, formula="(a+eps)**p-eps**p", p=0.5, scale=9.0)))
    assert point.penalty.to_dict() == {
        "name": "formula",
        "coefficient": 1.0,
        "formula": "(a + ε)^p - ε^p",
        "outer": "T",
        "scale": 1.0,
        "p": 0.5,
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["penalty.formula=2a"], "a product is written 2*a"),
        (["penalty.formula="], "a word"),
        (["penalty.formula=a,"], "a word"),
        (["penalty.formula=choice(a,tanh(a))"], "no function 'choice'"),
        (["penalty.formula=1/(a+s)"], "is 0.5 at a = 0 (penalty.scale=2)"),
        (["penalty.formula=a - a^2/9"], "falls"),
        (["penalty.formula=a^p"], "has no finite slope at a = 0 (penalty.p=0.5)"),
        (["penalty.formula=a", "penalty.outer=T - max(logπ + a)"], "penalty=exclusive_pi alone"),
        (["penalty.formula=a", "penalty.formula=tanh(a)"], "given twice"),
        (["penalty.formula=${toy.k}"], "is 3 at a = 0, where it must be 0"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        overrides.load([*OWN, "penalty.scale=2", "penalty.p=0.5", *words])
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_formula_without_its_penalty_is_refused() -> None:
    with pytest.raises(UserError, match="read by penalty=formula alone"):
        overrides.load(["experiment=null", "toy=small", "penalty=l1,tanh", "penalty.formula=a"])
