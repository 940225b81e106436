"""Logging a sweep to W&B: one run per point and one for the sweep, from records that the store already holds.

W&B is never the source of truth and never in the way. All of it happens in a process of its own (wandb_logger.py);
whatever goes wrong there becomes one line for the user, and training goes on. A ledger in `<sweep>/wandb/logged/`
remembers what was logged whole, so that a sweep run again logs what is missing and nothing twice.

A point's run has the point's id. Run ids are unique in a W&B project, so a point that two sweeps of a project share is
one run there, in the group of the sweep that logged it last; each sweep's own run carries that sweep's whole table.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sae_sweep.signals import check
from sae_sweep.tracking.wandb_client import TIMEOUT, Run
from sae_sweep.tracking.wandb_runs import WITH_FILES, point_run, sweep_run

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


class WandbLog:
    """Logs the runs of one sweep, in the background. A context manager: leaving it waits until all is logged.

    directory: the sweep's folder; everything that W&B writes lies in its `wandb/`.
    mode: `auto` (WANDB_MODE or the user's settings if they name one; else online with a key and a server that
        answers, offline otherwise), `online` (offline if that fails) or `offline`.
    artifacts: whether a point's run carries the files of its folder in the store, as an artifact `sae-<point id>`.
    note: takes one line for the user; called on a thread of its own.
    waiting: takes how many runs are logged of how many, again and again while leaving waits for them.
    """

    def __init__(
        self,
        directory: Path,
        sweep: str,
        *,
        project: str,
        entity: str | None = None,
        mode: str = "auto",
        artifacts: bool = False,
        note: Callable[[str], None],
        waiting: Callable[[int, int], None] = lambda logged, of: None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.directory = directory.absolute()
        self.sweep = sweep
        self._note, self._waiting = note, waiting
        self._artifacts = artifacts
        settled = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
        self._settings = {
            "directory": str(self.directory),
            "sweep": sweep,
            "project": project,
            "entity": entity,
            "mode": settled,
            "asked": mode,
            "timeout": timeout,
        }
        self._logged = {path.name for path in _listing(self.directory / "wandb" / "logged")}
        self._jobs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._asked = self._done = 0
        self._heard = 0.0
        self._logger: subprocess.Popen[bytes] | None = None
        # Nothing (more) can be logged; and nobody waits for it any more.
        self._over, self._abandoned = threading.Event(), threading.Event()
        if settled == "disabled":
            self._over.set()

    def logged(self, point_id: str, measure_id: str) -> bool:
        """Whether the point with this measurement needs no logging: spares the caller reading its record."""
        with_files = WITH_FILES if self._artifacts else ""
        return f"{point_id}.{measure_id}{with_files}" in self._logged or self._over.is_set()

    def log_point(self, record: Mapping[str, Any]) -> None:
        """Queue the run of a finished point: settings, training curve and metrics of its record in the store."""
        folder = self.directory.parents[1] / "points" / record["id"]
        self._submit(point_run(record, self.sweep, str(folder) if self._artifacts else None))

    def log_sweep(
        self,
        frame: pd.DataFrame,
        untrained: pd.DataFrame | None = None,
        verdicts: Sequence[Mapping[str, Any]] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Queue the sweep's own run: the results table, its charts, the untrained starts, a row per tested claim.

        frame: a row per point with the columns of the results table. verdicts: all with the same keys.
        """
        self._submit(sweep_run(self.sweep, frame, untrained, verdicts, config or {}))

    def start(self) -> None:
        """Start the logger now, whatever it takes from what else is at work."""
        if self._logger is not None or self._over.is_set():
            return
        command = [sys.executable, "-P", "-m", "sae_sweep.tracking.wandb_logger", json.dumps(self._settings)]
        try:
            self._logger = subprocess.Popen(
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
            self._note(_stopped(str(problem)))
            return
        # Daemons: a process that is told to stop does not wait for a server.
        threading.Thread(target=self._send, args=(self._logger,), name="to W&B", daemon=True).start()
        threading.Thread(target=self._listen, args=(self._logger,), name="from W&B", daemon=True).start()

    def close(self, timeout: float | None = None) -> None:
        """Wait until everything queued is logged, or `timeout` seconds; without one as long as it gets on. What is left
        then is for the next run."""
        if not self._asked and self._logger is None:
            return
        if timeout is None:
            self.start()
        self._jobs.put(None)
        began = self._heard = time.monotonic()
        try:
            while self._logger is not None and not self._over.wait(0.25):
                if timeout is None:
                    check()
                    if time.monotonic() - began > SILENT:
                        self._waiting(self._done, self._asked)
                if time.monotonic() - (self._heard if timeout is None else began) > (timeout or PATIENCE):
                    break
        finally:
            self._abandoned.set()
            if self._logger is not None:
                self._logger.kill()
        if not self._over.is_set():
            self._note("W&B: stopped before everything was logged; running the sweep again logs the rest")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close(None if kind is None else INTERRUPTED_TIMEOUT)

    def _submit(self, run: Run) -> None:
        if run.mark in self._logged or self._over.is_set():
            return
        self._logged.add(run.mark)
        self._asked += 1
        self._jobs.put(run)
        if time.process_time() > STARTS_AFTER:
            self.start()

    def _send(self, logger: subprocess.Popen[bytes]) -> None:
        """Hand over what is queued, at the pace at which the logger takes it."""
        assert logger.stdin is not None
        with suppress(OSError), logger.stdin as pipe:  # it has ended, which is for `_listen` to say
            run: Run | None = None
            while (run := self._jobs.get()) is not None:
                pipe.write(json.dumps(vars(run)).encode() + b"\n")
                pipe.flush()
            pipe.write(b"null\n")

    def _listen(self, logger: subprocess.Popen[bytes]) -> None:
        """Take what the logger tells, until it ends."""
        assert logger.stdout is not None
        last = ""
        for line in logger.stdout:
            self._heard = time.monotonic()
            if not line.startswith(b"{"):  # what W&B or Python print
                last = line.decode(errors="replace").strip() or last
            elif "logged" in (told := json.loads(line)):
                self._done += 1
            else:
                self._say(told["note"])
        if logger.wait():
            self._say(_stopped(last[:200] or f"its process ended with {logger.returncode}"))
        self._over.set()

    def _say(self, text: str) -> None:
        """A line for the user, unless nobody waits for the log any more."""
        if not self._abandoned.is_set():
            self._note(text)


def _stopped(why: str) -> str:
    return f"W&B: no longer logging, training goes on; running the sweep again logs it ({why})"


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        # Not there yet; or not readable, which is found and said when the first run is written.
        return []
