"""The toy: its forward pass against a plain transformer, its optimiser against torch's, its bits against its stack."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_sweep.config.settings import Toy
from sae_sweep.toys import max_of_k
from sae_sweep.toys.max_of_k import MaxOfK, shapes, train

SMALL = Toy(d_vocab=7, k=3, d_model=5, d_head=3, steps=60, batch_size=37)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes a second thread is all waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plain_logits(params: dict[str, Tensor], sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residual and logits of the last position, by causal attention at every position, in float64."""
    p = {name: param.double().numpy() for name, param in params.items()}
    x = p["W_E"][sequences] + p["W_pos"]
    scores = np.einsum("bqh,bkh->bqk", x @ p["W_Q"], x @ p["W_K"]) / np.sqrt(p["W_Q"].shape[1])
    scores[:, ~np.tri(sequences.shape[1], dtype=bool)] = -np.inf
    attention = np.exp(scores - scores.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    residual = (x + attention @ (x @ p["W_V"]) @ p["W_O"])[:, -1]
    return residual, residual @ p["W_U"]


def test_the_published_shape_and_start() -> None:
    assert sum(np.prod(shape) for shape in shapes(Toy()).values()) == 8_320
    start = max_of_k._initial(Toy(), torch.Generator().manual_seed(0))
    assert float(start.std()) == pytest.approx(0.8 / np.sqrt(32), rel=0.03)


def test_activations_are_those_of_a_plain_transformer() -> None:
    toy = SMALL.replace(d_vocab=9, k=4)
    (params,) = train([toy], "cpu")
    model = MaxOfK(toy, params)
    sequences = np.random.default_rng(0).integers(9, size=(200, 4))
    residual, logits = plain_logits(params, sequences)
    tokens = torch.from_numpy(sequences)
    pre, post = model.activations(tokens, "pre_unembed"), model.activations(tokens, "post_unembed")
    np.testing.assert_allclose(pre.numpy(), residual, atol=2e-5)
    np.testing.assert_allclose(post.numpy(), logits, atol=2e-5)
    np.testing.assert_allclose(model.logits(pre, "pre_unembed").numpy(), logits, atol=2e-5)
    assert model.logits(post, "post_unembed") is post
    assert (model.width("pre_unembed"), model.width("post_unembed")) == (pre.shape[1], post.shape[1])
    # What is minimised is the cross-entropy of these logits.
    loss = max_of_k._losses({name: param[None] for name, param in params.items()}, tokens[None])
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(200), sequences.max(1)]
    assert loss.tolist() == pytest.approx([expected.mean()], abs=1e-5)


def test_exact_evaluation_counts_every_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(max_of_k, "ROWS", 100)
    (params,) = train([SMALL], "cpu")
    sequences = np.array(list(itertools.product(range(7), repeat=3)))
    _, logits = plain_logits(params, sequences)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), sequences.max(1)]
    exact = MaxOfK(SMALL, params).evaluate_exact()
    assert exact.accuracy == (logits.argmax(1) == sequences.max(1)).mean()
    assert exact.loss == pytest.approx(loss.mean(), abs=1e-5)


def test_one_update_is_that_of_torch_adamw_for_every_toy() -> None:
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(2, 50, generator=rng)
    lr, weight_decay = [1e-2, 3e-3], [0.01, 0.5]
    alone = [torch.nn.Parameter(row.clone()) for row in flat]
    optimisers = [
        torch.optim.AdamW([param], lr=rate, betas=(0.9, 0.999), weight_decay=decay)
        for param, rate, decay in zip(alone, lr, weight_decay, strict=True)
    ]
    moments = torch.zeros_like(flat), torch.zeros_like(flat)
    decays = torch.tensor([[1 - rate * decay] for rate, decay in zip(lr, weight_decay, strict=True)])
    for step in range(1, 21):
        gradient = torch.randn(2, 50, generator=rng)
        for param, optimiser, own in zip(alone, optimisers, gradient, strict=True):
            param.grad = own.clone()
            optimiser.step()
        max_of_k._adamw(flat, gradient, moments, torch.tensor(lr)[:, None], decays, step)
    torch.testing.assert_close(flat, torch.stack([param.detach() for param in alone]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "toy",
    [
        SMALL.replace(steps=5),
        SMALL.replace(steps=5, distribution="max_stratified"),
        pytest.param(Toy().replace(steps=60), marks=pytest.mark.slow),
    ],
)
def test_a_toy_has_the_same_bits_alone_and_in_any_stack_on_any_threads(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(max_of_k, "BLOCK", max(2, toy.steps // 2 - 1))  # three blocks, the last a short one
    mates = [
        toy.replace(seed=1, lr=1e-2),
        toy.replace(seed=2, weight_decay=0.3),
        toy.replace(distribution="uniform"),
    ]
    (alone,) = train([toy], "cpu")
    for count in (1, 2):
        torch.set_num_threads(count)
        for stack in ([toy], [mates[0], toy], [*mates, toy]):
            assert same_bits(train(stack, "cpu")[-1], alone)
    assert not same_bits(train([mates[0]], "cpu")[0], alone)


def test_the_distribution_of_the_toy_is_that_of_its_inputs() -> None:
    toys = [Toy(steps=70), Toy(steps=70, distribution="max_stratified")]
    generators = [torch.Generator().manual_seed(0) for _ in toys]
    batches = list(max_of_k._batches(toys, generators, "cpu"))
    assert len(batches) == 70
    assert batches[0].shape == (2, 128, 4)
    maxima = torch.stack(batches).amax(-1).transpose(0, 1).flatten(1)
    share = torch.stack([m.bincount(minlength=64) for m in maxima]) / maxima.shape[1]
    expected = torch.arange(65) ** 4 / 64**4
    torch.testing.assert_close(share[0].double(), expected.diff().double(), atol=0.006, rtol=0)
    torch.testing.assert_close(share[1], torch.full((64,), 1 / 64), atol=0.006, rtol=0)


@pytest.mark.slow
def test_the_small_recipe_learns_the_maximum_and_reports_its_loss() -> None:
    toy = Toy(d_vocab=16, k=3, steps=1500, batch_size=256, lr=3e-3)
    seen: list[tuple[int, float]] = []
    (params,) = train([toy], "cpu", lambda step, loss: seen.append((step, loss)))
    exact = MaxOfK(toy, params).evaluate_exact()
    assert exact.accuracy > 0.999
    assert exact.loss < 0.01
    assert [step for step, _ in seen] == list(range(50, 1501, 50))
    assert seen[0][1] > 0.5 > 0.01 > seen[-1][1]


@pytest.mark.parametrize("other", [{"d_vocab": 8}, {"k": 4}, {"steps": 61}, {"batch_size": 38}, {"d_head": 4}])
def test_toys_of_other_shapes_are_not_stacked(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        train([SMALL, SMALL.replace(**other)], "cpu")


def test_the_comparison_with_the_published_figures_fails_for_worse_toys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parents[2] / "scripts" / "toy_accuracy.py"
    spec = importlib.util.spec_from_file_location("toy_accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy_accuracy", script)
    spec.loader.exec_module(script)
    # 0.0003 above the published mean: √(0.0001²/2 + 0.00148²/150) = 0.00014 is the error of the difference.
    close = [script.ACCURACY.mean + 0.0003 + sign * 0.0001 / np.sqrt(2) for sign in (-1, 1)]
    assert script.standard_errors(close, script.ACCURACY) == pytest.approx(2.14, abs=0.01)
    monkeypatch.setattr(script, "Toy", lambda seed: SMALL.replace(seed=seed))
    monkeypatch.setattr(sys, "argv", ["toy_accuracy.py", "--seeds", "3"])
    assert script.main() == 1
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["accuracy", "loss (nats)"]
    assert len({line.count("|") for line in table}) == 1
