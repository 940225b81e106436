"""Faster means to the same step as saes/train.py: compiled for processors, or for NVIDIA's GPUs."""

# The longest activation of which a tile fits a GPU's registers, and for which the error of its screening is bounded.
LONGEST = 128
