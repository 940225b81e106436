"""Files: folding changes no code and no reconstruction, and what is written is what is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load
from stacks import PENALTIES, points, start_of

from sae_sweep.config.settings import Sae
from sae_sweep.registry import kinds
from sae_sweep.saes.formats import saelens_export
from sae_sweep.saes.parameters import Parameters
from sae_sweep.store.tensors import to_bytes

MEAN, SCALE = torch.linspace(-2, 2, 16), 0.37


def with_threshold(parameters: Parameters) -> Parameters:
    return parameters.replace(threshold=torch.tensor(0.8))


def run(parameters: Parameters, architecture: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kind = kinds("architecture")[architecture]
    codes = kind.codes(x, parameters, Sae(architecture, width=40, k=3))
    return codes, codes @ parameters.W_dec + parameters.b_dec


def test_every_architecture_is_covered() -> None:
    assert set(kinds("architecture")) == set(saelens_export.ARCHITECTURES)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_a_folded_sae_takes_raw_activations(architecture: str) -> None:
    parameters = with_threshold(start_of(points(PENALTIES[:1], architecture)[0]))
    raw = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 3 + MEAN
    codes, reconstruction = run(parameters, architecture, (raw - MEAN) * SCALE)
    folded_codes, folded_reconstruction = run(saelens_export.fold(parameters, MEAN, SCALE), architecture, raw)
    torch.testing.assert_close(folded_codes, codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded_reconstruction, reconstruction / SCALE + MEAN, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_unfold_is_the_inverse(architecture: str) -> None:
    parameters = with_threshold(start_of(points(PENALTIES[:1], architecture)[0]))
    back = saelens_export.unfold(saelens_export.fold(parameters, MEAN, SCALE), MEAN, SCALE)
    for name, tensor in vars(parameters).items():
        torch.testing.assert_close(getattr(back, name), tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_files_hold_the_same_sae(architecture: str) -> None:
    point = points(PENALTIES[:1], architecture)[0]
    parameters = with_threshold(start_of(point))
    parameters.W_dec[7] = 0
    files = saelens_export.to_files(point, saelens_export.fold(parameters, MEAN, SCALE))
    back = saelens_export.unfold(saelens_export.from_files(files[saelens_export.WEIGHTS]), MEAN, SCALE)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 3
    for got, expected in zip(run(back, architecture, x), run(parameters, architecture, x), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back.norms(), parameters.norms())


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_the_layout_of_the_files(architecture: str) -> None:
    point = points(PENALTIES[:1], architecture)[0]
    parameters = with_threshold(start_of(point))
    files = saelens_export.to_files(point, parameters)
    config = json.loads(files[saelens_export.CONFIG])
    tensors = load(files[saelens_export.WEIGHTS])
    assert (config["d_in"], config["d_sae"]) == (16, 40) == tuple(tensors["W_enc"].shape)
    assert config["architecture"] == saelens_export.ARCHITECTURES[architecture]
    assert config.get("k") == (3 if architecture == "topk" else None)
    norms = torch.ones(40) if config["architecture"] in ("topk", "jumprelu") else parameters.norms()
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), norms)
    biases = {"b_gate", "r_mag", "b_mag"} if architecture == "gated" else {"b_enc"}
    biases |= {"threshold"} if config["architecture"] == "jumprelu" else set()
    assert set(tensors) == {"W_enc", "W_dec", "b_dec", *biases}


def test_what_is_not_rescaled_is_read_to_the_bit() -> None:
    relu, batchtopk = (points(PENALTIES[:1], architecture)[0] for architecture in ("relu", "batchtopk"))
    parameters = with_threshold(start_of(relu))
    read = saelens_export.from_files(saelens_export.to_files(relu, parameters)[saelens_export.WEIGHTS])
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(read, name), getattr(parameters, name)), name
    assert saelens_export.from_files(
        saelens_export.to_files(batchtopk, parameters)[saelens_export.WEIGHTS]
    ).threshold == torch.tensor(0.8)


def test_tensors_that_do_not_fit_are_an_error_and_no_abort() -> None:
    """Four pebibytes of one number: safetensors itself would panic."""
    with pytest.raises(MemoryError):
        to_bytes({"W_enc": torch.zeros(1).expand(1 << 50)})
