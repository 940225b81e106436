"""Run a sweep on this machine: freeze its grid, train what the store lacks, pack by pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import TRAIN_VERSION, measure_id, plugins_of, toy_id
from sae_sweep.errors import UserError
from sae_sweep.signals import check
from sae_sweep.store.checksums import SCHEMA
from sae_sweep.store.store import NotThere, Store, StoreDamaged
from sae_sweep.sweep.events import Event, Note, PointDone, PointFailed
from sae_sweep.sweep.plan import Work, of_shard, plan


class TooManyFailures(Exception):
    """With fail-fast, the first failed point."""


@dataclass
class Outcome:
    """What a run did, for the `--json` of DESIGN."""

    sweep: str
    points: int
    ran: int
    skipped: int
    failed: int
    directory: Path

    def to_json(self) -> dict[str, Any]:
        """The report of `sae-sweep run --json`."""
        return {"schema": 1, **dataclasses.asdict(self), "directory": str(self.directory)}


def check_files(sweep: Sweep) -> None:
    """UserError if a file of weights is not one for its toy, or `sae.init` names what is no SAE of the width asked."""
    used = {(p.toy.d_vocab, p.toy.k, p.distribution) for p in sweep.points if p.distribution.name == "weights"}
    if used:
        from sae_sweep.toys.classes import Cells
        from sae_sweep.toys.sampler import cell_weights

        for d_vocab, k, distribution in used:
            cell_weights(Cells(d_vocab, k), distribution)
    begun = {(point.sae.start, point.sae.width): point.sae for point in sweep.points if point.sae.init == "trained"}
    if begun:
        from sae_sweep.sweep.context import trained_sae

        for sae in begun.values():
            found = len(trained_sae(sae, Store(sweep.output_dir)).W_dec)
            if found != sae.width:
                raise UserError(f"sae.init={sae.start} has {found} latents, wanted sae.width={sae.width}")


def look(sweep: Sweep, store: Store, shard: tuple[int, int] = (0, 1)) -> Work:
    """What is left of a sweep. A toy or point damaged since it was finished is set aside and counts as missing.

    What the disk itself lost, without anyone writing, is found where it is read: `Store.records` with "everything".
    """
    wanted = measure_id(sweep.evaluation)
    points = of_shard(sweep, shard)
    records = store.records("points", (point.id for point in points), "changed")
    toys = dict.fromkeys(point.toy for point in points)
    trained = store.records("toys", map(toy_id, toys), "changed")
    planned = plan(sweep, records, shard, trained)
    elsewise = [point for point in planned.finished if records[point.id].get("measure_id") != wanted]
    stale = [point for point in elsewise if wanted not in store.measures(point.id, "changed")]
    work = Work(planned, [toy for toy in toys if toy_id(toy) not in trained], stale)
    return work if work.left else dataclasses.replace(work, records=records)


def run(sweep: Sweep, work: Work, store: Store, say: Callable[[Event], None], fail_fast: bool = False) -> Outcome:
    """Do the work; finished points are skipped. With `fail_fast` the first point that fails is the last."""
    outcome = before(sweep, work, store)
    count = account(outcome, store, say, fail_fast)
    if not work.left:
        freeze(sweep, store)
        return outcome
    # PyTorch takes seconds to load, and is not needed to find that nothing is left to do.
    from sae_sweep.sweep.local import execute, this_machine

    machine = this_machine(sweep.device)
    freeze(sweep, store)
    with suppress(TooManyFailures):
        execute(work, store, sweep.evaluation, machine, count)
    return outcome


def before(sweep: Sweep, work: Work, store: Store) -> Outcome:
    """What is known of a run that has not begun."""
    skipped = len(work.plan.finished) - len(work.stale)
    return Outcome(sweep.name, len(work.plan.points), 0, skipped, 0, directory=store.sweep(sweep.name))


def account(outcome: Outcome, store: Store, say: Callable[[Event], None], fail_fast: bool) -> Callable[[Event], None]:
    """A `say` that also counts, notes failures in the store, and stops where a signal or fail-fast asks for it."""

    def count(event: Event) -> None:
        check()
        while store.damaged:
            say(Note(store.damaged.pop(0)))
        if isinstance(event, PointDone):
            outcome.ran += 1
            store.clear_failure(outcome.sweep, event.point.id)
        elif isinstance(event, PointFailed):
            outcome.failed += 1
            info = {"step": event.step, "reason": event.reason, "settings": event.point.to_dict()}
            store.fail(outcome.sweep, event.point.id, info)
        say(event)
        if fail_fast and isinstance(event, PointFailed):
            raise TooManyFailures(event.reason)

    return count


def freeze(sweep: Sweep, store: Store) -> None:
    """Write sweep.yaml and points.txt: the whole grid, before anything of it is trained.

    A sweep may grow, never lose points: UserError if the name belongs to a grid that is not contained in this one.
    """
    ids = [point.id for point in sweep.points]
    with suppress(NotThere, StoreDamaged):
        trained = store.info(sweep.name).get("train_version", 1)
        if trained != TRAIN_VERSION:
            raise UserError(
                f"sweep {sweep.name} is of a version of sae-sweep that trains to other numbers (training {trained}, "
                f"this one {TRAIN_VERSION}): choose another name=, or use that version; its results can be read"
            )
    with suppress(NotThere, StoreDamaged):
        lost = len(set(store.read_sweep_file(sweep.name, "points.txt").split()) - set(ids))
        if lost:
            raise UserError(
                f"sweep {sweep.name} holds another grid: {lost} of its points are not in this one, "
                "or are of an architecture that this version trains to other numbers; choose another name="
            )
    info = {
        "schema": SCHEMA,
        "train_version": TRAIN_VERSION,
        "name": sweep.name,
        "experiment": sweep.experiment,
        "overrides": sweep.overrides,
        "points": len(ids),
        "varied": sweep.varied,
        "evaluation": sweep.evaluation.to_dict(),
        "measure_id": measure_id(sweep.evaluation),
        "claims": sweep.claims,
        "logger": sweep.logger,
    }
    answering = [least for point in sweep.points if (least := point.toy.get("least_accuracy")) is not None]
    if answering:
        info["least_accuracy"] = max(answering)
    names = {point.toy.get("names", "") for point in sweep.points}
    if len(names) == 1 and (named := names.pop()):
        info["factors"] = named.split(", ")
    if plugins := plugins_of(sweep.points):
        info["plugins"] = plugins
    if sweep.files:
        info["files"] = sweep.files
    if sweep.calibration is not None:
        info["calibration"] = sweep.calibration.to_yaml()
    store.write_sweep_file(sweep.name, "points.txt", ("\n".join(ids) + "\n").encode())
    store.write_sweep_file(sweep.name, "sweep.yaml", yaml.safe_dump(info, sort_keys=False, allow_unicode=True).encode())
