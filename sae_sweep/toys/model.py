"""What streams and measures need of a toy, whatever its kind; and which module makes which kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.config.settings import SYNTHETIC, Distribution, Toy
from sae_sweep.toys.classes import Factored


class Population(Protocol):
    """A toy's inputs under a declared distribution. An input is a row of a tensor [..., whatever the toy reads]."""

    @property
    def cells(self) -> Factored | None:
        """The ground-truth classes of inputs; None where features come and go independently of each other."""

    @property
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T], empty without cells."""

    @property
    def total(self) -> int | None:
        """How many inputs there are; None where there is no end of them."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, ...], on the generator's device."""

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each input [count] int64; 0 where there are none."""

    def weighted(self, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Chunks of inputs [b, ...], their cells [b] int64 and weights [b] float64, 1 in sum over all chunks.

        Every input of positive chance where there are at most `limit`, else `limit` draws: the same at every pass.
        """

    def count(self, limit: int) -> int:
        """How many inputs `weighted` gives."""

    def inputs_of_cells(self, limit: int) -> NDArray[np.float64]:
        """How many of these are of each cell [T], or may be expected to be where that is a matter of chance."""


class Planted(Protocol):
    """Features known because they were planted."""

    @property
    def directions(self) -> Tensor:
        """Each feature's direction in raw activations [features, d]."""

    def features(self, inputs: Tensor) -> Tensor:
        """How active each feature is in each input [batch, features], 0 where it is not."""


class Model(Protocol):
    """A trained or planted toy."""

    @property
    def toy(self) -> Toy:
        """Its settings."""

    @property
    def device(self) -> torch.device:
        """Where activations live."""

    def to(self, device: str | torch.device) -> Self:
        """The same toy on `device`."""

    def width(self, site: str) -> int:
        """d: numbers per activation at `site`."""

    def population(self, distribution: Distribution, device: str | torch.device) -> Population:
        """The toy's inputs under a distribution. UserError if its file of weights cannot be read."""

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32 of inputs at `site`: a fresh contiguous tensor."""

    def logits(self, acts: Tensor, site: str) -> Tensor | None:
        """The toy's own output from (possibly reconstructed) activations; None for one that computes nothing."""

    def truth(self, inputs: Tensor) -> Tensor | None:
        """What the toy is to predict: a token [batch] int64 or a distribution [batch, d_vocab]; None if nothing."""

    @property
    def planted(self) -> Planted | None:
        """The features that were planted, if any were."""


def kind(toy: Toy) -> ModuleType:
    """The module that trains and loads toys of this kind."""
    from sae_sweep.toys import bigrams, max_of_k, synthetic

    return synthetic if toy.name in SYNTHETIC else {"bigrams": bigrams, "max_of_k": max_of_k}[toy.name]


def stack_key(toy: Toy) -> Any:
    """Toys with the same key train as one stack."""
    return toy.name, kind(toy).stack_key(toy)


def train(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """Train toys of one stack key; the parameters of each, on the CPU."""
    trained: list[dict[str, Tensor]] = kind(toys[0]).train(toys, device, report)
    return trained


def load(toy: Toy, params: dict[str, Tensor]) -> Model:
    """The toy whose parameters `train` returned."""
    model: Model = kind(toy).load(toy, params)
    return model
