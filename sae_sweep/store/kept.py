"""Texts that take long to make and that other processes will want, kept where compiled code is.

Whatever is wrong with the folder or with a file in it, a text is made anew.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sae_sweep.environment import PACKAGE, use_numba_cache
from sae_sweep.store.atomic import write_file


def kept(filename: str, make: Callable[[], str]) -> tuple[str, Path | None]:
    """A text, and the file that has it below a first line of its own: None if it cannot be kept.

    filename: says all that the text depends on
    """
    use_numba_cache()
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(chosen) if chosen else PACKAGE / "kernels" / "cpu" / "__pycache__"
    place = folder / "kept" / filename
    with suppress(OSError, UnicodeDecodeError):
        first, _, text = place.read_text("utf-8").partition("\n")
        if first == _mark(text):
            return text, place
    text = make()
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_file(place, f"{_mark(text)}\n{text}".encode())
        return text, place
    return text, None


def _mark(text: str) -> str:
    """The line by which damage to a text shows."""
    return f"# {hashlib.sha256(text.encode()).hexdigest()}"
