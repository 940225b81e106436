"""Keeps on disk what is written from a penalty's formula: SymPy, which it takes, needs half a second to be loaded.

A text is named by a hash of the formula and of all code that writes it or that it is compiled with: what is found is
what would be written now. A text of functions is run as a module of its own, so that numba keeps them too; what it
cannot keep is compiled in memory.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from sae_sweep.saes.formula import Formula
from sae_sweep.store.kept import kept

_modules: dict[str, ModuleType] = {}
_one_at_a_time = threading.Lock()


@functools.cache
def code_in(folder: Path) -> str:
    """A hash of the code in this folder and in that of who writes texts, and SymPy's version.

    To be taken when the writer is imported: its files may change under a process that runs, which then writes by the
    code that it has.
    """
    files = [*sorted(Path(__file__).parent.glob("*.py")), *sorted(folder.glob("*.py"))]
    found = hashlib.sha256(importlib.metadata.version("sympy").encode())
    for file in files:
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def kept_text(kind: str, formula: Formula, *details: object, code: str, write: Callable[[], str]) -> str:
    """What `write` says of a formula; kept for other processes.

    kind and details: what else it depends on · code: `code_in` of who writes it
    """
    return kept(f"{_name(kind, formula, details, code)}.py", write)[0]


def kept_module(kind: str, formula: Formula, *details: object, code: str, write: Callable[[], str]) -> ModuleType:
    """The same text, run as a module; functions that it compiles with `cache=keep` are kept as well."""
    name = _name(kind, formula, details, code)
    with _one_at_a_time:
        if name not in _modules:
            text, place = kept(f"{name}.py", write)
            with suppress(Exception):  # whatever a damaged file of numba's makes it raise
                if place is not None:
                    _modules[name] = _run(name, text, str(place), keep=True)
            if name not in _modules:
                _modules[name] = _run(f"{name}_in_memory", text, f"<{name}>", keep=False)
        return _modules[name]


def _run(name: str, text: str, file: str, keep: bool) -> ModuleType:
    """numba names what it compiles by its module, so that functions of two formulas are never taken for one another."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(keep=keep, __file__=file)
    exec(compile(f"\n{text}", file, "exec"), vars(module))  # lines as they are in the file
    return module


def _name(kind: str, formula: Formula, details: tuple[object, ...], code: str) -> str:
    told = repr((kind, formula.text, formula.outer_text, details, code))
    return f"sae_sweep_{kind}_{hashlib.sha256(told.encode()).hexdigest()[:32]}"
