"""Run a sweep on this machine: freeze its grid, train what the store lacks, pack by pack."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.schema import Point, measure_id
from sae_sweep.store import Store
from sae_sweep.sweep.events import Event, Note, PointDone, PointFailed
from sae_sweep.sweep.grid import Sweep
from sae_sweep.sweep.pack import Machine, measure_again, run_pack, train_toys
from sae_sweep.sweep.plan import Plan, device_kind, plan, stack_key


class Interrupted(BaseException):
    """A signal asked the run to stop; finished points are in the store and a rerun does the rest."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")


class TooManyFailures(Exception):
    """With fail-fast, the first failed point."""


@dataclass
class Outcome:
    """What a run did, for the `--json` of DESIGN."""

    sweep: str
    points: int
    skipped: int
    directory: Path
    ran: int = 0
    failed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The report of `sae-sweep run --json`."""
        return {"schema": 1, **dataclasses.asdict(self), "directory": str(self.directory)}


@dataclass(frozen=True)
class Work:
    """A plan with what the store already knows: `stale` points are trained but not measured as asked."""

    plan: Plan
    stale: list[Point]


def look(sweep: Sweep, store: Store, shard: tuple[int, int] = (0, 1)) -> Work:
    """What is left of a sweep. Reads the records of finished points; a damaged one counts as missing."""
    wanted = measure_id(sweep.evaluation)
    ids = {point.id for point in sweep.points}
    records = store.records("points", ids & store.ids("points"))
    planned = plan(sweep, records.keys(), shard, store.ids("toys"))
    stale = [p for p in planned.finished if records[p.id]["measure_id"] != wanted and wanted not in store.measures(p.id)]
    return Work(planned, stale)


def run(sweep: Sweep, work: Work, store: Store, say: Callable[[Event], None], fail_fast: bool = False) -> Outcome:
    """Do the work; finished points are skipped. Raises Interrupted on SIGTERM or SIGUSR2, KeyboardInterrupt on Ctrl-C."""
    machine = this_machine(sweep.device)
    freeze(sweep, store)
    planned = work.plan
    directory = store.sweep(sweep.name)
    outcome = Outcome(sweep.name, len(planned.points), len(planned.finished) - len(work.stale), directory)

    def count(event: Event) -> None:
        if isinstance(event, PointDone):
            outcome.ran += 1
            store.clear_failure(sweep.name, event.point.id)
        elif isinstance(event, PointFailed):
            outcome.failed += 1
            info = {"step": event.step, "reason": event.reason, "settings": dataclasses.asdict(event.point)}
            store.fail(sweep.name, event.point.id, info)
        say(event)
        if fail_fast and isinstance(event, PointFailed):
            raise TooManyFailures(event.reason)

    for line in store.damaged:
        say(Note(line))
    with _signals_raise():
        for again in _by_stack(work.stale):
            measure_again(again, store, sweep.evaluation, machine, count)
        train_toys([pack[0].toy for pack in planned.packs], store, machine.device, count)
        for number, pack in enumerate(planned.packs, start=1):
            _run_or_split(pack, number, len(planned.packs), sweep, store, machine, count)
    return outcome


def freeze(sweep: Sweep, store: Store) -> None:
    """Write sweep.yaml and points.txt: the whole grid, before anything of it is trained.

    A sweep may grow, never lose points: UserError if the name belongs to a grid that is not contained in this one.
    """
    ids = [point.id for point in sweep.points]
    known = store.sweep(sweep.name) / "points.txt"
    if known.exists():
        lost = len(set(known.read_text().split()) - set(ids))
        if lost:
            raise UserError(
                f"sweep {sweep.name} holds another grid: {lost} of its points are not in this one; choose another name="
            )
    info = {
        "name": sweep.name,
        "experiment": sweep.experiment,
        "overrides": sweep.overrides,
        "points": len(ids),
        "varied": sweep.varied,
        "evaluation": dataclasses.asdict(sweep.evaluation),
        "measure_id": measure_id(sweep.evaluation),
        "claims": sweep.claims,
    }
    store.write_sweep_file(sweep.name, "points.txt", ("\n".join(ids) + "\n").encode())
    store.write_sweep_file(sweep.name, "sweep.yaml", yaml.safe_dump(info, sort_keys=False, allow_unicode=True).encode())


def this_machine(device: str) -> Machine:
    """The device to run on and the threads to use. EnvironmentProblem if it is not there."""
    kind = device_kind(device)
    if kind == "cuda" and not torch.cuda.is_available():
        if device == "cuda":
            raise EnvironmentProblem("device=cuda: PyTorch sees no GPU here (device=cpu trains on the processor)")
        kind = "cpu"
    if kind == "cpu":
        torch.set_num_threads(1)  # our own threads take the cores (saes/kernels/cpu.py)
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(kind, len(affinity(0)) if affinity else os.cpu_count() or 1)


def _run_or_split(
    pack: Sequence[Point],
    number: int,
    packs: int,
    sweep: Sweep,
    store: Store,
    machine: Machine,
    say: Callable[[Event], None],
) -> None:
    """Run a pack; one that does not fit into memory is halved, down to single points."""
    try:
        run_pack(pack, number, packs, store, sweep.evaluation, machine, say)
    except (MemoryError, torch.OutOfMemoryError) as error:
        if len(pack) == 1:
            say(PointFailed(pack[0], None, f"out of memory: {error}"))
            return
        say(Note(f"a pack of {len(pack)} points does not fit into memory: trying halves"))
        for half in (pack[: len(pack) // 2], pack[len(pack) // 2 :]):
            _run_or_split(half, number, packs, sweep, store, machine, say)


def _by_stack(points: Sequence[Point]) -> list[list[Point]]:
    stacks: dict[Any, list[Point]] = {}
    for point in points:
        stacks.setdefault(stack_key(point), []).append(point)
    return list(stacks.values())


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGUSR2 (what Slurm sends before it takes the machine) raise Interrupted in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
