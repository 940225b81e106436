"""An SAE in other units gives the same codes and the same reconstruction."""

from __future__ import annotations

import pytest
import torch
from stacks import PENALTIES, points, start_of

from sae_sweep.config.settings import Sae
from sae_sweep.registry import kinds
from sae_sweep.saes.folding import fold, rescaled, unfold, without_centring
from sae_sweep.saes.parameters import Parameters

MEAN, SCALE = torch.linspace(-2, 2, 16), 0.37


def parameters_of(architecture: str) -> Parameters:
    return start_of(points(PENALTIES[:1], architecture)[0]).replace(threshold=torch.tensor(0.8))


def run(parameters: Parameters, architecture: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kind = kinds("architecture")[architecture]
    codes = kind.codes(x, parameters, Sae(architecture, width=40, k=3))
    return codes, codes @ parameters.W_dec + parameters.b_dec


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_a_folded_sae_takes_raw_activations(architecture: str) -> None:
    parameters = parameters_of(architecture)
    raw = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 3 + MEAN
    codes, reconstruction = run(parameters, architecture, (raw - MEAN) * SCALE)
    folded_codes, folded_reconstruction = run(fold(parameters, MEAN, SCALE), architecture, raw)
    torch.testing.assert_close(folded_codes, codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(folded_reconstruction, reconstruction / SCALE + MEAN, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_unfold_is_the_inverse(architecture: str) -> None:
    parameters = parameters_of(architecture)
    back = unfold(fold(parameters, MEAN, SCALE), MEAN, SCALE)
    for name, tensor in parameters.tensors.items():
        torch.testing.assert_close(getattr(back, name), tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_without_centring_gives_the_codes_of_centred_inputs(architecture: str) -> None:
    parameters = parameters_of(architecture)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 3
    expected, _ = run(parameters, architecture, x - parameters.b_dec)
    torch.testing.assert_close(run(without_centring(parameters), architecture, x)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", sorted(set(kinds("architecture")) - {"gated", "tied"}))
def test_a_rescaled_sae_reconstructs_the_same(architecture: str) -> None:
    parameters, by = parameters_of(architecture), torch.logspace(-1, 1, 40)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) * 3
    codes, reconstruction = run(parameters, architecture, x)
    rescaled_codes, same = run(rescaled(parameters, by), architecture, x)
    torch.testing.assert_close(rescaled_codes, codes * by, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same, reconstruction, atol=1e-5, rtol=1e-5)
