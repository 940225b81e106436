"""The compiled step of ISTA, LISTA and an MLP: against the reference, and its bits against company and threads."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stacks import EXCLUSIVE, EXCLUSIVE_PI, FEW, PENALTIES, batches, cpu_backend, points, stack_of
from test_kernels import have_the_bits_of_each_alone, step_alike, trained

from sae_sweep.config.settings import Encoder, Penalty, Point
from sae_sweep.kernels.cpu import narrow, tile_stack
from sae_sweep.kernels.cpu.backend import CpuBackend
from sae_sweep.kernels.cpu.unrolled import UnrolledTrainer
from sae_sweep.saes.limits import UNROLLED, UNROLLED_CHOSEN
from sae_sweep.saes.recipes import is_plain
from sae_sweep.sweep import cost
from sae_sweep.sweep.backend import pick_backend

ISTA, LISTA, MLP = Encoder("ista", steps=2), Encoder("lista", steps=3), Encoder("mlp", hidden=21)
ENCODERS = pytest.mark.parametrize("encoder", [ISTA, LISTA, MLP], ids=lambda encoder: encoder.name)


def points_of(encoder: Encoder, penalties: list[Penalty], architecture: str = "relu", **shape: float) -> list[Point]:
    """A point per penalty."""
    chosen = points(penalties, architecture, **{"clip": 5.0, **shape})  # type: ignore[arg-type]
    return [dataclasses.replace(point, encoder=encoder) for point in chosen]


def agree(chosen: list[Point], b: int, d: int) -> None:
    """Two steps of the reference and of the compiled step from the same state."""
    reference, compiled = stack_of(chosen, d), stack_of(chosen, d)
    with cpu_backend() as backend:
        for x in batches(2, b, d):
            step_alike(backend, compiled, reference, x)
            torch.testing.assert_close(compiled.first, reference.first, rtol=1e-3, atol=5e-6)
    assert compiled.first.abs().max() > 1e-3


@ENCODERS
@pytest.mark.parametrize("above", [-1.0, 1.0], ids=["products", "bits"])
@pytest.mark.parametrize(("b", "d", "width"), [(64, 16, 40), (100, 20, 70)])
def test_it_is_the_reference(
    encoder: Encoder, above: float, b: int, d: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By products and by sums; also where the last tile is not full, and a row no whole vectors."""
    monkeypatch.setattr(narrow, "NARROW_DENSE_ABOVE", above)
    agree(points_of(encoder, PENALTIES[:2], width=width), b, d)
    for k in (1, 4):
        agree(points_of(encoder, PENALTIES[-1:], "topk", width=width, k=k), b, d)


def test_by_products_and_by_sums_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of long rows, which overshoot, more and fewer fire in turn."""
    monkeypatch.setattr(narrow, "NARROW_DENSE_ABOVE", 0.73)
    chosen = points_of(Encoder("lista", steps=4), PENALTIES[:1], clip=1e9)
    reference, compiled = stack_of(chosen), stack_of(chosen)
    named = reference.named(reference.flat)
    named["b_enc"].fill_(0.3)
    named["W_enc"].mul_(3)
    with cpu_backend() as backend:
        step_alike(backend, compiled, reference, batches(1)[0])
        (work,) = (each for free in backend.by_tiles[UnrolledTrainer].free.values() for each in free)
    assert work.by_products.tolist() == [[0, 1, 0, 1, 0]]


@ENCODERS
@pytest.mark.parametrize("many", [FEW, pytest.param(PENALTIES, marks=pytest.mark.slow)], ids=["few", "all"])
def test_under_every_penalty(encoder: Encoder, many: list[Penalty]) -> None:
    """Also one that no loop over vectors computes."""
    agree(points_of(encoder, many), 64, 16)
    agree(points_of(encoder, [EXCLUSIVE]), 64, 16)


@ENCODERS
def test_in_parts_and_of_a_wide_one(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_stack, "PART", 1 << 15)
    agree(points_of(encoder, PENALTIES[:1], width=1500), 200, 16)


@ENCODERS
@pytest.mark.parametrize(("architecture", "width"), [("relu", 60), ("topk", 60)])
def test_company_threads_and_calls_change_no_bit(
    encoder: Encoder, architecture: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_stack, "PART", 1 << 16)
    penalties = PENALTIES[:3] if architecture == "relu" else PENALTIES[-1:] * 3
    chosen, data = points_of(encoder, penalties, architecture, width=width), batches(6, 200)
    have_the_bits_of_each_alone(trained(chosen, data), data)


def test_which_have_a_compiled_step() -> None:
    def compiled(encoder: Encoder, architecture: str = "relu", penalty: Penalty = PENALTIES[0], **shape: float) -> bool:
        (point,) = points_of(encoder, [penalty], architecture, **shape)
        with cpu_backend() as backend:
            means = pick_backend(stack_of([point]), backend.pool, 2)
        assert isinstance(means, CpuBackend) is is_plain(point)
        return is_plain(point)

    none = PENALTIES[-1]
    assert compiled(ISTA) and compiled(LISTA, "topk", none) and compiled(MLP, penalty=EXCLUSIVE)
    for architecture in ("batchtopk", "jumprelu", "matryoshka"):
        assert not compiled(LISTA, architecture, none if architecture != "jumprelu" else PENALTIES[0])
    assert not compiled(MLP, "gated")
    assert not compiled(ISTA, penalty=EXCLUSIVE_PI)
    assert not compiled(ISTA, "topk", none, width=80, k=UNROLLED_CHOSEN + 1)
    assert not compiled(ISTA.replace(steps=UNROLLED // 40), width=40)
    assert not compiled(ISTA, revival="auxk") and compiled(ISTA, revival="resample")


@pytest.mark.parametrize("encoder", [Encoder("ista", steps=4), MLP], ids=lambda encoder: encoder.name)
def test_the_plan_knows_what_it_holds(encoder: Encoder) -> None:
    """Of four parts of a large batch; a site of the toy's width, whose activations have as many numbers."""
    (point,) = points_of(encoder, PENALTIES[-1:], "topk", width=1500, k=8)
    work = UnrolledTrainer.workspace(stack_of([point], cost.activation_size(point)), 1 << 14)
    held = sum(each.nbytes for each in work)
    assert cost._unrolled_bytes(point) == pytest.approx(held, rel=0.15)


def test_where_k_is_annealed_no_block_leaves_memory_behind() -> None:
    (point,) = points_of(ISTA, PENALTIES[-1:], "topk", width=80, k=8)
    with cpu_backend() as backend:
        for k in (40, 20, 8):
            stack = stack_of([dataclasses.replace(point, sae=point.sae.replace(k=k))])
            backend.advance(stack, batches(1))
        assert sum(map(len, backend.by_tiles[UnrolledTrainer].free.values())) == 1
