"""Numbers without a pattern from numbers with one (SplitMix64: Steele, Lea and Flood 2014).

Written so that numpy and numba both take it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)


def mixed(z: Any) -> Any:
    """Each number z of 64 bits mixed up, one to one. z = seed + GOLDEN · i gives a stream of random numbers."""
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return z ^ (z >> _31)
