"""How often each latent is the largest of an input, which `exclusive_pi` needs of a whole batch before its slopes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sae_sweep.kernels.cpu.sparse_step import CODE, LATENT, OPTIONS

Array = np.ndarray[Any, Any]


@numba.njit(**OPTIONS)
def count_wins(norms, thresholds, codes, latents, starts, rows, wins):  # type: ignore[no-untyped-def]
    """Add to wins [width] on how many inputs of a part each latent wins.

    The latent with the largest norm-scaled activation wins; of equals the first.
    thresholds [width]: what a norm-scaled activation has to exceed. codes, latents and starts are the part's list.
    """
    for row in range(rows):
        most, winner = np.float32(0), -1
        for entry in range(starts[row], starts[row + 1]):
            latent = latents[entry, LATENT]
            contribution = codes[entry, CODE] * norms[latent]
            if contribution > most and contribution > thresholds[latent]:
                most, winner = contribution, latent
        if winner >= 0:
            wins[winner] += 1


def log_shares(wins: Array) -> Array:
    """log π [width] of so many wins: one is added to each, as in penalties.py."""
    return np.log((wins + 1) / (wins + 1).sum()).astype(np.float32)
