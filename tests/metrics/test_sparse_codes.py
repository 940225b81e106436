"""Lists of active latents against dense codes: what they hold, and what SAEs of the CPU list."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stacks import PENALTIES, batches, points, stack_of

from sae_sweep.config.settings import Encoder
from sae_sweep.metrics import sparse_codes
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.registry import kinds
from sae_sweep.saes.parameters import Parameters

CODES = torch.tensor([[0, 2.0, 0, 1.0], [0, 0, 0, 0], [3.0, 0, 0, 0]])


def test_lists_hold_the_codes() -> None:
    listed = Active.of(CODES)
    assert (len(listed), listed.most, listed.counts.tolist()) == (3, 2, [2, 0, 1])
    assert listed.packed().tolist() == [[2, 1], [0, 0], [3, 0]]
    assert torch.equal(listed.dense(4), CODES)
    assert listed.contributions(torch.tensor([2.0, 1, 1, 3])).codes.tolist() == [2, 3, 6]
    for inputs in (0, 1, 2, 5):
        assert torch.equal(torch.cat([part.dense(4) for part in listed.split(inputs)]), CODES)
    nothing = Active.of(torch.zeros(0, 4))
    assert (len(nothing), nothing.most, list(nothing.split(3))) == (0, 0, [])
    # Inputs on which nothing fires are inputs, at the end too; what is not a number fires.
    silent = Active.of(torch.tensor([[0, torch.nan], [0, 0], [0, 0]]))
    assert (len(silent), silent.counts.tolist(), silent.latents.tolist()) == (3, [1, 0, 0], [1])


@pytest.mark.parametrize("dense_above", [0.0, 1.0])
def test_decoding_either_way(dense_above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_codes, "DENSE_ABOVE", dense_above)
    generator = torch.Generator().manual_seed(0)
    W_dec, b_dec = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    torch.testing.assert_close(Active.of(CODES).decode(W_dec, b_dec), CODES @ W_dec + b_dec)


@pytest.mark.parametrize("entries", [1, 1 << 20])
@pytest.mark.parametrize("architecture", [name for name, kind in kinds("architecture").items() if kind.listed])
def test_an_sae_lists_what_it_encodes(architecture: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_sweep.kernels.cpu import sparse_encode
    from sae_sweep.sweep.context import PointSae

    monkeypatch.setattr(sparse_encode, "ENTRIES", entries)
    (point,) = points(PENALTIES[-1:], architecture, width=75)
    started = stack_of([point]).parameters(0)
    threshold = torch.tensor(0.5 if kinds("architecture")[architecture].learns_threshold else 0.0)
    sae = PointSae(point, Parameters(started.W_enc, started.W_dec, started.b_enc, started.b_dec, threshold))
    x = batches(1, 90)[0]
    lists = list(sae.active(x))
    assert len(lists) > 1 or entries > 1
    expected = sae.encode(x)
    found = torch.cat([part.dense(75) for part in lists])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert 0 < int((found != 0).sum()) < found.numel()


@pytest.mark.parametrize("k", [1, 2])
def test_matching_pursuit_of_one_step_is_listed_as_topk_is(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_sweep.sweep import context

    asked = []
    monkeypatch.setattr(context, "LISTED_AT_LEAST", 75)
    monkeypatch.setattr(context, "_dense_codes", lambda *given: asked.append(given) or iter(()))
    (point,) = points(PENALTIES[-1:], "topk", width=75, k=k)
    point = dataclasses.replace(point, encoder=Encoder("matching_pursuit"))
    started = stack_of([point]).parameters(0)
    sae = context.PointSae(point, started)
    x = batches(1, 90)[0]
    lists = list(sae.active(x))
    assert bool(asked) == (k > 1), "of more steps each goes by what the ones before left"
    if k == 1:
        found = torch.cat([part.dense(75) for part in lists])
        torch.testing.assert_close(found, sae.encode(x), atol=1e-5, rtol=1e-5)
        assert set(torch.cat([part.counts for part in lists]).tolist()) <= {0, 1} and (found != 0).any()
