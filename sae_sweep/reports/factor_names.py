"""The user's names of factors, in place of those of max-of-K: "split latents per letter" for "per maximum"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from sae_sweep.toys.classes import FACTORS

# How we call each factor, a group each in the order of FACTORS; before a bracket max is a function.
_OURS = re.compile(r"\b(?:(maxima|maxes|maximum|max(?!\())|(query)|(runner-up)|(copies))\b", re.IGNORECASE)
_PLURAL = ("maxima", "maxes")


@dataclass(frozen=True)
class FactorNames:
    """`names`: of the factors m, q, n and c, as far as a table of factors has them; none for toys of our own."""

    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> FactorNames:
        """Those of a sweep, by its sweep.yaml."""
        return cls(tuple(map(str, info.get("factors") or ())))

    def say(self, text: str) -> str:
        """Our words with the user's names in them."""
        return _OURS.sub(self._named, text)

    def _named(self, match: re.Match[str]) -> str:
        place = (match.lastindex or 1) - 1
        return _like(match[0], self.names[place]) if place < len(self.names) else match[0]

    @property
    def legend(self) -> str:
        """Which name each letter of a label stands for: "m letter, q casing"."""
        return ", ".join(f"{factor} {name}" for factor, name in zip(FACTORS, self.names, strict=False))

    def figure(self, drawn: go.Figure) -> go.Figure:
        """A figure with the user's names in its titles, legends and labels."""
        return go.Figure(self._said(drawn.to_plotly_json())) if self.names else drawn

    def _said(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.say(value)
        if isinstance(value, dict):
            return {key: self._said(each) for key, each in value.items()}
        return [self._said(each) for each in value] if isinstance(value, list | tuple) else value


def _like(ours: str, name: str) -> str:
    """The name in the number of our word, and with a capital where that has one."""
    found = f"values of {name}" if ours.lower() in _PLURAL else name
    return found[0].upper() + found[1:] if ours[0].isupper() else found


NO_NAMES = FactorNames()
