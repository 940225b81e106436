"""Which backend trains a stack, and what happens where one fails."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stacks import EXCLUSIVE, PENALTIES, batches, points, stack_of

# Read when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"

from sae_sweep.config.settings import Penalty
from sae_sweep.kernels import LONGEST
from sae_sweep.registry import kinds
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend, Progress
from sae_sweep.sweep import backend
from sae_sweep.sweep.backend import FirstThatWorks, pick_backend
from sae_sweep.sweep.events import Event, Note
from sae_sweep.sweep.memory import out_of_memory


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_warned", set())


class Broken(Backend):
    """Spoils a stack before it fails, at its first block of steps or at a later one."""

    def __init__(self, error: Exception, blocks: int = 0) -> None:
        self.error, self.blocks = error, blocks

    def advance(self, stack: Stack, batches: torch.Tensor) -> Progress:
        if self.blocks:
            self.blocks -= 1
            return AutogradBackend().advance(stack, batches)
        for tensor in (stack.flat, stack.first, stack.second, stack.threshold):
            tensor.add_(1.0)
        stack.step += 1
        raise self.error


def choices(*makers: Callable[[], Backend]) -> list[tuple[str, Callable[[], Backend]]]:
    return [(f"choice {i}", maker) for i, maker in enumerate(makers)]


def test_what_fails_is_left_with_one_warning_and_trains_as_if_never_tried() -> None:
    heard: list[Event] = []
    error = RuntimeError("PassManager::run\n failed")
    for _ in range(2):  # two packs of one run
        stack, expected = (stack_of(points(PENALTIES[:2])) for _ in range(2))
        chosen = FirstThatWorks(choices(lambda: Broken(error), AutogradBackend), heard.append)
        for block in batches(4).split(2):
            chosen.advance(stack, block), AutogradBackend().advance(expected, block)
        assert isinstance(chosen.backend, AutogradBackend)
        assert torch.equal(stack.flat, expected.flat) and torch.equal(stack.second, expected.second)
        assert stack.step == expected.step == 4
    assert heard == [Note("choice 0 are not used, a slower step is: RuntimeError: PassManager::run failed")]


def test_a_backend_that_cannot_be_made_is_left_too() -> None:
    def unmade() -> Backend:
        raise NotImplementedError("no Triton function for besselj")

    heard: list[Event] = []
    FirstThatWorks(choices(unmade, AutogradBackend), heard.append).advance(stack_of(points(PENALTIES[:1])), batches(1))
    assert len(heard) == 1


def test_too_little_memory_and_what_comes_later_are_not_the_kernels_fault() -> None:
    too_large = RuntimeError("CUDA error: out of memory")
    late = FirstThatWorks(choices(lambda: Broken(ValueError(), blocks=1), AutogradBackend), lambda event: None)
    stack = stack_of(points(PENALTIES[:1]))
    with pytest.raises(RuntimeError, match="out of memory"):
        FirstThatWorks(choices(lambda: Broken(too_large), AutogradBackend), lambda event: None).advance(
            stack, batches(1)
        )
    late.advance(stack, batches(1))
    with pytest.raises(ValueError):
        late.advance(stack, batches(1))
    last = FirstThatWorks(choices(lambda: Broken(ValueError("last"))), lambda event: None)
    with pytest.raises(ValueError, match="last"):
        last.advance(stack, batches(1))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_what_too_little_memory_looks_like(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory access was encountered", "out of resource: registers"])
def test_what_it_does_not_look_like(said: str) -> None:
    assert not out_of_memory(RuntimeError(said))


def on_gpu(architecture: str, d: int = 32, penalty: Penalty = PENALTIES[0]) -> Any:
    """As much of a stack on a GPU as a choice asks for."""
    lies = SimpleNamespace(device=torch.device("cuda"))
    return SimpleNamespace(
        flat=lies, d=d, architecture=kinds("architecture")[architecture], points=points([penalty], architecture)
    )


def names(stack: Any, heard: list[Event]) -> list[str]:
    chosen = pick_backend(stack, None, 2, heard.append)  # type: ignore[arg-type]
    assert isinstance(chosen, FirstThatWorks)
    return [name for name, _ in chosen._choices]


def test_the_backend_for_a_stack_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sae_sweep.kernels.cuda import self_check

    reference = ["the reference step as a CUDA graph", "the reference step"]
    heard: list[Event] = []
    monkeypatch.setattr(self_check, "problem", lambda stack: None)
    assert names(on_gpu("relu"), heard) == ["CUDA kernels for relu", *reference]
    assert names(on_gpu("topk"), heard) == ["CUDA kernels for topk", *reference]
    assert names(on_gpu("relu", LONGEST + 1), heard) == reference
    assert names(on_gpu("batchtopk"), heard) == reference
    assert names(on_gpu("relu", penalty=EXCLUSIVE), heard) == reference
    with monkeypatch.context() as patch:
        patch.setattr(backend, "find_spec", lambda name: None)
        assert names(on_gpu("relu"), heard) == reference
    assert not heard
    # Kernels that were found wrong are not used, which is said once however many stacks there are.
    monkeypatch.setattr(self_check, "problem", lambda stack: "two runs differ")
    assert [names(on_gpu("relu"), heard) for _ in range(3)] == [reference] * 3
    assert len(heard) == 1 and "two runs differ" in str(heard[0])


@pytest.mark.slow
def test_a_backend_is_let_go_before_measuring(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from commandline import TINY

    from sae_sweep.config import overrides
    from sae_sweep.store.store import Store
    from sae_sweep.sweep import pack
    from sae_sweep.sweep.context import Ground

    sweep = overrides.load([*TINY, "device=cpu", "penalty.coefficient=0.1"])
    made: list[weakref.ref[AutogradBackend]] = []
    alive: list[bool] = []

    def pick(*_: Any) -> AutogradBackend:
        chosen = AutogradBackend()
        made.append(weakref.ref(chosen))
        return chosen

    measure = Ground.measure

    def measured(self: Ground, *more: Any, **settings: Any) -> Any:
        gc.collect()
        alive.extend(backend() is not None for backend in made)
        return measure(self, *more, **settings)

    monkeypatch.setattr(pack, "pick_backend", pick)
    monkeypatch.setattr(Ground, "measure", measured)
    store, machine = Store(tmp_path), pack.Machine("cpu", 1)
    pack.run_pack(sweep.points[:1], 0, 1, store, sweep.evaluation, machine, lambda event: None)
    assert len(made) == 1 and alive and not any(alive)
