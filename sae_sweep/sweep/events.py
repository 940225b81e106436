"""What a pack says while it runs: read by the live view, the log lines and W&B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_sweep.config.settings import Distribution, Point, Toy
from sae_sweep.toys.limits import LEAST_ACCURACY


@dataclass(frozen=True)
class ToyProgress:
    """A toy model is being trained: `loss` is the cross-entropy in nats."""

    toy: Toy
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class ToyAccuracy:
    """What share of its inputs a toy answers right, by their weights under a distribution."""

    toy: Toy
    distribution: Distribution
    accuracy: float

    @property
    def text(self) -> str:
        """It in a line, as a warning where the toy has not learnt enough."""
        found = f"toy {self.toy.title}, seed {self.toy.seed}, answers {100 * self.accuracy:.4g}% of its inputs right"
        found += f" as distribution={self.distribution.name} draws them" if self.toy.kind.distributions else ""
        return f"warning: {found}, less than toy.least_accuracy={self.least:g}" if self.is_low else found

    @property
    def least(self) -> float:
        """What it should be at the least."""
        return float(self.toy.get("least_accuracy", LEAST_ACCURACY))

    @property
    def is_low(self) -> bool:
        """Whether the toy has not learnt enough."""
        return self.accuracy < self.least


@dataclass(frozen=True)
class TrainProgress:
    """A stack of `points` SAEs is being trained; `fvu` and `l0` are medians over the stack on recent batches."""

    pack: int
    packs: int
    points: int
    step: int
    steps: int
    fvu: float
    l0: float


@dataclass(frozen=True)
class PointDone:
    """The point is trained, measured and in the store."""

    point: Point
    record: dict[str, Any]


@dataclass(frozen=True)
class PointFailed:
    """The point could not be trained; its pack-mates go on. `step` is None if training never started."""

    point: Point
    step: int | None
    reason: str


@dataclass(frozen=True)
class Note:
    """One line that the user should see, such as a damaged file that is being recomputed."""

    text: str


@dataclass(frozen=True)
class Logging:
    """All is trained; of the runs of this sweep to be logged to W&B so many are."""

    done: int
    total: int


Event = ToyProgress | ToyAccuracy | TrainProgress | PointDone | PointFailed | Note | Logging
# What listens.
Say = Callable[[Event], None]
