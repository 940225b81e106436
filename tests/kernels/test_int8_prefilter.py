"""Products of bytes pass over no latent that fires: lists are those of `tile`, entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sae_sweep.kernels.cpu import int8_prefilter
from sae_sweep.kernels.cpu import sparse_step as sparse
from sae_sweep.kernels.cpu.simd import LANES, has
from sae_sweep.kernels.cpu.sparse_step import CODE, LATENT, LISTED, encode, encoder_of, refresh

rounds = pytest.mark.skipif(
    not int8_prefilter.PREFILTERS, reason="this processor has no AVX-512 VNNI: nothing is rounded"
)
Array = np.ndarray


def listed(
    x: Array, W: Array, bias: Array, rounded: bool, k: int = 0, floor: float = 0, norm: float = 1
) -> list[Array]:
    """Where each input's entries begin, their latents, and the bits of their codes."""
    width, d = W.shape
    flat = np.concatenate([W.ravel(), np.full(width * d, norm / d**0.5), bias, np.zeros(d)]).astype(np.float32)
    norms, ones = np.ones((2, -(-width // LANES) * LANES), np.float32)
    encoder = encoder_of(flat[: width * d].reshape(width, d), norms if k else ones, rounded, k, floor)
    refresh(flat, width, d, encoder, norms)
    codes, starts = np.empty((len(x) * width, LISTED), np.float32), np.empty(len(x) + 1, np.int64)
    latents = codes.view(np.int32)
    assert encode(x.astype(np.float32), 0, len(x), encoder, codes, latents, starts) == len(x)
    entries = slice(0, starts[-1])
    return [starts, latents[entries, LATENT], codes[entries, CODE].view(np.int32)]


def same(*settings: object, **named: object) -> None:
    """Both lists are one, and not empty."""
    exactly, rounded = (listed(*settings, rounded=way, **named) for way in (False, True))  # type: ignore[misc,arg-type]
    assert len(exactly[1])
    for one, other in zip(exactly, rounded, strict=True):
        np.testing.assert_array_equal(one, other)


def drawn(width: int, d: int, rows: int = 200, quiet: float = 1.5) -> tuple[Array, Array, Array]:
    """Inputs, an encoder and biases under which few latents fire."""
    rng = np.random.default_rng(width + d)
    W = rng.normal(size=(width, d)) / d**0.5
    return rng.normal(size=(rows, d)), W, -quiet * np.abs(rng.normal(size=width))


@pytest.mark.parametrize("k", [0, 3])
def test_lists_are_the_codes_that_fire(k: int) -> None:
    """On any processor, without rounding."""
    x, W, bias = (array.astype(np.float32) for array in drawn(40, 8, rows=20))
    codes = np.maximum(x @ W.T + bias, 0)
    if k:
        codes[codes < np.sort(codes, axis=1)[:, [-k]]] = 0
    starts, latents, bits = listed(x, W, bias, rounded=False, k=k)
    expected = [np.flatnonzero(row) for row in codes]
    assert starts.tolist() == [0, *np.cumsum([len(row) for row in expected])]
    for row, of_row in enumerate(expected):
        entries = slice(starts[row], starts[row + 1])
        order = np.argsort(latents[entries])
        np.testing.assert_array_equal(latents[entries][order], of_row)
        np.testing.assert_allclose(bits[entries].view(np.float32)[order], codes[row, of_row], rtol=1e-4, atol=1e-5)


@rounds
@pytest.mark.parametrize("width", [3, 16, 40, 501, 1100])
@pytest.mark.parametrize("d", [1, 5, 16, 64, 70])
def test_lists_are_those_without_rounding(width: int, d: int) -> None:
    same(*drawn(width, d, quiet=0.3))
    same(*drawn(width, d, quiet=0.3), floor=0.3)


@rounds
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("width", [40, 501, 1100])
def test_the_largest_are_those_without_rounding(width: int, k: int) -> None:
    same(*drawn(width, 32), k=k, norm=0.7)


SCALES: list[Callable[[Array], Array]] = [
    lambda a: a * 1e-18,
    lambda a: a * 1e12,
    lambda a: a * np.exp(8 * np.random.default_rng(1).normal(size=a.shape)),
    lambda a: a * (np.random.default_rng(2).random(a.shape) < 0.05),
    lambda a: np.sign(a),
]


@rounds
@pytest.mark.parametrize("of_inputs", range(len(SCALES)))
@pytest.mark.parametrize("of_latents", range(len(SCALES)))
def test_whatever_the_sizes(of_inputs: int, of_latents: int) -> None:
    x, W, bias = drawn(300, 24)
    x, W = SCALES[of_inputs](x), SCALES[of_latents](W)
    usual = np.abs(x @ W.T).mean(0)
    same(x, W, bias * usual)


@rounds
def test_what_is_no_number_is_left_to_the_exact_product() -> None:
    x, W, bias = drawn(90, 20)
    for array, bad in ((x, np.nan), (x, np.inf), (W, np.nan), (W, -np.inf), (bias, np.inf), (bias, np.nan)):
        rows = np.random.default_rng(3).integers(0, len(array), 5)
        array[rows] = bad if array.ndim == 1 else np.where(np.arange(array.shape[1]) == 3, bad, array[rows])
    same(x, W, bias)
    same(x, W, bias, k=2)


@rounds
@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize("of_latents", [True, False])
def test_what_rounding_hides_is_found_all_the_same(d: int, of_latents: bool) -> None:
    """Each input lies along what rounding takes from a latent, or the other way round, and the latent just fires."""
    rng = np.random.default_rng(d)
    rows = rng.normal(size=(150, d)).astype(np.float32)
    step = np.abs(rows).max(1, keepdims=True) / int8_prefilter.LARGEST
    along = (rows / step - np.rint(rows / step)).astype(np.float32) * 10
    x, W = (along, rows) if of_latents else (rows, along)
    reached = np.einsum("ij,ij->i", x.astype(float), W.astype(float))
    sizes = np.linalg.norm(x, axis=1) * np.linalg.norm(W, axis=1)
    bias = -reached + 1e-4 * sizes
    starts, latents, _ = listed(x, W, bias, rounded=True)
    for row in range(len(x)):
        assert row in latents[starts[row] : starts[row + 1]]
    same(x, W, bias)


@rounds
def test_bounds_hold_and_say_something() -> None:
    x, W, bias = drawn(64, 64, rows=64)
    bias -= 100  # far from firing
    starts, _, _ = listed(x, W, bias, rounded=True)
    assert starts[-1] == 0
    x, W = x.astype(np.float32), W.astype(np.float32)
    coarse, bounds = (
        np.zeros((4, int8_prefilter.digits(64), LANES), np.int32),
        np.zeros((int8_prefilter.BOUNDS, 64), np.float32),
    )
    ones, idle = np.ones(64, np.float32), np.zeros(64, np.uint8)
    int8_prefilter.coarsen(W, ones, ones, idle, 0, 64, coarse, bounds)
    steps = np.abs(W).max(1) / int8_prefilter.LARGEST
    np.testing.assert_allclose(bounds[int8_prefilter.STEP], steps, rtol=1e-6)
    rest = np.linalg.norm(W - np.rint(W / steps[:, None]) * steps[:, None], axis=1)
    np.testing.assert_allclose(bounds[int8_prefilter.GAP], rest, rtol=1e-3)
    assert (bounds[int8_prefilter.NORM] >= np.linalg.norm(W, axis=1) * (1 - 1e-6)).all()
    assert (bounds[int8_prefilter.NORM] <= 1.05 * np.linalg.norm(W, axis=1)).all()
    assert (bounds[int8_prefilter.BIAS] >= 1).all() and (bounds[int8_prefilter.BIAS] < 1.001).all()


@rounds
def test_only_where_few_fire_is_anything_rounded() -> None:
    W, weights = np.zeros((320, 8), np.float32), np.ones(320, np.float32)
    rows = [
        [len(part) for part in (made[1], made[4])] for made in (encoder_of(W, weights, way) for way in (True, False))
    ]
    assert rows == [[0, 20], [20, 0]]
    first = len(encoder_of(W, weights, True, k=1)[1])
    assert 0 < first < 20 and first * LANES >= sparse.FIRST
    assert has("avx512f") and not has("a feature that no processor has")
