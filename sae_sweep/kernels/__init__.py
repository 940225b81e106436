"""Faster means to the same step as saes/train.py: compiled for processors, or for NVIDIA's GPUs."""

# The longest activation of which a tile fits a GPU's registers, and for which the error of its screening is bounded.
LONGEST = 128
# Architectures whose code is every positive pre-activation, the k of largest contribution, or what reaches a threshold:
# those that listing.py lists.
LISTED = ("relu", "topk", "batchtopk", "matryoshka", "tied")
