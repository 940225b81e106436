"""Sizes of sampling: here, without PyTorch, so that plans can count on them."""

# Inputs drawn with one seeding of the generator: a block of whole steps.
BLOCK_ROWS = 1 << 15
# Up to so many inputs a toy has, the activations of all are kept and batches are looked up.
TABLE_INPUTS = 1 << 18
# Up to so many, centring and scale are exact; beyond, so many are drawn for them.
CONSTANTS_INPUTS = 1 << 20
# A toy that answers less of its inputs right has not learnt what its SAEs are asked about.
LEAST_ACCURACY = 0.99
