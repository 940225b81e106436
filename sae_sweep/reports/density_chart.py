"""Densities over activations as a chart of characters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotext
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.text import Text

_COLOURS = (4, 1, 2, 5, 6, 3)  # of the terminal's own sixteen
_MARKS = "•x+*#@"
_HEIGHT = 14


def density_chart(
    activations: NDArray[np.float64], curves: Mapping[str, NDArray[np.float64]], width: int
) -> RenderableType:
    """A line for each named curve over activations [n]; the legend above has each name with its mark and colour."""
    legend = Text()
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(width, _HEIGHT)
    plotext.ylim(0, 1)
    for i, (name, heights) in enumerate(curves.items()):
        mark, colour = _MARKS[i % len(_MARKS)], _COLOURS[i % len(_COLOURS)]
        legend.append(f"{mark} {name}   ", style=f"color({colour})")
        plotext.plot(activations.tolist(), heights.tolist(), marker=mark, color=colour)
    drawn = Text.from_ansi(plotext.build(), no_wrap=True, overflow="crop")
    drawn.rstrip()
    plotext.clear_figure()
    return Group(legend, drawn)
