"""Formulas as text: what is read, what is one and the same, what is refused; the built-in penalties as text."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sympy as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_sweep.errors import UserError
from sae_sweep.registry import kinds
from sae_sweep.saes.formula import Formula, check, parse
from sae_sweep.saes.formula_text import Node, derivative
from sae_sweep.saes.penalties import formula_of

a, s, p, ε, T0, T1 = sp.symbols("a s p ε T0 T1", positive=True)
M, logπ = sp.symbols("M logπ", real=True)
_PRODUCT = sp.Piecewise((sp.exp(T0) - 1, T0 <= 8), (sp.exp(8) * (1 + T0 - 8) - 1, True))
# Every penalty of the package: terms, outer and largest, written with SymPy by hand.
BY_HAND = {
    "none": ([sp.Integer(0)], T0, 0),
    "l1": ([a], T0, 0),
    "lp": ([(a + ε) ** p - ε**p], T0, 0),
    "sqrt": ([sp.sqrt(a + ε) - sp.sqrt(ε)], T0, 0),
    "log1p": ([sp.log(1 + a / s)], T0, 0),
    "log1p_sq": ([sp.log(1 + a**2 / s**2)], T0, 0),
    "tanh": ([sp.tanh(a / s)], T0, 0),
    "prod1p": ([sp.log(1 + a / s)], _PRODUCT, 0),
    "pair": ([a, a**2], (T0**2 - T1) / 2, 0),
    "lp_annealed": ([(a + ε) ** p - ε**p], T0, 0),
    "hoyer": ([a, a**2], T0**2 / (T1 + ε), 0),
    "mcp": ([sp.Piecewise((a - a**2 / (2 * s), a <= s), (s / 2, True))], T0, 0),
    "l0": ([sp.Piecewise((0, a <= ε), (1, True))], T0, 0),
    "exclusive": ([a], (T0 - M) / (sp.Rational(1, 10) * s) + M / s, a),
    "exclusive_pi": ([a], T0 / (sp.Rational(1, 10) * s) - M, 9 * a / s + logπ),
    "formula": ([a / (a + s)], T0, 0),
}


def test_every_penalty_is_covered() -> None:
    assert set(BY_HAND) == set(kinds("penalty"))


@pytest.mark.parametrize("name", BY_HAND)
def test_texts_of_penalties_are_the_expressions_that_they_stand_for(name: str) -> None:
    formula, (terms, outer, largest) = formula_of(name), BY_HAND[name]
    assert formula.expressions() == (tuple(terms), outer, largest)
    assert parse(formula.text, formula.outer_text) == formula
    if name not in ("none", "exclusive_pi"):
        check(formula, scale=0.7, p=0.3)


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


@settings(deadline=None)
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


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("alike", [1, 3])
def test_values_and_slopes_are_those_of_sympy(name: str, alike: int) -> None:
    terms, outer, largest = BY_HAND[name]
    sums = dict(zip((T0, T1), (alike * term for term in terms), strict=False))
    whole = sp.sympify(outer.subs({**sums, M: largest})).subs({s: 0.7, p: 0.3, ε: 1e-3, logπ: -0.5})
    at = np.array([0.01, 0.4, 3.0])
    value, slope = formula_of(name).value(at, 0.7, 0.3, alike, log_share=-0.5)
    np.testing.assert_allclose(value, [float(whole.subs(a, each)) for each in at], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(slope, [float(sp.diff(whole, a).subs(a, each)) for each in at], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "text", ["a^p*tanh(a/s)", "log(1 + a)/(a + s)", "atan(a)^2 - 1/(1 + exp(-a))", "2^a*sqrt(a + s)", "erf(a*s)"]
)
def test_derivatives_are_those_of_sympy(text: str) -> None:
    node = parse(text).term
    at = {"s": 0.7, "p": 0.3, "a": 1.3}
    expected = sp.diff(sp.sympify(text), sp.Symbol("a")).subs({sp.Symbol(name): size for name, size in at.items()})
    found, _ = Formula(derivative(node, Node("name", ("a",)))).value(np.array(at["a"]), at["s"], at["p"])
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


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
        ("a", "2*T - max(a + logπ)", "logπ is known to penalty=exclusive_pi alone"),
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
