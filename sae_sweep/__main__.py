"""`python -m sae_sweep`."""

from sae_sweep.cli import main

main()
