"""Faster means to the same step as saes/train.py: compiled for processors, or for NVIDIA's GPUs."""

from __future__ import annotations

from sae_sweep.saes.formula import Formula

# The longest activation of which a tile fits a GPU's registers, and for which the error of its screening is bounded.
LONGEST = 128
# What a formula may consist of for the GPU's kernels to know its slopes (cuda/penalty_gradients.py).
_ON_GPU = {"number", "name", "+", "*", "^", "where", "exp", "log", "tanh", "sum"}


def gpu_knows(formula: Formula) -> bool:
    """Whether the GPU's kernels know a penalty. They look for no largest latent, and make of sums what no setting
    changes; what they do not know is trained by autograd."""
    return (
        formula.largest is None
        and not formula.outer.names() & {"s", "p"}
        and all(part.kind in _ON_GPU for node in (formula.term, formula.outer) for part in node.parts())
    )
