"""sparsify's files: its defaults, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import SPARSIFY, WIDTH, X, pre

from sae_sweep.errors import UserError
from sae_sweep.saes.formats.index import read_sae

TOPK = SPARSIFY["topk"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transcode": True}, "transcode of cfg.json is true"),
        ({"skip_connection": True}, "skip_connection of cfg.json is true"),
        ({"signed": True}, "signed of cfg.json is true"),
        ({"activation": "relu"}, "activation of cfg.json is 'relu', wanted one of topk, groupmax"),
        ({"num_latents": 25}, "num_latents of cfg.json is 25, but encoder.weight has 24"),
        ({"num_latents": 0}, "num_latents of cfg.json is 512, but encoder.weight has 24"),
        ({"d_in": 32}, "d_in of cfg.json is 32, but encoder.weight has 16"),
        ({"k": 25}, "is 25, wanted a whole number from 1 to 24"),
        ({"k": None}, "is None, wanted a whole number"),
        ({"activation": "groupmax", "k": 5}, "wanted a number of groups that divides 24 latents"),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert TOPK.config is not None
    folder = dataclasses.replace(TOPK, config={**TOPK.config, **config}).write(tmp_path)
    with pytest.raises(UserError) as error:
        read_sae(folder)
    assert message in str(error.value)


def test_what_is_absent_takes_sparsifys_default(tmp_path: Path) -> None:
    """topk, k 32, 32 times as many latents as numbers in an activation."""
    copies = 512 // WIDTH + 1
    wide = {name: torch.cat([tensor] * copies)[:512] for name, tensor in TOPK.tensors.items() if name != "b_dec"}
    wide["b_dec"] = TOPK.tensors["b_dec"]
    sae = read_sae(dataclasses.replace(TOPK, config={}, tensors=wide).write(tmp_path))
    assert (sae.k, sae.kind, len(sae.W_dec)) == (32, "topk", 512)
    every = torch.cat([pre(X, True).relu()] * copies, 1)[:, :512]
    torch.testing.assert_close(sae.encode(X).sum(1), every.topk(32).values.sum(1), atol=1e-4, rtol=1e-5)
