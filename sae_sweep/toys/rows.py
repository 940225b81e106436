"""Rows of numbers in a file of one's own: .npy, .npz, .safetensors or .parquet, read as they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, pd, torch = lazy("numpy"), lazy("pandas"), lazy("torch")

# NumPy's name of what safetensors calls each type; bfloat16 is read as whole numbers and seen as what it is.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "int16"}


@dataclass(frozen=True)
class Rows:
    """Activations [N, d] of a file; `numbers` may be mapped from it, so that they need not fit into memory."""

    numbers: NDArray[Any]
    bfloat16: bool = False

    def read(self, which: Any) -> Tensor:
        """Some of the rows [b, d], float32: by their numbers [b], or a slice."""
        found = torch.from_numpy(np.array(self.numbers[which]))
        return found.view(torch.bfloat16).float() if self.bfloat16 else found.float()


def open_rows(path: Path) -> Rows:
    """The rows of a .npy, .npz, .safetensors or .parquet file. UserError: it is none, or holds no single matrix."""
    try:
        if path.suffix == ".npy":
            rows = Rows(np.load(path, mmap_mode="r", allow_pickle=False))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                rows = Rows(arrays[_only(path, list(arrays.files))])
        elif path.suffix == ".safetensors":
            rows = _of_safetensors(path)
        elif path.suffix == ".parquet":
            rows = Rows(pd.read_parquet(path).to_numpy("float32"))
        else:
            raise UserError(f"toy.file={path} must end in .npy, .npz, .safetensors or .parquet")
    except UserError:
        raise
    except Exception as error:  # whatever the readers raise on files that are damaged
        raise UserError(f"toy.file={path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if rows.numbers.ndim != 2 or not rows.numbers.size:
        raise UserError(f"toy.file={path} holds {list(rows.numbers.shape)}, wanted [rows, numbers]")
    if not rows.bfloat16 and rows.numbers.dtype.kind not in "fiu":
        raise UserError(f"toy.file={path} holds {rows.numbers.dtype}, wanted numbers")
    return rows


def _only(path: Path, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UserError(f"toy.file={path} holds {len(names)} arrays ({', '.join(names[:6])}), wanted one")
    return names[0]


def _of_safetensors(path: Path) -> Rows:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    about = header[_only(path, list(header))]
    if about["dtype"] not in _TYPES:
        raise UserError(f"toy.file={path} holds {about['dtype']}, wanted one of {', '.join(_TYPES)}")
    begin = 8 + length + about["data_offsets"][0]
    numbers = np.memmap(path, _TYPES[about["dtype"]], "r", begin, tuple(about["shape"]))
    return Rows(numbers, about["dtype"] == "BF16")
