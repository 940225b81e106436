"""Formulas as text: what is read, what is one and the same, what is refused; the built-in penalties as text."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sympy as sp
from hypothesis import given
from hypothesis import strategies as st

from sae_sweep.errors import UserError
from sae_sweep.saes.formula import check, parse, split_formulas
from sae_sweep.saes.penalties import FORMULAS, M, T, a, p, s, ε

# Every penalty of the package as (formula, outer): a declaration in text can hold it.
BUILT_IN: dict[str, tuple[str, str | None]] = {
    "none": ("0", None),
    "l1": ("a", None),
    "lp": ("(a+ε)^p - ε^p", None),
    "sqrt": ("sqrt(a+ε) - sqrt(ε)", None),
    "log1p": ("log(1 + a/s)", None),
    "log1p_sq": ("log(1 + a^2/s^2)", None),
    "tanh": ("tanh(a/s)", None),
    "prod1p": ("log(1 + a/s)", "where(T <= 8, exp(T) - 1, exp(8)*(T - 7) - 1)"),
    "pair": ("a", "(T^2 - sum(a^2))/2"),
    "lp_annealed": ("(a+ε)^p - ε^p", None),
    "hoyer": ("a", "T^2/(sum(a^2) + ε)"),
    "mcp": ("where(a <= s, a - a^2/(2*s), s/2)", None),
    "l0": ("where(a <= ε, 0, 1)", None),
    "exclusive": ("a", "(T - max(a))/(s/10) + max(a)/s"),
    "exclusive_pi": ("a", "T/(s/10) - max(9*a/s + logπ)"),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_built_in_penalty_can_be_written_as_text(name: str) -> None:
    text, outer = BUILT_IN[name]
    formula, built_in = parse(text, outer), FORMULAS[name]
    terms, outer_expression, largest = formula.expressions()
    assert terms == built_in.terms
    assert sp.simplify(outer_expression - built_in.outer) == 0 if outer else outer_expression == T[0]
    assert sp.simplify(largest - built_in.largest) == 0
    if name != "none":
        check(formula, scale=0.7, p=0.3)
    assert parse(formula.text, formula.outer_text) == formula


def test_product_is_continued_just_as_the_built_in_one() -> None:
    (_, expression, _) = parse(*BUILT_IN["prod1p"]).expressions()
    assert expression == FORMULAS["prod1p"].outer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a/(a+s)", " a / ( ( s + a ) ) "),
        ("(a+ε)^p - ε^p", "((eps + a)**p) - eps**p"),
        ("sqrt(a+ε) - sqrt(ε)", "(a + epsilon)^0.5 - ε**(1/2)"),
        ("log1p(a/s)", "log(a/s + 1)"),
        ("expm1(a)", "exp(a) - 1"),
        ("a*s*p", "p·s×a"),
        ("a/2/s", "0.5*a/s"),
        ("a/(2*s)", "a*s^-1*1e0/2"),
        ("-(a*s)^2 + a", "a − (s*a)**2"),
        ("a + a", "2*a"),
        ("a*a/s", "a^2/s"),
        ("s*a - a*s + a", "a"),
        ("min(a, s)", "where(s >= a, a, s)"),
        ("where(a > s, 1, a)", "where(a ≤ s, a, 1)"),
    ],
)
def test_the_same_formula_written_otherwise_is_the_same(one: str, other: str) -> None:
    assert parse(one) == parse(other)
    assert parse(one).text == parse(other).text


def test_algebra_is_not_done() -> None:
    assert parse("(a + 1)*s").text != parse("a*s + s").text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a/(a+s)", "a/(a + s)"),
        ("-ε^p+(ε+a)^p", "(a + ε)^p - ε^p"),
        ("-a^2", "-a^2"),
        ("a^-2", "1/a^2"),
        ("a^p^2", "a^(p^2)"),
        ("a - (s - p)", "a - (s - p)"),
        ("0.1*a/3", "a/30"),
        ("a^(1/3)", "a^(1/3)"),
        ("a/(s/10)", "10*a/s"),
        ("1/(1/a)", "a"),
        ("2^3*a", "8*a"),
        ("min(a, 2*s)", "where(a <= 2*s, a, 2*s)"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    """Stored identities hold these texts: none of them may ever change."""
    assert parse(text).text == canonical


_numbers = st.sampled_from(["1", "2", "0.5", "3", "1e-3"])
_texts = st.recursive(
    st.one_of(_numbers, st.sampled_from(["a", "s", "p", "ε"])),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(lambda t: f"({t[0]}{t[1]}({t[2]}))"),
        st.tuples(st.sampled_from(["exp", "log", "tanh", "sqrt", "-"]), inner).map(lambda t: f"{t[0]}({t[1]})"),
        st.tuples(inner, st.sampled_from(["2", "-1", "p", "0.5", "-0.5", "-p"])).map(lambda t: f"({t[0]})^({t[1]})"),
        st.tuples(inner, inner).map(lambda t: f"where(a <= s, 1, {t[1]})"),
    ),
    max_leaves=6,
)


@given(_texts)
def test_canonical_text_reads_as_itself_and_has_the_same_value(text: str) -> None:
    try:
        formula = parse(text)
    except UserError:
        return
    again = parse(formula.text)
    assert again == formula
    at = np.array([0.3, 1.7])
    names = {"a": at, "s": 1.3, "p": 0.6, "ε": 1e-3, "exp": np.exp, "log": np.log, "tanh": np.tanh, "sqrt": np.sqrt}
    with np.errstate(all="ignore"):
        # Python itself reads the text as typed.
        by_python = eval(text.replace("^", "**").replace("a <=", "a >="), names | {"where": lambda c, x, y: 0 * at})
    if "where" in text or not np.isfinite(by_python).all() or (np.abs(by_python) > 1e12).any():
        return
    np.testing.assert_allclose(formula.value(at, 1.3, 0.6)[0], by_python + 0 * at, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "none"])
@pytest.mark.parametrize("alike", [1, 3])
def test_values_and_slopes_are_those_of_sympy(name: str, alike: int) -> None:
    formula, built_in = parse(*BUILT_IN[name]), FORMULAS[name]
    sums = dict(zip(T, (alike * term for term in built_in.terms), strict=False))
    numbers = {s: 0.7, p: 0.3, ε: 1e-3, sp.Symbol("logπ", real=True): -0.5}
    whole = built_in.outer.subs({**sums, M: built_in.largest}).subs(numbers)
    at = np.array([0.01, 0.4, 3.0])
    value, slope = formula.value(at, 0.7, 0.3, alike, log_share=-0.5)
    np.testing.assert_allclose(value, [float(whole.subs(a, each)) for each in at], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(slope, [float(sp.diff(whole, a).subs(a, each)) for each in at], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2a", "a sign is missing before 'a' at character 2"),
        ("a(1+a)", "there is no function 'a'"),
        ("tan(a)", "there is no function 'tan' (did you mean 'tanh'"),
        ("log10(a)", "did you mean 'log1p'"),
        ("scale*a", "there is no 'scale' here"),
        ("a/", "missing before the end"),
        ("(a", "')' is missing to close a bracket, before the end"),
        ("a)", "')' at character 2 is out of place"),
        ("a,a", "',' at character 2 is out of place"),
        ("|a|", "a is never negative"),
        ("", "must be a formula such as a/(a+s)"),
        ("s*2", "has no a"),
        ("a/0", "division by zero"),
        ("a/(1-1)", "division by zero"),
        ("9^9^9", "the exponent 387420489 is above 32"),
        ("1e99*a", "out of bounds"),
        ("(1e12)^9*a", "out of bounds"),
        ("a" * 301, "301 characters, more than 300"),
        ("(" * 40 + "a" + ")" * 40, "more than 30 deep"),
        ("a" + "^a" * 40, "more than 30 deep"),
        ("log a", "log at character 1 takes an argument in brackets: log(…)"),
        ("exp(a, a)", "exp() takes 1 argument, got 2"),
        ("min(a)", "min() takes 2 arguments, got 1"),
        ("min(log(1+a), 2)", "min() compares a with numbers and settings"),
        ("where(a, 1, 2)", "where() begins with a comparison"),
        ("where(a <= a^2, a, 1)", "where() compares a with numbers"),
        ("where(a <= 2, where(a <= 1, a, 1), 2)", "can only be its last value"),
        ("sum(a)", "there is no function 'sum'"),
        ("__import__('os')", "means nothing here"),
        ("a.real", "'.' at character 2 means nothing here"),
        ("lambda: a", "means nothing here"),
        ("a if a else a", "a sign is missing before 'if'"),
    ],
)
def test_what_is_no_formula_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(text)
    message = str(refused.value)
    assert message.startswith("penalty.formula") and says in message and "\n" not in message


@pytest.mark.parametrize(
    ("outer", "says"),
    [
        ("sum(a)", "has no T"),
        ("T + sum(a) + sum(a^2)", "one sum(…) or one max(…), got sum(a) and sum(a^2)"),
        ("T + sum(a^2) + max(a)", "got max(a) and sum(a^2)"),
        ("T + sum(T)", "there is no 'T' here"),
        ("T + a", "there is no 'a' here"),
        ("T - logπ", "there is no 'logπ' here"),
        ("T + sum(s)", "it needs a"),
        ("T + max(s, 2)", "compares T, sum(…) or max(…) with numbers"),
    ],
)
def test_what_is_no_outer_formula_is_refused(outer: str, says: str) -> None:
    with pytest.raises(UserError, match=r"penalty\.outer") as refused:
        parse("a", outer)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "outer", "says"),
    [
        ("1 + a/(a+s)", None, "is 1 at a = 0 (penalty.scale=2), where it must be 0: write a/(a + s)"),
        ("1/(1+a)", None, "is 1 at a = 0"),
        ("a*log(a)", None, "is not finite at a = 0: add ε"),
        ("sqrt(a)", None, "has no finite slope at a = 0: write a + ε there"),
        ("a^p", None, "has no finite slope at a = 0 (penalty.p=0.5)"),
        ("exp(a) - 1", None, "is not finite at a = 89.13"),
        ("a - a^2/(2*s)", None, "falls from 1 at a = 1.995"),
        ("a^2 - a/10000", None, "falls from 0 at a = 0"),
        ("-a", None, "never reward a larger activation"),
        ("0*a", None, "penalises nothing"),
        ("a", "exp(T)", "is 1 at a = 0"),
        ("a", "T^2/sum(a^2)", "is not finite at a = 0"),
        ("a", "T - 2*max(a)", "falls"),
        ("a", "3*T - sum(a)*2.5 - 0.6*T", "falls"),
        ("a", "T - max(a - 1)", "max(a - 1) must be 0 at a = 0"),
        ("a", "2*T - max(a - logπ)", "must not fall with logπ"),
        ("tanh(a)", "T - where(T <= 3/2, 0, T - 3/2)*2", "2 latents firing alike"),
    ],
)
def test_what_is_no_penalty_is_refused_with_where_it_fails(text: str, outer: str | None, says: str) -> None:
    with pytest.raises(UserError) as refused:
        check(parse(text, outer), scale=2.0, p=0.5)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_settings_decide_whether_a_formula_is_a_penalty() -> None:
    check(parse("a^p"), scale=1.0, p=1.5)
    with pytest.raises(UserError, match=r"penalty\.p=0\.9"):
        check(parse("a^p"), scale=1.0, p=0.9)


def test_what_overflows_in_the_case_not_taken_does_no_harm() -> None:
    check(parse("where(a <= 8, exp(a) - 1, exp(8)*(a - 7) - 1)"), 1.0, 1.0)


@pytest.mark.parametrize(
    ("typed", "formulas"),
    [
        ("a/(a+s)", ["a/(a+s)"]),
        ("a/(a+s),tanh(a)", ["a/(a+s)", "tanh(a)"]),
        ("'a/(a+s)','tanh(a)'", ["a/(a+s)", "tanh(a)"]),
        ("'a/(a+s),tanh(a)'", ["a/(a+s)", "tanh(a)"]),
        ("where(a<=s, a, s), a", ["where(a<=s, a, s)", "a"]),
        ("a,", ["a", ""]),
        ("", [""]),
    ],
)
def test_formulas_of_an_axis_are_split_at_commas_outside_brackets(typed: str, formulas: list[str]) -> None:
    assert split_formulas(typed) == formulas


def test_settings_that_a_formula_reads() -> None:
    assert parse("a").reads == ()
    assert parse("(a+ε)^p - ε^p").reads == ("p",)
    assert parse("a", "exp(T/s) - 1").reads == ("scale",)


def test_reading_a_formula_imports_neither_sympy_nor_torch_nor_numpy() -> None:
    code = (
        "import sys; from sae_sweep.saes.formula import parse; parse('a/(a+s)', 'exp(T)-1').text; "
        "print(sorted({'sympy', 'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
