"""The stage that chooses coefficients, before a sweep is planned: `grid.calibrate=l0`.

Its runs are points like any other: what was trained once is found in the store, and those that are not short are points
of the sweep if their coefficient is chosen. What they lead to is written into
sweep.yaml with the sweep, as explicit coefficients, and taken from there ever after.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress

from sae_sweep.config.calibration import (
    REFINEMENTS,
    Calibration,
    Line,
    by_line,
    choose,
    coarse,
    coefficients,
    line_of,
    refined,
)
from sae_sweep.config.grid import Sweep, varied
from sae_sweep.config.settings import Evaluation, Point, canonical, init_name, measure_id
from sae_sweep.errors import UserError
from sae_sweep.signals import check
from sae_sweep.store.store import NotThere, Store, StoreDamaged
from sae_sweep.sweep import run as runner
from sae_sweep.sweep.events import Event
from sae_sweep.sweep.plan import Work

# A short run takes this share of the steps, but so many at least.
SHARE, LEAST_STEPS = 0.25, 100
# How L0 of short runs is measured, whatever the sweep asks to measure.
MEASURED = Evaluation(inputs=4096, permutations=1)

# What shows the work as it is done.
View = Callable[[Work], AbstractContextManager[Callable[[Event], None]]]


def calibrated(sweep: Sweep, store: Store, view: View | None) -> Sweep:
    """The sweep with its coefficients chosen. `view`: None to train nothing; it is then as it was, if need be.

    UserError if the sweep of this name was calibrated otherwise.
    """
    calibration = sweep.calibration
    if calibration is None or not calibration.rungs:
        return sweep
    lines = by_line(calibration.rungs)
    found = _written(sweep, calibration, store)
    rest = {line: points for line, points in lines.items() if line.id not in found}
    wanted = calibration.l0_range, calibration.coefficients
    short: dict[Point, dict[float, float]] = {line: {} for line in rest}
    whole: dict[Point, dict[float, float]] = {line: {} for line in rest}
    # The first point of a line stands for its toys and seeds.
    asked = {(line, c): _short(points[0], c) for line, points in rest.items() for c in coarse(coefficients(points))}
    for found_by, evaluation in [(short, MEASURED), *[(whole, sweep.evaluation)] * REFINEMENTS]:
        l0 = _l0(_part(sweep, asked.values(), evaluation), store, view)
        if l0 is None:
            return sweep
        for (line, c), run in asked.items():
            if run in l0:
                found_by[line][c] = l0[run]
        further = {line: refined(short[line], whole[line], *wanted) for line in rest}
        asked = {(line, c): _at(rest[line][0], c) for line, found_there in further.items() for c in found_there}
    names = _names(list(lines))
    for line, points in rest.items():
        found[line.id] = choose(names[line], short[line], whole[line], *wanted, coefficients(points))
    return _filled_in(sweep, calibration, {line.id: found[line.id] for line in lines})


def first_runs(sweep: Sweep) -> Sweep:
    """The short runs that are tried first, as a sweep."""
    lines = by_line(sweep.calibration.rungs if sweep.calibration else ())
    short = (_short(points[0], c) for points in lines.values() for c in coarse(coefficients(points)))
    return _part(sweep, short, MEASURED)


def _part(sweep: Sweep, points: Iterable[Point], evaluation: Evaluation) -> Sweep:
    return dataclasses.replace(sweep, points=list(dict.fromkeys(points)), evaluation=evaluation)


def _written(sweep: Sweep, calibration: Calibration, store: Store) -> dict[str, Line]:
    """What was chosen when a sweep of this name was first run, by line."""
    with suppress(NotThere, StoreDamaged):
        info = store.info(sweep.name).get("calibration")
        if info is None or {key: info[key] for key in calibration.request} != calibration.request:
            was = "without it" if info is None else f"for {info['coefficients']} coefficients of L0 {info['l0_range']}"
            raise UserError(f"sweep {sweep.name} was run {was}, not as grid.calibrate asks now: choose another name=")
        try:
            return {id: Line(**line) for id, line in info["lines"].items()}
        except TypeError:
            raise UserError(
                f"sweep {sweep.name} was calibrated by another version of sae-sweep: choose another name="
            ) from None
    return {}


def _l0(part: Sweep, store: Store, view: View | None) -> dict[Point, float] | None:
    """L0 of some runs, trained if they are missing; those that broke are left out. None if they may not be trained."""
    work = runner.look(part, store)
    if work.plan.packs or work.stale:
        if view is None:
            return None
        from sae_sweep.sweep.local import execute, this_machine

        with view(work) as show:

            def say(event: Event) -> None:
                check()
                show(event)

            execute(work, store, part.evaluation, this_machine(part.device), say)
    wanted, found = measure_id(part.evaluation), {}
    records = store.records("points", [point.id for point in part.points])
    for point in part.points:
        record = records.get(point.id)
        if record is not None and record.get("measure_id") != wanted:
            record = store.measures(point.id).get(wanted)
        if record is not None:
            found[point] = float(record["metrics"]["l0"])
    return found


def _short(point: Point, coefficient: float) -> Point:
    """A short run of a point at another coefficient."""
    steps = point.training.steps
    training = point.training.replace(steps=min(steps, max(LEAST_STEPS, round(SHARE * steps))))
    return _at(dataclasses.replace(point, training=training), coefficient)


def _at(point: Point, coefficient: float) -> Point:
    return canonical(dataclasses.replace(point, penalty=point.penalty.replace(coefficient=coefficient)))


def _filled_in(sweep: Sweep, calibration: Calibration, lines: Mapping[str, Line]) -> Sweep:
    """The sweep with each stand-in replaced; of a line with fewer coefficients than asked for, the rest fall away."""

    def points() -> Iterable[Point]:
        for point in sweep.points:
            rung = calibration.rungs.get(point)
            if rung is None or point in calibration.given:
                yield point
            if rung is not None:
                chosen = lines[line_of(point).id].coefficients
                if rung < len(chosen):
                    yield _at(point, chosen[rung])

    found = list(dict.fromkeys(points()))
    done = Calibration(calibration.l0_range, calibration.coefficients, lines=lines)
    return dataclasses.replace(sweep, points=found, varied=varied(found), calibration=done)


def _names(lines: list[Point]) -> dict[Point, str]:
    """Each line in a few words: architecture, penalty, width and init, then what else sets lines apart."""
    told = ("sae.architecture", "sae.width", "sae.init", "sae.partition", "penalty.name", "penalty.p", "penalty.scale")
    further = [key for key in varied(lines) if key not in told]
    names = {}
    for line in lines:
        sae, penalty = line.sae, line.penalty
        init = init_name(sae.init, sae.get("partition"))
        words = [sae.architecture, penalty.words, f"width {sae.width}", init]
        names[line] = ", ".join([*words, *(f"{key}={line.get(key)}" for key in further)])
    return names
