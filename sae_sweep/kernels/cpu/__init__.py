"""Compiled steps for processors."""

from sae_sweep.environment import use_numba_cache

use_numba_cache()
