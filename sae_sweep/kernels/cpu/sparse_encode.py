"""Lists the active latents of inputs outside training, by the encoder of the CPU step: nothing is inputs × width."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_sweep.kernels.cpu.simd import LANES
from sae_sweep.kernels.cpu.sparse_step import CODE, LATENT, LISTED, Encoder, encode, encoder_of, refresh
from sae_sweep.kernels.limits import ROUND_BELOW
from sae_sweep.saes.parameters import Parameters

# Entries listed at a time; and always room for one more input.
ENTRIES = 1 << 20

Array = np.ndarray[Any, Any]


class Lister:
    """The encoder of one SAE on the CPU, laid out for `tile`."""

    def __init__(self, parameters: Parameters, architecture: str, k: int) -> None:
        """`architecture` is one of LISTED; BatchTopK fires where a norm-scaled activation reaches its threshold."""
        W_enc, W_dec = parameters.W_enc, parameters.W_dec
        self.width, self.d = W_enc.shape
        self.flat = torch.cat([W_enc.flatten(), W_dec.flatten(), parameters.b_enc, parameters.b_dec]).numpy()
        self.k, self.floor = k if architecture == "topk" else 0, 0.0
        # What decides which latents count is their norm-scaled activation, or only its sign.
        self.by_sign = architecture in ("relu", "tied")
        self.density = 0.0  # of the latest inputs: on those to come it is about the same
        if architecture in ("batchtopk", "matryoshka"):
            self.floor = float(np.nextafter(np.float32(parameters.threshold), np.float32(0)))

    def __call__(self, x: Tensor) -> Iterator[tuple[Array, Array, Array]]:
        """`starts` [inputs + 1], `latents` and `codes` of the inputs x [b, d] in order, some at a time."""
        inputs, begin = x.contiguous().numpy(), 0
        # Of the system only what is written to; not kept, as threads may list by one encoder.
        listed = np.empty((min(ENTRIES, len(x) * (self.k or self.width)) + self.width, LISTED), np.float32)
        latents, starts = listed.view(np.int32), np.empty(len(x) + 1, np.int64)
        while begin < len(x):
            encoder = self._rounded if self.density < ROUND_BELOW else self._exact
            end = encode(inputs, begin, len(x), encoder, listed, latents, starts)
            self.density = starts[end - begin] / (self.width * (end - begin))
            bounds = starts[: end - begin + 1].copy()
            yield bounds, latents[: bounds[-1], LATENT].astype(np.int64), listed[: bounds[-1], CODE].copy()
            begin = end

    @cached_property
    def _rounded(self) -> Encoder:
        return self._laid_out(rounded=True)

    @cached_property
    def _exact(self) -> Encoder:
        return self._laid_out(rounded=False)

    def _laid_out(self, rounded: bool) -> Encoder:
        """The encoder as `encode` reads it: the lists are the same with either; it depends which has them sooner."""
        width, d = self.width, self.d
        norms, ones = np.ones((2, -(-width // LANES) * LANES), np.float32)
        W_enc = self.flat[: width * d].reshape(width, d)
        encoder = encoder_of(W_enc, ones if self.by_sign else norms, rounded, self.k, self.floor)
        refresh(self.flat, width, d, encoder, norms)
        return encoder
