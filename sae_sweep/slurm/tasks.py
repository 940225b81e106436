"""Tasks: packs put together to about as much work as asked for, as files that a node can read, and as submitted."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_sweep.config.settings import Evaluation, Point, Toy, point_from, toy_id
from sae_sweep.errors import EnvironmentProblem
from sae_sweep.store.store import Store
from sae_sweep.sweep.cost import pack_seconds, peak_bytes, toy_seconds
from sae_sweep.sweep.hardware_profile import SPEEDS
from sae_sweep.sweep.plan import Pack


@dataclass(frozen=True)
class Task:
    """What one job does: packs one after the other, in the time and device memory that the planner expects."""

    packs: tuple[Pack, ...]
    seconds: float
    bytes: int

    @property
    def points(self) -> list[Point]:
        """All its points, in order."""
        return [point for pack in self.packs for point in pack]


@dataclass(frozen=True)
class Submission:
    """One call of `submit`: its tasks (ids of points, seconds) and its arrays (job id, number of jobs), in order.

    per_job: tasks that one job runs side by side.
    """

    id: str
    user: str
    created: float
    job_name: str
    tasks: list[dict[str, Any]]
    arrays: list[dict[str, Any]] = field(default_factory=list)
    per_job: int = 1

    def job_of(self, task: int) -> str | None:
        """The id of a task's job as Slurm writes it, or None if it was never accepted."""
        job, first = task // self.per_job, 0
        for array in self.arrays:
            if job < first + array["count"]:
                return str(array["job"]) if array["count"] == 1 else f"{array['job']}_{job - first}"
            first += array["count"]
        return None

    @property
    def sent(self) -> int:
        """How many of the tasks were accepted."""
        return min(len(self.tasks), self.per_job * sum(array["count"] for array in self.arrays))


def make_tasks(
    packs: Iterable[Pack],
    evaluation: Evaluation,
    kind: str,
    target_seconds: float,
    most: int,
    trained_toys: Collection[str] = frozenset(),
    workers: int = 1,
) -> list[Task]:
    """Packs in order, cut into tasks of at most `target_seconds` where a single point does not already take longer.

    A pack that takes longer is split. Where that would make more than `most` tasks, each is given more. Packs of one
    toy come together, so that at most the first and the last toy of a task are trained by its neighbours too, should
    they begin at the same time. `workers`: cores of a task, or 1 where it has a GPU.
    """
    of_toy: dict[Toy, list[Pack]] = {}
    for pack in packs:
        of_toy.setdefault(pack[0].toy, []).append(pack)
    packs = [pack for together in of_toy.values() for pack in together]
    target = target_seconds
    tasks = list(_fill(packs, evaluation, kind, target, trained_toys, workers))
    if len(tasks) > most:
        whole = sum(pack_seconds(pack, evaluation, SPEEDS[kind], workers) for pack in packs)
        target = max(target, whole / most)
    while len(tasks) > most:
        tasks = list(_fill(packs, evaluation, kind, target, trained_toys, workers))
        target *= 1.1
    return tasks


def _fill(
    packs: Sequence[Pack],
    evaluation: Evaluation,
    kind: str,
    target: float,
    trained_toys: Collection[str],
    workers: int,
) -> Iterator[Task]:
    speed = SPEEDS[kind]
    taken: list[Pack] = []
    toys: set[Toy] = set()
    seconds = 0.0
    for pack in (piece for whole in packs for piece in _split(whole, evaluation, kind, target, workers)):
        toy = pack[0].toy
        first = 0.0 if toy_id(toy) in trained_toys else toy_seconds(toy, speed)
        cost = pack_seconds(pack, evaluation, speed, workers)
        more = cost + (0.0 if toy in toys else first)
        if taken and seconds + more > target:
            yield _task(taken, seconds, kind, workers)
            taken, toys, seconds, more = [], set(), 0.0, cost + first
        taken.append(pack)
        toys.add(toy)
        seconds += more
    if taken:
        yield _task(taken, seconds, kind, workers)


def _task(packs: Sequence[Pack], seconds: float, kind: str, workers: int) -> Task:
    return Task(tuple(packs), seconds, peak_bytes(packs, kind, workers))


def _split(pack: Pack, evaluation: Evaluation, kind: str, target: float, workers: int) -> Iterator[Pack]:
    """A pack in as few pieces of near equal size as stay below the target."""
    # SAEs that train side by side take about as long as one: to part them would gain nothing.
    target = max(target, 1.1 * pack_seconds(pack[:1], evaluation, SPEEDS[kind], workers))
    pieces = 1
    while pieces < len(pack):
        size = math.ceil(len(pack) / pieces)
        if pack_seconds(pack[:size], evaluation, SPEEDS[kind], workers) <= target:
            break
        pieces += 1
    size = math.ceil(len(pack) / pieces)
    for start in range(0, len(pack), size):
        yield pack[start : start + size]


def to_json(points: Iterable[Point]) -> list[dict[str, Any]]:
    """The settings of points with their ids."""
    return [{"id": point.id, **point.to_dict()} for point in points]


def from_json(rows: Iterable[Mapping[str, Any]]) -> list[Point]:
    """The points again. EnvironmentProblem where this code would train something else than the code that wrote them."""
    points = []
    for row in rows:
        try:
            point = point_from(row)
        except TypeError as error:
            raise EnvironmentProblem(f"the sweep was submitted by another version of sae-sweep ({error})") from error
        if point.id != row["id"]:
            raise EnvironmentProblem(
                f"the sweep was submitted by another version of sae-sweep: point {row['id']} is {point.id} here"
            )
        points.append(point)
    return points


def submissions(store: Store, sweep: str) -> list[Submission]:
    """What was submitted for a sweep, oldest first."""
    found = []
    for path in sorted((store.sweep(sweep) / "jobs").glob("*.json")):
        try:
            found.append(Submission(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError) as error:
            raise EnvironmentProblem(f"{path} cannot be read: {error}") from error
    return found
