"""From a sweep that is configured to its tables: what the command line and a notebook do alike."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.config import overrides as config
from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import Point, Sae, Training
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.reports import layout
from sae_sweep.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

    from sae_sweep.saes.formats.loaded import LoadedSae
    from sae_sweep.sweep.events import Event
    from sae_sweep.sweep.plan import Work
    from sae_sweep.sweep.run import Outcome
    from sae_sweep.tracking.logging import WandbLog

# Without a word on the penalty, the loss of an SAE that is scored is the reconstruction's alone.
OF_SCORE = ("experiment=null", "penalty=none")


def calibrated(sweep: Sweep, store: Store) -> Sweep:
    """The sweep with the coefficients that grid.calibrate chooses, by trial where they are not known; says so."""
    if sweep.calibration is None:
        return sweep
    from sae_sweep.sweep.calibrate import calibrated as choose

    sweep = choose(sweep, store, _trials)
    for line in sweep.calibration.lines.values() if sweep.calibration else ():
        print(line.sentence, file=sys.stderr)
        if line.warning:
            print(f"warning: {line.warning}", file=sys.stderr)
    return sweep


@contextmanager
def _trials(work: Work) -> Iterator[Callable[[Event], None]]:
    """Shows the runs that choose coefficients."""
    from sae_sweep.reports.live import LiveView
    from sae_sweep.sweep.events import Note

    count = layout.plural(sum(map(len, work.plan.packs)), "SAE")
    with LiveView(len(work.plan.points), len(work.plan.finished), work.plan.seconds) as view:
        view.handle(Note(f"choosing coefficients by L0: {count}, about {layout.duration(work.plan.seconds)}"))
        yield view.handle


def train(sweep: Sweep, work: Work, store: Store, fail_fast: bool) -> tuple[Outcome, pd.DataFrame, pd.DataFrame]:
    """Run with a live view, log to W&B beside it, and write the sweep's tables, which come back too."""
    from sae_sweep.store.results import sweep_info
    from sae_sweep.sweep import run as runner
    from sae_sweep.sweep.events import Note
    from sae_sweep.tracking.logging import watch

    with watch(sweep, work, store) as seen:
        outcome = runner.run(sweep, work, store, seen.handle, fail_fast)
        if seen.log is not None and outcome.ran:
            seen.log.start()  # nothing more is trained that it could slow
        results, untrained = _write_tables(sweep, work, outcome, store)
        for line in store.damaged:
            seen.handle(Note(line))
        if seen.log is not None:
            log_sweep(seen.log, sweep_info(store, sweep.name), store, results, untrained)
    return outcome, results, untrained


def _write_tables(sweep: Sweep, work: Work, outcome: Outcome, store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write a sweep's tables. EnvironmentProblem if they lack points that the run found or made."""
    from sae_sweep.store import results as frame

    if sweep.name not in store.sweeps():
        raise EnvironmentProblem(f"{store.sweep(sweep.name)} was deleted while the sweep ran: run it again")
    results, untrained = frame.write(store, sweep.name, frame.tables(store, sweep.name, work.records))
    there = set(results["point_id"])
    lost = outcome.ran + outcome.skipped - sum(point.id in there for point in work.plan.points)
    if lost:
        raise EnvironmentProblem(f"{lost} finished points were deleted or damaged while the sweep ran: run it again")
    return results, untrained


def known(sweep: Sweep, store: Store) -> Sweep:
    """The sweep with the coefficients that grid.calibrate chose before; as it is where they are not known yet."""
    if sweep.calibration is None:
        return sweep
    from sae_sweep.sweep.calibrate import calibrated as choose

    return choose(sweep, store, view=None)


def log_sweep(
    log: WandbLog, info: Mapping[str, Any], store: Store, results: pd.DataFrame, untrained: pd.DataFrame
) -> None:
    """Log the points that are finished but were not logged, then the sweep's own run. `info`: its sweep.yaml."""
    from sae_sweep.reports.claims import evaluate_all
    from sae_sweep.store.results import measured

    wanted = info["measure_id"]
    missing = [id for id in results["point_id"] if not log.logged(id, wanted)]
    for record in measured(store, missing, wanted):
        log.log_point(record)
    verdicts = [dataclasses.asdict(verdict) for verdict in evaluate_all(info, results, untrained)]
    config = {name: info.get(name) for name in ("experiment", "overrides", "factors")}
    log.log_sweep(results, untrained, verdicts, config)


def measured(path: Path, overrides: Sequence[str]) -> tuple[LoadedSae, Point, dict[str, Any]]:
    """An SAE of any library by its folder or file, the setting that it is measured in, and its metrics by column.

    `overrides` say on which toy, site and distribution. UserError: it is not an SAE that is known here, or not one for
    those activations.
    """
    sweep = config.load(overrides, OF_SCORE)
    # The SAE is what it is: settings of sae and training, and seeds of SAEs, say nothing here.
    points = {dataclasses.replace(point, sae=Sae(), training=Training(), seed=0) for point in sweep.points}
    if len(points) > 1:
        raise UserError(f"score measures in one setting at a time, got {len(points)} (a penalty needs its coefficient)")
    (point,) = points
    config.check_writable(sweep.output_dir)

    # PyTorch takes seconds to load.
    from sae_sweep.saes.formats.index import read_sae
    from sae_sweep.sweep import pack
    from sae_sweep.sweep.context import Ground
    from sae_sweep.sweep.cost import activation_size
    from sae_sweep.sweep.events import ToyAccuracy
    from sae_sweep.sweep.local import this_machine

    sae = read_sae(path)
    d, needed = sae.W_dec.shape[1], activation_size(point)
    if d != needed:
        raise UserError(
            f"{path}: takes activations of length {d}, but {point.site.name} of this toy has {needed} "
            "(give toy.d_model=…, site=… as it was trained)"
        )
    machine = this_machine(sweep.device)

    def say(event: Event) -> None:
        if isinstance(event, ToyAccuracy):
            print(event.text, file=sys.stderr)

    ground = Ground(point, Store(sweep.output_dir), sweep.evaluation, machine.device, say)
    return sae, point, pack.with_loss(ground.measure_loaded(sae, point.penalty), point)
