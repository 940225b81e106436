"""AuxK: in a step in which latents are dead, these fit what the living ones leave (saes/recipes/revivals.py).

The dead latents are gathered as a narrow SAE of their own: it reads the inputs, keeps `aux_k` latents of each, has no
b_dec, and is to reconstruct x − x̂. Its gradient is added to that of their rows. Which latents are dead is known once a
step has seen its whole batch: only then does this begin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

from sae_sweep.kernels.cpu.narrow_gradient import SQUARED, Sae, Setting, Workspace, add_gradient, part_of
from sae_sweep.kernels.cpu.sparse_step import OPTIONS, views
from sae_sweep.kernels.limits import NARROW_DENSE_ABOVE

_jit = numba.njit(**OPTIONS)

Array = np.ndarray[Any, Any]


class Auxiliary(NamedTuple):
    """The loss of dead latents, and its memory.

    after: steps without firing after which a latent is dead, 0: there is no such loss; coefficient: its weight. dead
    [width] and count [1]: which latents are dead, and how many; left [b, d]: x − x̂. sae, setting and work: the SAE of
    the dead, with room for all latents.
    """

    after: int
    coefficient: float
    dead: Array
    count: Array
    left: Array
    sae: Sae
    setting: Setting
    work: Workspace


@_jit
def find_dead(flat, norms, fired, silent, auxiliary):  # type: ignore[no-untyped-def]
    """Gather the latents that are dead at the end of a step in which those `fired` [width] fire; how many they are.

    flat: the SAE's parameters; norms [width]: ‖d‖; silent [width]: for how many steps latents did not fire before it.
    """
    width, dead, own, count = len(fired), auxiliary.dead, auxiliary.sae, 0
    if auxiliary.after:
        for latent in range(width):
            if not fired[latent] and silent[latent] + 1 >= auxiliary.after:
                dead[count] = latent
                count += 1
    auxiliary.count[0] = count
    if count:
        d = auxiliary.left.shape[1]
        W_enc, W_dec, b_enc, _ = views(flat, width, d)
        own_enc, own_dec, own_benc, own_bdec = views(own.flat[: (2 * count + 1) * d + count], count, d)
        own_bdec[:] = 0
        for at in range(count):
            latent = dead[at]
            own_benc[at], own.norms[at] = b_enc[latent], norms[latent]
            for i in range(d):
                own_enc[at, i], own_dec[at, i], own.rows[at, i] = W_enc[latent, i], W_dec[latent, i], W_dec[latent, i]
    return count


@_jit
def fit_dead(x, auxiliary, part):  # type: ignore[no-untyped-def]
    """The gradient of the loss over the inputs of a part, of x [b, d], in the part's memory."""
    (b, d), count = x.shape, auxiliary.count[0]
    sae, tile, setting = auxiliary.sae, part_of(auxiliary.work, part), auxiliary.setting
    own = Sae(
        sae.flat[: (2 * count + 1) * d + count], sae.first, sae.second, sae.norms[:count], sae.rows[:count], sae.silent
    )
    of_dead = Workspace(
        tile.x, tile.transposed, tile.target, tile.target_transposed, tile.residual, tile.residual_transposed,
        tile.codes[:count], tile.masks[:count], tile.gains, tile.slopes, tile.norm_scaled_acts, tile.entry_slopes,
        tile.order, tile.ranks, tile.latents, tile.g_enc[:count], tile.g_dec[:count], tile.g_benc[:count], tile.g_bdec,
        tile.pulls[:count], tile.fired[:count], tile.totals, tile.cuts,
    )  # fmt: skip
    weights = np.float32(2 * auxiliary.coefficient / b), np.float32(0)
    dense = setting.k > NARROW_DENSE_ABOVE * count
    add_gradient(x, auxiliary.left, auxiliary.left[:0], own, setting, of_dead, weights, dense)


@_jit
def add_fit(auxiliary, g_enc, g_dec, g_benc):  # type: ignore[no-untyped-def]
    """Add that gradient to g_enc, g_dec [width, ·] and g_benc [width], part by part."""
    work = auxiliary.work
    for at in range(auxiliary.count[0]):
        latent = auxiliary.dead[at]
        for part in range(len(work.cuts)):
            g_benc[latent] += work.g_benc[part, at]
            for i in range(g_enc.shape[1]):
                g_enc[latent, i] += work.g_enc[part, at, i]
                g_dec[latent, i] += work.g_dec[part, at, i]


@_jit
def add_to_active(sae, auxiliary):  # type: ignore[no-untyped-def]
    """Add it to the gradient of an SAE of sparse_step.py, of which only rows of active latents count."""
    g_enc, g_dec, g_benc, _ = views(sae.gradient, *sae.W_dec.shape)
    for at in range(auxiliary.count[0]):
        latent = auxiliary.dead[at]
        if not sae.active[latent]:
            sae.active[latent] = 1
            g_enc[latent, :] = 0
            g_dec[latent, :] = 0
            g_benc[latent] = 0
    add_fit(auxiliary, g_enc, g_dec, g_benc)


@_jit
def value(auxiliary):  # type: ignore[no-untyped-def]
    """The loss of a step, summed over its batch: 0 where none is dead."""
    total = 0.0
    for part in range(len(auxiliary.work.cuts) if auxiliary.count[0] else 0):
        total += auxiliary.work.totals[part, SQUARED]
    return auxiliary.coefficient * total
