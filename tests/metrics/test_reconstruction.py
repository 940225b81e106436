"""Reconstruction, sparsity and the toy's output, against the formulas written out over all inputs at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from planted import Planted

from sae_sweep.config.settings import Toy
from sae_sweep.metrics.reconstruction import Reconstruction
from sae_sweep.toys.max_of_k import MaxOfK, shapes

TOY = Toy(d_vocab=5, k=3, d_model=4, d_head=4)
SCALE = 1.7


class Case:
    """An untrained toy's inputs at a site, centred and scaled, with a code of 7 latents that is often 0."""

    def __init__(self, site: str, distribution: str = "max_stratified") -> None:
        generator = torch.Generator().manual_seed(0)
        params = {name: torch.randn(shape, generator=generator) for name, shape in shapes(TOY).items()}
        self.model, self.site = MaxOfK(TOY, params), site
        planted = Planted(TOY.d_vocab, TOY.k, distribution)
        self.weight = torch.from_numpy(planted.weight)
        self.maximum = torch.from_numpy(planted.factor("m")).long()
        raw = self.model.activations(torch.from_numpy(planted.sequences), site)
        self.mean = (self.weight @ raw.double()).float()
        self.x = (raw - self.mean) * SCALE
        self.z = torch.relu(torch.randn(len(raw), 7, generator=generator))
        self.decoder = torch.randn(7, raw.shape[1], generator=generator)

    def measure(self, x_hat, z=None, batches=1, truth=None):
        z = self.z if z is None else z
        norms = z * self.decoder.norm(dim=1)
        found = Reconstruction(self.model, self.site, self.mean, SCALE, lambda norms: norms.sum(1))
        for rows in torch.arange(len(self.x)).tensor_split(batches):
            parts = (part[rows] for part in (self.x, (z != 0).sum(1), norms, x_hat, self.maximum, self.weight))
            found.add(*parts, truth=(self.maximum if truth is None else truth)[rows])
        return found


@pytest.fixture(params=["pre_unembed", "post_unembed"])
def case(request):
    return Case(request.param)


def test_formulas_over_all_inputs(case):
    x, w, maximum = case.x.double(), case.weight, case.maximum
    x_hat = case.z @ case.decoder
    found = case.measure(x_hat, batches=3).metrics
    error = w @ (x - x_hat.double()).square().sum(1)
    centre = w @ x
    variance = w @ (x - centre).square().sum(1)
    means = torch.stack([(w[maximum == m] @ x[maximum == m]) / w[maximum == m].sum() for m in range(5)])
    within = w @ (x - means[maximum]).square().sum(1)
    penalty = w @ (case.z * case.decoder.norm(dim=1)).sum(1).double()
    assert found["fvu"] == pytest.approx(float(error / variance), rel=1e-5)
    assert found["fvu_above_ceiling"] == pytest.approx(float((error - within) / variance), rel=1e-5)
    assert found["l0"] == pytest.approx(float(w @ (case.z != 0).sum(1).double()))
    assert found["squared_error"] == pytest.approx(float(error), rel=1e-5)
    assert found["penalty_mean"] == pytest.approx(float(penalty), rel=1e-5)
    assert found["shrinkage"] == pytest.approx(float(w @ (x_hat.norm(dim=1) / x.norm(dim=1)).double()), rel=1e-5)
    logits, logits_hat = (case.model.logits(acts / SCALE + case.mean, case.site).double() for acts in (case.x, x_hat))
    original, reconstructed, zero = (
        float(w @ F.cross_entropy(output, maximum, reduction="none"))
        for output in (logits, logits_hat, torch.zeros_like(logits))
    )
    assert zero == pytest.approx(math.log(5))
    assert found["loss_recovered"] == pytest.approx((reconstructed - zero) / (original - zero), rel=1e-4)
    p, q = logits.softmax(1), logits_hat.softmax(1)
    assert found["kl"] == pytest.approx(float(w @ (p * (p / q).log()).sum(1)), rel=1e-4)


def test_perfect_reconstruction(case):
    found = case.measure(case.x).metrics
    assert found["fvu"] == found["kl"] == found["squared_error"] == 0
    assert found["loss_recovered"] == pytest.approx(1)
    assert found["shrinkage"] == pytest.approx(1)
    assert found["fvu_above_ceiling"] < 0


def test_means_of_the_maxima_reach_the_ceiling(case):
    w, maximum = case.weight, case.maximum
    means = torch.stack([(w[maximum == m] @ case.x[maximum == m].double()) / w[maximum == m].sum() for m in range(5)])
    found = case.measure(means[maximum].float()).metrics
    assert found["fvu_above_ceiling"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["fvu"] < 1


def test_nothing_reconstructed(case):
    """The mean for every input: all variance unexplained, nothing of x left."""
    found = case.measure(torch.zeros_like(case.x), z=torch.zeros_like(case.z)).metrics
    assert found["fvu"] == pytest.approx(1, rel=1e-6)
    assert found["l0"] == found["shrinkage"] == 0
    half = case.measure(case.x / 2).metrics
    assert half["shrinkage"] == pytest.approx(0.5)
    assert half["fvu"] == pytest.approx(0.25, rel=1e-6)


def test_raw_zero_recovers_nothing(case):
    """Reconstructing raw activation 0 is the zero ablation itself."""
    found = case.measure((-case.mean * SCALE).expand_as(case.x)).metrics
    assert found["loss_recovered"] == pytest.approx(0, abs=1e-5)


def test_ceiling_follows_the_weights():
    case, uniform = Case("pre_unembed"), Case("pre_unembed", "uniform")
    ceilings = [one.measure(one.x).ceiling for one in (case, uniform)]
    assert ceilings[0] != pytest.approx(ceilings[1], rel=1e-3)
    assert all(0 < ceiling < 1 for ceiling in ceilings)


def test_inputs_without_size_are_no_ratio():
    case = Case("pre_unembed")
    case.x[3] = 0
    found = case.measure(case.x / 2).metrics
    assert found["shrinkage"] == pytest.approx(0.5)


def test_weights_need_not_sum_to_one_nor_inputs_have_mean_zero():
    case = Case("pre_unembed")
    x_hat = case.z @ case.decoder
    expected = case.measure(x_hat).metrics
    case.weight = case.weight * 40
    heavier = case.measure(x_hat)
    assert heavier.metrics == pytest.approx(expected, rel=1e-9)
    shift = torch.tensor([3.0, -2.0, 0.5, 1.0])
    case.x, case.mean = case.x + shift, case.mean - shift / SCALE
    moved = case.measure(x_hat + shift)
    for name in ("fvu", "fvu_above_ceiling", "squared_error", "kl", "loss_recovered"):
        assert moved.metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    assert moved.ceiling == pytest.approx(heavier.ceiling, rel=1e-5)


def test_what_does_not_vary_has_no_share_of_variance_explained():
    case = Case("pre_unembed")
    case.x = torch.zeros_like(case.x)
    found = case.measure(torch.ones_like(case.x)).metrics
    assert all(math.isnan(found[name]) for name in ("fvu", "fvu_above_ceiling", "shrinkage"))
    assert found["squared_error"] == pytest.approx(case.x.shape[1])


def test_shares_do_not_depend_on_the_scale():
    case = Case("pre_unembed")
    x_hat = case.z @ case.decoder
    expected = case.measure(x_hat).metrics
    case.x = case.x * 1e-3
    found = case.measure(x_hat * 1e-3).metrics
    for name in ("fvu", "fvu_above_ceiling", "shrinkage"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("soft", [False, True])
def test_what_the_toy_is_to_predict_may_be_another_token_or_a_distribution(soft):
    case = Case("pre_unembed")
    truth = (case.maximum + 1) % 5
    expected = truth
    if soft:
        truth = expected = F.one_hot(truth, 5).double() * 0.7 + 0.3 / 5
    found = case.measure(case.z @ case.decoder, truth=truth).metrics
    acts = case.x, case.z @ case.decoder, -case.mean.expand_as(case.x) * SCALE
    original, reconstructed, zero = (
        float(case.weight @ F.cross_entropy(case.model.logits(x / SCALE + case.mean, case.site).double(), expected,
                                            reduction="none"))
        for x in acts
    )  # fmt: skip
    assert found["loss_recovered"] == pytest.approx((reconstructed - zero) / (original - zero), rel=1e-4)
