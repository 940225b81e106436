"""What is written from a formula is kept for other processes, and made anew whatever happens to what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from sae_sweep.kernels.cpu.penalty_gradients import compile_slopes
from sae_sweep.kernels.cpu.vector_penalty import compile_vectors, vectorises
from sae_sweep.saes import formula_cache, penalties
from sae_sweep.saes.formula import Formula, parse
from sae_sweep.saes.formula_cache import code_in, kept_module, kept_text

FORMULA = parse("a/(a + s)")
TEXT = "import numba\n\n@numba.njit('int64(int64)', cache=keep)\ndef double(x):\n    return 2 * x\n"


@pytest.fixture
def another_process() -> Iterator[Callable[[], None]]:
    """Forgets what this process holds in memory; whatever was put there meanwhile is taken out again."""
    before = dict(formula_cache._modules)

    def forget() -> None:
        formula_cache._modules.clear()
        for function in (compile_slopes, compile_vectors, vectorises, penalties._torch_functions):
            function.cache_clear()

    forget()
    yield forget
    formula_cache._modules.update(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled code is kept."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path / "kept"


def text(write: Callable[[], str], formula: Formula = FORMULA, *details: object, code: str = "") -> str:
    return kept_text("test", formula, *details, code=code, write=write)


def never() -> str:
    raise AssertionError("it was not found")


def test_a_text_is_found_by_all_that_it_depends_on(folder: Path) -> None:
    assert text(lambda: "first\nsecond") == text(never) == "first\nsecond"
    assert text(lambda: "of another formula", parse("a/(a + 2*s)")) == "of another formula"
    assert text(lambda: "of another outer", parse("a/(a + s)", "T^2")) == "of another outer"
    assert text(lambda: "of a detail", FORMULA, 1.0) == "of a detail"
    assert text(lambda: "by other code", code="other") == "by other code"
    assert len(list(folder.iterdir())) == 5


def test_a_process_writes_by_the_code_that_it_imported(tmp_path: Path) -> None:
    """An edit or a pull under it is the code of the next process; its own texts must not be found by that."""
    (tmp_path / "writer.py").write_text("before")
    code = code_in(tmp_path)
    (tmp_path / "writer.py").write_text("after")
    assert code_in(tmp_path) == code
    code_in.cache_clear()
    assert code_in(tmp_path) != code


@pytest.mark.parametrize("damage", [b"", b"# nonsense", b"\xff\xfe", None], ids=["empty", "cut", "not text", "changed"])
def test_a_damaged_text_is_written_anew(folder: Path, damage: bytes | None) -> None:
    text(lambda: "x = 1")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"x = 1", b"x = 2") if damage is None else damage)
    assert text(lambda: "x = 1") == "x = 1"
    assert file.read_bytes() == whole


def test_compiled_functions_are_kept(folder: Path, another_process: Callable[[], None]) -> None:
    def load(write: Callable[[], str] = never) -> object:
        module = kept_module("test", FORMULA, code="", write=write)
        assert module.double(21) == 42
        return module

    module = load(lambda: TEXT)
    assert load() is module
    another_process()
    again = load()
    assert again is not module and again.double.stats.cache_hits  # type: ignore[attr-defined]
    for file in (each for each in folder.parent.rglob("*.nb?")):
        file.write_bytes(b"damaged")
    another_process()
    assert load().double.stats.cache_path is None  # type: ignore[attr-defined]


def test_where_nothing_can_be_written_it_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_process: Callable[[], None]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    assert text(lambda: "text") == "text"
    module = kept_module("test", FORMULA, code="", write=lambda: TEXT)
    assert module.double(21) == 42 and module.double.stats.cache_path is None


@pytest.mark.parametrize("name", ["l1", "prod1p", "exclusive"])
def test_what_was_compiled_once_needs_neither_sympy_nor_a_compiler(
    name: str, another_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    formula = penalties.formula_of(name)

    def slopes() -> list[float]:
        codes, out = np.arange(3, dtype=np.float32), np.empty(3, np.float32)
        latents, bounds = np.zeros((3, 2), np.int32), np.array([0, 3])
        found = [compile_slopes(formula)(codes, latents, bounds, codes, 1.0, 1.0, out), *out.tolist()]
        if vectorises(formula):
            sums = np.zeros((2, 64), np.float32)
            compile_vectors(formula)[0](np.ones((3, 64), np.float32), codes, 1.0, 1.0, sums)
            found += sums.ravel().tolist()
        return [*found, *penalties.penalty_value(formula, torch.tensor(codes)[None]).tolist()]

    expected = slopes()

    def compiler(*_: object) -> None:
        raise AssertionError("it was not found")

    another_process()
    monkeypatch.setattr(Formula, "numeric_expressions", compiler)
    monkeypatch.setattr("numba.core.dispatcher._FunctionCompiler.compile", compiler)
    assert slopes() == expected
