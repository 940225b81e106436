"""Points to packs: what is left to do, what can train together, and what that will cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_sweep import registry
from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import Encoder, Penalty, Point, Sae, Toy, Training, toy_id
from sae_sweep.errors import UserError
from sae_sweep.kernels import gpu_knows
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes import of_step
from sae_sweep.sweep.cost import cores, pack_seconds, peak_bytes, state_bytes, toy_seconds, training_bytes
from sae_sweep.sweep.hardware_profile import SPEEDS

# A stack's launches are shared by its SAEs; beyond this many there is little left to share and more to lose.
LARGEST_PACK = 64

Pack = tuple[Point, ...]


@dataclass(frozen=True)
class Plan:
    """What a shard of a sweep has to do. `points` = `finished` + those in `packs`; bytes are of the device's memory."""

    points: list[Point]
    finished: list[Point]
    packs: list[Pack]
    seconds: float
    peak_memory_bytes: int

    def to_json(self, sweep: Sweep) -> dict[str, Any]:
        """The report of `sae-sweep plan --json`."""
        return {
            "schema": 1,
            "sweep": sweep.name,
            "points": len(self.points),
            "finished": len(self.finished),
            "packs": len(self.packs),
            "estimate": {"seconds": round(self.seconds, 1), "peak_memory_bytes": self.peak_memory_bytes},
        }


@dataclass(frozen=True)
class Work:
    """A plan with what the store already knows.

    `toys`: those of the plan's points that are not trained; `stale`: points trained but not measured as asked;
    `records`: of the finished points by id, as they were read and proved, where there is nothing left to do: work takes
    time, after which they are read again.
    """

    plan: Plan
    toys: list[Toy]
    stale: list[Point]
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.plan.packs or self.toys or self.stale)


def plan(
    sweep: Sweep,
    finished: Collection[str],
    shard: tuple[int, int] = (0, 1),
    trained_toys: Collection[str] = frozenset(),
) -> Plan:
    """What is left of shard (i, n) of `sweep`, in packs in grid order.

    finished: ids of the points that the store holds
    shard: i from 0; the points whose id ≡ i mod n over the full grid, whatever is finished
    trained_toys: ids of the toys that need no training

    UserError: no such shard.
    """
    points = of_shard(sweep, shard)
    missing = [point for point in points if point.id not in finished]
    device = device_kind(sweep.device)
    speed = SPEEDS[device]
    workers = cores(device)
    packs = list(_packs(missing, device, workers))
    toys = {point.toy for point in missing}
    seconds = sum(toy_seconds(toy, speed) for toy in toys if toy_id(toy) not in trained_toys)
    seconds += sum(pack_seconds(pack, sweep.evaluation, speed, workers) for pack in packs)
    seconds += speed.process if packs else 0
    # Logging goes on beside the work, and takes its share of the processor.
    seconds += len(missing) * speed.logged / cores("cpu") if sweep.logger["name"] != "none" else 0
    peak = peak_bytes(packs, device, workers)
    return Plan(points, [p for p in points if p.id in finished], packs, seconds, peak)


def of_shard(sweep: Sweep, shard: tuple[int, int]) -> list[Point]:
    """The points of shard (i, n), finished or not. UserError: no such shard."""
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"no shard {index}/{count}: shards of {count} are 0/{count} to {count - 1}/{count}")
    return sweep.points if count == 1 else [point for point in sweep.points if int(point.id, 16) % count == index]


def stack_key(point: Point) -> tuple[Any, ...]:
    """Points with the same key can be one set of tensors on shared batches."""
    data = (point.toy, point.site, point.distribution, point.data_seed)
    return (*data, *_step_key(point.encoder, point.sae, point.penalty, point.training))


# Kept: a grid of 100,000 points has few combinations of these.
@registry.derived
def _step_key(encoder: Encoder, sae: Sae, penalty: Penalty, training: Training) -> tuple[Any, ...]:
    """What the step itself has in common."""
    # Inits do not matter to a step; the settings of an architecture, which all SAEs of a stack share, do.
    kind = registry.get("architecture", sae.architecture)
    own = tuple(sae.get(name) for name in kind.settings)
    formula = formula_of(penalty)
    further = "" if gpu_knows(formula) else formula.whole
    falling = () if training.k_start is None else (training.k_start, training.k_anneal)
    recipe = of_step(Point(encoder=encoder, training=training))
    return (sae.architecture, sae.width, own, training.steps, training.batch_size, further, *falling, *recipe)


def stacks(points: Iterable[Point]) -> list[Pack]:
    """Points that could train together, together, in the order of their first."""
    found: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        found.setdefault(stack_key(point), []).append(point)
    return [tuple(each) for each in found.values()]


def device_kind(device: str) -> str:
    """cpu or cuda; for `auto`, by whether NVIDIA's driver is loaded: importing torch to ask takes two seconds."""
    if device != "auto":
        return device
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _packs(points: Sequence[Point], kind: str, workers: int) -> Iterator[Pack]:
    """Stacks of at most LARGEST_PACK points and `pack_bytes` bytes (one point at least), of near equal size."""
    speed = SPEEDS[kind]
    for stack in stacks(points):
        room = speed.pack_bytes - training_bytes(stack[0], workers, speed)
        most = max(1, min(LARGEST_PACK, room // state_bytes(stack[0], kind)))
        size = math.ceil(len(stack) / math.ceil(len(stack) / most))
        for start in range(0, len(stack), size):
            yield stack[start : start + size]
