"""Points to packs: what is left to do, what can train together, and what that will cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_sweep.errors import UserError
from sae_sweep.schema import Evaluation, Point, Toy, toy_id
from sae_sweep.sweep.grid import Sweep

# A stack's launches are shared by its SAEs; beyond this many there is little left to share and more to lose.
LARGEST_PACK = 64
# Numbers held for every parameter: itself, its gradient and Adam's two moments.
PER_PARAMETER = 4
# Tensors of batch × width alive at once in the dense step: pre-activations, activations, their gradients, scratch.
PER_ACTIVATION = 4
# Products of batch × width × d in a dense step: encode, decode, and two gradients of each; the first needs one.
PRODUCTS_PER_STEP = 5


@dataclass(frozen=True)
class Speed:
    """What a kind of device does: rough figures, within a factor of 2 on the machines they were taken on.

    pack_bytes bounds the memory of one pack, base_bytes is what the process holds without one; step_seconds is the
    overhead of a step of a whole stack, point_seconds that of starting, measuring and storing a point.
    """

    flops_per_second: float
    step_seconds: float
    toy_step_seconds: float
    point_seconds: float
    pack_bytes: int
    base_bytes: int


SPEEDS = {
    # 2 cores.
    "cpu": Speed(5e10, 3e-4, 1.5e-3, 0.1, 2 * 2**30, 2**29),
    # One data-centre GPU, float32.
    "cuda": Speed(2e13, 3e-4, 5e-4, 0.05, 32 * 2**30, 2**30),
}

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

    `toys`: those of the plan's points that are not trained; `stale`: points trained but not measured as asked.
    """

    plan: Plan
    toys: list[Toy]
    stale: list[Point]


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
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"no shard {index}/{count}: shards of {count} are 0/{count} to {count - 1}/{count}")
    points = sweep.points if count == 1 else [point for point in sweep.points if int(point.id, 16) % count == index]
    missing = [point for point in points if point.id not in finished]
    device = device_kind(sweep.device)
    speed = SPEEDS[device]
    packs = list(_packs(missing, speed.pack_bytes))
    toys = {point.toy for point in missing}
    seconds = sum(_toy_seconds(toy, speed) for toy in toys if toy_id(toy) not in trained_toys)
    seconds += sum(_pack_seconds(pack, sweep.evaluation, speed) for pack in packs)
    peak = max((_pack_bytes(pack) for pack in packs), default=0)
    return Plan(
        points, [p for p in points if p.id in finished], packs, seconds, peak + speed.base_bytes if packs else 0
    )


def stack_key(point: Point) -> tuple[Any, ...]:
    """Points with the same key can be one set of tensors on shared batches."""
    sae, training = point.sae, point.training
    data = (point.toy, point.site, point.distribution, point.data_seed)
    return (*data, sae.architecture, sae.width, sae.k, training.steps, training.batch_size)


def activation_size(point: Point) -> int:
    """d, the length of an activation at the point's site."""
    return point.toy.d_model if point.site.name == "pre_unembed" else point.toy.d_vocab


def pack_seconds(pack: Pack, evaluation: Evaluation, device: str) -> float:
    """What a pack takes on a kind of device, its toy trained."""
    return _pack_seconds(pack, evaluation, SPEEDS[device])


def pack_bytes(pack: Pack, device: str) -> int:
    """The device memory of a process that trains the pack."""
    return _pack_bytes(pack) + SPEEDS[device].base_bytes


def toy_seconds(toy: Toy, device: str) -> float:
    """What it takes to train a toy on a kind of device."""
    return _toy_seconds(toy, SPEEDS[device])


def device_kind(device: str) -> str:
    """cpu or cuda; for `auto`, by whether NVIDIA's driver is loaded: importing torch to ask takes two seconds."""
    if device != "auto":
        return device
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def _packs(points: Sequence[Point], bytes_per_pack: int) -> Iterator[Pack]:
    """Stacks of at most LARGEST_PACK points and `bytes_per_pack` bytes (one point at least), of near equal size."""
    stacks: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        stacks.setdefault(stack_key(point), []).append(point)
    for stack in stacks.values():
        most = max(1, min(LARGEST_PACK, bytes_per_pack // _point_bytes(stack[0])))
        size = math.ceil(len(stack) / math.ceil(len(stack) / most))
        for start in range(0, len(stack), size):
            yield tuple(stack[start : start + size])


def _point_bytes(point: Point) -> int:
    """Memory of one SAE while it trains, float32: parameters with their optimiser, activations of a batch."""
    d, width = activation_size(point), point.sae.width
    parameters = 2 * width * d + width + d
    return 4 * (PER_PARAMETER * parameters + PER_ACTIVATION * point.training.batch_size * width)


def _pack_bytes(pack: Pack) -> int:
    return len(pack) * _point_bytes(pack[0])


def _pack_seconds(pack: Pack, evaluation: Evaluation, speed: Speed) -> float:
    point = pack[0]
    toy, training = point.toy, point.training
    per_input = 2 * point.sae.width * activation_size(point)
    training_flops = training.steps * training.batch_size * per_input * PRODUCTS_PER_STEP
    # Encode and decode, for the trained SAE and for the untrained one beside it.
    measuring_flops = 4 * _inputs(toy, evaluation) * per_input
    each = (training_flops + measuring_flops) / speed.flops_per_second + speed.point_seconds
    return training.steps * speed.step_seconds + len(pack) * each


def _inputs(toy: Toy, evaluation: Evaluation) -> int:
    """How many inputs a measurement reads: all, where they are few enough."""
    few = toy.k * math.log(toy.d_vocab) <= math.log(evaluation.inputs) + 1
    return min(toy.d_vocab**toy.k, evaluation.inputs) if few else evaluation.inputs


def _toy_seconds(toy: Toy, speed: Speed) -> float:
    products = toy.k * toy.d_model * (4 * toy.d_head + 2 * toy.k) + toy.d_model * toy.d_vocab
    # A forward and a backward pass, which costs two.
    flops = 3 * 2 * toy.batch_size * products
    return toy.steps * (speed.toy_step_seconds + flops / speed.flops_per_second)
