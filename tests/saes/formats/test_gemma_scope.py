"""Gemma Scope's archives of arrays: other spellings of the same arrays, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import GEMMA_SCOPE, X

from sae_sweep.errors import UserError
from sae_sweep.saes.formats.index import read_sae

JUMPRELU = GEMMA_SCOPE["jumprelu"]
ARRAYS = {name: tensor.numpy() for name, tensor in JUMPRELU.tensors.items()}


@pytest.mark.parametrize(
    "arrays",
    [
        {name.replace("W_", "w_"): array for name, array in ARRAYS.items()},
        {name: array.astype(">f8") for name, array in ARRAYS.items()},
        {name: np.asfortranarray(array) for name, array in ARRAYS.items()},
    ],
    ids=["small_w", "big_endian", "fortran_order"],
)
def test_other_spellings_of_the_same_arrays(arrays: dict[str, Any], tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **arrays)
    torch.testing.assert_close(read_sae(tmp_path).encode(X), JUMPRELU.codes(X), atol=1e-5, rtol=1e-5)


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


def test_code_in_an_archive_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Payload(trace)], dtype=object))
    with pytest.raises(UserError, match="no archive of numpy arrays"):
        read_sae(tmp_path)
    (tmp_path / "params.npz").write_bytes(pickle.dumps(Payload(trace)))
    with pytest.raises(UserError, match="no archive of numpy arrays"):
        read_sae(tmp_path)
    assert not trace.exists()


def test_arrays_of_text_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **{**ARRAYS, "W_enc": np.array([["a"]])})
    with pytest.raises(UserError, match="W_enc holds <U1, wanted floating-point"):
        read_sae(tmp_path)
