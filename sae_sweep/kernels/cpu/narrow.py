"""Trains the SAEs of a stack by the step of narrow SAEs (narrow_step.py)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from sae_sweep.config.settings import Penalty
from sae_sweep.kernels.cpu.auxiliary import Auxiliary
from sae_sweep.kernels.cpu.function_pointers import address_of
from sae_sweep.kernels.cpu.narrow_gradient import LATENTS, TOTALS, Sae, Setting, Workspace, refresh
from sae_sweep.kernels.cpu.narrow_step import take_narrow_steps
from sae_sweep.kernels.cpu.narrow_tile import INPUTS
from sae_sweep.kernels.cpu.penalty_gradients import compile_slopes
from sae_sweep.kernels.cpu.penalty_loops import penalises
from sae_sweep.kernels.cpu.tile_stack import TileTrainer, cut, padded
from sae_sweep.kernels.cpu.vector_loops import slopes_codes, sums_terms, weighs_terms
from sae_sweep.kernels.cpu.vector_penalty import compile_vectors, vectorises
from sae_sweep.kernels.limits import NARROW_CHOSEN, NARROW_DENSE_ABOVE, NARROW_WIDTH
from sae_sweep.saes.formula import Formula, parse
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes import revival_of
from sae_sweep.saes.recipes.revivals import kept_of
from sae_sweep.saes.stack import Stack

Array = np.ndarray[Any, Any]


def is_narrow(stack: Stack, i: int) -> bool:
    """Whether SAE i of the stack is trained here."""
    name, point = stack.architecture.name, stack.points[i]
    if stack.width > NARROW_WIDTH or formula_of(point.penalty).weighs:
        return False
    return name == "relu" or (name == "topk" and point.sae.k <= NARROW_CHOSEN)


@functools.cache
def _penalty(formula: Formula) -> dict[str, int]:
    """The fields of Setting that depend on the penalty alone."""
    vectorised = vectorises(formula)
    by_input = not vectorised or formula.coupled
    functions = compile_vectors(formula if vectorised else parse("a"))
    signatures = (sums_terms, weighs_terms, slopes_codes)
    addresses = [address_of(*pair) for pair in zip(functions, signatures, strict=True)]
    return {
        "by_input": int(by_input),
        "slopes_at": address_of(compile_slopes(formula), penalises) if by_input else 0,
        **dict(zip(("sum_terms_at", "weigh_terms_at", "slope_codes_at"), addresses, strict=True)),
    }


def setting_of(stack: Stack, i: int) -> Setting:
    """The settings of a step of SAE i of the stack."""
    point = stack.points[i]
    formula = formula_of(point.penalty)
    return Setting(
        k=point.sae.k if stack.architecture.name == "topk" else 0,
        dense_above=NARROW_DENSE_ABOVE * stack.width if vectorises(formula) else np.inf,
        **_penalty(formula),
        scale=float(point.penalty.get("scale", 1.0)),
        exponent=float(stack.exponent[i]),
        clip=float(point.training.clip),
    )


class NarrowTrainer(TileTrainer):
    """By the step of narrow SAEs."""

    take_steps = staticmethod(take_narrow_steps)

    def __init__(self, stack: Stack, i: int, work: tuple[Workspace, Auxiliary]) -> None:
        super().__init__(stack, i, work[0])
        width, d = stack.width, stack.d
        flat, first, second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        rows = flat[width * d : 2 * width * d].reshape(width, d)
        if d != padded(d):
            rows = np.zeros((width, padded(d)), np.float32)
        self.sae = Sae(flat, first, second, np.empty(width, np.float32), rows, stack.silent[i].numpy())
        self.setting = setting_of(stack, i)
        refresh(self.sae)
        self.arguments = self.sae, self.setting, work[1]

    @classmethod
    def workspace(cls, stack: Stack, b: int) -> tuple[Workspace, Auxiliary]:
        """Memory for steps of an SAE of the stack on batches of b inputs, and for the loss of its dead latents."""
        k = stack.points[0].sae.k if stack.architecture.name == "topk" else 0
        return workspace(b, stack.width, stack.d, k), auxiliary_of(stack, b)


def workspace(b: int, width: int, d: int, k: int) -> Workspace:
    """Memory for steps on batches of b inputs."""
    cuts, side = cut(b, b * width * d), padded(d)
    parts = len(cuts)

    def zeros(*shape: int, kind: type = np.float32) -> Array:
        return np.zeros((parts, *shape), kind)

    return Workspace(
        cuts=cuts,
        x=zeros(INPUTS, side),
        transposed=zeros(side, INPUTS),
        target=zeros(INPUTS, side),
        target_transposed=zeros(side, INPUTS),
        residual=zeros(INPUTS, side),
        residual_transposed=zeros(side, INPUTS),
        codes=zeros(width, INPUTS),
        masks=zeros(width, kind=np.int64),
        gains=zeros(LATENTS, INPUTS),
        slopes=zeros(LATENTS, INPUTS),
        norm_scaled_acts=zeros(width * INPUTS),
        entry_slopes=zeros(2 * width * INPUTS),
        order=zeros(width * INPUTS, kind=np.int32),
        ranks=zeros(max(k, 1), INPUTS),
        latents=zeros(max(k, 1), INPUTS, kind=np.int32),
        g_enc=zeros(width, side),
        g_dec=zeros(width, side),
        g_benc=zeros(width),
        g_bdec=zeros(side),
        pulls=zeros(width),
        fired=zeros(width, kind=np.uint8),
        totals=zeros(TOTALS, kind=np.float64),
    )


def auxiliary_of(stack: Stack, b: int) -> Auxiliary:
    """The loss of dead latents that all SAEs of a stack have, and its memory for batches of b inputs; or none."""
    training, d, width, k = stack.points[0].training, stack.d, 0, 0
    none = Penalty("none", 0.0)
    if revival_of(training).auxiliary:
        width, k = stack.width, kept_of(training, stack.width, d)
    flat, norms = np.zeros((2 * width + 1) * d + width, np.float32), np.zeros(width, np.float32)
    dead = np.zeros(width, np.int64)
    return Auxiliary(
        after=training.dead_after if k else 0,
        coefficient=float(training.aux_coefficient if k else 0),
        dead=dead,
        count=np.zeros(1, np.int64),
        left=np.zeros((b if k else 0, d), np.float32),
        sae=Sae(flat, flat, flat, norms, np.zeros((width, padded(d)), np.float32), dead),
        setting=Setting(k, dense_above=0.0, **_penalty(formula_of(none)), scale=1.0, exponent=1.0, clip=0.0),
        work=workspace(b, width, d, k),
    )
