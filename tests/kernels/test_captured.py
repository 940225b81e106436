"""The reference step as a graph: the same step for every architecture, in which nothing waits for the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stacks import EXCLUSIVE, EXCLUSIVE_PI, PENALTIES, batches, points, stack_of
from torch.utils._python_dispatch import TorchDispatchMode

from sae_sweep.config.settings import Penalty
from sae_sweep.kernels.cuda.captured import CapturedReference, Step, uncaptured
from sae_sweep.registry import kinds
from sae_sweep.saes import train
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend

# On a GPU each of these waits for the device or copies a number from the host: neither can be captured.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "unique", "masked_select")
PENALTIES_OF = {"jumprelu": [Penalty("l0", 0.1), *PENALTIES[:2]], "gated": PENALTIES[:4], "tied": PENALTIES[:4]}
CASES = [(name, PENALTIES_OF.get(name, PENALTIES[-1:] * 3)) for name in kinds("architecture") if name != "relu"]
CASES += [("relu", PENALTIES), ("relu", [EXCLUSIVE] * 2), ("relu", [EXCLUSIVE_PI] * 2)]


class NoWaiting(TorchDispatchMode):
    """Raises at an operation that a capture would not survive."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in FORBIDDEN, f"{name} inside a captured step"
        return function(*args, **(kwargs or {}))


class FakeCapture:
    """In place of CUDA's: runs the step again whenever it is replayed; counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Step) -> Step:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            with NoWaiting():
                step()

        return replay


def copied(stack: Stack) -> Stack:
    return copy.deepcopy(stack)


def assert_same(one: Stack, other: Stack) -> None:
    assert one.step == other.step
    # Batched products may sum in another order, which Adam turns into a full step where a gradient is rounding alone.
    apart = ~torch.isclose(one.flat, other.flat, rtol=1e-4, atol=2e-5)
    assert apart.float().mean() < 2e-3
    torch.testing.assert_close(one.threshold, other.threshold, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "penalties"), CASES, ids=[f"{a}-{p[0].name}" for a, p in CASES])
def test_every_architecture_is_captured_once_and_trains_as_the_reference_does(
    architecture: str, penalties: list[Penalty]
) -> None:
    stack, data, fake = stack_of(points(penalties, architecture, coefficient_warmup=0.5)), batches(6), FakeCapture()
    reference, backend = copied(stack), CapturedReference(fake)
    for block in (data[:4], data[4:]):
        expected, progress = AutogradBackend().advance(reference, block), backend.advance(stack, block)
        assert progress.steps == expected.steps
        for name in ("variance", "loss", "error", "l0", "gradient"):
            torch.testing.assert_close(getattr(progress, name), getattr(expected, name), rtol=2e-3, atol=1e-4)
        assert_same(stack, reference)
    assert (fake.captures, fake.replays) == (1, 5)


def test_in_parts_where_activations_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, data, fake = stack_of(points(PENALTIES[:5])), batches(3), FakeCapture()
    reference = copied(stack)
    monkeypatch.setattr(train, "GPU_BYTES", 2 * 4 * train.COPIES * 64 * 40)  # two SAEs at once
    assert [len(part.points) for part in train.parts_at_once(stack, 64, on_gpu=True)] == [2, 2, 1]
    AutogradBackend().advance(reference, data)
    CapturedReference(fake).advance(stack, data)
    assert_same(stack, reference)
    assert fake.captures == 1


def test_annealed_exponents_are_captured_anew() -> None:
    stack, data, fake = stack_of(points([Penalty("lp_annealed", 0.5), PENALTIES[0]], "tied")), batches(6), FakeCapture()
    reference, backend = copied(stack), CapturedReference(fake)
    for block in data.split(3):
        for each in (stack, reference):  # as annealing leaves them between two blocks
            each.exponent[0] *= 0.8
            each.rescale[0] *= 1.2
        AutogradBackend().advance(reference, block)
        backend.advance(stack, block)
        assert_same(stack, reference)
    assert fake.captures == 2


def test_another_stack_and_another_batch_size_are_captured_anew() -> None:
    stack, other, fake = stack_of(points(PENALTIES[:2])), stack_of(points(PENALTIES[:2])), FakeCapture()
    backend = CapturedReference(fake)
    backend.advance(stack, batches(2)), backend.advance(other, batches(2)), backend.advance(other, batches(2, 32))
    assert fake.captures == 3


def test_without_a_graph_the_step_is_called_as_it_is() -> None:
    stack, captured = stack_of(points(PENALTIES[:2], "gated")), stack_of(points(PENALTIES[:2], "gated"))
    CapturedReference(uncaptured).advance(stack, batches(2))
    CapturedReference(FakeCapture()).advance(captured, batches(2))
    assert torch.equal(stack.flat, captured.flat)
