"""The user's names in place of ours, and nothing else in place of anything."""

from __future__ import annotations

import plotly.graph_objects as go

from sae_sweep.reports.factor_names import NO_NAMES, FactorNames

NAMES = FactorNames.of({"factors": ["letter", "query"]})


def test_our_words_become_the_users() -> None:
    said = {
        "splits\nper max": "splits\nper letter",
        "Maxima that have a latent": "Values of letter that have a latent",
        "max(L0, 1) and max_of_k": "max(L0, 1) and max_of_k",
        # In one pass: what a name says is not read again. The table has no third factor.
        "maximum, query, runner-up": "letter, query, runner-up",
    }
    assert {text: NAMES.say(text) for text in said} == said
    assert FactorNames(("query", "maximum")).say("maximum, query") == "query, maximum"
    assert (NAMES.legend, NO_NAMES.legend) == ("m letter, q query", "")


def test_toys_of_ours_keep_our_words() -> None:
    figure = go.Figure(go.Bar(name="whole maximum"))
    assert NO_NAMES.say("Maximum and query") == "Maximum and query" and NO_NAMES.figure(figure) is figure
    assert NAMES.figure(figure).data[0].name == "whole letter"
