"""`sae-sweep prior` and `sae-sweep penalties NAME`: what they print, their JSON, and what they refuse."""

from __future__ import annotations

import json

import pytest
from commandline import call

from sae_sweep.registry import kinds


def test_prior_of_a_penalty_in_words_and_numbers() -> None:
    out = call("prior", "log1p", "1", "3", "--scale", "2").out
    assert "log(1 + a/s), s = 2" in out and "normalisable for λ > 1 only: far out it falls as a^-(λ)" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "1", "none", "–", "none", "a^-1"] in lines
    (three,) = (line for line in lines if line[:2] == ["3", "3"])
    assert (three[2], three[5], three[6], three[9]) == ("1", "1", "2", "a^-3")
    assert "λ = 1 (no density)" in out and "┤" in out


def test_json_has_what_is_known_and_null_for_what_does_not_exist() -> None:
    found = json.loads(call("prior", "log1p_sq", "0.25", "1", "--sigma", "0.5", "--json").out)
    assert (found["penalty"], found["formula"], found["scale"], found["sigma"]) == (
        "log1p_sq",
        "log(1 + a^2/s^2)",
        1,
        0.5,
    )
    (latent,) = found["one_latent"]
    assert (latent["tail"], latent["proper_above"], latent["slope_at_zero"]) == ("power", pytest.approx(0.5), 0)
    improper, cauchy = latent["priors"]
    assert (improper["lambda"], improper["proper"], improper["z"], improper["mean"]) == (0.5, False, None, None)
    assert (cauchy["lambda"], cauchy["proper"], cauchy["mean"]) == (2, True, pytest.approx(2 / 3.141592653589793))
    assert found["joint"] == []


def test_prior_of_a_formula_of_ones_own() -> None:
    out = call("prior", "a/(a+s)", "1", "2").out
    assert "a/(a + s), s = 1" in out and "normalisable for no λ" in out
    coupled = json.loads(call("prior", "log(1+a/s)", "2", "--outer", "exp(T)-1", "--json").out)
    assert (coupled["penalty"], coupled["outer"]) == (None, "exp(T) - 1")
    assert [latent["beside"] for latent in coupled["one_latent"]] == [[], [1.0]]
    assert [latent["priors"][0]["mean"] for latent in coupled["one_latent"]] == pytest.approx([0.5, 0.25])
    assert [(each["latents"], each["proper"]) for each in coupled["joint"]] == [(2, True), (3, True)]


def test_pair_is_said_to_be_proper_from_three_latents_on() -> None:
    found = json.loads(call("prior", "pair", "1", "--json").out)
    assert [(each["latents"], each["proper"]) for each in found["joint"]] == [(2, False), (3, True)]
    assert "three" in found["closed_form"]


@pytest.mark.parametrize("name", [name for name in kinds("penalty") if name != "none"])
def test_every_penalty_has_a_prior_or_is_said_to_have_none(name: str) -> None:
    found = json.loads(call("prior", name, "1", "--json").out)
    assert found["penalty"] == name and found["closed_form"]
    improper = not found["one_latent"][0]["priors"][0]["proper"]
    assert improper == (name in ("log1p", "tanh", "pair", "hoyer", "mcp", "l0", "formula"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["log1q"], "there is no penalty 'log1q' (did you mean 'log1p'"),
        (["sqrt(a)"], "has no finite slope at a = 0"),
        (["2a"], "a product is written 2*a"),
        (["l1", "0"], "coefficient must be above 0"),
        (["l1", "x"], "[COEFFICIENT]"),
        (["l1", "--sigma", "0"], "sigma must be above 0"),
        (["pair", "--outer", "T"], "has its own"),
        (["none"], "no prior"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words: list[str], says: str) -> None:
    result = call("prior", *words)
    assert result.code == 2 and says in result.err and result.err.count("\n") == 1 and not result.out


def test_penalties_name_has_the_prior_at_its_ladder() -> None:
    out = call("penalties", "prod1p").out
    assert "slope at zero" in out and "Z of 2 latents" in out and "l1" not in out.split()
    found = json.loads(call("penalties", "l1", "--json").out)
    assert found["name"] == "l1" and [each["mean"] for each in found["implied_prior"]["one_latent"][0]["priors"]] == [
        pytest.approx(1 / coefficient) for coefficient in found["ladder"]
    ]
    assert json.loads(call("penalties", "none", "--json").out)["implied_prior"] is None
    assert "did you mean" in call("penalties", "log1q").err


def test_the_three_questions_are_answered() -> None:
    for name, answer in (
        ("log1p", "With λ > 1 it is a Lomax"),
        ("prod1p", "weighted by its own product"),
        ("pair", "a mixture over the latent j that fires"),
    ):
        assert answer in " ".join(call("penalties", name).out.split())
