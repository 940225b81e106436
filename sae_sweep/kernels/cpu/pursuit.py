"""Trains the SAEs of a stack whose encoder is matching pursuit (pursuit_step.py)."""

from __future__ import annotations

import numpy as np

from sae_sweep.kernels.cpu.narrow_gradient import TOTALS
from sae_sweep.kernels.cpu.narrow_tile import INPUTS
from sae_sweep.kernels.cpu.pursuit_step import Sae, Workspace, refresh, take_pursuit_steps
from sae_sweep.kernels.cpu.tile_stack import Array, TileTrainer, cut, padded
from sae_sweep.saes.stack import Stack


class PursuitTrainer(TileTrainer):
    """By the step of matching pursuit."""

    take_steps = staticmethod(take_pursuit_steps)

    def __init__(self, stack: Stack, i: int, work: Workspace) -> None:
        super().__init__(stack, i, work)
        flat, first, second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        units, norms = np.zeros((stack.width, padded(stack.d)), np.float32), np.empty(stack.width, np.float32)
        sae = Sae(flat, first, second, units, norms, stack.silent[i].numpy())
        refresh(sae)
        self.arguments = sae, float(stack.points[i].training.clip)

    @classmethod
    def workspace(cls, stack: Stack, b: int) -> Workspace:
        """Memory for steps of an SAE of the stack on batches of b inputs."""
        k, width, side = stack.points[0].sae.k, stack.width, padded(stack.d)
        cuts = cut(b, k * b * width * stack.d)

        def zeros(*shape: int, kind: type = np.float32) -> Array:
            return np.zeros((len(cuts), *shape), kind)

        return Workspace(
            left=zeros(k, INPUTS, side),
            transposed=zeros(side, INPUTS),
            best=zeros(INPUTS),
            latents=zeros(INPUTS, kind=np.int32),
            steps=zeros(INPUTS * k, 2),
            rows=zeros(INPUTS * k, 2, kind=np.int32),
            g_units=zeros(width, side),
            g_bdec=zeros(side),
            fired=zeros(width, kind=np.uint8),
            totals=zeros(TOTALS, kind=np.float64),
            cuts=cuts,
        )
