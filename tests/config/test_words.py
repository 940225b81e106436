"""Overrides given in Python become words that the command line's grammar reads back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_sweep.config.overrides import load
from sae_sweep.config.words import words
from sae_sweep.errors import UserError


def test_keywords_mappings_and_text_say_the_same() -> None:
    expected = ["sae.width=8,16", "penalty=l1", "seed=0,1", "toy.k=3"]
    assert words(["sae.width=8,16"], {"penalty": "l1", "seed": [0, 1], "toy__k": 3}) == expected
    assert words([{"sae.width": (8, 16), "penalty": "l1", "seed": range(2), "toy.k": 3}], {}) == expected
    assert words([], {"penalty__coefficient": None, "evaluation__priors": True}) == [
        "penalty.coefficient=null",
        "evaluation.priors=true",
    ]
    assert words([], {"output_dir": Path("a b"), "logger__tags": ["x", "y z"], "penalty__formula": "a/(a + s)"}) == [
        "output_dir='a b'",
        "logger.tags=[x,'y z']",
        "penalty.formula=a/(a + s)",
    ]
    with pytest.raises(UserError, match="text, as"):
        words([3], {})  # type: ignore[list-item]


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="$~"), min_size=1, max_size=9))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    sweep = load(["toy=small", "penalty.coefficient=1", *words([], {"logger__notes": text})])
    assert sweep.logger["notes"] == text
