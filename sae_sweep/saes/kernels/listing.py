"""Lists the active latents of inputs outside training, by the encoder of the CPU step: nothing is inputs × width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_sweep.saes.kernels.sparse import CODE, LATENT, LISTED, encode, encoder_of, refresh
from sae_sweep.saes.kernels.vectors import LANES
from sae_sweep.saes.parameters import Parameters

# Entries listed at a time; and always room for one more input.
ENTRIES = 1 << 20

Array = np.ndarray[Any, Any]


class Lister:
    """The encoder of one SAE on the CPU, laid out for `tile`."""

    def __init__(self, parameters: Parameters, architecture: str, k: int) -> None:
        """`architecture` is one of LISTED; BatchTopK fires where a contribution reaches its threshold."""
        W_enc, W_dec = parameters.W_enc, parameters.W_dec
        self.width, d = W_enc.shape
        self.k = k if architecture == "topk" else 0
        flat = torch.cat([W_enc.flatten(), W_dec.flatten(), parameters.b_enc, parameters.b_dec]).numpy()
        norms, ones = np.ones((2, -(-self.width // LANES) * LANES), np.float32)
        weights, self.floor = ones if architecture in ("relu", "tied") else norms, np.float32(0)
        self.encoder = encoder_of(flat[: self.width * d].reshape(self.width, d), weights, True, self.k)
        refresh(flat, self.width, d, self.encoder, norms)
        if architecture in ("batchtopk", "matryoshka"):
            self.floor = np.nextafter(np.float32(parameters.threshold), np.float32(0))

    def __call__(self, x: Tensor) -> Iterator[tuple[Array, Array, Array]]:
        """`starts` [inputs + 1], `latents` and `codes` of the inputs x [b, d] in order, some at a time."""
        inputs, begin = x.contiguous().numpy(), 0
        # Of the system only what is written to; not kept, as threads may list by one encoder.
        listed = np.empty((min(ENTRIES, len(x) * (self.k or self.width)) + self.width, LISTED), np.float32)
        latents, starts = listed.view(np.int32), np.empty(len(x) + 1, np.int64)
        while begin < len(x):
            end = encode(inputs, begin, len(x), self.encoder, self.k, self.floor, listed, latents, starts)
            bounds = starts[: end - begin + 1].copy()
            yield bounds, latents[: bounds[-1], LATENT].astype(np.int64), listed[: bounds[-1], CODE].copy()
            begin = end
