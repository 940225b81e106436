"""Sequences of max-of-K drawn by the probabilities of their cells."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.toys.classes import FACTORS, Cells


def mix(*parts: int | str) -> int:
    """A generator seed from several numbers and words: neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Sampler:
    """Draws sequences: a cell by its probability, then a sequence of the cell, each as likely as the others."""

    def __init__(self, cells: Cells, chance: NDArray[np.float64] | None, device: str | torch.device) -> None:
        """`chance` [T]: probability of each cell, or None for every sequence equally likely (no table is held)."""
        self.cells, self.device = cells, torch.device(device)
        if chance is None:
            self._cumulative = None
            return
        cumulative = np.cumsum(chance)
        self._cumulative = torch.from_numpy(cumulative / cumulative[-1]).to(self.device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` sequences [count, k], int64; `generator` must be of the sampler's device."""
        if self._cumulative is None:
            shape = (count, self.cells.k)
            return torch.randint(self.cells.d_vocab, shape, generator=generator, device=self.device)
        uniforms = torch.rand(count, dtype=torch.float64, generator=generator, device=self.device)
        # A cell of probability 0 is skipped: its bound equals the one before.
        return self.draw_within(torch.searchsorted(self._cumulative, uniforms, right=True), generator)

    def draw_within(self, cell: Tensor, generator: torch.Generator) -> Tensor:
        """A sequence of each cell [count], all those of the cell equally likely: [count, k], int64."""
        k = self.cells.k
        m, q, n, c = self._factors.index_select(0, cell).T.contiguous()
        columns = torch.empty(k, len(cell), dtype=torch.int64, device=self.device)
        columns[-1] = q
        uniforms = torch.rand(2, k - 1, len(cell), dtype=torch.float64, generator=generator, device=self.device)
        # Still to place before the query: copies of m; smaller tokens; among these at least one n.
        copies = c - (q == m).int()
        smaller = k - 1 - copies
        missing = n != q
        for position in range(k - 1):
            is_copy = uniforms[0, position] * (k - 1 - position) < copies
            uniform = uniforms[1, position]
            chance = torch.where(missing, self._chance_of_runner_up[smaller, n], 0.0)
            # What the missing n leaves of the unit interval goes to tokens below it; with none missing, to all up to n.
            other = (uniform - chance) / (1 - chance) * (n + (~missing).int())
            token = torch.where(uniform < chance, n, other.to(n.dtype))
            columns[position] = torch.where(is_copy, m, token)
            copies, smaller = copies - is_copy.int(), smaller - (~is_copy).int()
            missing = missing & (is_copy | (token != n))
        return columns.T

    @cached_property
    def _factors(self) -> Tensor:
        """m, q, n, c of every cell: int32 [T, 4]."""
        columns = np.stack([self.cells.factors[factor] for factor in FACTORS], 1)
        return torch.from_numpy(columns).to(self.device)

    @cached_property
    def _chance_of_runner_up(self) -> Tensor:
        """P(first is n) of r tokens up to n, at least one of them n: (n+1)^(r-1) / [(n+1)^r - n^r], [k, d_vocab]."""
        r, n = torch.arange(self.cells.k)[:, None], torch.arange(self.cells.d_vocab, dtype=torch.float64)
        # Divided through by (n+1)^(r-1), which alone may overflow. Row 0 is never read for a token.
        return (1 / (n + 1 - n * (n / (n + 1)) ** (r - 1).clamp(min=0))).to(self.device)
