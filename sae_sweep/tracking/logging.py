"""Logging a sweep to W&B: one run per point and one for the sweep, from records that the store already holds.

W&B is never the source of truth and never in the way. All of it happens in a process of its own (process.py); whatever
goes wrong there becomes one line for the user, and training goes on. A ledger in `<sweep>/wandb/logged/` remembers what
was logged whole, so that a sweep run again logs what is missing and nothing twice.

Run ids are unique in a W&B project, so the id of a point's run is made of the point's and the sweep's: a point that two
sweeps share is a run in each.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sae_sweep.config.grid import Sweep
from sae_sweep.config.logger import Logger
from sae_sweep.errors import EnvironmentProblem
from sae_sweep.reports.live import LiveView
from sae_sweep.signals import check
from sae_sweep.store.store import Store
from sae_sweep.sweep.events import Event, Logging, Note, PointDone
from sae_sweep.sweep.heartbeat import Beat
from sae_sweep.sweep.plan import Work
from sae_sweep.tracking.content import WITH_FILES, point_run, run_id, sweep_run
from sae_sweep.tracking.process import TIMEOUT, Run, stopped

if TYPE_CHECKING:
    import pandas as pd

# Seconds of the processor that this process has worked before the logger starts beside it, which takes some two: of a
# sweep that is shorter everything is logged at its end.
STARTS_AFTER = 60.0
# Seconds that the end of a command waits for a logger that gets nothing done.
PATIENCE = 3 * TIMEOUT
# From how many seconds on it says that it waits.
SILENT = 2.0
# How long an interrupted command waits for the log to come to a stop.
INTERRUPTED_TIMEOUT = 2.0
# Runs in one call of `wandb sync`, which takes some seconds to start.
AT_ONCE = 200


@dataclass(frozen=True)
class Observers:
    """Take the events of a run: the view on the screen, a note for other shells, and W&B, where a log is kept."""

    view: LiveView
    log: WandbLog | None
    beat: Beat

    def handle(self, event: Event) -> None:
        """Show an event, note it for other shells, and log the point that it finishes."""
        self.view.handle(event)
        self.beat.handle(event)
        if self.log is not None and isinstance(event, PointDone):
            self.log.log_point(event.record)


@contextmanager
def watch(sweep: Sweep, work: Work, store: Store) -> Iterator[Observers]:
    """Watch the work being done; leaving waits until all is logged."""
    with ExitStack() as stack:
        finished = len(work.plan.finished) - len(work.stale)
        view = stack.enter_context(LiveView(len(work.plan.points), finished, work.plan.seconds))
        log = None
        if sweep.logger["name"] != "none":
            log = stack.enter_context(open_log(store, sweep.name, sweep.logger, view.handle))
        beat = stack.enter_context(Beat(store, sweep.name, work.plan.packs, view.seconds_left))
        yield Observers(view, log, beat)


def open_log(store: Store, sweep: str, logger: Mapping[str, Any], emit: Callable[[Event], None]) -> WandbLog:
    """The W&B log of a sweep; `emit` takes its notes, and how far it is once all is trained."""
    return WandbLog(
        store.sweep(sweep),
        sweep,
        Logger.of(logger),
        note=lambda text: emit(Note(text)),
        waiting=lambda done, total: emit(Logging(done, total)),
    )


class WandbLog:
    """Logs the runs of one sweep, in the background. A context manager: leaving it waits until all is logged.

    Args:
        directory: the sweep's folder, which holds the ledger, and the files of W&B unless the logger names another.
        logger: where runs go and what they are called. `mode` auto is WANDB_MODE or the user's settings if they name
            one; else online with a key and a server that answers, offline otherwise. Online goes on offline if it
            fails. With `artifacts` a point's run carries the files of its folder in the store.
        note: takes one line for the user; called on a thread of its own.
        waiting: takes how many runs are logged of how many, again and again while leaving waits for them.
    """

    def __init__(
        self,
        directory: Path,
        sweep: str,
        logger: Logger,
        note: Callable[[str], None],
        waiting: Callable[[int, int], None] = lambda logged, of: None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.directory = directory.absolute()
        self.sweep = sweep
        self._note, self._waiting, self._logger = note, waiting, logger
        mode = os.environ.get("WANDB_MODE", "auto") if logger.mode == "auto" else logger.mode
        runs: dict[str, Any] = {"dir": str(files_folder(self.directory, logger).parent)}
        runs |= {"project": logger.project, "entity": logger.entity, "group": logger.group or sweep}
        runs |= {"tags": logger.tags or None, "notes": logger.notes}
        self._settings = {
            "directory": str(self.directory),
            "runs": runs,
            "mode": mode,
            "asked": logger.mode,
            "timeout": timeout,
        }
        self._logged = {path.name for path in _listing(self.directory / "wandb" / "logged")}
        self._jobs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._asked = self._done = 0
        self._last_word = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        # Nothing (more) can be logged; and nobody waits for it any more.
        self._over, self._abandoned = threading.Event(), threading.Event()
        if mode == "disabled":
            self._over.set()

    @property
    def complete(self) -> bool:
        """Whether every run that was asked for is logged."""
        return self._done == self._asked

    def logged(self, point_id: str, measure_id: str) -> bool:
        """Whether the point with this measurement needs no logging: spares the caller reading its record."""
        with_files = WITH_FILES if self._logger.artifacts else ""
        return f"{run_id(point_id, self.sweep)}.{measure_id}{with_files}" in self._logged or self._over.is_set()

    def log_point(self, record: Mapping[str, Any]) -> None:
        """Queue the run of a finished point: settings, training curve and metrics of its record in the store."""
        folder = self.directory.parents[1] / "points" / record["id"] if self._logger.artifacts else None
        self._submit(point_run(record, self.sweep, folder, self._logger.job_type))

    def log_sweep(
        self,
        frame: pd.DataFrame,
        untrained: pd.DataFrame | None = None,
        verdicts: Sequence[Mapping[str, Any]] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue the sweep's own run: the results table, its figures, the untrained starts, a row per tested claim.

        frame: a row per point with the columns of the results table. verdicts: all with the same keys.
        """
        self._submit(sweep_run(self.sweep, frame, untrained, verdicts, config or {}))

    def start(self) -> None:
        """Start the logger now, whatever it takes from what else is at work."""
        if self._process is not None or self._over.is_set():
            return
        command = [sys.executable, "-P", "-m", "sae_sweep.tracking.process", json.dumps(self._settings)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # Ctrl-C on the terminal is for this process alone.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        except OSError as problem:
            self._over.set()
            self._note(stopped(str(problem)))
            return
        # Daemons: a process that is told to stop does not wait for a server.
        threading.Thread(target=self._send, args=(self._process,), name="to W&B", daemon=True).start()
        threading.Thread(target=self._listen, args=(self._process,), name="from W&B", daemon=True).start()

    def close(self, timeout: float | None = None) -> None:
        """Wait until everything queued is logged, or `timeout` seconds; without one as long as it gets on. What is left
        then is for the next run."""
        if not self._asked and self._process is None:
            return
        if timeout is None:
            self.start()
        self._jobs.put(None)
        began = self._last_word = time.monotonic()
        try:
            while self._process is not None and not self._over.wait(0.25):
                if timeout is None:
                    check()
                    if time.monotonic() - began > SILENT:
                        self._waiting(self._done, self._asked)
                if time.monotonic() - (self._last_word if timeout is None else began) > (timeout or PATIENCE):
                    break
        finally:
            self._abandoned.set()
            if self._process is not None:
                self._process.kill()
        if not self._over.is_set():
            self._note("W&B: stopped before everything was logged; running the sweep again logs the rest")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close(None if kind is None else INTERRUPTED_TIMEOUT)

    def _submit(self, run: Run) -> None:
        if run.mark in self._logged:
            return
        self._asked += 1
        if self._over.is_set():
            return
        self._logged.add(run.mark)
        self._jobs.put(run)
        if time.process_time() > STARTS_AFTER:
            self.start()

    def _send(self, process: subprocess.Popen[bytes]) -> None:
        """Hand over what is queued, at the pace at which the logger takes it."""
        assert process.stdin is not None
        with suppress(OSError), process.stdin as pipe:  # it has ended, which is for `_listen` to say
            run: Run | None = None
            while (run := self._jobs.get()) is not None:
                pipe.write(json.dumps(vars(run)).encode() + b"\n")
                pipe.flush()
            pipe.write(b"null\n")

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Take what the logger tells, until it ends."""
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            self._last_word = time.monotonic()
            if not line.startswith(b"{"):  # what W&B or Python print
                last = line.decode(errors="replace").strip() or last
            elif "logged" in (message := json.loads(line)):
                self._done += 1
            else:
                self._tell(message["note"])
        if process.wait():
            self._tell(stopped(last[:200] or f"its process ended with {process.returncode}"))
        self._over.set()

    def _tell(self, text: str) -> None:
        """A line for the user, unless nobody waits for the log any more."""
        if not self._abandoned.is_set():
            self._note(text)


def files_folder(directory: Path, logger: Logger) -> Path:
    """Where the files of W&B lie: in the sweep's folder, or in one of the sweep's name below `logger.dir`."""
    base = directory.absolute() if logger.dir is None else Path(logger.dir) / directory.name
    return base / "wandb"


def unsynced(folder: Path) -> list[Path]:
    """The offline runs of a sweep's `wandb` folder that no server has yet. W&B itself marks those that one has."""
    logs = [next(iter(run.glob("run-*.wandb")), None) for run in sorted(folder.glob("offline-run-*"))]
    return [log.parent for log in logs if log is not None and not log.with_name(f"{log.name}.synced").exists()]


def push(folder: Path, progress: Callable[[str], None]) -> int:
    """Push every run that no server has yet, files and tables included; returns how many.

    Called again, after a failure or not, it goes on with what is left. EnvironmentProblem: no key, or no server.
    """
    waiting = unsynced(folder)
    for first in range(0, len(waiting), AT_ONCE):
        some = waiting[first : first + AT_ONCE]
        command = [sys.executable, "-m", "wandb", "sync", "--no-include-synced", *map(str, some)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        left = len(unsynced(folder))
        if done.returncode or left > len(waiting) - first - len(some):
            raise EnvironmentProblem(
                f"W&B took {len(waiting) - left} of {len(waiting)} runs, then: {_reason(done)}; sync again for the rest"
            )
        progress(f"{first + len(some):,} of {len(waiting):,} runs pushed")
    return len(waiting)


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.removeprefix("wandb: ").strip() for line in (done.stderr + done.stdout).splitlines()]
    telling = [line for line in lines if "error" in line.lower()] or [line for line in lines if line]
    return " ".join((telling or ["no reason given"])[-1].split())[:300]


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        # Not there yet; or not readable, which is found and said when the first run is written.
        return []
