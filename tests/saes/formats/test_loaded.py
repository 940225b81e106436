"""A loaded SAE in other units, and as an architecture of this package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import ALL, B_DEC, SAELENS, UNIT, X

from sae_sweep.config.settings import Sae
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds
from sae_sweep.saes.formats.index import read_sae

MEAN, SCALE = torch.linspace(-2, 2, 16), 0.37
HAS_NO_LIKE = {
    "tanh_relu",
    "groupmax",
    "topk_by_activation",
    "topk_kwargs",
    "topk_as_standard",
    "AutoEncoderTopK",
    "topk",
}


@pytest.mark.parametrize("name", ALL)
def test_normalised_inputs_get_the_same_codes(name: str, tmp_path: Path) -> None:
    sae = read_sae(ALL[name].write(tmp_path))
    normalised = sae.normalised(MEAN, SCALE)
    x = (X - MEAN) * SCALE
    torch.testing.assert_close(normalised.encode(x), sae.encode(X), atol=1e-5, rtol=1e-5)
    reconstruction = (sae.decode(sae.encode(X)) - MEAN) * SCALE
    torch.testing.assert_close(normalised.decode(sae.encode(X)), reconstruction, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_an_architecture_here_gives_the_same_codes_or_none_does(name: str, tmp_path: Path) -> None:
    sae = read_sae(ALL[name].write(tmp_path))
    if name.split("-")[1] in HAS_NO_LIKE:
        with pytest.raises(UserError, match=r"tanh-relu|groupmax|differ in norm"):
            sae.as_ours()
        return
    architecture, parameters = sae.as_ours()
    codes = kinds("architecture")[architecture].codes(
        X, parameters, Sae(architecture, width=len(sae.W_dec), k=sae.k or 1)
    )
    torch.testing.assert_close(codes, sae.encode(X), atol=1e-5, rtol=1e-5)


def test_topk_by_activation_has_a_like_where_rows_are_of_one_norm(tmp_path: Path) -> None:
    layout = SAELENS["topk_by_activation"]
    layout = type(layout)(layout.config, {**layout.tensors, "W_dec": UNIT}, layout.codes, UNIT)
    sae = read_sae(layout.write(tmp_path))
    architecture, parameters = sae.as_ours()
    codes = kinds("architecture")[architecture].codes(X, parameters, Sae(architecture, width=len(UNIT), k=3))
    torch.testing.assert_close(codes, layout.codes(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.b_dec, B_DEC)
