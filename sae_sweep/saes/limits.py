"""Sizes of the training loop: here, without PyTorch, so that plans can count on them."""

# Steps between two looks at the metrics: each look waits for the device.
BLOCK = 25
# Tensors of batch × width that autograd holds at once, about; and the bytes of them that SAEs on a GPU share.
COPIES, GPU_BYTES = 12, 1 << 32
# Codes of one input over all steps of an encoder, and of those kept of one, up to which it has a compiled step.
UNROLLED, UNROLLED_CHOSEN = 1 << 16, 64
# The most parts of a batch that a compiled step by tiles takes side by side, and the inputs of a tile.
TILE_PARTS, TILE_INPUTS = 4, 64
