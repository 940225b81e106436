"""Starts: what each promises of its latents, and what it may depend on."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from sae_sweep.config.settings import Penalty, Point, Sae, Toy
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds, offered
from sae_sweep.saes.inits import from_exemplars, start
from sae_sweep.saes.inits import kmeans as kmeans_init
from sae_sweep.saes.inits.kmeans import kmeans
from sae_sweep.saes.parameters import Parameters
from sae_sweep.sweep.context import Ground
from sae_sweep.toys.classes import Cells, Partition

INITS = offered("init")

D = 8


class Clusters:
    """Six clusters on orthogonal axes about the origin, each of two sub-clusters a little apart along a seventh."""

    device = "cpu"
    centres = torch.eye(D)[:6] * 8 - torch.tensor([8 / 6] * 6 + [0.0] * 2)
    offset = torch.eye(D)[6] * 0.8

    def exemplars(self, count: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(12, (count,), generator=generator)
        noise = torch.randn(count, D, generator=generator) * 0.02
        return self.centres[which % 6] + torch.where(which[:, None] < 6, -1, 1) * self.offset + noise

    def covariance(self) -> torch.Tensor:
        x = self.exemplars(4096, 0)
        return torch.cov(x.T, correction=0)

    def class_means(self, partition: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.centres.double(), torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25, 0.0])

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(D)[:6], self.centres.new_tensor([-8 / 6] * 6 + [0.0] * 2)


def codes(parameters: Parameters, x: torch.Tensor) -> torch.Tensor:
    return (x @ parameters.W_enc.T + parameters.b_enc).relu()


def point(**sae: object) -> Point:
    return Point(sae=Sae(**{"width": 6, **sae}))  # type: ignore[arg-type]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("width", [5, 6, 12])
def test_shapes_and_decoder_norms(init: str, width: int) -> None:
    parameters = start(point(init=init, width=width), Clusters())
    assert parameters.W_enc.shape == parameters.W_dec.shape == (width, D)
    assert parameters.b_enc.shape == (width,)
    torch.testing.assert_close(parameters.norms(), torch.full((width,), 0.1 if init == "random" else 1.0))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in vars(parameters).values())


@pytest.mark.parametrize("metric", [torch.eye(D), torch.diag(torch.linspace(0.1, 3, D))])
@pytest.mark.parametrize("margin", [0.0, 0.5, 0.8])
def test_an_exemplar_reconstructs_itself_and_stops_at_its_margin(metric: torch.Tensor, margin: float) -> None:
    x = Clusters().exemplars(6, 1)
    parameters = from_exemplars(x, margin, metric)
    own = (x @ parameters.W_enc.T + parameters.b_enc).diagonal()
    torch.testing.assert_close(own, x.norm(dim=1))
    torch.testing.assert_close(own[:, None] * parameters.W_dec, x)
    at_margin = (margin * x @ parameters.W_enc.T + parameters.b_enc).diagonal()
    torch.testing.assert_close(at_margin, torch.zeros(6), atol=1e-4, rtol=0)


def test_kmeans_finds_every_cluster() -> None:
    for seed in range(5):
        found = start(dataclasses.replace(point(init="kmeans"), seed=seed), Clusters())
        assert sorted(found.W_dec.argmax(1).tolist()) == [0, 1, 2, 3, 4, 5]


def test_the_whitened_start_tells_sub_clusters_apart_and_kmeans_does_not() -> None:
    x = torch.cat([Clusters.centres - Clusters.offset, Clusters.centres + Clusters.offset])
    apart = start(point(init="whitened", width=12, ridge=1e-3, margin=0.75), Clusters())
    assert (codes(apart, x) > 0).sum(1).tolist() == [1] * 12
    assert (codes(apart, x) > 0).sum(0).tolist() == [1] * 12
    merged = start(point(init="kmeans", width=12), Clusters())
    assert (codes(merged, x) > 0).sum(1).min() >= 2


def test_the_oracle_takes_the_heaviest_classes_and_spares_are_off() -> None:
    short = start(point(init="oracle", width=3), Clusters())
    assert short.W_dec.argmax(1).tolist() == [0, 4, 2]
    long = start(point(init="oracle", width=9), Clusters())
    fires = (codes(long, Clusters().exemplars(500, 3)) > 0).any(0)
    assert fires.tolist() == [True] * 5 + [False] * 4  # one class has no mass, three latents no class


def test_random_directions_are_those_of_the_seed_whatever_their_norms() -> None:
    short, unit, scaled = (
        start(point(init=f"random{name}", width=64), Clusters()) for name in ("", "_unit", "_scaled")
    )
    torch.testing.assert_close(short.W_enc, short.W_dec)
    torch.testing.assert_close(10 * short.W_dec, unit.W_dec)
    torch.testing.assert_close(unit.W_enc, unit.W_dec)
    torch.testing.assert_close(scaled.W_dec, unit.W_dec)
    torch.testing.assert_close(scaled.W_enc, 2 * D / 64 * unit.W_enc)


def test_what_a_start_depends_on() -> None:
    base = point(init="kmeans")

    def same(other: Point) -> bool:
        pair = start(base, Clusters()), start(other, Clusters())
        return all(torch.equal(a, b) for a, b in zip(vars(pair[0]).values(), vars(pair[1]).values(), strict=True))

    assert same(dataclasses.replace(base, penalty=Penalty("sqrt", 3.0)))
    assert not same(dataclasses.replace(base, seed=1))


def test_kmeans_takes_fewer_inputs_than_centres() -> None:
    few = torch.eye(D)[:3]
    assert kmeans(few.repeat(4, 1), 5, torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_every_architecture_starts_with_latents_that_see_their_exemplars(architecture: str, init: str) -> None:
    chosen = point(architecture=architecture, init=init, width=12, k=12)
    kind, parameters = kinds("architecture")[architecture], start(chosen, Clusters())
    for name in kind.extras:
        assert getattr(parameters, name).shape == (12,)
    x = Clusters().exemplars(400, 3)
    codes = kind.codes(x, parameters, chosen.sae, training=True)
    assert codes.isfinite().all()
    assert (codes > 0).any(1).float().mean() > 0.5
    if init == "oracle":  # five classes have weight: seven latents are off
        assert (codes > 0).any(0).tolist() == [True] * 5 + [False] * 7
    if not init.startswith("random") and init != "exemplars":  # several exemplars of one cluster add up to too much
        assert (codes @ parameters.W_dec - x).square().sum(1).mean() < x.square().sum(1).mean()


def test_a_threshold_stands_where_a_relu_would_begin() -> None:
    jump, relu = (start(point(architecture=name, init="oracle", width=3), Clusters()) for name in ("jumprelu", "relu"))
    x = Clusters.centres[[0, 4, 2]]
    fires = kinds("architecture")["jumprelu"].codes(torch.cat([0.51 * x, 0.49 * x]), jump, Sae("jumprelu", width=3)) > 0
    assert torch.equal(fires.sum(0), torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close((x @ jump.W_enc.T).diagonal(), x.norm(dim=1))
    torch.testing.assert_close((x @ relu.W_enc.T + relu.b_enc).diagonal(), x.norm(dim=1))


def test_a_gated_start_is_the_relu_start() -> None:
    gated, relu = (start(point(architecture=name, init="oracle"), Clusters()) for name in ("gated", "relu"))
    x = Clusters().exemplars(50, 0)
    found = kinds("architecture")["gated"].codes(x, gated, Sae("gated", width=6))
    torch.testing.assert_close(found, codes(relu, x), atol=1e-5, rtol=1e-5)


def test_additive_means_are_the_two_factors_of_an_additive_toy() -> None:
    cells = Cells(6, 3)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    both = cells.partition("mq")
    m, q = (torch.zeros(both.count, dtype=torch.int64).scatter(0, *pair) for pair in _of_classes(cells, both))
    mass = torch.rand(both.count, generator=generator, dtype=torch.float64)
    mass /= mass.sum()
    ground = SimpleNamespace(class_means=lambda name: (u[m] + v[q], mass))
    means, chance = Ground._additive_means(ground, cells, "m", "q")  # type: ignore[arg-type]
    torch.testing.assert_close(means[m] + means[6 + q], u[m] + v[q])
    torch.testing.assert_close(chance[6:] @ means[6:], torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(chance[:6], torch.zeros(6, dtype=torch.float64).index_add(0, m, mass))


def _of_classes(cells: Cells, both: Partition) -> list[tuple[torch.Tensor, torch.Tensor]]:
    of_cell = torch.as_tensor(both.of_cell)
    return [(of_cell, torch.as_tensor(cells.factors[name]).long()) for name in "mq"]


@pytest.mark.parametrize("architecture", ["relu", "batchtopk"])
def test_the_truth_reads_and_writes_each_feature(architecture: str) -> None:
    sae = Sae(architecture, init="truth", width=8)
    parameters = start(Point(sae=sae), Clusters())
    x = Clusters().centres
    expected = torch.zeros(6, 8)
    expected[range(6), range(6)] = 8.0  # a latent for each feature, two that are off
    torch.testing.assert_close(codes(parameters, x), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(codes(parameters, x) @ parameters.W_dec + parameters.b_dec, x)
    narrow = start(Point(sae=sae.replace(width=2)), Clusters())
    torch.testing.assert_close(narrow.W_dec, torch.eye(D)[:2])


def test_a_threshold_begins_where_k_latents_fire() -> None:
    for k in (1, 2):
        parameters = start(Point(sae=Sae("batchtopk", init="truth", width=6, k=k)), Clusters())
        fires = codes(parameters, Clusters().exemplars(5000, 7)) >= parameters.threshold
        assert float(fires.sum(1).float().mean()) == pytest.approx(k, abs=0.05)


def test_jitter_is_added_to_encoder_and_decoder_alike() -> None:
    rows = start(point(init="truth", jitter=0.25), Clusters()).W_dec - torch.eye(D)[:6]
    assert float(rows.std()) == pytest.approx(0.25, rel=0.3)
    jittered = start(point(init="truth", jitter=0.25), Clusters())
    torch.testing.assert_close(jittered.W_enc, jittered.W_dec)


def test_a_toy_without_features_has_no_truth() -> None:
    ground = SimpleNamespace(stream=SimpleNamespace(model=SimpleNamespace(planted=None, toy=Toy())))
    with pytest.raises(UserError, match="toy=max_of_k has no planted features"):
        Ground.truth(ground)  # type: ignore[arg-type]


def test_clusters_on_a_gpu_are_those_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = torch.randn(500, D, generator=torch.Generator().manual_seed(0))
    centres = pool[:7].clone()
    centres[3] = 100.0  # nearest to nothing
    monkeypatch.setattr(kmeans_init, "GPU_NUMBERS", 7 * 64)
    sizes, sums = kmeans_init._clusters(pool, centres)
    same_sizes, same_sums = kmeans_init._clusters_by_products(pool, centres)
    assert sizes[3] == 0 and sizes.sum() == 500
    assert torch.equal(sizes.float(), same_sizes)
    torch.testing.assert_close(sums, same_sums, rtol=1e-5, atol=1e-4)
