"""Kernels that are wrong, that raise, that do not compile or take the process with them are found out, and once."""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import PENALTIES, points, stack_of

# Read when a kernel is defined.
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

import triton.language as tl

from sae_sweep.kernels.cuda import dense, self_check, update
from sae_sweep.kernels.cuda.backend import CudaBackend
from sae_sweep.kernels.cuda.self_check import ANSWER, UNABLE, Check, compare, in_own_process, remembered
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import AutogradBackend, Backend, Progress

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def small() -> Check:
    """A check of L1 SAEs, as small as an interpreter wants it."""
    check = Check.of(stack_of(points(PENALTIES[:1], batch_size=16)))
    narrow = [dataclasses.replace(p, sae=p.sae.replace(width=24)) for p in check.points]
    return dataclasses.replace(check, points=tuple(narrow), device="cpu")


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_answers", {})
    return tmp_path


class Altered(Backend):
    """The reference step, and then something that it should not do."""

    def __init__(self, alter: Any) -> None:
        self.alter = alter

    def advance(self, stack: Stack, batches: torch.Tensor) -> Progress:
        progress = AutogradBackend().advance(stack, batches)
        self.alter(stack, progress)
        return progress


@pytest.mark.slow
def test_right_kernels_are_found_right(small: Check) -> None:
    assert compare(small, CudaBackend) == ""


def test_a_kernel_that_is_wrong_on_purpose(small: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update, "_BETA1", tl.constexpr(0.8))
    assert compare(small, CudaBackend).startswith("gradient apart from the reference's by 8.8e-01 of it, in call 1")


def test_a_kernel_that_raises(small: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    class Raises:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal\nmemory access")

    monkeypatch.setattr(dense, "reconstruct", Raises())
    assert compare(small, CudaBackend) == "RuntimeError: CUDA error: an illegal memory access"


@pytest.mark.slow
def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch, triton, triton.language as tl
        sys.path.insert(0, sys.argv[1])
        import compile_kernels  # every launch from here on compiles, for compute capability 9.0, and nothing else
        from sae_sweep.kernels.cuda import encode, self_check
        from sae_sweep.kernels.cuda.backend import CudaBackend

        @triton.jit
        def measure_latents(flat, norms, reach, packed, width, stride, D: tl.constexpr, DP: tl.constexpr,
                            LATENTS: tl.constexpr, SCREENED: tl.constexpr):
            tl.store(norms, tl.there_is_no_such_thing(flat))

        encode.measure_latents = measure_latents
        print(self_check.ANSWER + self_check.compare(self_check.Check.from_json(sys.stdin.read()), CudaBackend))
        """)
    )
    check = dataclasses.replace(Check.of(stack_of(points(PENALTIES[:1], batch_size=16))), device="cpu")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", environment)
        answer = in_own_process(check, [sys.executable, str(script), str(Path(__file__).parents[1])])
    assert answer is not None and answer.startswith("CompilationError") and "there_is_no_such_thing" in answer


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda stack, progress: stack.first.mul_(1.05), "gradient apart"),
        (lambda stack, progress: stack.flat[-1].mul_(torch.nan), "parameters apart"),
        (lambda stack, progress: progress.loss.mul_(1.001), "loss apart"),
        (lambda stack, progress: stack.flat.add_(torch.rand(()) * 1e-6), "two runs differ"),
        (lambda stack, progress: stack.flat.mul_(1 + 1e-6 * len(stack.points)), "an SAE alone and in a stack differ"),
    ],
)
def test_what_is_compared(small: Check, alter: Any, said: str) -> None:
    assert compare(small, lambda: Altered(lambda *_: None)) == ""
    assert compare(small, lambda: Altered(alter)).startswith(said)


def test_a_difference_in_the_second_call_alone(small: Check) -> None:
    """What only a captured graph gets wrong shows there."""

    def late(stack: Stack, progress: Progress) -> None:
        stack.second.mul_(1.1 if stack.step > self_check.STEPS else 1.0)

    assert "in call 2" in compare(small, lambda: Altered(late))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"print('noise'); print({ANSWER!r})", ""),
        (f"print({ANSWER!r} + 'it differs')", "it differs"),
        (f"print({ANSWER!r} + {UNABLE!r})", None),
        ("import os; os.abort()", "the check broke off with exit code -6: no message"),
        ("raise SystemExit('cannot')", "the check broke off with exit code 1: cannot"),
        ("import time; time.sleep(60)", "the check did not end within 1 s"),
    ],
)
def test_what_becomes_of_the_process_that_compares(small: Check, code: str, said: str | None) -> None:
    patience = 1.0 if "sleep" in code else 60.0
    assert in_own_process(small, [sys.executable, "-c", code], patience) == said


@pytest.mark.slow
def test_the_process_that_compares_is_ours(small: Check) -> None:
    assert in_own_process(small) == ""


def test_an_answer_is_asked_for_once(small: Check, a_cache_of_its_own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask() -> str:
        asked.append("")
        return "it differs"

    assert [remembered(small, "a GPU", ask) for _ in range(2)] == ["it differs"] * 2
    self_check._answers.clear()  # another process reads the file
    assert remembered(small, "a GPU", ask) == "it differs" and len(asked) == 1
    (file,) = (a_cache_of_its_own / "sae-sweep" / "kernels").iterdir()
    # Another machine, other kernels and another kind of stack are asked for anew; so is what cannot be read.
    remembered(small, "another GPU", ask)
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "sources", lambda: "other kernels")
        remembered(small, "a GPU", ask)
    remembered(dataclasses.replace(small, d=small.d + 1), "a GPU", ask)
    self_check._answers.clear()
    file.write_text("{")
    remembered(small, "a GPU", ask)
    assert len(asked) == 5


def test_without_a_home_that_can_be_written_a_process_asks_once(
    small: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [remembered(small, "a GPU", lambda: "") for _ in range(2)] == ["", ""]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    self_check._answers.clear()
    assert self_check.folder() is None and remembered(small, "a GPU", lambda: "") == ""


def test_a_check_is_of_the_kind_of_its_stack() -> None:
    one = Check.of(stack_of(points([PENALTIES[1], PENALTIES[0]], width=64)))
    # Another coefficient, seed or width of the same tiles runs the same code.
    same = [p.replace(coefficient=9.0) for p in PENALTIES[:2]]
    assert Check.of(stack_of(points(same, width=80))).kind == one.kind
    kinds = {one.kind}
    for other in (
        Check.of(stack_of(points(PENALTIES[:1], width=64))),
        Check.of(stack_of(points(PENALTIES[:2], width=65))),
        Check.of(stack_of(points(PENALTIES[:2], width=1024))),
        Check.of(stack_of(points(PENALTIES[:2], width=64), d=24)),
        Check.of(stack_of(points(PENALTIES[:2], width=64, batch_size=512))),
        Check.of(stack_of(points(PENALTIES[-1:] * 2, "topk", width=64))),
    ):
        kinds.add(other.kind)
    assert len(kinds) == 7
