"""Training steps: the reference against torch.optim.Adam, the compiled one against it, bits against company."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from stacks import EXCLUSIVE, EXCLUSIVE_PI, FEW, PENALTIES, batches, cpu_backend, points, stack_of, start_of

from sae_sweep import registry
from sae_sweep.config.settings import Penalty, Point, Sae
from sae_sweep.kernels.cpu import architecture_steps, tile_stack, work_queue
from sae_sweep.kernels.cpu import backend as cpu
from sae_sweep.kernels.cpu import sparse_step as sparse
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.kernels.cpu.function_pointers import address_of, function_at
from sae_sweep.kernels.cpu.simd import LANES, forget_older
from sae_sweep.kernels.limits import DENSE_AT_LEAST
from sae_sweep.registry import kinds
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.penalties import log_shares, penalty_value
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend
from sae_sweep.sweep.backend import pick_backend

L0 = Penalty("l0", 0.1)
KINDS = [
    ("relu", FEW),
    ("topk", PENALTIES[-1:] * 2),
    ("batchtopk", PENALTIES[-1:] * 2),
    ("jumprelu", [L0, *PENALTIES[:3], PENALTIES[-1]]),
    ("gated", [*PENALTIES[:4], PENALTIES[-1]]),
    ("matryoshka", PENALTIES[-1:] * 2),
    ("tied", [*PENALTIES[:4], PENALTIES[-1]]),
    *((architecture, [EXCLUSIVE] * 2) for architecture in ("relu", "jumprelu", "gated", "tied")),
    *((architecture, [EXCLUSIVE_PI] * 2) for architecture in ("relu", "jumprelu", "gated", "tied")),
]
# Each penalty is compiled for itself, which takes most of a second.
WITH_ALL = [("jumprelu", [L0, *PENALTIES]), *((architecture, PENALTIES) for architecture in ("relu", "gated", "tied"))]
WITH_ALL = [pytest.param(*case, marks=pytest.mark.slow) for case in WITH_ALL]
# Architectures, each with its penalties; and a penalty that needs the whole batch before its slopes.
EACH = KINDS[:7]
SEVERAL = [*EACH, ("relu", [EXCLUSIVE_PI] * 4), ("jumprelu", [EXCLUSIVE_PI] * 4)]


def train_alone(point: Point, data: torch.Tensor) -> torch.Tensor:
    """The point trained as anybody would: a module, torch.optim.Adam, clip_grad_norm_."""
    start = start_of(point)
    kind, settings = kinds("architecture")[point.sae.architecture], point.sae
    names = ("W_enc", "W_dec", "b_enc", "b_dec", *kind.extras)
    leaves = [torch.nn.Parameter(getattr(start, name).clone()) for name in names]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    optimiser = torch.optim.Adam(leaves, betas=(0.9, 0.999), eps=1e-8)
    penalty, training, steps = point.penalty, point.training, len(data)
    for step, x in enumerate(data):
        warm = min(1.0, (step + 1) / max(1.0, training.lr_warmup * steps))
        cool = min(1.0, (steps - step) / max(1.0, training.lr_decay * steps))
        ramp = min(1.0, (step + 1) / max(1.0, training.coefficient_warmup * steps))
        optimiser.param_groups[0]["lr"] = training.lr * min(warm, cool)
        sae = Parameters(threshold=torch.zeros(()), **dict(zip(names, leaves, strict=True)))
        sae = kind.effective(sae) if kind.effective else sae
        pre = x @ sae.W_enc.T + sae.b_enc
        codes = kind.activate(pre, sae, settings, True)
        error = (codes @ sae.W_dec + sae.b_dec - x).square().sum(1).mean()
        contributions = kind.penalised(pre, codes, sae)
        shares = log_shares(contributions) if penalty.name == "exclusive_pi" else None
        sparsity = penalty_value(
            penalty.name, contributions, penalty.get("scale", 1.0), penalty.get("p", 1.0), shares
        ).mean()
        if penalty.name == "l0":
            sparsity = kind.fires(pre, sae, settings).sum(1).mean()
        further = kind.auxiliary(x, pre, codes, sae, settings) if kind.auxiliary else 0
        optimiser.zero_grad(set_to_none=False)
        (error + penalty.coefficient * ramp * sparsity + further).backward()
        torch.nn.utils.clip_grad_norm_(leaves, training.clip)
        optimiser.step()
    return torch.cat([leaf.detach().flatten() for leaf in leaves])


@pytest.mark.parametrize(("architecture", "penalties"), [*KINDS, *WITH_ALL])
def test_a_stack_equals_separate_adam_runs(architecture: str, penalties: list[Penalty]) -> None:
    chosen = points(penalties, architecture, clip=2.0, coefficient_warmup=0.5)
    # A stack holds different learning rates too.
    chosen[0] = dataclasses.replace(chosen[0], training=chosen[0].training.replace(lr=1e-3))
    data, stack = batches(40), stack_of(chosen)
    AutogradBackend().advance(stack, data)
    for point, flat in zip(chosen, stack.flat, strict=True):
        # 40 steps of Adam at 3e-3 move a parameter by up to 0.1; float32 sums in another order by about 1e-5.
        torch.testing.assert_close(flat, train_alone(point, data), atol=2e-4, rtol=0)


def step_alike(backend: CpuBackend, compiled: Stack, reference: Stack, x: torch.Tensor) -> None:
    """One step of both from the state of the reference, on x [b, d]: everything that a step says or leaves is alike."""
    for state in ("flat", "first", "second", "threshold", "silent"):
        getattr(compiled, state).copy_(getattr(reference, state))
    expected, progress = AutogradBackend().advance(reference, x[None]), backend.advance(compiled, x[None])
    # An entry within rounding of the end of a window has a slope in one and not in the other.
    close = torch.isclose(compiled.first, reference.first, atol=2e-5, rtol=2e-3)
    assert (~close).sum(1).max() <= (3 * reference.d if reference.architecture.name == "jumprelu" else 0)
    torch.testing.assert_close(compiled.first, reference.first, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(progress.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(progress.error, expected.error, rtol=1e-5, atol=1e-5)
    # An activation within rounding of zero counts in one and not in the other.
    torch.testing.assert_close(progress.l0, expected.l0, rtol=1e-3, atol=0.02)
    torch.testing.assert_close(progress.variance, expected.variance)
    torch.testing.assert_close(progress.gradient, expected.gradient, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(compiled.threshold, reference.threshold, rtol=1e-5, atol=1e-6)
    # As an activation within rounding of zero may.
    assert (compiled.silent != reference.silent).sum(1).max() <= 1


def test_what_fails_behind_an_address_fails_in_its_caller() -> None:
    signature = numba.int64(numba.int64)
    at = function_at(numba.types.FunctionType(signature))

    @numba.njit(signature)
    def rooms(size):  # type: ignore[no-untyped-def]
        return len(np.empty(size))

    @numba.njit
    def call(address, size):  # type: ignore[no-untyped-def]
        function = at(address)
        return function(size) + 1

    assert call(address_of(rooms, signature), 3) == 4
    with pytest.raises(MemoryError):
        call(address_of(rooms, signature), 1 << 50)


@pytest.mark.parametrize(("architecture", "penalties"), [*KINDS, *WITH_ALL])
@pytest.mark.parametrize("width", [40, 2500])
def test_the_compiled_step_is_the_reference_step(architecture: str, penalties: list[Penalty], width: int) -> None:
    chosen = points(penalties, architecture, width, clip=5.0)
    data = batches(6)
    reference, compiled = stack_of(chosen), stack_of(chosen)
    with cpu_backend() as backend:
        for x in data:
            # From the same state each time: two runs drift apart once rounding decides whether a latent fires.
            step_alike(backend, compiled, reference, x)


@pytest.mark.parametrize("architecture", ["jumprelu", "gated", "tied", "matryoshka"])
@pytest.mark.parametrize("off", [0.0, 1.5, 4.0])
def test_a_step_where_much_or_next_to_nothing_fires(architecture: str, off: float, many_parts: None) -> None:
    penalties = dict(EACH)[architecture]
    chosen = points([*penalties[:4], penalties[-1]], architecture, 150, k=4, clip=5.0)
    reference, compiled = stack_of(chosen), stack_of(chosen)
    for stack in (reference, compiled):
        stack.parameters().b_enc.sub_(off)
    with cpu_backend() as backend:
        for x in batches(4, 100):
            step_alike(backend, compiled, reference, x)
    assert (float(compiled.density.max()) < 3) == (off == 4.0)


@pytest.mark.parametrize(
    "penalties", [[L0, *PENALTIES[:9]], [EXCLUSIVE] * 2, [EXCLUSIVE_PI] * 2], ids=["apart", "exclusive", "weighed"]
)
@pytest.mark.parametrize("thresholds", [-0.3, -0.1, 0.0, 0.2, 3.0])
def test_jumps_where_a_threshold_is_below_zero_within_reach_of_it_or_far_above(
    penalties: list[Penalty], thresholds: float
) -> None:
    """Windows that reach below 0, where under l0 every input moves a threshold; inputs on which nothing fires."""
    chosen = points(penalties, "jumprelu", 30, clip=5.0)
    reference, compiled = stack_of(chosen), stack_of(chosen)
    for stack in (reference, compiled):
        stack.parameters().thresholds.mul_(0.2).add_(thresholds)
        stack.parameters().b_enc.sub_(1)
    with cpu_backend() as backend:
        for x in batches(4):
            step_alike(backend, compiled, reference, x)


@pytest.mark.slow
def test_no_architecture_holds_batch_times_width() -> None:
    """Also where half of the dictionary fires, or is near a threshold."""
    b, width = 1 << 13, 1 << 13
    code = f"""
import resource
from stacks import *
from sae_sweep.registry import kinds
from sae_sweep.kernels.cpu.architecture_steps import steps_of
for architecture in kinds("architecture"):
    chosen = points(PENALTIES[-1:], architecture, 40)
    with cpu_backend(1) as backend:
        backend.advance(stack_of(chosen), batches(1))
x = batches(1, {b})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for architecture in kinds("architecture"):
    stack = stack_of(points(PENALTIES[-1:], architecture, {width}))
    stack.parameters().b_enc.add_(1)
    with cpu_backend(1) as backend:
        backend.advance(stack, x)
    print(architecture, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    end = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    for line in end.stdout.splitlines():
        assert int(line.split()[1]) << 10 < 2 * b * width, line


def test_levels_of_a_width_that_is_no_power_of_two() -> None:
    for levels in (1, 2, 9):
        chosen = points(PENALTIES[-1:], "matryoshka", 75)
        chosen = [dataclasses.replace(chosen[0], sae=chosen[0].sae.replace(levels=levels))]
        reference, compiled = stack_of(chosen), stack_of(chosen)
        with cpu_backend() as backend:
            for x in batches(3):
                step_alike(backend, compiled, reference, x)


@pytest.mark.parametrize("penalties", [FEW, pytest.param(PENALTIES, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("architecture", ["relu", "tied"])
def test_dense_and_sparse_work_agree(architecture: str, penalties: list[Penalty]) -> None:
    chosen = points(penalties, architecture, width=2 * DENSE_AT_LEAST)
    data = batches(1)
    dense, sparse = stack_of(chosen), stack_of(chosen)
    sparse.density.zero_()
    with cpu_backend() as backend:
        first, second = backend.advance(dense, data), backend.advance(sparse, data)
    torch.testing.assert_close(sparse.first, dense.first, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(second.loss, first.loss, rtol=1e-6, atol=0)
    assert torch.equal(second.l0, first.l0)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even small SAEs into parts and slices, as only wide ones are otherwise."""
    monkeypatch.setattr(cpu, "PART", 1 << 15)
    monkeypatch.setattr(tile_stack, "PART", 1 << 15)


def trained(chosen: list[Point], data: torch.Tensor, threads: int = 2) -> Stack:
    """The points as one stack, after half and then the other half of the batches."""
    stack = stack_of(chosen)
    with cpu_backend(threads) as backend:
        for half in data.chunk(2):
            backend.advance(stack, half)
    return stack


def have_the_bits_of_each_alone(together: Stack, data: torch.Tensor) -> None:
    """Assert of `trained(points, data)` that each trained alone, with 1, 2 and 5 threads, and a call for each step end
    in the same bits."""
    for i, point in enumerate(together.points):
        for threads in (1, 2, 5):
            alone = trained([point], data, threads)
            for state in ("flat", "second", "silent"):
                assert torch.equal(getattr(alone, state)[0], getattr(together, state)[i])
    one_by_one = stack_of(together.points)
    with cpu_backend() as backend:
        for x in data:
            backend.advance(one_by_one, x[None])
    assert torch.equal(one_by_one.flat, together.flat)


WIDTHS = [(40, *case) for case in SEVERAL] + [(3000, *case) for case in SEVERAL[:2]]
WIDTHS += [
    pytest.param(width, *case, marks=pytest.mark.slow)
    for width, cases in ((501, SEVERAL), (3000, SEVERAL[2:]))
    for case in cases
]


@pytest.mark.parametrize(("width", "architecture", "penalties"), WIDTHS)
def test_company_and_threads_change_no_bit(
    architecture: str, penalties: list[Penalty], width: int, many_parts: None
) -> None:
    chosen = points([*penalties, penalties[0]][:4], architecture, width)
    data = batches(8, 200)
    together = trained(chosen, data)
    for i, point in enumerate(chosen):
        for threads in (1, 2, 5):
            alone = trained([point], data, threads)
            assert torch.equal(alone.flat[0], together.flat[i])
            assert torch.equal(alone.threshold[0], together.threshold[i])
    assert torch.equal(trained([chosen[2], chosen[0]], data, 1).flat[0], together.flat[2])


@pytest.mark.parametrize(("architecture", "penalties"), SEVERAL)
def test_steps_in_one_call_are_those_one_by_one(architecture: str, penalties: list[Penalty]) -> None:
    chosen, data = points(penalties[:2], architecture, 70), batches(8)
    together, one_by_one = stack_of(chosen), stack_of(chosen)
    with cpu_backend() as backend:
        whole = backend.advance(together, data)
        steps = [backend.advance(one_by_one, x[None]) for x in data]
    for state in ("flat", "first", "second", "threshold", "density"):
        assert torch.equal(getattr(together, state), getattr(one_by_one, state))
    torch.testing.assert_close(whole.loss, torch.stack([step.loss for step in steps]).sum(0))
    torch.testing.assert_close(whole.l0, torch.stack([step.l0 for step in steps]).sum(0))


def test_a_thread_that_fails_or_is_interrupted_keeps_no_other_waiting() -> None:
    shared = np.zeros(work_queue.QUEUE_SIZE, np.int64)
    work_queue.publish(shared, 1, 2)
    assert [work_queue.claim(shared), work_queue.claim(shared)] == [(1, 1), (1, 0)]
    assert [work_queue.finish_piece(shared, 2), work_queue.finish_piece(shared, 2)] == [False, True]
    work_queue.publish(shared, 2, 1)
    with pytest.raises(KeyboardInterrupt), work_queue.abort_on_error(shared):
        assert work_queue.claim(shared) == (2, 0)
        raise KeyboardInterrupt
    with pytest.raises(MemoryError, match="another thread"):
        work_queue.claim(shared)


def test_company_and_threads_change_no_bit_of_the_reference() -> None:
    chosen, data = points([EXCLUSIVE_PI] * 3, "jumprelu", 90), batches(8, 200)

    def trained(members: list[Point], threads: int) -> Stack:
        stack = stack_of(members)
        with cpu_backend(threads) as cpu:
            for half in data.chunk(2):
                AutogradBackend(cpu.pool).advance(stack, half)
        return stack

    together = trained(chosen, 2)
    for i, point in enumerate(chosen):
        for threads in (1, 2):
            assert torch.equal(trained([point], threads).flat[0], together.flat[i])
    assert torch.equal(trained([chosen[2], chosen[0]], 1).flat[0], together.flat[2])


@pytest.mark.parametrize(
    ("architecture", "penalty"),
    [*((architecture, penalties[1]) for architecture, penalties in SEVERAL), ("jumprelu", L0)],
)
def test_parts_and_full_lists_change_no_more_than_the_order_of_sums(
    architecture: str, penalty: Penalty, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = points([penalty], architecture, 300)
    data = batches(1, 200)

    def first_step() -> Stack:
        stack = stack_of(chosen)
        stack.density.zero_()  # lists, though much of a random start fires
        with cpu_backend() as backend:
            backend.advance(stack, data)
        return stack

    whole = first_step()
    monkeypatch.setattr(cpu, "PART", 1 << 15)
    monkeypatch.setattr(tile_stack, "PART", 1 << 15)
    in_parts = first_step()
    monkeypatch.setattr(cpu, "ENTRIES", 1)  # room for one input that is wholly active, and hardly more
    in_rounds = first_step()
    for other in (in_parts, in_rounds):
        assert torch.equal(other.density, whole.density)
        torch.testing.assert_close(other.first, whole.first, atol=1e-6, rtol=1e-4)


def test_the_guess_decides_nothing_in_batchtopk(many_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, data = points(PENALTIES[-1:], "batchtopk", 120), batches(6, 200)
    stacks = []
    # Candidates enough, too few every time (count instead), and nearly every latent that fires.
    for guess in (0.9, 1.5, 1e-3):
        monkeypatch.setattr(cpu, "GUESS", np.float32(guess))
        stacks.append(trained(chosen, data))
    for other in stacks[1:]:
        assert torch.equal(other.flat, stacks[0].flat)
        assert torch.equal(other.threshold, stacks[0].threshold)


def test_batchtopk_with_fewer_positive_contributions_than_places_keeps_them_all() -> None:
    chosen, data = points(PENALTIES[-1:], "batchtopk", 40, k=39), batches(1)
    reference, compiled = stack_of(chosen), stack_of(chosen)
    with cpu_backend() as backend:
        expected, progress = AutogradBackend().advance(reference, data), backend.advance(compiled, data)
    assert 0 < float(progress.l0) == float(expected.l0) < 39
    torch.testing.assert_close(compiled.first, reference.first, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(compiled.threshold, reference.threshold, rtol=1e-4, atol=0)


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated", "tied"])
def test_latents_without_gradient_take_adams_step_all_the_same(architecture: str) -> None:
    chosen = points(PENALTIES[:1], architecture, width=40)
    off = slice(0, 10)
    stacks = [stack_of(chosen), stack_of(chosen)]
    backends = [AutogradBackend(), None]
    with cpu_backend() as backend:
        for stack, own in zip(stacks, backends, strict=True):
            stack.parameters(0).b_enc[off] = -99.0
            for at, x in enumerate(batches(4)):
                if at == 2:  # latents that fired before, and now fall silent
                    stack.parameters(0).b_enc[10:20] = -99.0
                (own or backend).advance(stack, x[None])
    reference, compiled = (stack.parameters(0) for stack in stacks)
    torch.testing.assert_close(compiled.W_enc, reference.W_enc, atol=2e-5, rtol=0)
    start = stack_of(chosen).parameters(0)
    assert torch.equal(compiled.W_enc[off], start.W_enc[off])
    assert not torch.equal(compiled.W_enc[10:20], start.W_enc[10:20])
    for extra in kinds("architecture")[architecture].extras:
        torch.testing.assert_close(getattr(compiled, extra), getattr(reference, extra), atol=2e-5, rtol=0)
        assert torch.equal(getattr(compiled, extra)[off], getattr(start, extra)[off])
        assert not torch.equal(getattr(compiled, extra)[10:20], getattr(start, extra)[10:20])


@pytest.mark.parametrize(("architecture", "penalties"), SEVERAL)
def test_a_broken_sae_leaves_its_mates_alone(architecture: str, penalties: list[Penalty]) -> None:
    chosen = points([*penalties, penalties[0]][:3], architecture)
    broken = dataclasses.replace(chosen[1], training=chosen[1].training.replace(lr=1e30))
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
    broken = dataclasses.replace(chosen[1], training=chosen[1].training.replace(lr=1e30))
    whole, mixed = stack_of(chosen), stack_of([chosen[0], broken, chosen[2]])
    AutogradBackend().advance(whole, batches(20))
    AutogradBackend().advance(mixed, batches(20))
    assert torch.equal(mixed.flat[0], whole.flat[0])
    assert torch.equal(mixed.flat[2], whole.flat[2])


@pytest.mark.parametrize(
    "penalty",
    [
        pytest.param(penalty, id=penalty.name, marks=() if penalty in FEW else pytest.mark.slow)
        for penalty in PENALTIES[:-1]
    ],
)
def test_a_gradient_too_long_to_be_a_number_breaks_an_sae_and_does_not_freeze_it(penalty: Penalty) -> None:
    """Scaled down by its infinite norm it would be nothing, and the start would pass for a trained SAE."""
    huge = penalty.replace(coefficient=1e30)
    chosen = points([PENALTIES[0], huge])
    with cpu_backend() as backend:
        for own in (backend, AutogradBackend()):
            whole, mixed = stack_of(chosen[:1]), stack_of(chosen)
            own.advance(whole, batches(3))
            assert own.advance(mixed, batches(3)).loss.isfinite().tolist() == [True, False]
            assert torch.equal(mixed.flat[0], whole.flat[0])


def test_batchtopk_keeps_k_per_input_on_average_and_learns_its_threshold() -> None:
    pre = torch.tensor([[5.0, 4.0, 0.5], [1.0, -3.0, 0.2]])
    norms = torch.tensor([1.0, 1.0, 10.0])
    sae = Parameters(torch.empty(0), torch.diag(norms), torch.zeros(3), torch.zeros(3), torch.tensor(2.0))
    codes = kinds("architecture")["batchtopk"].activate(pre, sae, Sae("batchtopk", k=1), True)
    assert codes.tolist() == [[5.0, 0.0, 0.5], [0.0, 0.0, 0.0]]  # contributions 5, 4, 5 | 1, 0, 2
    reached = kinds("architecture")["batchtopk"].activate(pre, sae, Sae("batchtopk", k=1), False)
    assert (reached > 0).tolist() == [[True, True, True], [False, False, True]]
    stack = stack_of(points(PENALTIES[-1:], "batchtopk"))
    AutogradBackend().advance(stack, batches(40))
    assert float(stack.threshold) > 0


def test_topk_chooses_by_contribution() -> None:
    pre = torch.tensor([[5.0, 4.0, 0.6, -1.0]])
    W_dec = torch.diag(torch.tensor([1.0, 1.0, 10.0, 99.0]))
    sae = Parameters(torch.empty(0), W_dec, torch.zeros(4), torch.zeros(4), torch.zeros(()))
    codes = kinds("architecture")["topk"].activate(pre, sae, Sae("topk", k=2), True)
    assert codes.tolist() == [[5.0, 0.0, pytest.approx(0.6), 0.0]]


@pytest.mark.parametrize(("width", "k", "rare"), [(100, 1, 0), (100, 8, 0), (100, 8, 6), (500, 40, 0), (40, 64, 0)])
def test_the_compiled_topk_replaces_the_smallest_latent_by_latent(width: int, k: int, rare: int) -> None:
    # Integers: no rounding, and many ties.
    generator = np.random.default_rng(width + k)
    x, W = generator.integers(-2, 3, (150, 5)), generator.integers(-2, 3, (width, 5))
    flat = np.concatenate([W.ravel(), W.ravel(), np.full(width, -rare), np.zeros(5)]).astype(np.float32)
    ones = np.ones(-(-width // LANES) * LANES, np.float32)
    encoder = sparse.encoder_of(flat[: width * 5].reshape(width, 5), ones, rounded=False, k=k)
    sparse.refresh(flat, width, 5, encoder, ones.copy())
    codes = np.empty((150 * width, sparse.LISTED), np.float32)
    latents, starts = codes.view(np.int32), np.empty(151, np.int64)
    assert sparse.encode(x.astype(np.float32), 0, 150, encoder, codes, latents, starts) == 150
    pre = x @ W.T - rare
    for row in range(150):
        kept: list[int] = []
        for latent in np.flatnonzero(pre[row] > 0):
            if len(kept) < k:
                kept.append(latent)
                continue
            goes = min(range(k), key=lambda place: (pre[row, kept[place]], -kept[place]))
            if pre[row, latent] > pre[row, kept[goes]]:
                kept[goes] = latent
        listed = slice(starts[row], starts[row + 1])
        assert latents[listed, sparse.LATENT].tolist() == kept
        assert codes[listed, sparse.CODE].tolist() == pre[row, kept].tolist()


def test_the_backend_for_a_stack_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def picked(architecture: str, penalty: Penalty) -> Backend:
        with cpu_backend() as backend:
            return pick_backend(stack_of(points([penalty], architecture)), backend.pool, 2)

    assert {name for name, kind in kinds("architecture").items() if "cpu" in kind.compiled} == set(
        architecture_steps.STEPS
    )
    for architecture, penalties in SEVERAL:
        assert isinstance(picked(architecture, penalties[0]), CpuBackend)
    # What has no compiled functions yet trains all the same.
    tied = dataclasses.replace(kinds("architecture")["tied"], compiled=())
    monkeypatch.setitem(registry._kinds["architecture"], "tied", tied)
    assert isinstance(picked("tied", PENALTIES[0]), AutogradBackend)


def test_compiled_functions_are_dropped_when_any_file_beside_them_has_changed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1"), (tmp_path / "b.py").write_text("2")
    index = tmp_path / "__pycache__" / "a.function-1.py311.nbi"

    def kept() -> bool:
        index.parent.mkdir(exist_ok=True)
        index.touch()
        forget_older(tmp_path)
        return index.exists()

    assert [kept(), kept()] == [False, True]
    (tmp_path / "b.py").write_text("33")
    assert [kept(), kept()] == [False, True]


def test_schedules() -> None:
    point = points(PENALTIES[:1], steps=100, lr=1.0, lr_warmup=0.1, lr_decay=0.2, coefficient_warmup=0.5)[0]
    stack = Stack.start([point], [start_of(point)], "cpu")
    rates = [stack.schedule(0, step)[0] for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05])
    assert [stack.schedule(0, step)[1] for step in (0, 24, 49, 99)] == pytest.approx([0.02, 0.5, 1.0, 1.0])
