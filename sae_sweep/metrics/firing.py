"""The firing table: on which cells each latent fires, and which latent is on top, from one pass over the inputs.

Two sparse tables with evaluation weights; every measure of splitting and information is a function of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.metrics.limits import ROWS_HELD
from sae_sweep.metrics.partitions import Ints, partition
from sae_sweep.metrics.segment_sums import sum_by
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.toys.classes import Factored

# "No latent fires" in the table of top latents.
NO_LATENT = -1

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FiringTable:
    """Where latents fire (a‖d‖ above the cut), in evaluation weights.

    Rows (latent, cell), each pair at most once and sorted: `weight` of the inputs of the cell on which the latent
    fires, `mass` = Σ weight · a‖d‖ over them, `count` of them. Rows (top_cell, top_latent), likewise: `top_weight` and
    `top_count` of the inputs of the cell on which that latent has the largest a‖d‖, or NO_LATENT where none fires.
    Every input is in exactly one row of the second table, so that its sums over latents are the cells' own totals.
    """

    width: int
    cells: int
    latent: Ints
    cell: Ints
    weight: Floats
    mass: Floats
    count: Ints
    top_cell: Ints
    top_latent: Ints
    top_weight: Floats
    top_count: Ints
    # Σ weight · ordered pairs of latents that fire on one input; nan where nobody counted.
    together: float = np.nan
    # Latents that fire on more weight have rows that are merged: see `Fold`.
    fold_above: float = np.inf

    @cached_property
    def cell_weight(self) -> Floats:
        """Evaluation weight of every cell [cells]."""
        return np.bincount(self.top_cell, self.top_weight, self.cells).astype(np.float64, copy=False)

    @cached_property
    def top_starts(self) -> Ints:
        """Where in the second table the rows of every cell begin, and the last one's end [cells + 1]."""
        return np.searchsorted(self.top_cell, np.arange(self.cells + 1))

    @cached_property
    def total(self) -> float:
        """Evaluation weight of all inputs."""
        return float(self.cell_weight.sum())

    @cached_property
    def fired(self) -> Floats:
        """Evaluation weight of the inputs on which each latent fires [width]."""
        return np.bincount(self.latent, self.weight, self.width).astype(np.float64, copy=False)

    @property
    def folded(self) -> NDArray[np.bool_]:
        """Which latents [width] have merged rows, of which only maximum and copies are known."""
        return self.fired > self.fold_above

    @cached_property
    def starts(self) -> Ints:
        """Where in the first table the rows of every latent begin, and the last one's end [width + 1]."""
        return np.searchsorted(self.latent, np.arange(self.width + 1))

    @cached_property
    def mean_mass(self) -> Floats:
        """Mean a‖d‖ of each latent where it fires [width], 0 if it never does."""
        mass = np.bincount(self.latent, self.mass, self.width)
        return mass / np.maximum(self.fired, np.finfo(np.float64).tiny)

    @cached_property
    def inputs(self) -> Ints:
        """How many evaluation inputs each latent fires on [width], whatever their weight."""
        return np.bincount(self.latent, self.count, self.width).astype(np.int64)


@dataclass(frozen=True)
class Fold:
    """How rows of dense latents are merged, to bound the table's size.

    A latent that fires on more weight than `above` has its cells replaced by `onto[cell]` [cells].
    """

    above: float
    onto: Ints


def fold_dense(cells: Factored, chance: Floats, f1: float) -> Fold:
    """Merge the cells of each (m, c) for latents too dense for any label that needs more detail.

    F1 = 2·TP/(fired + class) ≤ 2·class/(fired + class), so a latent that fires on more than (2/f1 - 1) times the
    heaviest class of m, of q and of n reaches `f1` with no predicate that names one of them: c alone is left.
    Owner, purity and the F1 of m, c and mc are the same on merged rows. `chance` [T]: probability of every cell.
    The factor 2 leaves room for drawn inputs, whose class weights are near their probabilities but not equal.
    """
    heaviest = max(float(np.bincount(partition(cells, name).of_cell, chance).max()) for name in "mqn")
    classes = partition(cells, "mc")
    return Fold(2 * (2 / f1 - 1) * heaviest, classes.first[classes.of_cell])


class FiringCounter:
    """Builds a firing table from batches of inputs: `add` them in any order, then read `table`.

    Sums are float64 in a fixed order: the same batches give the same bits. Memory: 32 bytes a distinct pair of latent
    and cell (with `fold`, few pairs of a dense latent), three times that while merging, and one batch.
    """

    def __init__(self, width: int, cells: int, fires_above: float, fold: Fold | None = None) -> None:
        """`width` latents, `cells` cells; a latent fires where a‖d‖ > `fires_above`."""
        self.width, self.cells, self.fires_above, self.fold = width, cells, fires_above, fold
        self._fired = np.zeros(width)
        self._together = 0.0
        self._pairs, self._tops = _Rows(floats=2), _Rows(floats=1)

    def add(self, norms: Tensor, cell: NDArray[Any], weight: Floats) -> None:
        """Count a batch: a‖d‖ `norms` [b, width] on any device, and each input's `cell` [b] and `weight` [b].

        Inputs of weight 0 are not in the distribution and are left out.
        """
        order = np.argsort(cell, kind="stable")
        order = order[weight[order] > 0]
        self.count(Active.of(norms[torch.from_numpy(order).to(norms.device)]), cell[order], weight[order])

    def count(self, norms: Active, cell: NDArray[Any], weight: Floats) -> None:
        """The same of listed a‖d‖, for inputs in the order of their cells and of weight above 0."""
        if not len(norms):
            return
        cell, weight = np.asarray(cell, np.int64), np.asarray(weight, np.float64)
        lists = (part.cpu().numpy() for part in (norms.starts, norms.latents, norms.codes))
        pairs, tops, together = _count(*lists, np.float32(self.fires_above), cell, weight, self.cells, self._fired)
        self._together += together
        self._pairs.add(*pairs)
        self._tops.add(*tops)
        if self._pairs.overdue:
            self._pairs.merge(self._folded)
        if self._tops.overdue:
            self._tops.merge()

    def _folded(self, keys: Ints) -> Ints:
        if self.fold is None:
            return keys
        rows = np.flatnonzero((self._fired > self.fold.above)[keys // self.cells])
        cell = keys[rows] % self.cells
        keys[rows] += self.fold.onto[cell] - cell
        return keys

    @property
    def table(self) -> FiringTable:
        """The table of all inputs added so far."""
        key, weight, mass, count = self._pairs.merge(self._folded)
        top_key, top_weight, top_count = self._tops.merge()
        latent, cell = np.divmod(key, self.cells)
        top_cell, top_latent = np.divmod(top_key, self.width + 1)
        top = (top_cell, top_latent + NO_LATENT, top_weight, top_count)
        return FiringTable(
            self.width,
            self.cells,
            latent,
            cell,
            weight,
            mass,
            count,
            *top,
            self._together,
            self.fold.above if self.fold else np.inf,
        )


class _Rows:
    """Rows of a key, `floats` float64 sums and a count, as pieces that are merged once they have grown."""

    def __init__(self, floats: int) -> None:
        none = np.zeros(0, np.int64)
        self._pieces: list[tuple[NDArray[Any], ...]] = [(none, *[np.zeros(0)] * floats, none)]
        self._held = self._merged = 0

    def add(self, *piece: NDArray[Any]) -> None:
        self._pieces.append(piece)
        self._held += len(piece[0])

    @property
    def overdue(self) -> bool:
        return self._held > max(ROWS_HELD, 2 * self._merged)

    def merge(self, rekey: Callable[[Ints], Ints] = lambda keys: keys) -> tuple[NDArray[Any], ...]:
        keys, *values = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        merged = sum_by(rekey(keys), *values)
        self._pieces, self._held, self._merged = [merged], len(merged[0]), len(merged[0])
        return merged


@numba.njit(cache=True, nogil=True)
def _count(starts, latents, norms, cut, cell, weight, cells, fired):  # type: ignore[no-untyped-def]
    """Rows of keys latent · cells + cell of what fires: the sums of weight and of weight · norm, and counts; rows of
    keys cell · (width + 1) + top - NO_LATENT: the sums of weight, and counts; and Σ weight · ordered pairs.

    Entries as in Active. An input is added to the latest row of its latent, or top, if that is of its cell, else to a
    new one: with `cell` sorted, keys are distinct. Weights are added to `fired` [width].
    """
    width, entries, inputs = len(fired), len(latents), len(cell)
    keys, counts = np.empty(entries, np.int64), np.empty(entries, np.int64)
    weights, masses = np.empty(entries), np.empty(entries)
    top_keys, top_counts, top_weights = np.empty(inputs, np.int64), np.empty(inputs, np.int64), np.empty(inputs)
    latest, latest_top = np.full(width, -1, np.int64), np.full(width + 1, -1, np.int64)
    pairs = tops = 0
    together = 0.0
    for row in range(inputs):
        largest, top, active = cut, NO_LATENT, 0
        for entry in range(starts[row], starts[row + 1]):
            norm, latent = norms[entry], latents[entry]
            if norm > cut:
                if norm > largest:
                    largest, top = norm, latent
                place, key = latest[latent], latent * cells + cell[row]
                if place < 0 or keys[place] != key:
                    latest[latent] = place = pairs
                    keys[place], weights[place], masses[place], counts[place] = key, 0, 0, 0
                    pairs += 1
                weights[place] += weight[row]
                masses[place] += weight[row] * norm
                counts[place] += 1
                fired[latent] += weight[row]
                active += 1
        place, key = latest_top[top - NO_LATENT], cell[row] * (width + 1) + top - NO_LATENT
        if place < 0 or top_keys[place] != key:
            latest_top[top - NO_LATENT] = place = tops
            top_keys[place], top_weights[place], top_counts[place] = key, 0, 0
            tops += 1
        top_weights[place] += weight[row]
        top_counts[place] += 1
        together += weight[row] * (active * (active - 1))
    of_pairs = keys[:pairs].copy(), weights[:pairs].copy(), masses[:pairs].copy(), counts[:pairs].copy()
    return of_pairs, (top_keys[:tops].copy(), top_weights[:tops].copy(), top_counts[:tops].copy()), together
