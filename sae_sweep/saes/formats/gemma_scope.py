"""Gemma Scope's layout: `params.npz`, the arrays of a JumpReLU SAE (arXiv 2408.05147). Nothing is unpickled."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_sweep.errors import UserError
from sae_sweep.saes.formats.loaded import LoadedSae
from sae_sweep.saes.formats.tensors import Tensors
from sae_sweep.saes.parameters import Parameters

NAME, WEIGHTS, CONFIG = "Gemma Scope", "params.npz", None


def read(weights: bytes, config: Mapping[str, Any]) -> LoadedSae:
    """The SAE of `params.npz`, which takes its input as it is. UserError names what is wrong or not known."""
    tensors = Tensors(WEIGHTS, _arrays(weights))
    d, width = tensors.size("W_enc")
    parameters = Parameters(
        tensors.take("W_enc", d, width).T.contiguous(),
        tensors.take("W_dec", width, d),
        tensors.take("b_enc", width),
        tensors.take("b_dec", d),
        torch.zeros(()),
    )
    thresholds = tensors.take("threshold", width)
    tensors.nothing_left("a JumpReLU SAE")
    return LoadedSae(NAME, "jumprelu", "jumprelu", parameters.replace(thresholds=thresholds))


def _arrays(weights: bytes) -> dict[str, Tensor]:
    """The arrays by name; those of some releases have a small w."""
    try:
        with np.load(io.BytesIO(weights), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive can raise whatever there is
        raise UserError(f"{WEIGHTS} is no archive of numpy arrays: {error}") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"{WEIGHTS}: {name} holds {array.dtype}, wanted floating-point numbers")
    native = {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays.items()}
    return {name.replace("w_", "W_", 1): torch.from_numpy(array) for name, array in native.items()}
