"""Sizes at which the CPU step takes another path: here, without compiled code, so that plans can count on them."""

# One part for so many products of the encoder (0.2 ms): less is not worth sharing. More than MOST_PARTS cores are rare.
PART, MOST_PARTS = 1 << 24, 16
# Up to this width, and up to so many chosen of an input, the step of narrow SAEs (cpu/narrow_step.py) is the faster
# one; where more than this share of the latents fires, its products beat sums over the codes above 0.
NARROW_WIDTH, NARROW_CHOSEN, NARROW_DENSE_ABOVE = 1280, 8, 0.16
# Entries that a part lists before their gradients are collected; a list always has room for one more input besides.
ENTRIES = 1 << 17
# Where more than this share of the latents fires, and at least so many, matrix products beat loops over entries.
DENSE_ABOVE, DENSE_AT_LEAST = 0.1, 64
# Where fewer than this share of the latents fires, products of rounded rows pass over most of them
# (cpu/int8_prefilter.py).
ROUND_BELOW = 0.016
