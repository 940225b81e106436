"""Trains the SAEs of a stack whose encoder is ISTA, LISTA or an MLP (unrolled_step.py)."""

from __future__ import annotations

import numpy as np

from sae_sweep.kernels.cpu.narrow import setting_of
from sae_sweep.kernels.cpu.narrow_gradient import LATENTS, TOTALS
from sae_sweep.kernels.cpu.narrow_tile import INPUTS
from sae_sweep.kernels.cpu.tile_stack import Array, TileTrainer, cut, padded
from sae_sweep.kernels.cpu.unrolled_gradient import Sae, Workspace
from sae_sweep.kernels.cpu.unrolled_step import refresh, take_unrolled_steps
from sae_sweep.saes.stack import Stack


class UnrolledTrainer(TileTrainer):
    """By the step of encoders that iterate or have a hidden layer."""

    take_steps = staticmethod(take_unrolled_steps)

    def __init__(self, stack: Stack, i: int, work: Workspace) -> None:
        super().__init__(stack, i, work)
        width, d, point = stack.width, stack.d, stack.points[i]
        units = padded(point.encoder.get("hidden", 0))
        flat, first, second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        sae = Sae(
            flat, first, second, np.zeros_like(flat),
            encoder=np.zeros((width, padded(d) + units), np.float32),
            decoder=np.zeros((width, padded(d)), np.float32),
            biases=np.empty(width, np.float32),
            norms=np.empty(width, np.float32),
            hidden=np.zeros((units, padded(d)), np.float32),
            hidden_biases=np.zeros(units, np.float32),
            gains=np.empty(width if stack.encoder.effective else 0, np.float32),
            b_dec=stack.split(stack.flat[i])[3].numpy(),
            silent=stack.silent[i].numpy(),
        )  # fmt: skip
        refresh(sae)
        self.arguments = sae, setting_of(stack, i)

    @classmethod
    def workspace(cls, stack: Stack, b: int) -> Workspace:
        """Memory for steps of an SAE of the stack on batches of b inputs."""
        point, width, side = stack.points[0], stack.width, padded(stack.d)
        steps, units = 1 + point.encoder.get("steps", 0), padded(point.encoder.get("hidden", 0))
        reach, k = side + units, point.sae.get("k", 1)
        cuts = cut(b, steps * b * width * (stack.d + units))

        def zeros(*shape: int, kind: type = np.float32) -> Array:
            return np.zeros((len(cuts), *shape), kind)

        return Workspace(
            over=zeros(steps, INPUTS, reach),
            codes=zeros(steps, width, INPUTS),
            masks=zeros(steps, width, kind=np.int64),
            by_products=zeros(steps, kind=np.uint8),
            residual=zeros(INPUTS, side),
            g_over=zeros(2, INPUTS, reach),
            transposed=zeros(reach, INPUTS),
            decoded=zeros(side, INPUTS),
            g_codes=zeros(width, INPUTS),
            slopes=zeros(LATENTS, INPUTS),
            unused=zeros(max(LATENTS, units)),
            units=zeros(2, units, INPUTS),
            unit_masks=zeros(units, kind=np.int64),
            norm_scaled_acts=zeros(width * INPUTS),
            entry_slopes=zeros(2 * width * INPUTS),
            order=zeros(width * INPUTS, kind=np.int32),
            ranks=zeros(k, INPUTS),
            latents=zeros(k, INPUTS, kind=np.int32),
            g_encoder=zeros(width, reach),
            g_decoder=zeros(width, side),
            g_biases=zeros(width),
            g_bdec=zeros(side),
            g_hidden=zeros(units, side),
            g_hidden_biases=zeros(units),
            pulls=zeros(width),
            fired=zeros(width, kind=np.uint8),
            totals=zeros(TOTALS, kind=np.float64),
            cuts=cuts,
        )
