"""The training curve of an SAE: few rows of many looks (saes/train.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sae_sweep.saes.stack import Stack

if TYPE_CHECKING:
    from sae_sweep.saes.train import Look

# Rows that a training curve keeps of every doubling of the step, however long the training: enough to see where it
# leads (store/plateau.py).
ROWS_AN_OCTAVE = 16


def curve(stack: Stack, looks: Sequence[Look], i: int) -> Iterator[dict[str, Any]]:
    """SAE i's rows of the curve, ROWS_AN_OCTAVE of them for every doubling of the step, the last look at the end.

    Each is the mean of the steps since the row before, with the learning rate and coefficient of its last step. Of the
    gradient's norm it has the largest: a peak is not to fall between two rows.
    """
    begin = 0
    for part in _octave_parts(looks):
        length = torch.tensor([begin, *(look.step for look in part)]).diff()
        begin = part[-1].step
        means = {
            name: float((torch.stack([getattr(look, name)[i] for look in part]).double() * length).sum() / length.sum())
            for name in ("loss", "fvu", "l0")
        }
        gradient = max(float(look.gradient[i]) for look in part)
        lr, coefficient = stack.schedule(i, begin - 1)
        if stack.points[i].training.target_l0 is not None:
            coefficient *= float(part[-1].rescale[i])
        row = {"step": begin, **means, "gradient": gradient, "lr": lr, "coefficient": coefficient}
        if stack.points[i].training.revival != "none":
            row["revived"] = int(sum(float(look.revived[i]) for look in part))
            row["dead"] = int(part[-1].dead[i])
        yield row


def _octave_parts(looks: Sequence[Look]) -> Iterator[list[Look]]:
    """The looks in groups of consecutive ones: parts of octaves, counted from the last look back."""
    parts = itertools.groupby(looks, lambda look: math.floor(ROWS_AN_OCTAVE * math.log2(looks[-1].step / look.step)))
    return (list(part) for _, part in parts)
