"""What an architecture adds to a step: three compiled functions, which kernels take as pointers.

So `take_steps` is compiled once for all architectures, and theirs only when one is used. Records are those of
sparse_step.py: handed over a pointer, they are the same arguments that their members would be.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import numba

from sae_sweep.config.settings import Point
from sae_sweep.kernels.cpu.function_pointers import address_of, function_at
from sae_sweep.kernels.cpu.penalty_loops import SLOPES
from sae_sweep.kernels.cpu.sparse_step import OPTIONS, OWN, ROW, SAE, WORKSPACE, record

_int, _real = numba.int64, numba.float64

# What is counted of a part: its penalty; its squared error; what else the objective has; how many of its entries fire;
# and how many entries it has.
PENALTY, SQUARED, FURTHER, FIRED, ENTRIES, TOTALS = 0, 1, 2, 3, 4, 5


class Setting(NamedTuple):
    """The settings of a step.

    Addresses: of the penalty's slopes (penalty_gradients.py) and of the architecture's three functions. The penalty's
    shares [width] (log π), its scale and exponent; the norm to which gradients are clipped; how many latents of an
    input fire at most before the steps end; the column of residuals; and whether steps end before their gradient is
    clipped, to which something is to be added.
    """

    slopes_at: int
    reconstruct_at: int
    finish_gradient_at: int
    refresh_at: int
    shares: Any
    scale: float
    exponent: float
    clip: float
    dense_above: float
    residual_column: int
    unfinished: int = 0


SETTING = record(Setting, _int, _int, _int, _int, numba.float32[::1], _real, _real, _real, _real, _int, _int)
_slopes_at = function_at(SLOPES)


@numba.njit(**OPTIONS)
def penalise(setting, norm_scaled_acts, latents, bounds, slope):  # type: ignore[no-untyped-def]
    """The penalty of listed entries, and its slope in each (penalty_gradients.py)."""
    slopes = _slopes_at(setting.slopes_at)
    return slopes(norm_scaled_acts, latents, bounds, setting.shares, setting.scale, setting.exponent, slope)


# `reconstruct(x, part, sae, setting, work, (of_error, of_penalty))`: reconstruct the inputs of a part's list, put its
# entries into place and mark the latents that fire. of_error = 2/batch and of_penalty = coefficient/batch weigh an
# input. Of the workspace, residuals receives of_error · (x̂ − x), g_bdec and totals what there is to add.
reconstructs = numba.void(numba.float32[:, ::1], _int, SAE, SETTING, WORKSPACE, numba.types.UniTuple(numba.float32, 2))
# `finish_gradient(sae, work, inputs, whole, of_penalty, begin, end)`: add the rest of the gradient of latents
# [begin, end), which their entries add along no input. inputs: how many inputs are listed; whole: whether these and the
# inputs whose gradients were finished before are the whole batch.
finishes_gradient = numba.void(SAE, WORKSPACE, _int, numba.boolean, numba.float32, _int, _int)
# `refresh(sae, begin, end)`: once latents [begin, end) have moved, bring what kernels read of them up to date. Idle
# latents have not moved.
refreshes = numba.void(SAE, _int, _int)
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
