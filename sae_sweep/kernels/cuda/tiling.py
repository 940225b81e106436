"""How the CUDA step cuts an SAE's work, and the memory it needs for it: from the SAE's shape alone.

Of no pack-mate, so that an SAE's bits depend on none; and without torch, so that a plan can be made of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_sweep.config.settings import Sae

# Up to this width matrix products beat lists of active latents, however little fires.
NARROW = 512
# From this width an input's latents are looked for by SEGMENTS programs at once.
WIDE, SEGMENTS = 8192, 8
# Inputs, and latents, in a tile.
TILE = 64
# Words of 32 bits that are read at once: of a latent's inputs, and of an input's latents. Registers decide.
WORDS, LATENT_WORDS = 128, 32
# Programs per SAE that its gradient is split among, at least, where there are inputs enough.
PROGRAMS = 32


@dataclass(frozen=True)
class Tiles:
    """Tiles of one SAE of `width` latents over inputs of length `d`, `b` in a batch; `k` of TopK, else 0."""

    width: int
    d: int
    b: int
    k: int = 0

    @classmethod
    def of(cls, sae: Sae, d: int, b: int) -> Tiles:
        """Those of an SAE that the CUDA step trains."""
        return cls(sae.width, d, b, sae.k if sae.architecture == "topk" else 0)

    @property
    def sparse(self) -> bool:
        """Whether steps are taken by lists of active latents, where those have room."""
        return bool(self.k) or self.width > NARROW

    @property
    def padded(self) -> int:
        """Columns of a tile: a power of two."""
        return max(16, power_of_two(self.d))

    @property
    def rows(self) -> int:
        """Inputs in a tile of products. Registers decide: half as many where d is long."""
        return TILE if self.padded <= 64 else TILE // 2

    @property
    def share(self) -> int:
        """Inputs of which one program sums the gradient, half `rows` at a time, as there are two gradients."""
        parts = 1 if self.k else min(over(self.b, self.rows // 2), over(PROGRAMS, over(self.width, TILE)))
        return over(over(self.b, parts), self.rows // 2) * (self.rows // 2)

    @property
    def parts(self) -> int:
        """Parts that the gradient comes in."""
        return over(self.b, self.share)

    @property
    def run(self) -> int:
        """Latents whose squares one program adds up."""
        return 1024 if self.sparse else 8

    @property
    def wide(self) -> bool:
        """Whether an input's latents are looked for in segments."""
        return self.width >= WIDE and not self.k

    @property
    def segments(self) -> int:
        """Segments of the latents, each looked through by a program of its own."""
        return SEGMENTS if self.wide else 1

    @property
    def most(self) -> int:
        """Mean latents of an input, of those that may fire, above which products are faster."""
        return self.k or min(max(self.width // 32, 32), 256)

    @property
    def latent_words(self) -> int:
        """Words of 32 bits, an even number of them, that have one for every latent."""
        return 2 * over(self.width, TILE)

    @property
    def cells(self) -> int:
        """Counts of latents that may fire: of TopK one for every input, else one for every program that looks."""
        return self.b if self.k else over(self.b, TILE) * self.segments

    @property
    def words(self) -> int:
        """Words of 32 bits that have one for every input."""
        return over(self.b, 32)

    @property
    def bytes(self) -> int:
        """Device memory that training takes beside parameters and moments (backend.py), to a few percent."""
        sums = over(self.b, TILE) * (self.padded + 4) + over(self.width, self.run)
        gradient = self.parts * (2 * self.width * self.d + 2 * self.width + self.d)
        numbers = sums + gradient + self.width + self.b * (self.d + 5)
        if self.sparse:
            numbers += self.b * (self.k or self.latent_words) + self.cells + self.width * (self.words + 4)
            numbers += self.width * self.padded // 2
        return 4 * numbers


def over(number: int, size: int) -> int:
    """How many of `size` hold `number`."""
    return -(-number // size)


def power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()
