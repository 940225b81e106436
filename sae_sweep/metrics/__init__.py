"""Measures of SAEs against the ground truth."""

from sae_sweep.environment import use_numba_cache

use_numba_cache()
