"""What inputs an SAE or a toy sees: a probability for each cell, and sequences drawn by it."""

from __future__ import annotations

import csv
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Distribution
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import get
from sae_sweep.toys.classes import FACTORS, NONE, Cells

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch = lazy("numpy"), lazy("torch")


def cell_weights(cells: Cells, distribution: Distribution) -> NDArray[np.float64]:
    """Probability of every cell [T] under `distribution`; within a cell sequences are equally likely.

    Raises UserError where a file of weights cannot be read.
    """
    name, weights = get("distribution", distribution.name).weigh(cells, distribution)
    of_cell = cells.partition(name).of_cell
    # Sizes are divided first: their sum d_vocab^k may be far beyond what the weights need.
    share = cells.sizes / np.bincount(of_cell, cells.sizes)[of_cell]
    return (weights / weights.sum())[of_cell] * share


def read_weights(cells: Cells, path: Path) -> tuple[str, NDArray[np.float64]]:
    """The partition that the columns of a CSV of weights name, and each class's weight, 0 if not listed."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [column.strip() for column in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(value.strip() for value in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the weights in {path}: {error}") from error
    name = "".join(factor for factor in FACTORS if factor in header)
    if not name or sorted(header) != sorted([*name, "weight"]):
        raise UserError(f"{path}:1: the columns must be some of m, q, n, c, and weight; found: {', '.join(header)}")
    partition = cells.partition(name)
    columns = np.stack([cells.factors[factor] for factor in name], 1)
    _, first = np.unique(partition.of_cell, return_index=True)
    class_of = {tuple(values): index for index, values in enumerate(columns[first].tolist())}
    weights = np.full(partition.count, np.nan)
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}:{line}: {len(row)} values under {len(header)} columns")
        values = {column: value.strip() for column, value in zip(header, row, strict=True)}
        key = tuple(_factor(values[factor], factor, f"{path}:{line}") for factor in name)
        if key not in class_of:
            cell = ", ".join(f"{factor}={values[factor]}" for factor in name)
            raise UserError(f"{path}:{line}: no cell has {cell} at d_vocab {cells.d_vocab}, k {cells.k}")
        if not math.isnan(weights[class_of[key]]):
            raise UserError(f"{path}:{line}: a second weight for the same cells")
        weights[class_of[key]] = _weight(values["weight"], f"{path}:{line}")
    weights = np.nan_to_num(weights, nan=0.0)
    if not 0 < weights.sum() < math.inf:
        raise UserError(f"{path}:{max([line for line, _ in rows], default=1)}: the weights sum to {weights.sum():g}")
    return name, weights


def _factor(text: str, factor: str, place: str) -> int:
    if factor == "n" and text == "none":
        return NONE
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place}: {factor} must be a whole number, not {text!r}") from None


def _weight(text: str, place: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{place}: a weight must be a number from 0, not {text!r}")
    return weight


def systematic_draws(chance: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many of `count` draws each cell gets, and what each of its draws weighs: two arrays [T].

    Systematic sampling: draw i takes the cell at (i + ½)/count of the cumulative proposal, which is half the declared
    `chance` [T] and half every possible cell alike, so that light cells are seen. Weights undo the proposal.
    """
    possible = chance > 0
    proposal = chance / (2 * chance.sum()) + possible / (2 * possible.sum())
    cumulative = np.cumsum(proposal)
    ends = np.ceil(count * (cumulative / cumulative[-1]) - 0.5).astype(np.int64)
    draws = np.diff(ends, prepend=0)
    weight = np.divide(chance, proposal, out=np.zeros_like(chance), where=possible)
    return draws, weight / (weight @ draws)


def inputs_of_cells(cells: Cells, chance: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """How many inputs of each cell [T] an evaluation has that takes all sequences up to `limit`, else draws so many."""
    if cells.d_vocab**cells.k <= limit:
        return np.where(chance > 0, cells.sizes, 0.0)
    return systematic_draws(chance, limit)[0].astype(np.float64)


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
