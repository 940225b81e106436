"""The smallest norm-scaled activation that BatchTopK keeps, exactly, without a batch × width tensor to sort.

Positive floats sort as their bits do. A count of the upper halves of the bits of all norm-scaled activations finds the
upper half of the one that is wanted, and a count of the lower halves under it finds the rest. That encodes the batch
twice. Usually a guess just below the last step's threshold leaves few enough candidates to list and to sort.
"""

from __future__ import annotations

import numba
import numpy as np

from sae_sweep.kernels.cpu.encoder_tile import ACROSS, PANELS, ROWS, WORDS, lowest, tile
from sae_sweep.kernels.cpu.simd import LANES
from sae_sweep.kernels.cpu.sparse_step import CODE, LATENT, OPTIONS

_jit = numba.njit(**OPTIONS)

# Half the bits of a float32.
HALF = 16


@_jit
def tally(x, parts, chunk, encoder, upper, counts):  # type: ignore[no-untyped-def]
    """Count the norm-scaled activations of parts [chunk[0], chunk[1]) by the upper halves of their bits.

    counts [parts, 2¹⁶] receives the counts. If upper ≥ 0, only activations with that upper half are counted, by the
    lower halves of their bits.
    """
    floors, out, masks = np.zeros(ROWS, np.float32), np.empty((ROWS, ACROSS), np.float32), np.empty(WORDS, np.int64)
    value = np.empty(1, np.float32)
    bits = value.view(np.int32)
    for part in range(chunk[0], chunk[1]):
        begin, end = parts[part]
        for first in range(begin, end, ROWS):
            for panel in range(0, len(encoder.panels), PANELS):
                tile(x, first, encoder, panel, floors, out, masks)
                for word in range(WORDS):
                    mask = masks[word]
                    while mask:
                        bit = 64 * word + lowest(mask)
                        r, lane = bit // ACROSS, bit % ACROSS
                        mask &= mask - 1
                        if first + r >= end:
                            break
                        value[0] = out[r, lane] * encoder.weights[panel * LANES + lane]
                        high = bits[0] >> HALF
                        if upper < 0:
                            counts[part, high] += 1
                        elif high == upper:
                            counts[part, bits[0] & ((1 << HALF) - 1)] += 1


@_jit
def rank_in(counts, rank):  # type: ignore[no-untyped-def]
    """Where the rank-th largest (from 1) of what `counts` counted lies, and its rank there; (−1, 0) for rank 0."""
    for half in range(len(counts) - 1, -1, -1):
        if 0 < rank <= counts[half]:
            return half, rank
        rank -= counts[half]
    return -1, 0


@_jit
def norm_scaled_acts(norms, codes, latents, starts, rows):  # type: ignore[no-untyped-def]
    """The norm-scaled activations of all entries of a part with `rows` inputs."""
    result = np.empty(starts[rows], np.float32)
    for entry in range(len(result)):
        result[entry] = codes[entry, CODE] * norms[latents[entry, LATENT]]
    return result


@_jit
def drop_below(least, norms, codes, latents, starts, rows):  # type: ignore[no-untyped-def]
    """Leave only the entries whose norm-scaled activation is `least` or more."""
    kept = begin = 0
    for row in range(rows):
        end = starts[row + 1]
        for entry in range(begin, end):
            if codes[entry, CODE] * norms[latents[entry, LATENT]] >= least:
                codes[kept, CODE], latents[kept, LATENT] = codes[entry, CODE], latents[entry, LATENT]
                kept += 1
        begin = end
        starts[row + 1] = kept
