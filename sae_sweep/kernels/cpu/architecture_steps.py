"""What an architecture adds to a step: three compiled functions, which kernels take as pointers.

So `take_steps` is compiled once for all architectures, and theirs only when one is used. Shapes as in sparse.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import numba

from sae_sweep.config.settings import Point
from sae_sweep.kernels.cpu.function_pointers import address_of
from sae_sweep.kernels.cpu.penalty_gradients import SLOPES
from sae_sweep.kernels.cpu.sparse_step import ENCODER, OWN, ROW

_float, _int, _real, _flags = numba.float32, numba.int64, numba.float64, numba.uint8[::1]
_row, _table, _ints = _float[::1], _float[:, ::1], numba.int32[:, ::1]

# What is counted of a part: penalty; squared error; what else the objective has; entries that fire, and all.
PENALTY, SQUARED, FURTHER, FIRED, ENTRIES, TOTALS = 0, 1, 2, 3, 4, 5

# `reconstruct(x, begin, end, flat, W_dec, norms, slopes, shares, scale, p, of_error, of_penalty, codes, latents,
# starts, residuals, places, sums, rows, g_bdec, own, totals)`: reconstruct inputs [begin, end) from a part's list and
# put its entries into place. of_error = 2/batch and of_penalty = coefficient/batch weigh an input. residuals receives
# of_error · (x̂ − x), g_bdec [1, d] and totals [TOTALS] what there is to add. W_dec is as it is used.
reconstructs = numba.void(
    _table, _int, _int, _row, _table, _row, SLOPES, _row, _real, _real, _float, _float, _table, _ints,
    _int[::1], _table, numba.int32[::1], _table, _ints, _table, _real[::1], _real[::1],
)  # fmt: skip
# `settle(flat, W_dec, norms, sums, bounds, gradient, active, inputs, whole, of_penalty, own, begin, end)`: the rest of
# the gradient of latents [begin, end), which their entries add along no input. inputs: how many of them are listed;
# whole: with those listed, and settled, before it is the whole batch.
settles = numba.void(
    _row, _table, _row, _table, _int[::1], _row, _flags, _int, numba.boolean, _float, _real[::1], _int, _int
)
# `lay_out(flat, W_dec, encoder, norms, idle, own, begin, end)`: once latents [begin, end) have moved, bring what is
# read of them up to date; idle ones have not moved.
lays_out = numba.void(_row, _table, ENCODER, _row, _flags, _real[::1], _int, _int)
RECONSTRUCT, SETTLE, LAY_OUT = (numba.types.FunctionType(each) for each in (reconstructs, settles, lays_out))


def _nothing(point: Point) -> list[float]:
    return []


@dataclass(frozen=True)
class Rule:
    """The functions, and what goes with them.

    columns: of an entry; seen: which of them says which residual it sees
    own: numbers for the functions, from a point; levels: residuals of an input, from a point
    floor: what a listed code, weighted, exceeds; at_zero: what is listed need not fire, so that slopes at 0 are needed
    unit: encoder and decoder are used as rows of unit norm, apart from what is trained
    dense: codes and penalty are ReLU's, so that products.py knows the gradient. Elsewhere lists are faster than
    autograd until three quarters of the latents fire, and never hold more than they have room for
    """

    reconstruct: Callable[..., None]
    settle: Callable[..., None]
    lay_out: Callable[..., None]
    columns: int = OWN
    seen: int = ROW
    own: Callable[[Point], list[float]] = _nothing
    levels: Callable[[Point], int] = field(default=lambda point: 1)
    floor: float = 0.0
    at_zero: bool = False
    unit: bool = False
    dense: bool = False

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the three functions."""
        return (
            address_of(self.reconstruct, reconstructs),
            address_of(self.settle, settles),
            address_of(self.lay_out, lays_out),
        )


# Where each architecture's rule is: to load it is to compile it.
RULES = {
    "relu": ("relu", "RELU"),
    "topk": ("relu", "CHOSEN"),
    "batchtopk": ("relu", "CHOSEN"),
    "jumprelu": ("jumprelu", "JUMPRELU"),
    "gated": ("gated", "GATED"),
    "matryoshka": ("matryoshka", "MATRYOSHKA"),
    "tied": ("tied", "TIED"),
}


@functools.cache
def rule_of(architecture: str) -> Rule:
    """The rule of an architecture."""
    module, name = RULES[architecture]
    rule: Rule = getattr(import_module(f"sae_sweep.kernels.cpu.{module}"), name)
    return rule
