"""The compiled auxiliary loss of dead latents: against the reference, and its bits against company and threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of
from test_kernels import have_the_bits_of_each_alone, step_alike, trained

from sae_sweep.config.settings import Point
from sae_sweep.kernels.cpu import backend as cpu
from sae_sweep.kernels.cpu import tile_stack
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.saes.stack import Stack
from sae_sweep.sweep.backend import pick_backend

AFTER = 4


def chosen_of(architecture: str, width: int, k: int, count: int = 2) -> list[Point]:
    """Points of several seeds with an auxiliary loss."""
    penalties = PENALTIES[:1] if architecture == "relu" else PENALTIES[-1:]
    recipe = {"revival": "auxk", "dead_after": AFTER, "aux_k": 3, "aux_coefficient": 0.5, "clip": 5.0}
    return points(penalties * count, architecture, width, k, **recipe)  # type: ignore[arg-type]


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small SAEs into parts."""
    for module in (cpu, tile_stack):
        monkeypatch.setattr(module, "PART", 1 << 15)


def be_silent(stacks: list[Stack], share: float) -> None:
    """Let this share of the latents have been silent for long, and one for one step less than it takes to be dead."""
    for stack in stacks:
        stack.silent.zero_()
        stack.silent[:, : int(share * stack.width)] = AFTER
        stack.silent[:, -1] = AFTER - 2


@pytest.mark.parametrize("share", [0.0, 0.08, 0.9], ids=["none", "few", "most"])
@pytest.mark.parametrize(
    ("architecture", "width", "k"),
    [("topk", 60, 1), ("topk", 150, 3), ("topk", 1300, 2), ("batchtopk", 60, 2), ("relu", 60, 0), ("relu", 1300, 0)],
)
def test_it_is_the_reference(architecture: str, width: int, k: int, share: float, many_parts: None) -> None:
    """In narrow steps, by products and by sums, and in wide ones; also of steps in which the last one dies."""
    chosen = chosen_of(architecture, width, k or 3)
    reference, compiled = stack_of(chosen, 20), stack_of(chosen, 20)
    be_silent([reference, compiled], share)
    with cpu_backend() as backend:
        for x in batches(3, 100, 20):
            step_alike(backend, compiled, reference, x)
            torch.testing.assert_close(compiled.first, reference.first, rtol=1e-3, atol=2e-5)
        assert isinstance(pick_backend(compiled, backend.pool, 2), CpuBackend)


@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu"])
def test_the_dead_learn_by_it_where_they_are_not_chosen(architecture: str, share: float) -> None:
    """What is silent under ReLU has a code of 0 on every input: nothing to learn from."""
    chosen = chosen_of(architecture, 60, 2, 1)
    without = [replace(point, training=point.training.replace(revival="none")) for point in chosen]
    with_it, plain = stack_of(chosen), stack_of(without)
    be_silent([with_it, plain], share)
    with cpu_backend() as backend:
        losses = [backend.advance(stack, batches(1)).loss for stack in (with_it, plain)]
    learns = share > 0 and architecture != "relu"
    assert torch.equal(plain.flat, with_it.flat) is not learns
    assert bool(losses[0] > losses[1]) is bool((plain.silent >= AFTER).any())


@pytest.mark.parametrize(("architecture", "width"), [("topk", 150), ("topk", 1400), ("batchtopk", 150)])
def test_company_threads_and_calls_change_no_bit(architecture: str, width: int, many_parts: None) -> None:
    chosen, data = chosen_of(architecture, width, 2, 3), batches(10, 200)
    together = trained(chosen, data)
    assert (together.silent >= AFTER).any()
    have_the_bits_of_each_alone(together, data)
