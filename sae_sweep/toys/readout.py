"""A read-out: what a model makes of activations that are read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
else:
    np, torch = lazy("numpy"), lazy("torch")


def read_readout(path: Path) -> dict[str, Tensor]:
    """W_U [d, outputs], b_U [outputs] and, where the file has them, targets [N] int64 of a .npz or .safetensors file.

    A row's output is activation @ W_U + b_U; its target is the output that is right. UserError, one line.
    """
    where = f"toy.readout={path}"
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"{where} must end in .npz or .safetensors")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            from safetensors.torch import load_file

            found = load_file(path)
    except Exception as error:  # whatever the readers raise on files that are damaged
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())[:200]}") from error
    unknown = sorted(found.keys() - {"W_U", "b_U", "targets"})
    if unknown or "W_U" not in found:
        raise UserError(f"{where} holds {', '.join(sorted(found))}, wanted W_U and, if there are any, b_U and targets")
    W_U, b_U, targets = found["W_U"], found.get("b_U"), found.get("targets")
    if W_U.dim() != 2 or not W_U.numel():
        raise UserError(f"{where}: W_U is {list(W_U.shape)}, wanted [d, outputs]")
    bias = torch.zeros(W_U.shape[1]) if b_U is None else b_U
    if tuple(bias.shape) != tuple(W_U.shape[1:]):
        raise UserError(f"{where}: b_U is {list(bias.shape)}, wanted [{W_U.shape[1]}]")
    numbers = {"W_U": W_U.float().contiguous(), "b_U": bias.float()}
    for name, tensor in numbers.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds nan or infinity")
    if targets is not None:
        if targets.dim() != 1 or targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise UserError(f"{where}: targets are {list(targets.shape)} {targets.dtype}, wanted [N] whole numbers")
        numbers["targets"] = targets.long()
        if not ((numbers["targets"] >= 0) & (numbers["targets"] < W_U.shape[1])).all():
            raise UserError(f"{where}: targets must be outputs, from 0 to {W_U.shape[1] - 1}")
    return numbers
