"""Training steps: the reference against torch.optim.Adam, the compiled one against it, bits against company."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of, start_of

from sae_sweep.saes.architectures import ARCHITECTURES
from sae_sweep.saes.kernels import pick_backend
from sae_sweep.saes.kernels.cpu import DENSE_AT_LEAST, PARTITION_ABOVE, CpuBackend
from sae_sweep.saes.kernels.dense import DenseBackend
from sae_sweep.saes.penalties import penalty_value
from sae_sweep.saes.stack import Stack, parameter_count
from sae_sweep.schema import Penalty, Point

KINDS = [("relu", PENALTIES), ("topk", PENALTIES[-1:] * 2), ("batchtopk", PENALTIES[-1:] * 2)]


def train_alone(point: Point, data: torch.Tensor) -> torch.Tensor:
    """The point trained as anybody would: a module, torch.optim.Adam, clip_grad_norm_."""
    start = start_of(point)
    leaves = [torch.nn.Parameter(t.clone()) for t in (start.W_enc, start.W_dec, start.b_enc, start.b_dec)]
    W_enc, W_dec, b_enc, b_dec = leaves
    optimiser = torch.optim.Adam(leaves, betas=(0.9, 0.999), eps=1e-8)
    penalty, training, steps = point.penalty, point.training, len(data)
    activate = ARCHITECTURES[point.sae.architecture].activate
    for step, x in enumerate(data):
        warm = min(1.0, (step + 1) / max(1.0, training.lr_warmup * steps))
        cool = min(1.0, (steps - step) / max(1.0, training.lr_decay * steps))
        ramp = min(1.0, (step + 1) / max(1.0, training.coefficient_warmup * steps))
        optimiser.param_groups[0]["lr"] = training.lr * min(warm, cool)
        norms = W_dec.norm(dim=1)
        codes = activate(x @ W_enc.T + b_enc, norms, point.sae.k, None)
        error = (codes @ W_dec + b_dec - x).square().sum(1).mean()
        sparsity = penalty_value(penalty.name, codes * norms, penalty.scale, penalty.p).mean()
        optimiser.zero_grad()
        (error + penalty.coefficient * ramp * sparsity).backward()
        torch.nn.utils.clip_grad_norm_(leaves, training.clip)
        optimiser.step()
    return torch.cat([leaf.detach().flatten() for leaf in leaves])


@pytest.mark.parametrize(("architecture", "penalties"), KINDS)
def test_a_stack_equals_separate_adam_runs(architecture: str, penalties: list[Penalty]) -> None:
    chosen = points(penalties, architecture, clip=2.0, coefficient_warmup=0.5)
    # A stack holds different learning rates too.
    chosen[0] = dataclasses.replace(chosen[0], training=dataclasses.replace(chosen[0].training, lr=1e-3))
    data, stack = batches(40), stack_of(chosen)
    DenseBackend().advance(stack, data)
    for point, flat in zip(chosen, stack.flat, strict=True):
        # 40 steps of Adam at 3e-3 move a parameter by up to 0.1; float32 sums in another order by about 1e-5.
        torch.testing.assert_close(flat, train_alone(point, data), atol=2e-4, rtol=0)


@pytest.mark.parametrize(("architecture", "penalties"), KINDS[:2])
@pytest.mark.parametrize("width", [40, 2500])
def test_the_compiled_step_is_the_reference_step(architecture: str, penalties: list[Penalty], width: int) -> None:
    chosen = points(penalties, architecture, width, clip=5.0)
    data = batches(6)
    reference, compiled = stack_of(chosen), stack_of(chosen)
    with cpu_backend() as backend:
        for x in data:
            # From the same state each time: two runs drift apart once rounding decides whether a latent fires.
            compiled.flat.copy_(reference.flat)
            compiled.first.copy_(reference.first)
            compiled.second.copy_(reference.second)
            expected = DenseBackend().advance(reference, x[None])
            progress = backend.advance(compiled, x[None])
            torch.testing.assert_close(compiled.first, reference.first, atol=2e-5, rtol=2e-3)
            torch.testing.assert_close(progress.loss, expected.loss, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(progress.error, expected.error, rtol=1e-5, atol=1e-5)
            # An activation within rounding of zero counts in one and not in the other.
            torch.testing.assert_close(progress.l0, expected.l0, rtol=1e-3, atol=0.02)
            torch.testing.assert_close(progress.variance, expected.variance)


def test_dense_and_sparse_work_agree() -> None:
    chosen = points(PENALTIES, width=2 * DENSE_AT_LEAST)
    data = batches(1)
    dense, sparse = stack_of(chosen), stack_of(chosen)
    sparse.density.zero_()
    with cpu_backend() as backend:
        first, second = backend.advance(dense, data), backend.advance(sparse, data)
    torch.testing.assert_close(sparse.first, dense.first, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-6, atol=0)
    assert torch.equal(second.l0, first.l0)


@pytest.mark.parametrize(("architecture", "width"), [("relu", 40), ("relu", 501), ("relu", 6000), ("topk", 40)])
def test_company_and_threads_change_no_bit(architecture: str, width: int) -> None:
    chosen = points(PENALTIES[:4] if architecture == "relu" else PENALTIES[-1:] * 3, architecture, width)
    if width > 1000:
        assert parameter_count(width, 16) > PARTITION_ABOVE  # or the test would miss the partitioned path
    data = batches(8)

    def trained(members: list[int], threads: int) -> list[torch.Tensor]:
        stack = stack_of([chosen[i] for i in members])
        with cpu_backend(threads) as backend:
            for start in range(0, 8, 4):
                backend.advance(stack, data[start : start + 4])
        return list(stack.flat)

    together = trained(list(range(len(chosen))), 2)
    for i, flat in enumerate(together):
        assert torch.equal(trained([i], 2)[0], flat)
        assert torch.equal(trained([i], 1)[0], flat)
    assert torch.equal(trained([2, 0], 1)[0], together[2])


def test_a_broken_sae_leaves_its_mates_alone() -> None:
    chosen = points(PENALTIES[:3])
    broken = dataclasses.replace(chosen[1], training=dataclasses.replace(chosen[1].training, lr=1e30))
    data = batches(20)
    with cpu_backend() as backend:
        whole, mixed = stack_of(chosen), stack_of([chosen[0], broken, chosen[2]])
        backend.advance(whole, data)
        progress = backend.advance(mixed, data)
    assert not progress.loss[1].isfinite()
    assert progress.loss[[0, 2]].isfinite().all()
    assert torch.equal(mixed.flat[0], whole.flat[0])
    assert torch.equal(mixed.flat[2], whole.flat[2])


def test_the_reference_breaks_alone_too() -> None:
    chosen = points(PENALTIES[:3])
    broken = dataclasses.replace(chosen[1], training=dataclasses.replace(chosen[1].training, lr=1e30))
    whole, mixed = stack_of(chosen), stack_of([chosen[0], broken, chosen[2]])
    DenseBackend().advance(whole, batches(20))
    DenseBackend().advance(mixed, batches(20))
    assert torch.equal(mixed.flat[0], whole.flat[0])
    assert torch.equal(mixed.flat[2], whole.flat[2])


def test_batchtopk_keeps_k_per_input_on_average_and_learns_its_threshold() -> None:
    pre = torch.tensor([[5.0, 4.0, 0.5], [1.0, -3.0, 0.2]])
    norms = torch.tensor([1.0, 1.0, 10.0])
    codes = ARCHITECTURES["batchtopk"].activate(pre, norms, 1, None)
    assert codes.tolist() == [[5.0, 0.0, 0.5], [0.0, 0.0, 0.0]]  # contributions 5, 4, 5 | 1, 0, 2
    reached = ARCHITECTURES["batchtopk"].activate(pre, norms, 1, torch.tensor(2.0))
    assert (reached > 0).tolist() == [[True, True, True], [False, False, True]]
    stack = stack_of(points(PENALTIES[-1:], "batchtopk"))
    DenseBackend().advance(stack, batches(40))
    assert float(stack.threshold) > 0


def test_topk_chooses_by_contribution() -> None:
    pre = torch.tensor([[5.0, 4.0, 0.6, -1.0]])
    codes = ARCHITECTURES["topk"].activate(pre, torch.tensor([1.0, 1.0, 10.0, 99.0]), 2, None)
    assert codes.tolist() == [[5.0, 0.0, pytest.approx(0.6), 0.0]]


def test_the_backend_for_a_stack() -> None:
    def picked(architecture: str) -> object:
        with cpu_backend() as backend:
            return pick_backend(stack_of(points(PENALTIES[-1:], architecture)), backend.pool, 2)

    assert isinstance(picked("relu"), CpuBackend)
    assert isinstance(picked("topk"), CpuBackend)
    assert isinstance(picked("batchtopk"), DenseBackend)


def test_schedules() -> None:
    point = points(PENALTIES[:1], steps=100, lr=1.0, lr_warmup=0.1, lr_decay=0.2, coefficient_warmup=0.5)[0]
    stack = Stack.start([point], [start_of(point)], "cpu")
    rates = [stack.schedule(0, step)[0] for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05])
    assert [stack.schedule(0, step)[1] for step in (0, 24, 49, 99)] == pytest.approx([0.02, 0.5, 1.0, 1.0])
