"""The inputs of max-of-K under a declared distribution: drawn for training, enumerated or sampled for measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Distribution, derive_seed
from sae_sweep.lazy import lazy
from sae_sweep.toys.classes import Cells
from sae_sweep.toys.sampler import Sampler, cell_weights, inputs_of_cells, systematic_draws

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch = lazy("numpy"), lazy("torch")

# Inputs per chunk of an evaluation.
CHUNK_ROWS = 1 << 14


class Sequences:
    """All sequences of `cells.k` tokens below `cells.d_vocab`: the `Population` of max-of-K (toys/model.py)."""

    def __init__(self, cells: Cells, distribution: Distribution, device: str | torch.device) -> None:
        """Raises UserError where a file of weights cannot be read."""
        self.cells, self.device = cells, device
        self.chance = cell_weights(cells, distribution)
        self.total = cells.d_vocab**cells.k
        self._uniform = distribution.name == "uniform"

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.cells, None if self._uniform else self.chance, self.device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent sequences [count, k] int64."""
        return self._sampler.draw(count, generator)

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each sequence [count] int64."""
        return torch.from_numpy(self.cells.index(inputs.cpu().numpy())).to(inputs.device)

    def weighted(self, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `weighted_inputs`, in the order of cells."""
        return weighted_inputs(self.cells, self.chance, limit, self.device)

    def count(self, limit: int) -> int:
        """How many inputs `weighted` gives."""
        return int(self.inputs_of_cells(limit).sum())

    def inputs_of_cells(self, limit: int) -> NDArray[np.float64]:
        """How many of the inputs that `weighted` gives are of each cell [T]."""
        return inputs_of_cells(self.cells, self.chance, limit)

    def listed(self) -> Tensor:
        """Every sequence [total, k], at the number that its tokens spell in base d_vocab."""
        return spelled(torch.arange(self.total, device=self.device), self.cells.d_vocab, self.cells.k)

    def number(self, inputs: Tensor) -> Tensor:
        """Where each sequence stands in `listed` [count]."""
        code = inputs[:, 0]
        for token in inputs.unbind(1)[1:]:
            code = code * self.cells.d_vocab + token
        return code


def spelled(codes: Tensor, d_vocab: int, k: int) -> Tensor:
    """The sequences [..., k] int64 whose tokens are the digits of `codes` [...] in base d_vocab, first token first."""
    places = torch.tensor([d_vocab**i for i in reversed(range(k))], device=codes.device)
    return codes[..., None] // places % d_vocab


def weighted_inputs(
    cells: Cells, chance: NDArray[np.float64], limit: int, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of sequences [b, k] int64, cells [b] int64 and weights [b] float64 that stand for the distribution.

    Every input of positive chance if d_vocab^k is at most `limit`, else `limit` draws by systematic sampling over the
    cells, half as declared and half with every cell equally likely, so that light cells are seen. Weights undo the
    proposal; they are scaled to sum to 1, which leaves a bias far below the sampling error. In the order of cells.
    """
    if cells.d_vocab**cells.k > limit:
        yield from _drawn(cells, chance, limit, device)
        return
    of_input = chance / cells.sizes
    for rows in _rechunked(_inputs_of_max(cells, m, chance > 0) for m in range(cells.d_vocab)):
        sequences, cell = rows[:, :-1], rows[:, -1]
        on_device = torch.from_numpy(cell).to(device)
        yield torch.from_numpy(sequences).to(device), on_device, torch.from_numpy(of_input[cell]).to(device)


def _drawn(
    cells: Cells, chance: NDArray[np.float64], count: int, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`count` draws, in the order of their cells, and what each weighs."""
    draws, weight = systematic_draws(chance, count)
    # Where each cell's draws end, so that all draws need not be held.
    ends = np.cumsum(draws)
    sampler = Sampler(cells, chance, device)
    for number, start in enumerate(range(0, count, CHUNK_ROWS)):
        cell = np.searchsorted(ends, np.arange(start, min(start + CHUNK_ROWS, count)), side="right")
        on_device = torch.from_numpy(cell).to(device)
        generator = torch.Generator(device).manual_seed(derive_seed("evaluation", count, number))
        yield sampler.draw_within(on_device, generator), on_device, torch.from_numpy(weight[cell]).to(device)


def _inputs_of_max(cells: Cells, m: int, possible: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The sequences with maximum `m`, (m+1)^k - m^k in all, whose cell is `possible` [T], and this: [., k + 1].

    Sorted by cell.
    """
    parts = []
    for first in range(cells.k):
        # Tokens below m, then the first m, then tokens up to m.
        choices = (m,) * first + (1,) + (m + 1,) * (cells.k - 1 - first)
        tokens = np.stack(np.unravel_index(np.arange(math.prod(choices)), choices), 1)
        tokens[:, first] = m
        parts.append(tokens)
    sequences = np.concatenate(parts)
    cell = cells.index(sequences)
    order = np.argsort(cell, kind="stable")
    return np.column_stack([sequences, cell])[order[possible[cell[order]]]]


def _rechunked(parts: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """The rows of `parts` in chunks of CHUNK_ROWS, the last one shorter."""
    held: list[NDArray[np.int64]] = []
    for part in parts:
        held.append(part)
        while sum(map(len, held)) >= CHUNK_ROWS:
            rows = np.concatenate(held)
            yield rows[:CHUNK_ROWS]
            held = [rows[CHUNK_ROWS:]]
    if any(map(len, held)):
        yield np.concatenate(held)
