"""What a pack says while it runs: read by the live view, the log lines and W&B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sae_sweep.config.settings import Point, Toy


@dataclass(frozen=True)
class ToyProgress:
    """A toy model is being trained: `loss` is the cross-entropy in nats."""

    toy: Toy
    step: int
    steps: int
    loss: float


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


Event = ToyProgress | TrainProgress | PointDone | PointFailed | Note | Logging
# What listens.
Say = Callable[[Event], None]
