"""Whole steps of a TopK SAE whose encoder is matching pursuit (saes/encoders/matching_pursuit.py), a tile at a time.

With unit rows u = d/‖d‖ and y = x − b_dec, k times: i = argmax u·y, a = max(u·y, 0), y ← y − a·u. The error is ‖y‖² of
the last y. Its gradient in u goes back through the steps: with G = (2/b)·y of the last y and s = −G·u, each step adds
s·y − a·G to that of its row, y as the step found it, and then s·u to G. At the last step s is 0, since what is left is
at right angles to its row. A row d has what of u's gradient is at right angles to it, over ‖d‖.

Nothing is as long as the dictionary but its rows and their gradient, so that this step is for SAEs of any width.
Records, parts and threads are as in narrow_step.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from sae_sweep.kernels.cpu.narrow_gradient import FIRED, SQUARED
from sae_sweep.kernels.cpu.narrow_step import finish_step, join_fired
from sae_sweep.kernels.cpu.narrow_tile import INPUTS, keep_best, transpose
from sae_sweep.kernels.cpu.rows import add_rows, dot
from sae_sweep.kernels.cpu.sparse_step import OPTIONS, views
from sae_sweep.kernels.cpu.steps import FACTOR, NORM, adam, clip_factor
from sae_sweep.kernels.cpu.work_queue import END, claim, finish_piece

_jit = numba.njit(**OPTIONS)

# What a row's norm is divided by at least (matching_pursuit.SMALLEST_SQUARE): a row of zeros is never chosen.
LEAST = np.float32(1e-15)

Array = np.ndarray[Any, Any]


class Sae(NamedTuple):
    """An SAE's row of a stack, and what is derived of its parameters.

    flat, first, second [parameter_count]: parameters and Adam's moments; units [width, padded]: decoder rows of norm 1,
    filled up with zeros to whole vectors; norms [width]: ‖d‖; silent [width]: for how many steps each latent has not
    fired.
    """

    flat: Array
    first: Array
    second: Array
    units: Array
    norms: Array
    silent: Array


class Workspace(NamedTuple):
    """Memory of each part: what a tile needs, and the part's gradient; or of one part, without the first dimension.

    cuts [parts, 2]: the inputs of each; fired [parts, width]: which latents fire there. Of a tile: left [k, INPUTS,
    padded], what each step finds, the last one what all leave; transposed [padded, INPUTS], what the next step finds;
    best and latents [INPUTS]: of the rows so far, the largest projection and whose it is; steps [INPUTS · k, 2], of
    each step of each input: −a and s; rows int32 [INPUTS · k, 2]: its latent and its input. g_units [width, padded] and
    g_bdec [padded]: the gradient.
    """

    left: Array
    transposed: Array
    best: Array
    latents: Array
    steps: Array
    rows: Array
    g_units: Array
    g_bdec: Array
    fired: Array
    totals: Array
    cuts: Array


# Columns of `steps` and of `rows`.
REACH, PULL, LATENT, ROW = 0, 1, 0, 1


@_jit
def refresh(sae):  # type: ignore[no-untyped-def]
    """Bring what is derived of an SAE's parameters up to date."""
    width, d = len(sae.norms), (len(sae.flat) - len(sae.norms)) // (2 * len(sae.norms) + 1)
    _, W_dec, _, _ = views(sae.flat, width, d)
    for latent in range(width):
        sae.norms[latent] = max(np.float32(math.sqrt(dot(W_dec, latent, W_dec, latent))), LEAST)
        for i in range(d):
            sae.units[latent, i] = W_dec[latent, i] / sae.norms[latent]


@_jit
def _choose(sae, tile, step):  # type: ignore[no-untyped-def]
    """A step of the tile's inputs: what it leaves is the next step's, or, of the last, takes the place of its own."""
    k, inputs = tile.left.shape[0], tile.left.shape[1]
    found, leaves = tile.left[step], tile.left[min(step + 1, k - 1)]
    transpose(found, tile.transposed)
    tile.best[:], tile.latents[:] = 0, 0
    keep_best(sae.units, tile.transposed, tile.best, tile.latents)
    if step + 1 < k:
        leaves[:] = found
    for r in range(inputs):
        at, latent = r * k + step, tile.latents[r]
        tile.steps[at, REACH], tile.rows[at, LATENT], tile.rows[at, ROW] = -tile.best[r], latent, r
        if tile.best[r] > 0:
            add_rows(leaves, r, tile.steps, REACH, sae.units, tile.rows, LATENT, (at, at + 1))


@_jit
def _count(tile, rows):  # type: ignore[no-untyped-def]
    """How many latents fire on the first `rows` inputs of a tile; one that is chosen twice fires once."""
    k, fired = tile.left.shape[0], 0
    for r in range(rows):
        for at in range(r * k, (r + 1) * k):
            latent, again = tile.rows[at, LATENT], tile.steps[at, REACH] == 0
            for before in range(r * k, at):
                again |= tile.rows[before, LATENT] == latent and tile.steps[before, REACH] != 0
            if not again:
                tile.fired[latent] = 1
                fired += 1
    return fired


@_jit
def _go_back(sae, tile, rows):  # type: ignore[no-untyped-def]
    """Add the gradient of the first `rows` inputs of a tile, whose last `left` is G."""
    k = tile.left.shape[0]
    G = tile.left[k - 1]
    for r in range(rows):
        for step in range(k - 1, -1, -1):
            at, latent = r * k + step, np.int64(tile.rows[r * k + step, LATENT])
            if tile.steps[at, REACH] == 0:
                continue
            add_rows(tile.g_units, latent, tile.steps, REACH, G, tile.rows, ROW, (at, at + 1))
            if step + 1 < k:
                tile.steps[at, PULL] = -dot(G, r, sae.units, latent)
                add_rows(tile.g_units, latent, tile.steps, PULL, tile.left[step], tile.rows, ROW, (at, at + 1))
                add_rows(G, r, tile.steps, PULL, sae.units, tile.rows, LATENT, (at, at + 1))
        for i in range(G.shape[1]):
            tile.g_bdec[i] -= G[r, i]


@_jit
def _add_gradient(x, sae, tile):  # type: ignore[no-untyped-def]
    """The gradient over the inputs of a part, of x [b, d], in its memory, and its totals."""
    (b, d), k, cut, totals = x.shape, tile.left.shape[0], tile.cuts, tile.totals
    _, _, _, b_dec = views(sae.flat, len(sae.norms), d)
    tile.g_units[:], tile.g_bdec[:], tile.fired[:], totals[:] = 0, 0, 0, 0
    flat, of_error = tile.left[k - 1].reshape(1, INPUTS * tile.left.shape[2]), np.float32(2 / b)
    for first in range(cut[0], cut[1], INPUTS):
        rows = min(INPUTS, cut[1] - first)
        tile.left[0, rows:] = 0  # nothing is left of inputs that are none: no row reaches them
        for r in range(rows):
            for i in range(d):
                tile.left[0, r, i] = x[first + r, i] - b_dec[0, i]
        for step in range(k):
            _choose(sae, tile, step)
        totals[FIRED] += _count(tile, rows)
        totals[SQUARED] += float(dot(flat, 0, flat, 0))
        for i in range(flat.shape[1]):
            flat[0, i] *= of_error
        _go_back(sae, tile, rows)


@_jit
def _part(work, part):  # type: ignore[no-untyped-def]
    """The memory of one part."""
    return Workspace(
        work.left[part], work.transposed[part], work.best[part], work.latents[part], work.steps[part], work.rows[part],
        work.g_units[part], work.g_bdec[part], work.fired[part], work.totals[part], work.cuts[part],
    )  # fmt: skip


@_jit
def _add_up(sae, work):  # type: ignore[no-untyped-def]
    """The parts' gradients in the first one's memory, of decoder rows as they are trained; ‖g‖²."""
    width, padded = sae.units.shape
    g_units, g_bdec = work.g_units[0], work.g_bdec[0]
    for part in range(1, len(work.cuts)):
        for latent in range(width):
            for i in range(padded):
                g_units[latent, i] += work.g_units[part, latent, i]
        for i in range(padded):
            g_bdec[i] += work.g_bdec[part, i]
    total, biases = 0.0, g_bdec.reshape(1, padded)
    for latent in range(width):
        along = dot(g_units, latent, sae.units, latent)
        for i in range(padded):
            g_units[latent, i] = (g_units[latent, i] - along * sae.units[latent, i]) / sae.norms[latent]
        total += dot(g_units, latent, g_units, latent)
    return total + dot(biases, 0, biases, 0)


@_jit
def _update(sae, work, scales):  # type: ignore[no-untyped-def]
    """Adam's step of decoder rows and b_dec: W_enc and b_enc, which are not used, never have a gradient."""
    width, padded = sae.units.shape
    d = (len(sae.flat) - width) // (2 * width + 1)
    gradient = work.g_units[0].reshape(width * padded)
    # Rows without padding follow each other as one.
    rows, length = (1, width * d) if padded == d else (width, d)
    for row in range(rows):
        begin = width * d + row * length
        here = slice(begin, begin + length)
        adam(sae.flat[here], gradient[row * padded :], sae.first[here], sae.second[here], scales, 1, 0, length)
    here = slice(2 * width * d + width, len(sae.flat))
    adam(sae.flat[here], work.g_bdec[0], sae.first[here], sae.second[here], scales, 1, 0, d)


@_jit
def take_pursuit_steps(batches, schedule, sae, clip, work, shared):  # type: ignore[no-untyped-def]
    """Adam steps of one SAE on batches [steps, b, d]; the rest is as of `narrow_step.take_narrow_steps`."""
    steps, b, _ = batches.shape
    queue, metrics = shared.queue, shared.metrics
    while True:
        kind, part = claim(queue)
        if kind == END:
            return
        now = shared.step[0]
        _add_gradient(batches[now], sae, _part(work, part))
        if finish_piece(queue, len(work.cuts)):
            metrics[FACTOR], norm = clip_factor(_add_up(sae, work), np.empty(0), clip)
            metrics[NORM] = max(metrics[NORM], norm)
            scales = np.float32(metrics[FACTOR]), np.float32(schedule[now, 0]), np.float32(1 / schedule[now, 1])
            _update(sae, work, scales)
            refresh(sae)
            join_fired(work.fired)
            finish_step(work, sae.silent, (b, 0.0), steps, shared)
