"""What an architecture adds to a step: three compiled functions, which kernels take as pointers.

So `take_steps` is compiled once for all architectures, and theirs only when one is used. Shapes as in sparse_step.py.
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

# What is counted of a part: its penalty; its squared error; what else the objective has; how many of its entries fire;
# and how many entries it has.
PENALTY, SQUARED, FURTHER, FIRED, ENTRIES, TOTALS = 0, 1, 2, 3, 4, 5

# `reconstruct(x, begin, end, flat, W_dec, norms, slopes, shares, scale, p, of_error, of_penalty, codes, latents,
# starts, residuals, places, sums, rows, g_bdec, own, totals)`: reconstruct inputs [begin, end) from a part's list and
# put its entries into place. of_error = 2/batch and of_penalty = coefficient/batch weigh an input. residuals receives
# of_error · (x̂ − x), g_bdec [1, d] and totals [TOTALS] what there is to add. W_dec is as it is used.
reconstructs = numba.void(
    _table, _int, _int, _row, _table, _row, SLOPES, _row, _real, _real, _float, _float, _table, _ints,
    _int[::1], _table, numba.int32[::1], _table, _ints, _table, _real[::1], _real[::1],
)  # fmt: skip
# `finish_gradient(flat, W_dec, norms, sums, bounds, gradient, active, inputs, whole, of_penalty, own, begin, end)`: add
# the rest of the gradient of latents [begin, end), which their entries add along no input. inputs: how many inputs are
# listed; whole: whether these and the inputs whose gradients were finished before are the whole batch.
finishes_gradient = numba.void(
    _row, _table, _row, _table, _int[::1], _row, _flags, _int, numba.boolean, _float, _real[::1], _int, _int
)
# `refresh(flat, W_dec, encoder, norms, idle, own, begin, end)`: once latents [begin, end) have moved, bring what
# kernels read of them up to date. Idle latents have not moved.
refreshes = numba.void(_row, _table, ENCODER, _row, _flags, _real[::1], _int, _int)
RECONSTRUCT, FINISH_GRADIENT, REFRESH = (
    numba.types.FunctionType(each) for each in (reconstructs, finishes_gradient, refreshes)
)


def _nothing(point: Point) -> list[float]:
    return []


@dataclass(frozen=True)
class ArchitectureSteps:
    """The three functions of an architecture, and what they need.

    columns: how many numbers an entry has; residual_column: which of them says along which residual its gradient lies
    own: numbers that a point gives to the functions; levels: how many residuals an input has, from a point
    floor: what a listed code, times its latent's weight, exceeds
    at_zero: an entry that is listed need not fire, so that the penalty's slope at 0 is needed
    unit: the encoder and the decoder are rows of unit norm, kept apart from the parameters that are trained
    dense: codes and penalty are ReLU's, so that dense_gradient.py knows the gradient. For the other architectures lists
    are faster than autograd until three quarters of the latents fire, and lists never hold more than they have room for
    """

    reconstruct: Callable[..., None]
    finish_gradient: Callable[..., None]
    refresh: Callable[..., None]
    columns: int = OWN
    residual_column: int = ROW
    own: Callable[[Point], list[float]] = _nothing
    levels: Callable[[Point], int] = field(default=lambda point: 1)
    floor: float = 0.0
    at_zero: bool = False
    unit: bool = False
    dense: bool = False

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Addresses of the three functions."""
        return (
            address_of(self.reconstruct, reconstructs),
            address_of(self.finish_gradient, finishes_gradient),
            address_of(self.refresh, refreshes),
        )


# The module and the name of each architecture's functions: to load them is to compile them.
STEPS = {
    "relu": ("relu", "RELU"),
    "topk": ("relu", "CHOSEN"),
    "batchtopk": ("relu", "CHOSEN"),
    "jumprelu": ("jumprelu", "JUMPRELU"),
    "gated": ("gated", "GATED"),
    "matryoshka": ("matryoshka", "MATRYOSHKA"),
    "tied": ("tied", "TIED"),
}


@functools.cache
def steps_of(architecture: str) -> ArchitectureSteps:
    """The functions of an architecture."""
    module, name = STEPS[architecture]
    steps: ArchitectureSteps = getattr(import_module(f"sae_sweep.kernels.cpu.{module}"), name)
    return steps
