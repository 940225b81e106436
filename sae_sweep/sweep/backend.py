"""Which means train a stack where it lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

from torch import Tensor

from sae_sweep.kernels import LONGEST, gpu_knows
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes import is_plain
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend, Progress
from sae_sweep.sweep.events import Note, Say
from sae_sweep.sweep.memory import out_of_memory

# What was warned of in this process: once is enough.
_warned: set[str] = set()


def pick_backend(stack: Stack, pool: ThreadPoolExecutor, threads: int, say: Say = lambda event: None) -> Backend:
    """The fastest backend that can train this stack where it lies; `pool` has `threads` threads.

    On a GPU our kernels are used where they are known to compute what the reference does (kernels/cuda/self_check.py);
    `say` hears once where they are not.
    """
    device = stack.flat.device.type
    # All SAEs of a stack have the step of a recipe in common (plan.stack_key).
    known = device in stack.architecture.compiled and all(is_plain(point, device) for point in stack.points)
    # Imported here: compiled kernels are of no use on a GPU, and take a second to load.
    if device == "cpu" and known:
        from sae_sweep.kernels.cpu.backend import CpuBackend

        return CpuBackend(pool, threads)
    if device != "cuda":
        return AutogradBackend(pool)
    from sae_sweep.kernels.cuda.captured import CapturedReference

    choices: list[tuple[str, Callable[[], Backend]]] = [
        ("the reference step as a CUDA graph", CapturedReference),
        ("the reference step", AutogradBackend),
    ]
    # All SAEs of a stack have penalties that the GPU's kernels know, or the same one that they do not (plan.stack_key).
    known = known and gpu_knows(formula_of(stack.points[0].penalty))
    if known and stack.d <= LONGEST and find_spec("triton"):
        from sae_sweep.kernels.cuda import self_check
        from sae_sweep.kernels.cuda.backend import CudaBackend

        name = f"CUDA kernels for {stack.architecture.name}"
        if wrong := self_check.problem(stack):
            kept = self_check.folder()
            warn(say, name, f"{wrong} (remembered in {kept})" if kept else wrong)
        else:
            choices.insert(0, (name, CudaBackend))
    return FirstThatWorks(choices, say)


def warn(say: Say, name: str, wrong: str) -> None:
    """Say that a means of training is not used and why: once in this process for each."""
    if name not in _warned:
        _warned.add(name)
        say(Note(f"{name} are not used, a slower step is: {wrong}"))


class FirstThatWorks(Backend):
    """Trains by the first of several backends that gets through a block of steps; what fails before that is left."""

    def __init__(self, choices: Sequence[tuple[str, Callable[[], Backend]]], say: Say) -> None:
        """`choices`: the name and the maker of each backend, the fastest first."""
        self._choices, self._say = list(choices), say
        self.backend: Backend | None = None

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        if self.backend is not None:
            return self.backend.advance(stack, batches)
        trained = (stack.flat, stack.first, stack.second, stack.threshold, stack.silent)
        before, step = [tensor.clone() for tensor in trained], stack.step
        for i, (name, make) in enumerate(self._choices):
            try:
                backend = make()
                progress = backend.advance(stack, batches)
            except Exception as error:  # whatever a compiler, a driver or a capture may raise
                if out_of_memory(error) or i == len(self._choices) - 1:
                    raise
                warn(self._say, name, " ".join(f"{type(error).__name__}: {error}".split())[:300])
                for tensor, as_it_was in zip(trained, before, strict=True):
                    tensor.copy_(as_it_was)
                stack.step = step
            else:
                self.backend = backend
                return progress
        raise AssertionError("no backend to choose from")

    def responses(self, stack: Stack, i: int, batches: Tensor) -> tuple[Tensor, Tensor]:
        """Which latents of SAE i fire on batches [steps, b, d], and the squared error of each input."""
        if self.backend is None:
            return super().responses(stack, i, batches)
        return self.backend.responses(stack, i, batches)
