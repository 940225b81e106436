"""Which library wrote a folder or a file, and the SAE that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from sae_sweep.errors import UserError
from sae_sweep.saes.formats import dictionary_learning, gemma_scope, saelens, sparsify
from sae_sweep.saes.formats.loaded import LoadedSae

# Each has NAME, WEIGHTS and CONFIG, the names of its files (CONFIG None where it has one file), and `read`.
FORMATS: tuple[ModuleType, ...] = (saelens, dictionary_learning, sparsify, gemma_scope)
KNOWN = ", ".join(
    f"{known.WEIGHTS}{f' with {known.CONFIG}' if known.CONFIG else ''} ({known.NAME})" for known in FORMATS
)


def read_sae(path: Path | str) -> LoadedSae:
    """The SAE in a folder, or in a file of weights whose settings lie beside it, on raw activations.

    UserError, one line that begins with the path: there is none, or something in it is wrong or not known.
    """
    path = Path(path)
    try:
        format, weights = _recognised(path)
        config = _settings(weights.with_name(format.CONFIG)) if format.CONFIG else {}
        sae: LoadedSae = format.read(weights.read_bytes(), config)
        return sae
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error} (an SAE is {KNOWN})") from error
    except UserError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error


def _recognised(path: Path) -> tuple[ModuleType, Path]:
    """The format, and the file of weights."""
    if path.is_dir():
        found = [format for format in FORMATS if (path / format.WEIGHTS).exists()]
        if len(found) == 1:
            return found[0], path / found[0].WEIGHTS
        names = " and ".join(format.WEIGHTS for format in found)
        raise UserError(f"holds {names}: give the file" if found else f"holds no SAE, wanted {KNOWN}")
    path.stat()  # OSError where there is nothing
    for format in FORMATS:
        if path.name in (format.WEIGHTS, format.CONFIG) and (path.with_name(format.WEIGHTS)).exists():
            return format, path.with_name(format.WEIGHTS)
    if path.suffix == ".npz":
        return gemma_scope, path
    raise UserError(f"is no SAE's file, wanted {KNOWN}")


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path.name} holds a {type(settings).__name__}, wanted an object of settings")
    return settings
