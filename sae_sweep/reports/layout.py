"""Aligned text for the terminal: columns, bars, and a console that writes nothing a reader did not ask for."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

NARROWEST, WIDEST = 80, 200
# Values of a list that are shown.
LISTED = 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# One character for one, so that what is aligned stays so.
_ASCII: dict[int, int | str] = {
    **dict.fromkeys(range(0x2800, 0x2900), "."),
    **dict.fromkeys(map(ord, _EIGHTHS[1:4]), "."),
    **dict.fromkeys(map(ord, _EIGHTHS[4:]), "#"),
    ord("░"): ".",
    **str.maketrans("–−×±·…│─┌┐└┘┤├┬┴┼✓✗→━╸╺", "--x~..|-+++++++++vx>---"),
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would end the process here; a run must outlive whoever read its progress."""
        raise BrokenPipeError


def stream_console(stream: TextIO) -> Console:
    """A console as wide as the terminal: no colours but on a terminal without NO_COLOR, elsewhere no escape codes."""
    plain = bool(os.environ.get("NO_COLOR")) or not stream.isatty()
    return _Console(file=stream, color_system=None if plain else "auto", highlight=False)


def console(stream: TextIO | None = None) -> Console:
    """The console for a report, on `stream` (stdout): 80 to 200 columns wide."""
    found = stream_console(stream or sys.stdout)
    found.width = min(max(found.width, NARROWEST), WIDEST)
    return found


def write(to: Console, *parts: RenderableType) -> None:
    """Print the parts; where the stream knows no Unicode, in ASCII of the same widths."""
    with to.capture() as capture:
        for part in parts:
            if isinstance(part, Text):  # print would forget that a text is not to be wrapped
                to.print(part, no_wrap=part.no_wrap, overflow=part.overflow, crop=False)
            else:
                to.print(part)
    text = capture.get()
    try:
        text.encode(to.encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode("ascii", "replace").decode()
    to.file.write(text)
    to.file.flush()


@dataclass(frozen=True)
class Row:
    """A line of cells in one style."""

    cells: Sequence[str]
    style: str = ""


@dataclass(frozen=True)
class Block:
    """Rows under a title of their own."""

    title: str
    rows: Sequence[Row]


def columns(headers: Sequence[str], blocks: Sequence[Block], width: int, last_left: bool = False) -> Text:
    """Blocks of rows under one head: the first column to the left, the others to the right.

    A header may have two lines. With `last_left` the last column is to the left too and is cut to fit `width`. Where a
    table is still too wide, words of the first column that leave no room beside them have a line of their own.
    """
    heads = [header.split("\n") for header in headers]
    depth = max(map(len, heads))
    head = [
        Row([lines[i - depth + len(lines)] if i >= depth - len(lines) else "" for lines in heads], "bold")
        for i in range(depth)
    ]
    rows = [*head, *(row for block in blocks for row in block.rows)]
    widths = [max(len(row.cells[i]) for row in rows) for i in range(len(headers))]
    gap = 2 if sum(widths) + 2 * len(widths) <= width else 1
    if last_left:
        widths[-1] = min(widths[-1], max(8, width - sum(widths[:-1]) - gap * (len(widths) - 1)))
    over = sum(widths) + gap * (len(widths) - 1) - width
    if 0 < over <= widths[0] - max(len(row.cells[0]) for row in head):
        widths[0] -= over

    def line(row: Row) -> Text:
        first, *others = row.cells
        if len(first) > widths[0]:
            alone = Text(f"{first}\n", style=row.style, no_wrap=True, overflow="crop")
            return alone.append_text(line(replace(row, cells=["", *others])))
        cells = []
        for i, (cell, space) in enumerate(zip(row.cells, widths, strict=True)):
            short = cell if len(cell) <= space else cell[: space - 1] + "…"
            left = i == 0 or (last_left and i == len(widths) - 1)
            cells.append(short.ljust(space) if left else short.rjust(space))
        return Text((" " * gap).join(cells).rstrip() + "\n", style=row.style, no_wrap=True, overflow="crop")

    text = Text(no_wrap=True, overflow="crop")
    for row in head:
        text.append_text(line(row))
    for i, block in enumerate(blocks):
        if block.title:
            title = "\n".join(wrap(block.title, width, subsequent_indent="  ", break_on_hyphens=False))
            text.append("\n" * (i > 0) + f"{title}\n", style="bold cyan")
        for row in block.rows:
            text.append_text(line(row))
    text.rstrip()
    return text


def bar(value: float, most: float, width: int) -> str:
    """A bar of `width` cells at `most`, in eighths of a cell."""
    eighths = round(8 * width * value / most) if most > 0 else 0
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)


def fraction(value: float) -> str:
    """A share such as FVU: four decimals, fewer digits below."""
    return f"{value:.4f}".replace("0.", ".", 1) if 1e-4 <= value < 1 else f"{value:.3g}"


def count(value: float) -> str:
    """A mean count: whole where it is whole."""
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def listed(values: Sequence[Any]) -> str:
    """Values side by side; of more than LISTED the first ones, the last, and how many."""
    if len(values) <= LISTED:
        return ", ".join(map(str, values))
    return f"{', '.join(map(str, values[: LISTED - 2]))}, …, {values[-1]} ({len(values):,} values)"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    spans = ((120, 1, "s"), (7200, 60, "min"), (math.inf, 3600, "h"))
    return next(f"{seconds / unit:.0f} {name}" for below, unit, name in spans if seconds < below)


def plural(number: int, word: str) -> str:
    """`1 point`, `2 points`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def log_ticks(low: float, high: float) -> list[float]:
    """Round values within the limits of a logarithmic axis: powers of ten, with 2 and 5 or every digit of them where
    the range is smaller, and steps of equal size where it is so small that few of those lie in it."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1,) if len(decades) > 4 else (1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    inside = [value for decade in decades for digit in leading if low <= (value := digit * 10.0**decade) <= high]
    if len(inside) > 2 or high <= low:
        return inside if len(inside) > 1 else [low, high]
    unit = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(size * unit for size in (1, 2, 5, 10) if (high - low) / (size * unit) <= 5)
    return [float(f"{i * step:.6g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
