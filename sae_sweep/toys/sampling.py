"""Activations of a toy under a declared distribution: endless batches to train on, weighted inputs to measure on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_sweep.config.settings import Distribution, Evaluation, derive_seed
from sae_sweep.errors import UserError
from sae_sweep.toys.aligned import product
from sae_sweep.toys.limits import BLOCK_ROWS, CONSTANTS_INPUTS, TABLE_INPUTS
from sae_sweep.toys.model import Model, Population
from sae_sweep.toys.sequences import Sequences


class Stream:
    """Batches of x = (activation - mean) · scale with mean 0 and E‖x‖² = d under the distribution.

    Batch t is a function of toy, site, distribution, data_seed, batch_size and t alone, so a restart needs no state.
    Bits are the same for any number of threads; another kind of device draws other inputs.
    """

    def __init__(
        self,
        model: Model,
        site: str,
        distribution: Distribution,
        data_seed: int,
        batch_size: int,
        device: str | torch.device,
    ) -> None:
        """Raises UserError if the weights cannot be read, or the activations do not vary or are not finite."""
        self.model, self.site, self.data_seed, self.batch_size = model.to(device), site, data_seed, batch_size
        self._population = self.model.population(distribution, device)
        mean, covariance = _moments(self.model, site, self._population)
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
        self._table = self._tabulate()

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
        return self._normalised(self._population.draw(count, self._generator("exemplars", self.data_seed, seed)))

    def covariance(self) -> Tensor:
        """Covariance [d, d] float64 of x under the distribution; its trace is d."""
        return self._covariance

    def _block(self, block: int) -> Tensor:
        """All batches of a block of steps [steps, batch_size, d]; the latest is kept for calls of few steps."""
        if self._latest is None or self._latest[0] != block:
            generator = self._generator("batches", self.data_seed, block)
            inputs = self._population.draw(self._block_steps * self.batch_size, generator)
            self._latest = block, self._normalised(inputs).unflatten(0, (self._block_steps, self.batch_size))
        return self._latest[1]

    def _generator(self, *parts: int | str) -> torch.Generator:
        return torch.Generator(self.model.device).manual_seed(derive_seed(*parts))

    def _normalised(self, inputs: Tensor) -> Tensor:
        if self._table is not None:
            numbered, x = self._table
            return x.index_select(0, numbered(inputs))
        return _normalise(self.model.activations(inputs, self.site), self.mean, self.scale)

    def _tabulate(self) -> tuple[Callable[[Tensor], Tensor], Tensor] | None:
        """Each input's number, and x of every input in their order [total, d]; None where there are too many."""
        population = self._population
        if not isinstance(population, Sequences) or population.total > TABLE_INPUTS:
            return None
        raw = self.model.activations(population.listed(), self.site)
        return population.number, _normalise(raw, self.mean, self.scale)


@dataclass(frozen=True)
class Chunk:
    """Some of the inputs of an evaluation, on the model's device.

    x [b, d] float32, normalised; cell [b] int64 (0 for a toy without cells); weight [b] float64, 1 in sum over all
    chunks; inputs [b, ...], as the toy reads them.
    """

    x: Tensor
    cell: Tensor
    weight: Tensor
    inputs: Tensor


class EvaluationInputs:
    """The inputs that an SAE is measured on: the same at every pass and for every SAE.

    All inputs of the distribution where there are at most `evaluation.inputs`, else a sample of so many (see the toy's
    `Population`).

    exact: whether enumerated; count: inputs in all; cells, chance: of the toy's `Population`; cell_inputs: how many of
    the inputs each cell has (expected, where the toy draws them one by one).
    """

    def __init__(
        self,
        model: Model,
        site: str,
        distribution: Distribution,
        mean: Tensor,
        scale: float,
        evaluation: Evaluation,
        trained_on: bool = False,
    ) -> None:
        """`mean` [d] and `scale`: a stream's constants. `trained_on`: the inputs that SAEs train on, in place of those
        that the toy holds out from them."""
        self.model, self.site, self.mean, self.scale = model, site, mean, scale
        # Only toys that hold some inputs out have two populations.
        population = model.population if trained_on else getattr(model, "measured_population", model.population)
        self._population: Population = population(distribution, model.device)
        self.cells, self.chance = self._population.cells, self._population.chance
        self._limit = evaluation.inputs
        self.exact = self._population.total is not None and self._population.total <= evaluation.inputs
        self.count = self._population.count(evaluation.inputs)
        self.cell_inputs = self._population.inputs_of_cells(evaluation.inputs)

    def __iter__(self) -> Iterator[Chunk]:
        for inputs, cell, weight in self._population.weighted(self._limit):
            x = _normalise(self.model.activations(inputs, self.site), self.mean, self.scale)
            yield Chunk(x, cell, weight, inputs)

    def labelled(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` independent inputs x [count, d] float32 and what is true of them [count, concepts] bool.

        Concepts are the maxima of the toy's cells, or its planted features where there are no cells.
        """
        drawn = self._population.draw(
            count, torch.Generator(self.mean.device).manual_seed(derive_seed("labelled", count))
        )
        x = _normalise(self.model.activations(drawn, self.site), self.mean, self.scale)
        if self.cells is None:
            assert self.model.planted is not None
            return x, self.model.planted.features(drawn) != 0
        maxima = torch.from_numpy(self.cells.factors["m"]).long().to(x.device)[self._population.cell(drawn)]
        return x, maxima[:, None] == torch.arange(self.cells.d_vocab, device=x.device)


def feature_means(inputs: EvaluationInputs) -> tuple[Tensor, Tensor]:
    """Mean x [features, d] where each planted feature is active, and how often it is [features]; float64, CPU."""
    planted, d = inputs.model.planted, len(inputs.mean)
    assert planted is not None
    sums = torch.zeros(len(planted.directions), d, dtype=torch.float64, device=inputs.mean.device)
    mass = torch.zeros(len(sums), dtype=torch.float64, device=inputs.mean.device)
    with one_thread():
        for chunk in inputs:
            weight = (planted.features(chunk.inputs) != 0).double() * chunk.weight[:, None]
            sums += product(weight.T, chunk.x.double())
            mass += weight.sum(0)
    return (sums / mass.clamp_min(1e-300)[:, None]).cpu(), mass.cpu()


def _moments(model: Model, site: str, population: Population) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of the raw activations, float64."""
    d = model.width(site)
    total = torch.zeros(d, dtype=torch.float64, device=model.device)
    products = torch.zeros(d, d, dtype=torch.float64, device=model.device)
    with one_thread():
        for inputs, _, weight in population.weighted(CONSTANTS_INPUTS):
            acts = model.activations(inputs, site).double()
            total += product(weight[None], acts)[0]
            products += product(acts.T, acts * weight[:, None])
    return total, products - torch.outer(total, total)


def _normalise(raw: Tensor, mean: Tensor, scale: float) -> Tensor:
    """In place: `raw` is a fresh tensor of activations."""
    return raw.sub_(mean).mul_(scale)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread: some libraries cut a long sum at their threads, and round differently for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
