"""Sizes of measuring: here, without PyTorch or Numba, so that plans can count on them."""

# Inputs at a time, so that what is computed of them stays in a cache; fewer where so many latents fire that a row for
# each input of all that fire would have more numbers than this. Fixed, as sums depend on where a block ends.
BLOCK_INPUTS, BLOCK_NUMBERS = 1 << 11, 1 << 22
# Rows of a firing table held before they are merged; once a merged table is larger, it may grow to twice its length.
ROWS_HELD = 1 << 21
# Inputs permuted before the mean of a null is good enough: its spread falls with the inputs of one permutation.
PERMUTED_INPUTS = 1 << 19
# Inputs drawn for probes; the first share of them is trained on, in so many epochs of batches of so many.
PROBE_INPUTS, PROBE_TRAIN_SHARE, PROBE_EPOCHS, PROBE_BATCH = 20_000, 0.8, 50, 512
# A prior is fitted to a latent that fires on so many of the probes' inputs.
PRIOR_INPUTS = 100
