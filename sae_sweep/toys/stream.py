"""Activations of a toy under a declared distribution: endless batches to train on, weighted inputs to measure on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.errors import UserError
from sae_sweep.schema import Distribution, Evaluation
from sae_sweep.toys.cells import Cells
from sae_sweep.toys.max_of_k import MaxOfK, product, spelled
from sae_sweep.toys.sampler import Sampler, cell_weights

# Inputs drawn with one seeding of the generator: a block of whole steps.
BLOCK_ROWS = 1 << 15
# Up to so many inputs a toy has, the activations of all are kept and batches are looked up.
TABLE_INPUTS = 1 << 18
# Up to so many, centring and scale are exact; beyond, so many are drawn for them.
CONSTANTS_INPUTS = 1 << 20
# Inputs per chunk of an evaluation.
CHUNK_ROWS = 1 << 14


def mix(*parts: int | str) -> int:
    """A generator seed from several numbers and words: neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Stream:
    """Batches of x = (activation - mean) · scale with mean 0 and E‖x‖² = d under the distribution.

    Batch t is a function of toy, site, distribution, data_seed, batch_size and t alone, so a restart needs no state.
    Bits are the same for any number of threads; another kind of device draws other inputs.
    """

    def __init__(
        self,
        model: MaxOfK,
        site: str,
        distribution: Distribution,
        data_seed: int,
        batch_size: int,
        device: str | torch.device,
    ) -> None:
        """Raises UserError if the weights cannot be read, or the activations do not vary or are not finite."""
        self.model, self.site, self.data_seed, self.batch_size = model.to(device), site, data_seed, batch_size
        toy = model.toy
        cells = Cells(toy.d_vocab, toy.k)
        chance = cell_weights(cells, distribution)
        self._sampler = Sampler(cells, None if distribution.name == "uniform" else chance, device)
        mean, covariance = _moments(self.model, site, cells, chance)
        power = float(covariance.trace())
        # Rounding leaves a little of a variance that is zero.
        if not power > 1e-9 * float(mean @ mean):
            wrong = "are not finite" if math.isnan(power) else "do not vary"
            raise UserError(f"the toy's activations at {site} {wrong} under distribution {distribution.name}")
        self.mean = mean.float()
        self.scale = math.sqrt(len(mean) / power)
        self._covariance = covariance * self.scale**2
        self._block_steps = max(1, BLOCK_ROWS // batch_size)
        self._latest: tuple[int, Tensor] | None = None
        self._table = self._tabulate() if toy.d_vocab**toy.k <= TABLE_INPUTS else None

    def batches(self, start_step: int, count: int) -> Tensor:
        """Batches of steps start_step, start_step + 1, …: [count, batch_size, d] float32, not to be written to."""
        end, steps = start_step + count, self._block_steps
        parts = []
        for block in range(start_step // steps, -(-end // steps)):
            first = block * steps
            parts.append(self._block(block)[max(start_step - first, 0) : end - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def exemplars(self, count: int, seed: int) -> Tensor:
        """`count` inputs' activations [count, d] float32 from the same distribution, independent of the batches."""
        return self._normalised(self._sampler.draw(count, self._generator("exemplars", self.data_seed, seed)))

    def covariance(self) -> Tensor:
        """Covariance [d, d] float64 of x under the distribution; its trace is d."""
        return self._covariance

    def _block(self, block: int) -> Tensor:
        """All batches of a block of steps [steps, batch_size, d]; the latest is kept for calls of few steps."""
        if self._latest is None or self._latest[0] != block:
            generator = self._generator("batches", self.data_seed, block)
            sequences = self._sampler.draw(self._block_steps * self.batch_size, generator)
            self._latest = block, self._normalised(sequences).unflatten(0, (self._block_steps, self.batch_size))
        return self._latest[1]

    def _generator(self, *parts: int | str) -> torch.Generator:
        return torch.Generator(self.model.device).manual_seed(mix(*parts))

    def _normalised(self, sequences: Tensor) -> Tensor:
        if self._table is None:
            return _normalise(self.model.activations(sequences, self.site), self.mean, self.scale)
        code = sequences[:, 0]
        for token in sequences.unbind(1)[1:]:
            code = code * self.model.toy.d_vocab + token
        return self._table.index_select(0, code)

    def _tabulate(self) -> Tensor:
        """x of every input [d_vocab^k, d], at the number that its tokens spell in base d_vocab."""
        toy = self.model.toy
        codes = torch.arange(toy.d_vocab**toy.k, device=self.model.device)
        raw = self.model.activations(spelled(codes, toy.d_vocab, toy.k), self.site)
        return _normalise(raw, self.mean, self.scale)


@dataclass(frozen=True)
class Chunk:
    """Some of the inputs of an evaluation, on the model's device.

    x [b, d] float32, normalised; cell [b] int64; weight [b] float64, 1 in sum over all chunks; sequences [b, k] int64.
    """

    x: Tensor
    cell: Tensor
    weight: Tensor
    sequences: Tensor


class EvaluationInputs:
    """The inputs that an SAE is measured on, in the order of their cells: the same at every pass and for every SAE.

    All inputs of the distribution where there are at most `evaluation.inputs`, else so many by systematic sampling
    over the cells, half as declared and half with every cell equally likely, so that light cells are seen. Weights
    undo the proposal; they are scaled to sum to 1, which leaves a bias far below the sampling error.

    exact: whether enumerated; count: inputs in all; cells; chance [T]: probability of each cell.
    """

    def __init__(
        self,
        model: MaxOfK,
        site: str,
        distribution: Distribution,
        mean: Tensor,
        scale: float,
        evaluation: Evaluation,
    ) -> None:
        """`mean` [d] and `scale`: a stream's constants."""
        self.model, self.site, self.mean, self.scale = model, site, mean, scale
        self.cells = Cells(model.toy.d_vocab, model.toy.k)
        self.chance = cell_weights(self.cells, distribution)
        self.exact = model.toy.d_vocab**model.toy.k <= evaluation.inputs
        self.count = int(self.cells.sizes[self.chance > 0].sum()) if self.exact else evaluation.inputs
        self._limit = evaluation.inputs

    def __iter__(self) -> Iterator[Chunk]:
        for sequences, cell, weight in weighted_inputs(self.cells, self.chance, self._limit, self.model.device):
            x = _normalise(self.model.activations(sequences, self.site), self.mean, self.scale)
            yield Chunk(x, cell, weight, sequences)


def weighted_inputs(
    cells: Cells, chance: NDArray[np.float64], limit: int, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of sequences [b, k] int64, cells [b] int64 and weights [b] float64 that stand for the distribution.

    Every input of positive chance if d_vocab^k is at most `limit`, else `limit` draws; by cell; weights sum to 1.
    """
    if cells.d_vocab**cells.k > limit:
        yield from _drawn(cells, chance, limit, device)
        return
    of_input = chance / cells.sizes
    for sequences in _rechunked(_inputs_of_max(cells, m, chance > 0) for m in range(cells.d_vocab)):
        cell = cells.index(sequences)
        on_device = torch.from_numpy(cell).to(device)
        yield torch.from_numpy(sequences).to(device), on_device, torch.from_numpy(of_input[cell]).to(device)


def _drawn(
    cells: Cells, chance: NDArray[np.float64], count: int, device: str | torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`count` draws by systematic sampling: draw i takes the cell at (i + ½)/count of the cumulative proposal."""
    possible = chance > 0
    proposal = chance / (2 * chance.sum()) + possible / (2 * possible.sum())
    cumulative = np.cumsum(proposal)
    # Draws up to each cell's end, so that all draws need not be held to know how many each cell gets.
    ends = np.ceil(count * (cumulative / cumulative[-1]) - 0.5).astype(np.int64)
    weight = np.divide(chance, proposal, out=np.zeros_like(chance), where=possible)
    weight /= weight @ np.diff(ends, prepend=0)
    sampler = Sampler(cells, chance, device)
    for number, start in enumerate(range(0, count, CHUNK_ROWS)):
        cell = np.searchsorted(ends, np.arange(start, min(start + CHUNK_ROWS, count)), side="right")
        on_device = torch.from_numpy(cell).to(device)
        generator = torch.Generator(device).manual_seed(mix("evaluation", count, number))
        yield sampler.draw_within(on_device, generator), on_device, torch.from_numpy(weight[cell]).to(device)


def _inputs_of_max(cells: Cells, m: int, possible: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The sequences [., k] with maximum `m`, (m+1)^k - m^k in all, whose cell is `possible` [T], sorted by cell."""
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
    return sequences[order[possible[cell[order]]]]


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


def _moments(model: MaxOfK, site: str, cells: Cells, chance: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of the raw activations, float64."""
    d = model.width(site)
    total = torch.zeros(d, dtype=torch.float64, device=model.device)
    products = torch.zeros(d, d, dtype=torch.float64, device=model.device)
    for sequences, _, weight in weighted_inputs(cells, chance, CONSTANTS_INPUTS, model.device):
        acts = model.activations(sequences, site).double()
        total += product(weight[None], acts)[0]
        products += product(acts.T, acts * weight[:, None])
    return total, products - torch.outer(total, total)


def _normalise(raw: Tensor, mean: Tensor, scale: float) -> Tensor:
    """In place: `raw` is a fresh tensor of activations."""
    return raw.sub_(mean).mul_(scale)
