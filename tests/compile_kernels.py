"""Compiles every kernel that a step launches to machine code of compute capability 9.0, for which no GPU is needed.

Prints the name of each, and how many warps run a program of it.
"""

from typing import Any

import torch
from stacks import PENALTIES, points, stack_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sae_sweep.kernels.cuda.backend import CudaBackend


class NoGpu:
    """What Triton asks of a driver before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


driver.set_active(NoGpu())
launch = JITFunction.run


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    """Instead of a launch."""
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    assert kernel.asm["cubin"]
    print(self.__name__, kernel.metadata.num_warps)
    return kernel


JITFunction.run = compile_only
if __name__ == "__main__":
    for architecture, width in (("relu", 64), ("relu", 16384), ("topk", 1024)):
        stack = stack_of(points(PENALTIES[7:8], architecture, width), d=32)
        CudaBackend().advance(stack, torch.zeros(1, 512, 32))
