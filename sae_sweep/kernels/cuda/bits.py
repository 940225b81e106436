"""Sets kept as bits in words: how many there are, and which."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ones_in(word):  # type: ignore[no-untyped-def]
    """How many bits of each int32 are set (Warren, Hacker's Delight, 5-1); what its sign shifts in is masked."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F
    sixteens = eights + (eights >> 8)
    return (sixteens + (sixteens >> 16)) & 0x3F


@triton.jit
def places_of_bits(bits, ends, rank, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rank-th set bit [chunk] lies in words `bits` [WORDS], of which so many are set up to each: `ends`."""
    # The word that holds a rank is the first that ends above it.
    which = tl.sum((ends[None, :] <= rank[:, None]).to(tl.int32), 1)
    its = tl.arange(0, WORDS)[None, :] == which[:, None]
    word = tl.sum(tl.where(its, bits[None, :], 0), 1)
    begin = tl.sum(tl.where(its, ends[None, :], 0), 1) - ones_in(word)
    # And in it the place of a bit is how many places end at or below what comes before it.
    so_far = tl.cumsum((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, 1)
    return which * 32 + tl.sum((so_far <= (rank - begin)[:, None]).to(tl.int32), 1)
