"""What a kind of toy says of itself, and what streams and metrics need of a toy, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from sae_sweep.registry import Kind, Setting
from sae_sweep.toys.limits import LEAST_ACCURACY

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_sweep.config.settings import Distribution, Toy
    from sae_sweep.toys.classes import Factored

Report = Callable[[int, float], None]
# Of a toy that answers: it changes no number, only what is said of verdicts.
ANSWERS = {
    "least_accuracy": Setting(
        LEAST_ACCURACY,
        "a toy that answers a smaller share of its inputs right has a warning beside each verdict",
        ge=0,
        le=1,
        told=False,
    )
}


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

    @property
    def origin(self) -> Tensor:
        """The raw activation where no feature is active [d]."""

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


def _made_first(toy: Toy, distribution: Distribution) -> None:
    return None


def _alike(toy: Toy) -> Any:
    return None


def _itself(toy: Toy) -> Toy:
    return toy


def _as_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class ToyKind(Kind):
    """A kind of toy: how toys of it are made, and what can be said of them before they are.

    train(toys, device, report) -> the parameters of each, on the CPU: of toys that are equal in `stack_key`
    load(toy, params) -> the toy; ValueError if they are not its parameters
    maxima(toy): how many values the factor m has; size(toy): what tells toys of the kind apart in their title, beside
    classes(partition, toy): how many classes a partition has; UserError if there is no such partition, or no classes
    cells(toy, distribution): the finest classes of inputs and the probability of each, where they are known before the
    toy is made
    sites: where activations are read, if there is a choice; d(toy, site): numbers of an activation there
    distributions: whether `distribution` says how inputs are drawn, or the toy's own settings do
    inputs(toy): how many inputs there are, infinity if there is no end of them
    planted: whether features are planted, and nothing is trained
    independent: whether features come and go by themselves, so that inputs have no classes
    factors_depend: whether the factors of a cell depend on each other
    trains(toy): steps of training and multiplications in each, for the planner; (0, 0) where nothing is trained
    model_cost: what an input's activations take, in those of max-of-K
    resolve(settings) -> settings that follow from those given, such as sizes in a file; UserError if it cannot be read
    parts(toy): of a preset of `planted`, the planted toy that it is
    """

    family = "toy"
    train: Callable[[Sequence[Toy], str | torch.device, Report | None], list[dict[str, Tensor]]]
    load: Callable[[Toy, dict[str, Tensor]], Model]
    maxima: Callable[[Toy], int]
    size: Callable[[Toy], tuple[int, ...]]
    classes: Callable[[str, Toy], int]
    d: Callable[[Toy, str], int]
    inputs: Callable[[Toy], float]
    trains: Callable[[Toy], tuple[int, int]]
    cells: Callable[[Toy, Distribution], tuple[Factored, NDArray[np.float64]] | None] = _made_first
    sites: tuple[str, ...] = ()
    distributions: bool = False
    planted: bool = False
    independent: bool = False
    factors_depend: bool = False
    model_cost: float = 1.0
    stack_key: Callable[[Toy], Any] = _alike
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]] = _as_given
    parts: Callable[[Toy], Toy] = _itself


@dataclass(frozen=True, kw_only=True)
class SiteKind(Kind):
    """A place where activations are read."""

    family = "site"


def stack_key(toy: Toy) -> Any:
    """Toys with the same key train as one stack."""
    return toy.name, toy.kind.stack_key(toy)


def train(toys: Sequence[Toy], device: str | torch.device, report: Report | None = None) -> list[dict[str, Tensor]]:
    """Train toys of one stack key; the parameters of each, on the CPU."""
    trained: list[dict[str, Tensor]] = toys[0].kind.train(toys, device, report)
    return trained


def load(toy: Toy, params: dict[str, Tensor]) -> Model:
    """The toy whose parameters `train` returned."""
    model: Model = toy.kind.load(toy, params)
    return model
