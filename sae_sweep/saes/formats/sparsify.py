"""EleutherAI sparsify's layout: `sae.safetensors` beside `cfg.json`.

What is read, and which default stands for what is absent, follows `SparseCoder.load_from_disk` of
github.com/EleutherAI/sparsify 1.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sae_sweep.errors import UserError
from sae_sweep.saes.folding import without_centring
from sae_sweep.saes.formats.loaded import LoadedSae
from sae_sweep.saes.formats.tensors import Tensors, agree, count, flag, whole
from sae_sweep.saes.parameters import Parameters

NAME, WEIGHTS, CONFIG = "sparsify", "sae.safetensors", "cfg.json"
# What sparsify takes where `cfg.json` does not say.
_DEFAULT_K, _DEFAULT_EXPANSION = 32, 32
# sparsify's activation → what selects latents alike.
_SELECTIONS = {"topk": "topk", "groupmax": "groupmax"}
# Under these it reconstructs other activations than it reads, or with signs, or with a linear path beside its latents.
_OTHER = ("transcode", "signed", "skip_connection")


def read(weights: bytes, config: Mapping[str, Any]) -> LoadedSae:
    """The SAE of `sae.safetensors` and what `cfg.json` says. UserError names what is wrong or not known."""
    kind = config.get("activation", "topk")
    if not isinstance(kind, str) or kind not in _SELECTIONS:
        raise UserError(f"activation of {CONFIG} is {kind!r}, wanted one of {', '.join(_SELECTIONS)}")
    for key in _OTHER:
        if flag(f"{key} of {CONFIG}", config.get(key, False)):
            raise UserError(f"{key} of {CONFIG} is true, which is not supported")
    tensors = Tensors.of_safetensors(WEIGHTS, weights)
    width, d = tensors.size("encoder.weight")
    agree(f"d_in of {CONFIG}", config.get("d_in"), d, "encoder.weight")
    said = config.get("num_latents") or d * whole(
        f"expansion_factor of {CONFIG}", config.get("expansion_factor", _DEFAULT_EXPANSION), 1
    )
    agree(f"num_latents of {CONFIG}", said, width, "encoder.weight")
    parameters = Parameters(
        tensors.take("encoder.weight", width, d),
        tensors.take("W_dec", width, d),
        tensors.take("encoder.bias", width),
        tensors.take("b_dec", d),
        torch.zeros(()),
    )
    tensors.nothing_left("a sparse autoencoder")
    k = count(f"k of {CONFIG}", config.get("k", _DEFAULT_K), width)
    if kind == "groupmax" and width % k:
        raise UserError(f"k of {CONFIG} is {k}, wanted a number of groups that divides {width} latents")
    return LoadedSae(NAME, kind, _SELECTIONS[kind], without_centring(parameters), k)
