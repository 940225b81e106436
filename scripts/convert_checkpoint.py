"""Turn a pickled checkpoint of a max-of-K transformer into a safetensors file that `toy=checkpoint` reads.

    python scripts/convert_checkpoint.py MaxOf4.pth model.safetensors

Checkpoints of guarantees-based-mechanistic-interpretability (Compact Proofs, arXiv 2406.11779) hold a state dict beside
a pickled configuration, whose classes are that project's. Here tensors alone are restored: each other class or function
in the file becomes an empty object, so that no code of it is run and none of it need be installed. A state dict by
itself, and a Lightning checkpoint (`state_dict`, its names behind `model.`), are converted as well.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_sweep.errors import UserError
from sae_sweep.toys.checkpoint import parameters_of

# Where a checkpoint keeps its state dict.
PLACES = ("model", "state_dict")
# What a state dict is restored by; storages of each type come from torch by their names.
RESTORED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class Empty:
    """Stands for an object whose class is not restored, whatever it is made with and whatever is put into it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Empty:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Empty:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """As a list's."""

    def extend(self, values: Any) -> None:
        """As a list's."""

    add = append


class TensorUnpickler(pickle.Unpickler):
    """Restores tensors and containers; whatever else a pickle names becomes an Empty."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RESTORED or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module, name)
        return Empty


def load(file: Any, **further: Any) -> Any:
    """What `pickle.load` gives, by TensorUnpickler."""
    return TensorUnpickler(file, **further).load()


def state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors by name. UserError if the file holds none."""
    tensors_only = SimpleNamespace(Unpickler=TensorUnpickler, load=load, __name__="tensors only")
    try:
        content = torch.load(path, map_location="cpu", pickle_module=tensors_only, weights_only=False)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for place in PLACES:
        if isinstance(content, Mapping) and isinstance(content.get(place), Mapping):
            content = content[place]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no state dict, also not under {' or '.join(PLACES)}")
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    if len(tensors) < len(content):
        raise UserError(f"{path} holds {', '.join(sorted(map(str, set(content) - set(tensors))))} beside tensors")
    return tensors


def main() -> int:
    """Convert the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="pickled file (.pth, .pt, .ckpt)")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    arguments = parser.parse_args()
    try:
        parameters = parameters_of(state_dict(arguments.checkpoint))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    save_file(parameters, arguments.output)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in parameters.items())
    print(f"{arguments.output}: {shapes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
