"""Logging a sweep to W&B: one run per point and one for the sweep, from records that the store already holds.

W&B is never the source of truth and never in the way. All of it happens on a thread of its own; whatever goes wrong
there becomes one line for the user, and training goes on. A ledger in `<sweep>/wandb/logged/` remembers what was
logged whole, so that a sweep run again logs what is missing and nothing twice.

A point's run has the point's id. Run ids are unique in a W&B project, so a point that two sweeps of a project share is
one run there, in the group of the sweep that logged it last; each sweep's own run carries that sweep's whole table.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sae_sweep.reports.wandb_runs import WITH_FILES, Run, point_run, sweep_run

if TYPE_CHECKING:
    import pandas as pd

# Seconds. A server that takes longer to start a run, or to take the rest of it at its end, means offline from there on.
# Also the longest that the end of the process can wait for W&B.
ONLINE_TIMEOUT = 10.0
# How long an interrupted command waits for the log to come to a stop.
INTERRUPTED_TIMEOUT = 2.0
# No samples of the machine, no code, no console capture: a run is a few kilobytes and some 20 ms. The transaction log
# reaches the disk every second, so that a run killed half-way is not lost whole.
LEAN = {
    "silent": True,
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "label_disable": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_transaction_log_flush_interval": 1.0,
    "symlink": False,
    "use_dot_wandb": False,
    "sagemaker_disable": True,
    "init_timeout": ONLINE_TIMEOUT,
    "finish_timeout": ONLINE_TIMEOUT,
    "finish_timeout_raises": True,
}


class WandbLog:
    """Logs the runs of one sweep, in the background. A context manager: leaving it waits until all is logged.

    directory: the sweep's folder; everything that W&B writes lies in its `wandb/`.
    mode: `auto` (WANDB_MODE or the user's settings if they name one; else online with a key and a server that
        answers, offline otherwise), `online` (offline if that fails) or `offline`.
    artifacts: whether a point's run carries the files of its folder in the store, as an artifact `sae-<point id>`.
    note: takes one line for the user; called on the logging thread.
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
    ) -> None:
        self.directory = directory.absolute()
        self.sweep = sweep
        self.url: str | None = None
        self._project, self._entity, self._note = project, entity, note
        # auto, online, offline, or disabled; settled on the thread before the first run
        self._mode = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
        self._asked = mode
        self._artifacts = artifacts
        self._ledger = self.directory / "wandb" / "logged"
        self._logged = {path.name for path in _listing(self._ledger)}
        self._jobs: queue.Queue[Run | None] = queue.Queue()
        self._abandoned = threading.Event()
        self._thread: threading.Thread | None = None

    def logged(self, point_id: str, measure_id: str) -> bool:
        """Whether the point with this measurement needs no logging: spares the caller reading its record."""
        with_files = WITH_FILES if self._artifacts else ""
        return f"{point_id}.{measure_id}{with_files}" in self._logged or self._mode == "disabled"

    def log_point(self, record: Mapping[str, Any]) -> None:
        """Queue the run of a finished point: settings, training curve and metrics of its record in the store."""
        folder = self.directory.parents[1] / "points" / record["id"]
        self._submit(point_run(record, self.sweep, folder if self._artifacts else None))

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

    def close(self, timeout: float | None = None) -> None:
        """Wait until everything queued is logged, or `timeout` seconds; what is left then is for the next run."""
        if self._thread is None:
            return
        self._jobs.put(None)
        try:
            self._thread.join(timeout)
        finally:
            self._abandoned.set()
        if self._thread.is_alive():
            self._note("W&B: stopped before everything was logged; running the sweep again logs the rest")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close(None if kind is None else INTERRUPTED_TIMEOUT)

    def _submit(self, run: Run) -> None:
        if run.mark in self._logged or self._mode == "disabled":
            return
        self._logged.add(run.mark)
        self._jobs.put(run)
        if self._thread is None:
            # A daemon: a process that is told to stop does not wait for a server.
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        try:
            with own_environment(self.directory / "wandb"):
                self._ledger.mkdir(parents=True, exist_ok=True)
                wandb = set_up(self._asked)
                try:
                    self._mode = self._settle_mode(wandb)
                    self._drain(wandb)
                finally:
                    wandb.teardown()
        # SystemExit too: W&B's teardown exits with the status of its service.
        except (Exception, SystemExit) as problem:
            self._give_up(problem)

    def _drain(self, wandb: Any) -> None:
        earlier = self._earlier()
        while (run := self._jobs.get()) is not None:
            if self._abandoned.is_set() or self._mode == "disabled":
                return
            _remove(earlier.pop(run.id, ()))
            try:
                self._log(wandb, run)
            except Exception as problem:
                if self._mode != "online":
                    raise
                self._mode = "offline"
                self._say(f"W&B: logging online failed, going on offline ({_one_line(problem)})")
                # A service of its own again: the first one still holds the run's id.
                wandb.teardown()
                set_up("offline")
                _remove(self._earlier().get(run.id, ()))
                self._log(wandb, run)

    def _log(self, wandb: Any, run: Run) -> None:
        """Write one run and enter it in the ledger."""
        with wandb.init(
            dir=self.directory,
            mode=self._mode,
            project=self._project,
            entity=self._entity,
            group=self.sweep,
            job_type=run.job_type,
            id=run.id,
            name=run.name,
            config=run.config,
            reinit="create_new",
        ) as live:
            last = 0
            for last, values in run.history:
                live.log(values, step=last)
            if run.media:
                live.log(run.media(wandb), step=last)
            if run.folder:
                live.log_artifact(_artifact(wandb, run))
            live.summary.update(run.summary)
        # W&B reports a full disk nowhere but in its own log files.
        if not Path(live.settings.sync_file).stat().st_size:
            raise OSError(f"nothing was written to {live.settings.sync_file}")
        if run.job_type == "sweep":
            self.url = live.url
        (self._ledger / run.mark).touch()

    def _earlier(self) -> dict[str, list[Path]]:
        """Run id → what there is of an earlier log of it, to be replaced: the log of a run killed half-way, or the log
        and the entry in the ledger of one whose measurement is out of date."""
        found: dict[str, list[Path]] = {}
        for path in self._ledger.iterdir():
            found.setdefault(path.name.rpartition(".")[0], []).append(path)
        for path in self._ledger.parent.iterdir():
            if match := re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+?)(?:-\d{1,3})?", path.name):
                found.setdefault(match[1], []).append(path)
        return found

    def _settle_mode(self, wandb: Any) -> str:
        """online, offline or disabled. Looks for a key and asks its server only where online is possible."""
        if self._mode == "auto":
            self._mode = wandb.setup().settings.mode
        if self._mode in ("offline", "dryrun"):
            return "offline"
        if self._mode == "disabled":
            return "disabled"
        try:
            # Public, complete (environment, netrc, settings) and the preflight in one; True if the server agrees.
            if wandb.login(prompt=False):
                return "online"
        except Exception as problem:
            self._say(f"W&B: logging offline ({_one_line(problem)})")
            return "offline"
        if self._asked == "online":
            self._say("W&B: logging offline (no API key is configured: `wandb login` stores one)")
        return "offline"

    def _say(self, text: str) -> None:
        """A line for the user, unless nobody waits for the log any more."""
        if not self._abandoned.is_set():
            self._note(text)

    def _give_up(self, problem: BaseException) -> None:
        self._mode = "disabled"
        self._say(f"W&B: no longer logging, training goes on; running the sweep again logs it ({_one_line(problem)})")


@contextmanager
def own_environment(folder: Path) -> Iterator[None]:
    """W&B's side files inside the sweep, no telemetry of its own; the process's environment as before afterwards."""
    changed = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "DATA", "ARTIFACT")}
    changed["WANDB_ERROR_REPORTING"] = "false"
    # W&B leaves variables of its own behind, such as the address of a service that has ended.
    before = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("WANDB_")]:
            del os.environ[key]
        os.environ.update(before)


def set_up(mode: str) -> Any:
    """Import W&B and start its service. W&B then hooks sys.exit and sys.excepthook, which are not its own: undone."""
    import wandb

    hooks = sys.exit, sys.excepthook
    wandb.setup(settings=wandb.Settings(**LEAN, **({} if mode == "auto" else {"mode": mode})))
    sys.exit, sys.excepthook = hooks
    return wandb


def _artifact(wandb: Any, run: Run) -> Any:
    """A point's files. Never copied: what the store holds is never written to again."""
    artifact = wandb.Artifact(f"sae-{run.id}", type="sae", metadata=run.summary)
    assert run.folder is not None
    for path in sorted(run.folder.iterdir()):
        if path.is_file():
            artifact.add_file(str(path), policy="immutable")
    return artifact


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        # Not there yet; or not readable, which is found and said when the first run is written.
        return []


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _one_line(problem: BaseException) -> str:
    return (" ".join(str(problem).split()) or type(problem).__name__)[:200]
