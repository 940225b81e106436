"""The compiled step of matching pursuit: against the reference, and its bits against company and threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of
from test_kernels import have_the_bits_of_each_alone, step_alike, trained

from sae_sweep.config.settings import Encoder, Point
from sae_sweep.kernels.cpu import tile_stack
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.sweep.backend import pick_backend


def pursuits(count: int, width: int, k: int, **training: float) -> list[Point]:
    """Points of several seeds."""
    chosen = points(PENALTIES[-1:] * count, "topk", width, k, **training)
    return [dataclasses.replace(point, encoder=Encoder("matching_pursuit")) for point in chosen]


@pytest.mark.parametrize(("b", "d", "width"), [(64, 16, 40), (100, 20, 33), (200, 32, 1500)])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_it_is_the_reference(b: int, d: int, width: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last tile is not full, a row no whole vectors, and a batch in parts."""
    monkeypatch.setattr(tile_stack, "PART", 1 << 18)
    chosen = pursuits(2, width, k, clip=0.7)
    reference, compiled = stack_of(chosen, d), stack_of(chosen, d)
    for stack in (reference, compiled):
        stack.split(stack.flat[0])[1][3] = 0  # a row of zeros is never chosen
    with cpu_backend() as backend:
        for x in batches(3, b, d):
            step_alike(backend, compiled, reference, x)
            torch.testing.assert_close(compiled.first, reference.first, rtol=1e-4, atol=1e-6)
    named, start = compiled.named(compiled.flat), stack_of(chosen, d)
    for unused in ("W_enc", "b_enc"):
        assert torch.equal(named[unused], start.named(start.flat)[unused])
    assert not compiled.first[0].isnan().any() and (compiled.silent[0, 3] == 3)


def test_a_row_that_is_chosen_again_fires_once() -> None:
    """One row, then another at 135 degrees to it, and again the first: two latents in three steps."""
    chosen = pursuits(1, 3, 3)
    reference, compiled = stack_of(chosen, 2), stack_of(chosen, 2)
    for stack in (reference, compiled):
        _, W_dec, _, b_dec = stack.split(stack.flat[0])
        W_dec.copy_(torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, 0.0]]))
        b_dec.zero_()
    x = torch.tensor([[1.0, 1.5], [0.0, -1.0]])
    with cpu_backend() as backend:
        step_alike(backend, compiled, reference, x)
    assert float(compiled.density) == 1.0, "two of the first input, none of the second"


@pytest.mark.parametrize("k", [1, 3])
def test_company_threads_and_calls_change_no_bit(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_stack, "PART", 1 << 18)
    chosen, data = pursuits(3, 150, k), batches(8, 300)
    have_the_bits_of_each_alone(trained(chosen, data), data)


def test_a_broken_one_leaves_its_mates_alone() -> None:
    chosen, data = pursuits(2, 60, 2), batches(10)
    broken = dataclasses.replace(chosen[1], training=chosen[1].training.replace(lr=1e30))
    with cpu_backend() as backend:
        whole, mixed = stack_of(chosen), stack_of([chosen[0], broken])
        backend.advance(whole, data)
        assert backend.advance(mixed, data).loss.isfinite().tolist() == [True, False]
        assert torch.equal(mixed.flat[0], whole.flat[0])
        assert isinstance(pick_backend(whole, backend.pool, 2), CpuBackend)
