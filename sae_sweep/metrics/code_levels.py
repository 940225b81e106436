"""How large each latent's contribution is, and how often: a table that fills in the one pass over the inputs.

A contribution a‖d‖ is rounded to a whole multiple of STEP, its level. Pairs of a latent and a level lie in a table by
hash, so that neither a wide SAE nor a contribution of a million takes more room than the pairs that there are.
"""

from __future__ import annotations

import numba
import numpy as np

from sae_sweep.metrics.hashing import GOLDEN
from sae_sweep.metrics.partitions import Floats, Ints
from sae_sweep.metrics.sparse_codes import Active

STEP = 0.25
# Places of a table, a power of 2, before it grows; and the bits of a key beside its latent's.
PLACES, LEVEL_BITS = 1 << 10, np.uint64(32)


class CodeLevels:
    """Σ weight by latent and level, level 0 left out: `add` batches in any order.

    Sums are float64 in the order of the inputs: however these are divided into batches, they have the same bits.
    """

    def __init__(self) -> None:
        self.finite = True  # whether all codes so far were
        self._keys, self._weights = np.zeros(PLACES, np.uint64), np.zeros(PLACES)

    def add(self, norms: Active, weight: Floats) -> None:
        """Count a batch: listed a‖d‖ on the CPU, and the `weight` [b] of each input."""
        level = np.rint(norms.codes.numpy() / np.float32(STEP))
        self.finite = self.finite and bool(np.isfinite(level).all())
        if self.finite:
            table = self._keys, self._weights
            self._keys, self._weights = _add(norms.starts.numpy(), norms.latents.numpy(), level, weight, *table)

    @property
    def table(self) -> tuple[Ints, Floats]:
        """Latent and Σ weight of every pair that there is: two arrays [pairs], latents and their levels in order."""
        held = np.flatnonzero(self._keys)
        held = held[np.argsort(self._keys[held])]
        return (self._keys[held] >> LEVEL_BITS).astype(np.int64), self._weights[held]


@numba.njit(cache=True, nogil=True)
def _place(key, keys):  # type: ignore[no-untyped-def]
    """Where a key is among `keys`, or is to be: a place of its own, or the next one that is free."""
    last = np.uint64(len(keys) - 1)
    place = (key * GOLDEN >> LEVEL_BITS) & last
    while keys[place] != key and keys[place] != 0:
        place = (place + np.uint64(1)) & last
    return place


@numba.njit(cache=True, nogil=True)
def _add(starts, latents, levels, weight, keys, weights):  # type: ignore[no-untyped-def]
    """Add inputs to a table, entries as in Active; returns the table, which is another one where it had to grow."""
    bits, held = levels.view(np.uint32), np.count_nonzero(keys)
    for row in range(len(weight)):
        for entry in range(starts[row], starts[row + 1]):
            if levels[entry] == 0:
                continue
            key = np.uint64(latents[entry]) << LEVEL_BITS | np.uint64(bits[entry])
            place = _place(key, keys)
            if keys[place] == 0:
                keys[place] = key
                held += 1
            weights[place] += weight[row]
            if 2 * held > len(keys):
                keys, weights = _grown(keys, weights)
    return keys, weights


@numba.njit(cache=True, nogil=True)
def _grown(keys, weights):  # type: ignore[no-untyped-def]
    """The same table with four times the places."""
    more_keys, more_weights = np.zeros(4 * len(keys), keys.dtype), np.zeros(4 * len(keys))
    for i in range(len(keys)):
        if keys[i] != 0:
            place = _place(keys[i], more_keys)
            more_keys[place], more_weights[place] = keys[i], weights[i]
    return more_keys, more_weights
