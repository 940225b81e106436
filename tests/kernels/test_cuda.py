"""The CUDA kernels in Triton's interpreter: against the reference, alone and in company, when lists overflow."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stacks import PENALTIES, batches, points, stack_of

# Read when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from sae_sweep import registry
from sae_sweep.config.settings import Penalty, Site, Toy
from sae_sweep.kernels import gpu_knows
from sae_sweep.kernels.cuda import tiling
from sae_sweep.kernels.cuda.backend import PRECISION, CudaBackend, _Trainer
from sae_sweep.kernels.cuda.captured import Step
from sae_sweep.kernels.cuda.self_check import Check, compare
from sae_sweep.registry import Setting
from sae_sweep.saes import penalties
from sae_sweep.saes.formula import parse
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend
from sae_sweep.sweep.cost import state_bytes

# The interpreter's numpy warns of 0·inf and the like, which the kernels mask.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# Every program of a grid is a loop of Python here: small batches.
BATCH = 8
# A loaded machine's interpreter takes many seconds for these, and their like in the fast tests are smaller.
SLOW = pytest.mark.slow
# Wide enough for lists of entries in these tests, and an encoder bias that leaves few latents on.
ENTRIES, QUIET = 300, 5.0


@pytest.fixture(autouse=True)
def narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of entries from a smaller width than on a GPU."""
    monkeypatch.setattr(tiling, "NARROW", 100)


def quiet(stack: Stack, by: float = QUIET) -> Stack:
    """The same stack with fewer latents on."""
    stack.split(stack.flat)[2].sub_(by)
    return stack


def agree(stack: Stack, data: torch.Tensor, backend: CudaBackend | None = None) -> list[bool]:
    """Compare each step with the reference's; for each SAE whether it took the last one by products."""
    backend = backend or CudaBackend()
    reference = Stack(**{f.name: getattr(stack, f.name) for f in dataclasses.fields(stack)})
    reference.flat, reference.first, reference.second = (t.clone() for t in (stack.flat, stack.first, stack.second))
    for x in data:
        # From the same state each time: two runs drift apart once rounding decides whether a latent fires.
        stack.flat.copy_(reference.flat), stack.first.copy_(reference.first), stack.second.copy_(reference.second)
        expected = AutogradBackend().advance(reference, x[None])
        progress = backend.advance(stack, x[None])
        assert (stack.step, progress.steps) == (reference.step, 1)
        largest = float(reference.first.abs().max())
        torch.testing.assert_close(stack.first, reference.first, atol=1e-4 * largest, rtol=1e-4)
        torch.testing.assert_close(stack.second, reference.second, atol=1e-7 * largest**2, rtol=1e-3)
        # Where a gradient is rounding alone, Adam may turn it into a full step: at most 2·lr apart, and rarely.
        apart = (stack.flat - reference.flat).abs() > 1e-5
        assert apart.float().mean() < 1e-3
        for name in ("loss", "error", "l0", "variance"):
            torch.testing.assert_close(getattr(progress, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(progress.gradient, expected.gradient, rtol=1e-4, atol=1e-5)
    assert backend._trainer is not None
    return [bool(dense) for dense in backend._trainer.dense]


@pytest.mark.parametrize("by_entries", [False, True])
@SLOW
def test_the_step_is_the_reference_step_for_every_penalty(by_entries: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_entries:
        monkeypatch.setattr(tiling, "NARROW", 0)
    chosen = points(PENALTIES, clip=2.0, coefficient_warmup=0.5)
    # A stack holds different learning rates too.
    chosen[0] = dataclasses.replace(chosen[0], training=chosen[0].training.replace(lr=1e-3))
    assert agree(stack_of(chosen), batches(2, BATCH)) == [not by_entries] * len(chosen)


@SLOW
@pytest.mark.parametrize("k", [1, 3, 20])
def test_topk(k: int) -> None:
    # At k = 20 some inputs have fewer positive latents than that.
    stack = stack_of(points(PENALTIES[-1:] * 2, "topk", width=90 if k == 3 else 40, k=k))
    assert agree(stack, batches(2, BATCH)) == [False, False]


def test_topk_keeps_the_lower_of_equal_latents() -> None:
    stack = stack_of(points(PENALTIES[-1:], "topk", width=100, k=2))
    W_enc, W_dec, b_enc, _ = stack.split(stack.flat)
    W_enc.zero_(), W_dec.copy_(torch.eye(16)[0].expand_as(W_dec)), b_enc.fill_(-1)
    # In one tile, in two, and with a larger one that comes last.
    b_enc[0, [3, 7, 70]], b_enc[0, 99] = 1.0, 2.0
    backend = CudaBackend()
    backend.advance(stack, batches(1, BATCH))
    assert backend._trainer is not None
    assert backend._trainer.candidates.sort(-1).values.unique(dim=1).tolist() == [[[3, 99]]]


@pytest.mark.slow
def test_many_segments_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "WIDE", 600)  # eight segments of two tiles, the last half empty
    stack = quiet(stack_of(points([PENALTIES[1], PENALTIES[7]], width=1100)))
    assert agree(stack, batches(1, 140)[:, ::5]) == [False, False]


@pytest.mark.slow
def test_a_latent_that_fires_on_more_inputs_than_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "NARROW", 0)
    monkeypatch.setattr(tiling, "WORDS", 2)  # of three, the last with six inputs
    stack = stack_of(points(PENALTIES[3:5], width=20))
    stack.split(stack.flat)[2][:, [0, 7]] += 100.0  # always on
    data = batches(1, 70)
    backend = CudaBackend()
    assert agree(stack, data, backend) == [False, False]
    assert backend._trainer is not None and not backend._trainer.masks.any() and not backend._trainer.hits.any()


@pytest.mark.slow
def test_an_sae_without_room_for_its_entries_takes_the_step_by_products() -> None:
    chosen = points([PENALTIES[7], PENALTIES[0], PENALTIES[6]], width=ENTRIES)
    stack = quiet(stack_of(chosen))
    stack.split(stack.flat)[2][1] += QUIET
    data = batches(3, BATCH)
    backend = CudaBackend()
    assert agree(stack, data[:1], backend) == [False, True, False]
    # A few inputs on which half of all fires.
    data[1, 3:6] *= 30
    assert agree(stack, data[1:2], backend) == [True, True, True]
    # The next step is by entries again.
    assert agree(stack, data[2:], backend) == [False, True, False]


@SLOW
def test_codes_are_float32s_whatever_half_precision_makes_of_them() -> None:
    stack = quiet(stack_of(points(PENALTIES[:2], width=ENTRIES)))
    W_enc, _, b_enc, _ = stack.split(stack.flat)
    data = batches(1, BATCH)
    W_enc[0, :3] *= 1e6  # infinite in half precision
    W_enc[1, :150] *= 1e-7  # zero in half precision
    b_enc[1, :150] = 1e-9
    # On the edge: pre-activations of both signs, far smaller than what half precision resolves.
    edge = torch.arange(150, ENTRIES)
    b_enc[1, edge] = (
        -(W_enc[1, edge] @ data[0, 0]) + torch.randn(150, generator=torch.Generator().manual_seed(1)) * 1e-5
    )
    agree(stack, data)


@pytest.mark.parametrize(
    ("architecture", "width"),
    [("relu", 40), ("relu", ENTRIES), ("topk", 40)],
)
@SLOW
def test_company_changes_no_bit(architecture: str, width: int) -> None:
    chosen = points(PENALTIES[:3] if architecture == "relu" else PENALTIES[-1:] * 3, architecture, width)
    data = batches(2, BATCH)

    def trained(members: list[int]) -> list[torch.Tensor]:
        stack, backend = stack_of([chosen[i] for i in members]), CudaBackend()
        if width > tiling.NARROW:
            # One of them begins with more on than lists have room for.
            for i, biases in zip(members, stack.split(stack.flat)[2], strict=True):
                biases -= QUIET * (i != 1)
        for x in data:
            backend.advance(stack, x[None])
        return list(stack.flat)

    together = trained([0, 1, 2])
    for i, flat in zip((2, 0), trained([2, 0]), strict=True):
        assert torch.equal(flat, together[i])
    assert torch.equal(trained([1])[0], together[1])


@pytest.mark.parametrize(
    ("width", "architecture"),
    [(40, "relu"), (ENTRIES, "relu"), (40, "topk")],
)
@SLOW
def test_a_broken_sae_leaves_its_mates_alone(width: int, architecture: str) -> None:
    chosen = points(PENALTIES[:2], architecture, width)
    broken = dataclasses.replace(chosen[1], training=chosen[1].training.replace(lr=1e30))
    data = batches(3, BATCH)
    whole, mixed = quiet(stack_of(chosen)), quiet(stack_of([chosen[0], broken]))
    CudaBackend().advance(whole, data)
    progress = CudaBackend().advance(mixed, data)
    assert progress.loss.isfinite().tolist() == [True, False]
    assert torch.equal(mixed.flat[0], whole.flat[0])


@SLOW
def test_a_gradient_too_long_to_be_a_number_breaks_an_sae_and_does_not_freeze_it() -> None:
    stack = quiet(stack_of(points([PENALTIES[0], PENALTIES[1].replace(coefficient=1e30)])))
    assert CudaBackend().advance(stack, batches(3, BATCH)).loss.isfinite().tolist() == [True, False]


def test_a_latent_without_entries_still_moves() -> None:
    stack = quiet(stack_of(points(PENALTIES[:1], width=ENTRIES)), 100.0)
    stack.first.fill_(1e-3), stack.second.fill_(1e-6)
    assert agree(stack, batches(1, BATCH)) == [False]
    assert (stack.first[0, :ENTRIES] == pytest.approx(0.9e-3)) and not (stack.flat == 0).any()


def test_a_new_penalty_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = penalties.PenaltyFormula(
        name="new",
        description="",
        prior="",
        formula="1 - exp(-a/s)",
        outer="T*log(1 + sum(sqrt(a + 1) - 1))",
        settings={"scale": Setting(1.0)},
    )
    monkeypatch.setitem(registry._kinds["penalty"], "new", formula)
    for clear in registry._derived:
        clear()
    assert agree(stack_of(points([Penalty("new", 0.5, scale=2.0)])), batches(1, BATCH)) == [True]
    own = Penalty("formula", 0.5, formula="where(a <= s, a, where(a <= 2*s, s, 2*s))", outer="T + T^2/9", scale=0.5)
    assert agree(stack_of(points([own])), batches(1, BATCH)) == [True]


@pytest.mark.parametrize(("text", "outer"), [("erf(a)", None), ("a", "T + max(a)"), ("a", "T/s")])
def test_formulas_that_the_kernels_do_not_know_are_left_to_autograd(text: str, outer: str | None) -> None:
    assert not gpu_knows(parse(text, outer))


@pytest.mark.parametrize(
    ("architecture", "width", "d", "b"),
    [("relu", 40, 16, 70), ("relu", 700, 24, 300), ("relu", 9000, 16, 33), ("topk", 90, 100, 64)],
)
def test_the_planner_knows_what_is_held(architecture: str, width: int, d: int, b: int) -> None:
    chosen = points(PENALTIES, architecture, width, batch_size=b)
    stack = stack_of(chosen, d)
    trainer = _Trainer(stack, b, PRECISION)
    tensors = [value for value in vars(trainer).values() if isinstance(value, torch.Tensor)]
    held = sum(t.nbytes for t in (*tensors, stack.flat, stack.first, stack.second))
    site, toy = Site("pre_unembed"), Toy(d_model=d)
    assert len(chosen) * state_bytes(dataclasses.replace(chosen[0], site=site, toy=toy), "cuda") == pytest.approx(
        held, rel=0.03
    )


@SLOW
def test_an_annealed_stack() -> None:
    stack = stack_of(points([Penalty("lp_annealed", 0.5), PENALTIES[0]]))
    backend = CudaBackend()
    agree(stack, batches(1, BATCH), backend)
    stack.exponent[0], stack.rescale[0] = 0.4, 1.7  # as annealing leaves them between two blocks
    agree(stack, batches(1, BATCH), backend)


# Every batch that the kernels cut differently; larger ones take minutes here, and seconds on a GPU (bench_gpu --check).
SEVERAL_STEPS = [("relu", 24, 8), ("relu", ENTRIES, 8), ("topk", 24, 8)]
SEVERAL_STEPS += [("relu", 24, b) for b in (64, 512, 1024, 4096)] + [("relu", ENTRIES, b) for b in (64, 512)]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the largest take three minutes in the interpreter, and more on a busy machine
@pytest.mark.parametrize(("architecture", "width", "b"), SEVERAL_STEPS)
def test_four_steps_and_four_more_with_annealing_between(architecture: str, width: int, b: int) -> None:
    """Launched, captured, replayed: against the reference, a second time, and one SAE alone."""
    captured: list[int] = []

    def capture(step: Step) -> Step:
        captured.append(1)
        return step

    penalties_of = [Penalty("none", 0.0)] * 2 if architecture == "topk" else [PENALTIES[0], Penalty("lp_annealed", 0.1)]
    chosen = points(penalties_of, architecture, width, steps=100, lr=1e-4, batch_size=b)
    check = Check(tuple(chosen), 16, b, "cpu", steps=4)
    assert compare(check, lambda: CudaBackend(capture=capture)) == ""
    assert len(captured) == 3  # of each of the three stacks once: annealing captures nothing anew


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    script = Path(__file__).parents[1] / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warps = dict(line.split() for line in done.stdout.splitlines())
    assert {"screen", "choose", "reconstruct"} <= set(warps)
    # It clears the words that it has read, which a second warp would read again.
    assert warps["gradients_of_latents"] == "1"
