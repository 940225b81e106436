"""Architectures beyond ReLU and TopK: what fires, what else their objectives hold, and that coefficients count."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stacks import PENALTIES, batches, cpu_backend, points, stack_of, start_of

from sae_sweep.config.settings import Penalty, Point, Sae
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds
from sae_sweep.saes.architectures import pre_activations
from sae_sweep.saes.architectures.jumprelu import straight_through_gate
from sae_sweep.saes.architectures.matryoshka import prefixes
from sae_sweep.saes.train import AutogradBackend
from sae_sweep.sweep.cost import by_autograd
from sae_sweep.sweep.hardware_profile import SPEEDS

X = batches(1)[0]


def one(architecture: str, **settings: object) -> tuple[Sae, object]:
    point = points(PENALTIES[:1], architecture)[0]
    return point.sae.replace(**settings), start_of(point)


def trained(chosen: list[Point], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L0 and squared error of the last step of each."""
    stack, data = stack_of(chosen), batches(steps)
    AutogradBackend().advance(stack, data[:-1])
    last = AutogradBackend().advance(stack, data[-1:])
    return last.l0, last.error


@pytest.mark.parametrize("bandwidth", [0.1, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_coefficient_of_l0_moves_l0(bandwidth: float) -> None:
    coefficients = (0.1, 1.0, 10.0)
    chosen = [
        dataclasses.replace(
            points([Penalty("l0", c)], "jumprelu", steps=250)[0],
            sae=Sae("jumprelu", width=40, init="random", bandwidth=bandwidth),
        )
        for c in coefficients
    ]
    l0, error = trained(chosen, 250)
    assert (l0[:-1] > 1.3 * l0[1:]).all(), l0
    assert l0[0] > 3 * l0[-1]
    assert (error[:-1] < error[1:]).all(), error


def test_jumprelu_compares_contributions_and_the_slope_passes_the_jump() -> None:
    settings, sae = one("jumprelu", bandwidth=0.4)
    pre = pre_activations(X, sae)
    contributions = pre.relu() * sae.norms()
    codes = kinds("architecture")["jumprelu"].codes(X, sae, settings)
    assert torch.equal(codes > 0, contributions > sae.thresholds)
    assert torch.equal(codes[codes > 0], pre[codes > 0])

    theta = sae.thresholds.clone().requires_grad_()
    straight_through_gate(pre, sae.replace(thresholds=theta), settings).sum().backward()
    near = ((contributions - sae.thresholds).abs() < 0.2).sum(0)
    assert near.sum() > 10
    torch.testing.assert_close(theta.grad, -near / 0.4)


def test_the_gate_alone_learns_from_its_reconstruction_and_the_penalty() -> None:
    settings, sae = one("gated")
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "r_mag", "b_mag")
    leaves = {name: getattr(sae, name).clone().requires_grad_() for name in names}
    kind, sae = kinds("architecture")["gated"], sae.replace(**leaves)
    pre = pre_activations(X, sae)
    codes = kind.activate(pre, sae, settings, True)
    assert torch.equal(codes > 0, (pre > 0) & (codes > 0))
    assert kind.auxiliary is not None
    by_hand = (pre.relu() @ sae.W_dec + sae.b_dec - X).square().sum(1).mean()
    auxiliary = kind.auxiliary(X, pre, codes, sae, settings)
    torch.testing.assert_close(auxiliary, by_hand)
    gradients = torch.autograd.grad(auxiliary, list(leaves.values()), materialize_grads=True, retain_graph=True)
    touched = {name for name, gradient in zip(names, gradients, strict=True) if gradient.any()}
    assert touched == {"W_enc", "b_enc"}
    # Magnitudes would make up for a shorter decoder: the penalty must not shorten it.
    penalised = kind.penalised(pre, codes, sae).sum()
    (shorter,) = torch.autograd.grad(penalised, [leaves["W_dec"]], materialize_grads=True, retain_graph=True)
    assert not shorter.any()
    # What is reconstructed passes no slope to the gate's bias.
    (bias,) = torch.autograd.grad((codes @ sae.W_dec).sum(), [leaves["b_enc"]])
    assert bias.abs().max() < 1e-4 * codes.sum()


def test_matryoshka_sums_the_errors_of_its_prefixes() -> None:
    settings, sae = one("matryoshka", levels=3)
    assert prefixes(settings) == [10, 20, 40]
    assert prefixes(Sae("matryoshka", width=5, levels=9)) == [1, 2, 3, 5]
    kind = kinds("architecture")["matryoshka"]
    pre = pre_activations(X, sae)
    codes = kind.activate(pre, sae, settings, True)
    by_hand = [(codes[:, :end] @ sae.W_dec[:end] + sae.b_dec - X).square().sum(1).mean() for end in (10, 20)]
    assert kind.auxiliary is not None
    torch.testing.assert_close(kind.auxiliary(X, pre, codes, sae, settings), sum(by_hand))
    assert int((codes > 0).sum()) == settings.k * len(X)


def test_tied_rows_are_one_matrix_of_unit_norm_throughout() -> None:
    stack = stack_of(points(PENALTIES[:2], "tied"))
    before = stack.parameters().W_dec
    AutogradBackend().advance(stack, batches(5))
    after = stack.parameters()
    assert torch.equal(after.W_enc, after.W_dec)
    torch.testing.assert_close(after.norms(), torch.ones(2, 40))
    assert (after.W_dec - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "architecture", ["relu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tied", "gated"))]
)
def test_a_larger_coefficient_leaves_fewer_latents_on(architecture: str) -> None:
    chosen = [points([Penalty("l1", c)], architecture, steps=250)[0] for c in (0.1, 1.0, 5.0)]
    l0, error = trained(chosen, 250)
    assert (l0[:-1] > l0[1:]).all(), l0
    assert l0[0] > 1.3 * l0[-1]
    assert (error[:-1] < error[1:]).all(), error


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_fractional_k_is_a_mean_over_the_batch(architecture: str, compiled: bool) -> None:
    stack = stack_of(points(PENALTIES[-1:], architecture, k=1.3))
    with cpu_backend() as backend:
        progress = (backend if compiled else AutogradBackend()).advance(stack, batches(2))
    assert progress.l0.tolist() == pytest.approx([2 * 83 / 64])  # 1.3 · 64 = 83.2
    assert Sae("batchtopk", k=3.0) == Sae("batchtopk", k=3) and type(Sae("batchtopk", k=3.0).k) is int
    assert Sae("batchtopk", k=1.3) != Sae("batchtopk", k=1)
    with pytest.raises(UserError, match="whole"):
        kinds("architecture")["topk"].check(Sae("topk", k=1.3))


@pytest.mark.parametrize(
    "own", [{}, {"slopes": "thresholds"}, {"preact": 0.3}, {"slopes": "thresholds", "preact": 0.3}]
)
def test_jumprelu_by_each_of_its_sources(own: dict[str, object]) -> None:
    """The gradient against the sources' formulas: H′ = 1/bandwidth in the window, and what it reaches."""
    sae, parameters = one("jumprelu", **own)
    kind, leaves = kinds("architecture")["jumprelu"], ("W_enc", "b_enc", "W_dec", "thresholds")
    p = parameters.map(lambda tensor: tensor.clone().requires_grad_())
    pre = pre_activations(X, p)
    weights = torch.randn(pre.shape, generator=torch.Generator().manual_seed(1))
    loss = (kind.activate(pre, p, sae, True) * weights).sum() + kind.auxiliary(X, pre, pre, p, sae) * len(X)
    found = dict(
        zip(
            leaves,
            torch.autograd.grad(loss, [getattr(p, name) for name in leaves], materialize_grads=True),
            strict=True,
        )
    )
    q, b = parameters, sae.bandwidth
    pre, norms = pre_activations(X, q), q.norms()
    reach = pre.relu() * norms - q.thresholds
    of_u = weights * pre.relu() * (reach.abs() < b / 2) / b
    short = sae.preact * (q.thresholds > pre * norms)
    of_pre = weights * (reach > 0) * (pre > 0) - short * norms
    of_norm = -short * pre
    if sae.slopes == "both":
        of_pre, of_norm = of_pre + of_u * (pre > 0) * norms, of_norm + of_u * pre.relu()
    expected = {
        "W_enc": of_pre.T @ X,
        "b_enc": of_pre.sum(0),
        "W_dec": of_norm.sum(0)[:, None] * q.W_dec / norms[:, None],
        "thresholds": (short - of_u).sum(0),
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-3)
    point = dataclasses.replace(points(PENALTIES[:1], "jumprelu")[0], sae=sae)
    assert by_autograd(point, SPEEDS["cpu"]) is bool(own)
    if not own:
        assert point.id == points(PENALTIES[:1], "jumprelu")[0].id


class Step(torch.autograd.Function):
    """H(a − θ) as the quadratic loss's source has it: with a slope to thresholds alone, 1/bandwidth in the window."""

    @staticmethod
    def forward(ctx, a, threshold, bandwidth):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, threshold)
        ctx.bandwidth = bandwidth
        return (a > threshold).float()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        a, threshold = ctx.saved_tensors
        near = ((a - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return None, (-near * gradient).sum(0), None


def test_the_quadratic_loss_is_its_sources() -> None:
    """E‖x − x̂‖² + weight·(L0/target − 1)² and its gradient, in plain PyTorch."""
    own = {"slopes": "thresholds", "l0_target": 2.5, "l0_weight": 3.0}
    (point,) = points(PENALTIES[-1:], "jumprelu")
    point = dataclasses.replace(point, sae=point.sae.replace(**own))
    p = start_of(point).map(lambda tensor: tensor.clone().requires_grad_())
    pre = (X @ p.W_enc.T + p.b_enc).relu()
    a = (pre * p.W_dec.norm(dim=1)).detach()
    fires = Step.apply(a, p.thresholds, point.sae.bandwidth)
    error = (X - (pre * fires) @ p.W_dec - p.b_dec).square().sum(1).mean()
    loss = error + 3.0 * (fires.sum(1).mean() / 2.5 - 1) ** 2
    assert loss > error + 0.1
    wanted = torch.autograd.grad(loss, [p.W_enc, p.W_dec, p.b_enc, p.b_dec, p.thresholds])
    stack = stack_of([point])
    found = AutogradBackend().advance(stack, X[None])
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-5)
    # The first step of Adam goes against the sign of each gradient; its first moment is a tenth of it.
    moments = stack.views(stack.first[0])
    scale = min(1.0, point.training.clip / float(found.gradient))
    for moment, gradient in zip(moments, wanted, strict=True):
        torch.testing.assert_close(moment, 0.1 * scale * gradient, rtol=1e-3, atol=1e-5)


def test_the_quadratic_loss_brings_l0_to_its_target() -> None:
    (point,) = points(PENALTIES[-1:], "jumprelu", steps=250, lr=1e-2)
    found = {}
    for target in (1.5, 4.0):
        sae = point.sae.replace(l0_target=target, l0_weight=300.0)
        found[target] = float(trained([dataclasses.replace(point, sae=sae)], 250)[0])
    assert found == {target: pytest.approx(target, rel=0.2) for target in found}
    assert by_autograd(dataclasses.replace(point, sae=sae), SPEEDS["cpu"])
    assert point.sae.replace(l0_target=None) == point.sae
    with pytest.raises(UserError, match=r"l0_target=50 is more than sae\.width=40"):
        kinds("architecture")["jumprelu"].check(point.sae.replace(l0_target=50.0))
