"""A step captured as a CUDA graph; and the reference step of a whole stack taken that way, for what no kernel trains.

A step of a narrow SAE is some hundred short kernels. Launched one by one they keep the host busier than the GPU; as a
graph they are one launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import Backend, Progress, ReferenceStep, parts_at_once, step_numbers

Step = Callable[[], None]
Capture = Callable[[Step], Step]


def cuda_graph(step: Step) -> Step:
    """Capture what `step` launches, without running it; what is returned launches all of it again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def uncaptured(step: Step) -> Step:
    """The step itself: in place of a graph where there is no GPU."""
    return step


class CapturedStep:
    """A step that is called as it is the first time, and from the second time on replayed from its capture.

    The first call compiles kernels and makes libraries allocate their workspaces, which no capture may do. The step
    reads and writes the same memory every time, and never waits for the device.
    """

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._called = False
        self._replay: Step | None = None

    def __call__(self) -> None:
        if self._replay is None and self._called:
            self._replay = self._capture(self._step)
        (self._replay or self._step)()
        self._called = True

    def forget(self) -> None:
        """Capture anew at the next call, as something that the capture holds has changed."""
        self._replay = None


class CapturedReference(Backend):
    """Trains a stack by the reference step (saes/train.py), all SAEs at once where their activations have room."""

    def __init__(self, capture: Capture = cuda_graph) -> None:
        self._capture = capture
        self._trainer: _Trainer | None = None

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        trainer = self._trainer
        if trainer is None or not trainer.fits(stack, batches):
            trainer = self._trainer = _Trainer(stack, batches, self._capture)
        return trainer.advance(batches)


class _Trainer:
    """One stack: the memory that its captured step reads and writes."""

    def __init__(self, stack: Stack, batches: Tensor, capture: Capture) -> None:
        self.stack, self.addresses = stack, addresses(stack)
        self.x = torch.empty_like(batches[0])
        self.parts = parts_at_once(stack, batches.shape[1], on_gpu=True)
        self.numbers = [step_numbers(part, 1)[0] for part in self.parts]
        self.progress = [Progress.zeros(part) for part in self.parts]
        self.captured = CapturedStep(self._step, capture)
        self._read_exponents()

    def fits(self, stack: Stack, batches: Tensor) -> bool:
        """Whether the captured addresses are still those of this stack, and the batches of this size."""
        return stack is self.stack and addresses(stack) == self.addresses and batches.shape[1:] == self.x.shape

    def advance(self, batches: Tensor) -> Progress:
        """Steps through batches [steps, b, d]."""
        if not torch.equal(self.exponents, self.stack.exponent):  # these are numbers inside the capture
            self._read_exponents()
            self.captured.forget()
        for part, progress in zip(self.parts, self.progress, strict=True):
            part.step = self.stack.step
            progress.reset()
        block = [step_numbers(part, len(batches)) for part in self.parts]
        for t, x in enumerate(batches):
            self.x.copy_(x)
            for row, rows in zip(self.numbers, block, strict=True):
                row.copy_(rows[t])
            self.captured()
        self.stack.step += len(batches)
        return Progress.joined(len(batches), self.progress)

    def _read_exponents(self) -> None:
        self.exponents = self.stack.exponent.clone()
        self.steps = [ReferenceStep(part) for part in self.parts]

    def _step(self) -> None:
        for step, numbers, progress in zip(self.steps, self.numbers, self.progress, strict=True):
            progress.add(self.x, *step(self.x, numbers))


def addresses(stack: Stack) -> list[int]:
    """Where the parameters and moments of a stack lie."""
    return [t.data_ptr() for t in (stack.flat, stack.first, stack.second)]
