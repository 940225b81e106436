"""The step of narrow SAEs: its pieces against NumPy and PyTorch, and the whole against the reference step."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from stacks import EXCLUSIVE, EXCLUSIVE_PI, FEW, PENALTIES, batches, cpu_backend, points, stack_of
from test_kernels import step_alike

from sae_sweep.config.settings import Penalty
from sae_sweep.kernels.cpu import narrow
from sae_sweep.kernels.cpu.narrow_tile import INPUTS, add_product, encode, transpose
from sae_sweep.kernels.cpu.tile_largest import keep_top, mark_top
from sae_sweep.kernels.cpu.vector_penalty import compile_vectors, vectorises
from sae_sweep.registry import kinds
from sae_sweep.saes.penalties import formula_of, penalty_value

_table = numba.float32[:, :]


@numba.njit(numba.void(_table, _table, numba.float32[::1], _table, numba.int64[::1], _table))
def _products(W, x, starts, codes, masks, gradient):  # type: ignore[no-untyped-def]
    encode(W, x, starts, codes, masks)
    add_product(codes, x.T.copy(), gradient)


@numba.njit
def _top(codes, half, norms, ranks, latents):  # type: ignore[no-untyped-def]
    keep_top(codes[:half], 0, norms, ranks, latents)
    keep_top(codes[half:], half, norms, ranks, latents)


@numba.njit
def _transpose(source, target):  # type: ignore[no-untyped-def]
    transpose(source, target)


@numba.njit
def _mark_top(codes, norms, k, masks, ranks, latents):  # type: ignore[no-untyped-def]
    return mark_top(codes, norms, k, masks, ranks, latents)


def _mark(codes: np.ndarray, norms: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """The bits of the k largest, and whether there are more than k."""
    masks, ranks, latents = np.full(len(codes), -1), np.empty(codes.size, np.float32), np.empty(codes.size, np.int32)
    return masks, _mark_top(codes, norms, k, masks, ranks, latents)


def _integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-3, 4, shape).astype(np.float32)


@pytest.mark.parametrize(("width", "d"), [(1, 16), (5, 16), (13, 32), (64, 48), (137, 32)])
def test_products_of_every_number_of_rows(width: int, d: int) -> None:
    W, x, starts, before = _integers(width, d), _integers(d, INPUTS), _integers(width), _integers(width, d)
    codes, masks, gradient = np.empty((width, INPUTS), np.float32), np.empty(width, np.int64), before.copy()
    _products(W, x, starts, codes, masks, gradient)
    expected = np.maximum(W @ x + starts[:, None], 0)  # integers: every order of sums gives the same
    assert np.array_equal(codes, expected)
    bits = (masks[:, None].view(np.uint64) >> np.arange(INPUTS, dtype=np.uint64)) & np.uint64(1)
    assert np.array_equal(bits.astype(bool), expected > 0)
    assert np.array_equal(gradient, before + expected @ x.T)


def test_transposing() -> None:
    source, target = _integers(INPUTS, 48), np.empty((48, INPUTS), np.float32)
    _transpose(source, target)
    assert np.array_equal(target, source.T)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_of_equal_ranks_the_lower_latent_stays(k: int) -> None:
    width = 40
    codes, norms = np.maximum(_integers(width, INPUTS), 0), np.abs(_integers(width)) + 1
    ranks, latents = np.zeros((k, INPUTS), np.float32), np.zeros((k, INPUTS), np.int32)
    _top(codes, 17, norms, ranks, latents)
    assert _mark(codes, norms, k)[1], "more than k have the k-th largest rank"
    for r in range(INPUTS):
        order = sorted(range(width), key=lambda latent: (-codes[latent, r] * norms[latent], latent))[:k]
        positive = [latent for latent in order if codes[latent, r] > 0]
        assert latents[ranks[:, r] > 0, r].tolist() == positive


@pytest.mark.parametrize(("width", "k"), [(3, 1), (3, 5), (40, 2), (40, 7), (40, 40), (300, 8)])
def test_marking_the_k_largest(width: int, k: int) -> None:
    """Also where fewer fire than stay, on an input where none does, and where numbers are far apart."""
    generator = np.random.default_rng(width + k)
    codes = np.maximum(generator.standard_normal((width, INPUTS)), 0).astype(np.float32)
    codes[:, 0], codes[:, 1], codes[0, 1] = 0, codes[:, 1] * np.float32(1e-30), np.inf
    norms = generator.uniform(0.5, 2, width).astype(np.float32)
    masks, tied = _mark(codes, norms, k)
    ranks = codes * norms[:, None]
    kth = -np.sort(-ranks, axis=0)[min(k, width) - 1]
    bits = (masks[:, None].view(np.uint64) >> np.arange(INPUTS, dtype=np.uint64)) & np.uint64(1)
    assert not tied and np.array_equal(bits.astype(bool), (ranks >= kth) & (ranks > 0))


@pytest.mark.parametrize(
    "penalty",
    [pytest.param(penalty, id=penalty.name, marks=() if penalty in FEW else pytest.mark.slow) for penalty in PENALTIES],
)
def test_penalties_in_vectors_are_autograds(penalty: Penalty) -> None:
    width = 20
    generator = np.random.default_rng(0)
    codes = np.maximum(2 * generator.standard_normal((width, INPUTS)), 0).astype(np.float32)
    codes[:, 0], codes[:, 1] = 0, 1e-4  # nothing fires; hardly anything does
    norms = generator.uniform(0.2, 2, width).astype(np.float32)
    scale, exponent = penalty.get("scale", 1.0), penalty.get("p", 1.0)
    sums, weights = np.zeros((2, 2, INPUTS), np.float32)
    slopes = np.empty_like(codes)
    sum_terms, weigh_terms, slope_codes = compile_vectors(formula_of(penalty))
    sum_terms(codes, norms, scale, exponent, sums)
    value = weigh_terms(sums, scale, exponent, weights)
    slope_codes(codes, norms, scale, exponent, weights, slopes)
    contributions = torch.tensor((codes * norms[:, None]).T, dtype=torch.float64, requires_grad=True)
    expected = penalty_value(formula_of(penalty), contributions, scale, exponent).sum()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=2e-6, abs=1e-6)
    assert contributions.grad is not None
    on, of_autograd = codes > 0, contributions.grad.numpy().T
    np.testing.assert_allclose(slopes[on], of_autograd[on], rtol=1e-5, atol=1e-6)


def test_what_has_a_largest_term_is_never_taken_in_vectors() -> None:
    assert {name for name, kind in kinds("penalty").items() if not vectorises(kind.parsed)} == {
        "exclusive",
        "exclusive_pi",
    }


def test_which_saes_are_narrow() -> None:
    def narrow_ones(penalties: list[Penalty], architecture: str, width: int, k: int = 3) -> list[bool]:
        stack = stack_of(points(penalties, architecture, width, k))
        return [narrow.is_narrow(stack, i) for i in range(len(penalties))]

    assert narrow_ones([PENALTIES[0], EXCLUSIVE_PI, EXCLUSIVE], "relu", 40) == [True, False, True]
    assert narrow_ones(PENALTIES[-1:], "topk", 40) == [True]
    assert narrow_ones(PENALTIES[-1:], "topk", 40, narrow.NARROW_CHOSEN + 1) == [False]
    assert narrow_ones(PENALTIES[:1], "relu", narrow.NARROW_WIDTH + 1) == [False]
    assert narrow_ones(PENALTIES[:1], "gated", 40) == [False]


@pytest.mark.parametrize("many", [FEW, pytest.param(PENALTIES, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("above", [-1.0, 1.0], ids=["products", "bits"])
@pytest.mark.parametrize(("b", "d", "width"), [(64, 32, 16), (100, 16, 70), (30, 20, 33)])
def test_products_and_bits_are_the_reference(
    above: float, b: int, d: int, width: int, many: list[Penalty], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last tile is not full, and a row no whole vectors."""
    monkeypatch.setattr(narrow, "NARROW_DENSE_ABOVE", above)
    cases = [
        ("relu", many, 0),
        ("relu", [EXCLUSIVE] * 2, 0),
        ("topk", PENALTIES[-1:], 1),
        ("topk", PENALTIES[-1:], 4),
    ]
    for architecture, penalties, k in cases:
        chosen = points(penalties, architecture, width, k or 3, clip=5.0)
        reference, compiled = stack_of(chosen, d), stack_of(chosen, d)
        with cpu_backend() as backend:
            for x in batches(2, b, d):
                step_alike(backend, compiled, reference, x)
