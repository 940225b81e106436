"""Files as users bring them, in tests/cases/sae: each is measured as its library means it, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_sweep.errors import UserError
from sae_sweep.saes.formats.index import read_sae

CASES = Path(__file__).parents[2] / "cases" / "sae"
REFUSED = {
    "W_enc_transposed": "W_enc is [24, 32], wanted [32, 24]",
    "b_dec_wrong_length": "b_dec is [31], wanted [32]",
    "cfg_disagrees_d_sae": "d_sae of cfg.json is 24576, but W_dec has 24",
    "nan_in_weights": "b_enc has 24 of 24 numbers that are nan or infinite, wanted finite",
    "one_nan_row": "W_dec has 32 of 768 numbers that are nan or infinite, wanted finite",
    "topk_k_missing": "by SAELens's default it (latents kept of 24) is 100, wanted a whole number from 1 to 24",
    "topk_k_zero": "k of cfg.json (latents kept of 24) is 0, wanted a whole number from 1 to 24",
    "transcoder_as_standard": "a transcoder, which predicts other activations than it reads",
}
Codes = Callable[[Tensor, dict[str, Tensor]], Tensor]


def relu(centred: bool) -> Codes:
    return lambda x, t: ((x - t["b_dec"] * centred) @ t["W_enc"] + t["b_enc"]).relu()


def topk(centred: bool) -> Codes:
    def codes(x: Tensor, t: dict[str, Tensor]) -> Tensor:
        found = relu(centred)(x, t)
        return found * (found >= found.topk(2, dim=1).values[:, -1:])

    return codes


def jumprelu(centred: bool, threshold: Callable[[dict[str, Tensor]], Tensor]) -> Codes:
    def codes(x: Tensor, t: dict[str, Tensor]) -> Tensor:
        found = relu(centred)(x, t)
        return found * (found > threshold(t))

    return codes


MEASURED: dict[str, Codes] = {
    "dictionary_learning": topk(True),
    "gemma_scope": jumprelu(False, lambda t: t["threshold"]),
    "jumprelu_log_threshold": jumprelu(True, lambda t: t["log_threshold"].exp()),
    "jumprelu_scalar_threshold": jumprelu(False, lambda t: t["threshold"]),
    "relu_with_k_null": relu(False),
    "sparsify": topk(True),
    "topk_bf16_unit": topk(False),
    "v2_norm_bool": relu(True),
    "v3_no_architecture": relu(True),
    "v4_tanh_relu": lambda x, t: relu(False)(x, t).tanh(),
    "v5_topk_kwargs": topk(False),
    "v6_minimal_no_apply": relu(True),
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """The file's own tensors, float32, under the names of SAELens."""
    if (folder / "ae.pt").exists():
        found = torch.load(folder / "ae.pt", weights_only=True)
    elif (folder / "params.npz").exists():
        found = {name: torch.from_numpy(each) for name, each in np.load(folder / "params.npz").items()}
    else:
        (path,) = (each for each in folder.glob("sae*.safetensors"))
        found = load_file(path)
    found = {name: each.float() for name, each in found.items()}
    if "encoder.weight" in found:
        found |= {"W_enc": found["encoder.weight"].T, "b_enc": found["encoder.bias"]}
    if "decoder.weight" in found:
        found["W_dec"] = found["decoder.weight"].T
    return found


def test_every_case_has_its_outcome() -> None:
    assert {each.name for each in CASES.iterdir()} == REFUSED.keys() | MEASURED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        read_sae(CASES / name)
    assert REFUSED[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MEASURED)
def test_codes_are_those_that_the_library_means(name: str) -> None:
    own, sae = tensors(CASES / name), read_sae(CASES / name)
    x = own["b_dec"] + torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) @ own["W_enc"].T * 8
    expected = MEASURED[name](x, own)
    assert 0.01 < (expected > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected @ own["W_dec"] + own["b_dec"], atol=1e-3, rtol=1e-4)
