"""Which means train a stack where it lies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from sae_sweep.kernels import LONGEST
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend


def pick_backend(stack: Stack, pool: ThreadPoolExecutor, threads: int) -> Backend:
    """The fastest backend that can train this stack where it lies; `pool` has `threads` threads."""
    device = stack.flat.device.type
    known = device in stack.architecture.compiled
    # Imported here: compiled kernels are of no use on a GPU, and take a second to load.
    if device == "cpu" and known:
        from sae_sweep.kernels.cpu.backend import CpuBackend

        return CpuBackend(pool, threads)
    # All SAEs of a stack have a largest term, or none (plan.stack_key).
    known = known and not formula_of(stack.points[0].penalty.name).largest
    if device == "cuda" and known and stack.d <= LONGEST and find_spec("triton"):
        from sae_sweep.kernels.cuda.backend import CudaBackend

        return CudaBackend()
    return AutogradBackend(pool)
