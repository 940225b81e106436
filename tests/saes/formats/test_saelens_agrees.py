"""SAELens itself loads what is written here, and computes what is read here: the same codes and reconstructions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import SAELENS, X
from stacks import PENALTIES, points, start_of

from sae_sweep.config.settings import Encoder, Point
from sae_sweep.registry import kinds
from sae_sweep.saes.encoders.matching_pursuit import by_projection
from sae_sweep.saes.folding import fold
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.formats.index import read_sae
from sae_sweep.saes.parameters import Parameters

sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)

MEAN, SCALE = torch.linspace(-2, 2, 16), 0.37


def a_point(architecture: str) -> Point:
    return points(PENALTIES[:1], architecture)[0]


def trained(point: Point, threshold: float = 0.8) -> Parameters:
    """As if trained: decoder rows from 0.1 to 10 long, and a threshold."""
    start = start_of(point)
    W_dec = start.W_dec * torch.logspace(-1, 1, len(start.W_dec))[:, None]
    changed = start.replace(W_dec=W_dec, threshold=torch.tensor(threshold))
    effective = kinds("architecture")[point.sae.architecture].effective
    return effective(changed) if effective else changed


def loaded(point: Point, parameters: Parameters, folder: Path, mean: torch.Tensor = MEAN, scale: float = SCALE):
    for name, content in saelens.to_files(point, fold(parameters, mean, scale)).items():
        (folder / name).write_bytes(content)
    return sae_lens.SAE.load_from_disk(folder)


@pytest.mark.parametrize("architecture", kinds("architecture"))
@torch.no_grad()
def test_saelens_computes_the_same(architecture: str, tmp_path: Path) -> None:
    point = a_point(architecture)
    parameters = trained(point)
    sae = loaded(point, parameters, tmp_path)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 2
    raw = x / SCALE + MEAN
    kind = kinds("architecture")[architecture]
    codes = kind.codes(x, parameters, point.sae)
    # SAELens's own habit: what chooses by contributions is saved with unit decoder rows, so that they are activations.
    as_it_is = architecture in ("relu", "tied", "gated")
    expected = codes if as_it_is else codes * parameters.norms() / SCALE
    reconstruction = (codes @ parameters.W_dec + parameters.b_dec) / SCALE + MEAN

    activations = sae.encode(raw)
    assert torch.equal(activations != 0, codes != 0)
    assert 0 < (codes != 0).float().mean() < 0.6
    torch.testing.assert_close(activations, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(activations), reconstruction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(raw), reconstruction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@torch.no_grad()
def test_saelens_pursues_as_we_do(k: int, tmp_path: Path) -> None:
    (point,) = points(PENALTIES[:1], "topk", k=k)
    point = dataclasses.replace(point, encoder=Encoder("matching_pursuit"))
    parameters, x = by_projection(trained(point)), torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 2
    codes = kinds("architecture")["topk"].codes(x, parameters, point.sae, encoder=point.encoder)
    activations = loaded(point, parameters, tmp_path).encode(x / SCALE + MEAN)
    torch.testing.assert_close(activations, codes * parameters.norms() / SCALE, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_matching_pursuit_is_read_as_saelens_saves_it(once: bool, centred: bool, tmp_path: Path) -> None:
    kind, config = sae_lens.registry.SAE_CLASS_REGISTRY["matching_pursuit"]
    further = {"max_iterations": 4, "residual_threshold": 0.8, "stop_on_duplicate_support": once}
    sae = kind(config(d_in=16, d_sae=40, device="cpu", apply_b_dec_to_input=centred, **further))
    _filled(sae)
    sae.save_model(tmp_path)
    _same(sae, tmp_path)


@torch.no_grad()
def test_a_contribution_at_the_threshold_fires(tmp_path: Path) -> None:
    width, d = 40, 16
    eye = torch.eye(width, d)
    parameters = Parameters(eye, eye, torch.zeros(width), torch.zeros(d), torch.tensor(0.8))
    sae = loaded(a_point("batchtopk"), parameters, tmp_path, torch.zeros(d), 1.0)
    at, below = torch.full((1, d), 0.8), torch.full((1, d), 0.7999)
    assert torch.equal(sae.encode(at), torch.where(torch.arange(width) < d, 0.8, 0.0)[None])
    assert not sae.encode(below).any()


@torch.no_grad()
def test_a_decoder_row_of_zeros_is_harmless(tmp_path: Path) -> None:
    point = a_point("topk")
    parameters = trained(point)
    parameters.W_dec[7], parameters.b_enc[7] = 0, 100
    activations = loaded(point, parameters, tmp_path).encode(MEAN.expand(4, 16))
    assert activations[:, 7].max() < 1e-20 < activations.amax()


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_saelens_keeps_what_we_say_of_an_sae(architecture: str, tmp_path: Path) -> None:
    point = a_point(architecture)
    metadata = loaded(point, trained(point), tmp_path).cfg.metadata
    assert (metadata.point_id, metadata.site) == (point.id, "pre_unembed")


@pytest.mark.parametrize("name", SAELENS)
@torch.no_grad()
def test_saelens_reads_every_layout_as_we_do(name: str, tmp_path: Path) -> None:
    folder = SAELENS[name].write(tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(folder), read_sae(folder)
    codes = theirs.encode(X)
    assert 0 < (codes != 0).float().mean() < 0.9
    torch.testing.assert_close(ours.encode(X), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(codes), theirs(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_what_saelens_saves_is_read_as_it_was_meant(
    architecture: str, rescaled: bool, centred: bool, tmp_path: Path
) -> None:
    kind, config = sae_lens.registry.SAE_CLASS_REGISTRY[architecture]
    further = {"k": 3, "rescale_acts_by_decoder_norm": rescaled} if architecture == "topk" else {}
    sae = kind(config(d_in=16, d_sae=40, device="cpu", apply_b_dec_to_input=centred, **further))
    _filled(sae)
    sae.save_model(tmp_path)
    _same(sae, tmp_path)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("inference", [False, True])
@torch.no_grad()
def test_what_saelens_trains_is_read_as_it_is_used(architecture: str, inference: bool, tmp_path: Path) -> None:
    """A checkpoint of training gives the codes of the SAE that SAELens saves for use."""
    kind, config = sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY[architecture]
    further = {"k": 3} if "topk" in architecture else {}
    further |= {"matryoshka_widths": [10, 40]} if "matryoshka" in architecture else {}
    sae = kind(config(d_in=16, d_sae=40, device="cpu", **further))
    _filled(sae)
    if "batchtopk" in architecture:
        sae.topk_threshold = torch.tensor(0.6, dtype=torch.double)
    sae.save_inference_model(tmp_path / "use")
    sae.save_model(tmp_path / "checkpoint")
    _same(sae_lens.SAE.load_from_disk(tmp_path / "use"), tmp_path / ("use" if inference else "checkpoint"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_weights_are_rounded_as_saelens_rounds_them(dtype: str, tmp_path: Path) -> None:
    layout = SAELENS["topk_by_activation"]
    folder = dataclasses.replace(layout, config={**layout.config, "dtype": dtype}).write(tmp_path)
    theirs, ours = sae_lens.SAE.load_from_disk(folder), read_sae(folder)
    assert torch.equal(theirs.W_enc.float().T, ours.W_enc)
    assert torch.equal(theirs.W_dec.float(), ours.W_dec)


def _filled(sae: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sae.named_parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator) - (0 if name == "threshold" else 0.5))


def _same(theirs: Any, folder: Path) -> None:
    ours = read_sae(folder)
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    codes = theirs.encode(x)
    assert 0 < (codes != 0).float().mean() < 0.9
    torch.testing.assert_close(ours.encode(x), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(ours.encode(x)), theirs(x), atol=1e-4, rtol=1e-4)
