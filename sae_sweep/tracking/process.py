"""The process that logs a sweep to W&B beside the trainer: `python -m sae_sweep.tracking.process SETTINGS`.

It reads runs from its standard input, a line of JSON each, `null` after the last, and writes them; a ledger in
`<sweep>/wandb/logged/` remembers which are written whole. What it has to tell is a line of JSON on its standard output:
{"note": a line for the user} or {"logged": the mark of a run}. Where its input ends without `null`, the process that
trains is gone, and so is this one at once.

It has the priority of any process, so that nobody waits for it long, but as long as training may go on it rests after
each run. To lower its priority instead would be for good: only root may raise it again. Once nothing more is to come,
what is left goes to a server several runs at a time.

Nothing else talks to W&B's own client, which is used lean and keeps its side files inside the sweep.
"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_sweep.signals import ignore_signals

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
    "finish_timeout_raises": True,
}
# Seconds. A server that takes longer to start a run, or to take the rest of it at its end, means offline from there on.
TIMEOUT = 10.0
# While training may go on: seconds of rest for each that a run took of the processor, and at most, since the first run
# takes what is loaded for it.
REST, LONGEST_REST = 100, 3.0
# Runs sent at a time: a run waits for the server most of its time.
LANES = 8


@dataclass(frozen=True)
class Run:
    """A run to be logged, as plain data. `history`: (step, values)."""

    id: str
    # Of the content: the same run with another fingerprint is logged anew in its place.
    fingerprint: str
    name: str
    job_type: str
    config: dict[str, Any]
    history: Sequence[tuple[int, dict[str, Any]]]
    summary: dict[str, Any]
    # Key → what `_drawn` makes of it.
    media: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Its files become an artifact.
    folder: str | None = None

    @property
    def mark(self) -> str:
        """Its entry in the ledger of what was logged."""
        return f"{self.id}.{self.fingerprint}"


class Writer:
    """Writes runs in the order in which they come; whatever goes wrong becomes one note.

    Args:
        directory: the sweep's folder, which holds the ledger.
        runs: what `wandb.init` is told of every run: where its files lie, project, entity, group, tags, notes.
        mode: auto, online, offline; asked: what the user wrote, which may be less.
        timeout: see `set_up`.
    """

    def __init__(self, directory: str, runs: dict[str, Any], mode: str, asked: str, timeout: float) -> None:
        self._folder = Path(runs["dir"]) / "wandb"
        self._side_files = Path(directory) / "wandb"
        self._ledger = self._side_files / "logged"
        self._where = runs
        self._mode, self._asked, self._timeout = mode, asked, timeout
        self._runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        # Of `_earlier`, what was not removed yet.
        self._replaced: dict[str, list[Path]] = {}

    def receive(self) -> None:
        """Take the runs as they come; after the last there is nothing any more to rest for."""
        for line in sys.stdin.buffer:
            message = json.loads(line)
            self._runs.put(Run(**message) if message else None)
            if message is None:
                self._hurry.set()
                return
        os._exit(1)

    def work(self) -> None:
        """Write all runs."""
        try:
            with own_environment(self._side_files):
                self._ledger.mkdir(parents=True, exist_ok=True)
                # W&B would take a temporary folder in place of one that it cannot write.
                self._folder.mkdir(parents=True, exist_ok=True)
                wandb = set_up(self._asked, self._timeout)
                try:
                    self._mode = self._settle_mode(wandb)
                    if self._mode != "disabled":
                        self._drain(wandb)
                finally:
                    wandb.teardown()
        # SystemExit too: W&B's teardown exits with the status of its service.
        except (Exception, SystemExit) as problem:
            note(stopped(_one_line(problem)))

    def _drain(self, wandb: Any) -> None:
        self._replaced = self._earlier()
        while (run := self._runs.get()) is not None:
            if self._hurry.is_set():
                self._write(wandb, [run, *iter(self._runs.get, None)])
                break
            began = time.process_time()
            self._write(wandb, [run])
            self._hurry.wait(min(REST * (time.process_time() - began), LONGEST_REST))

    def _write(self, wandb: Any, runs: Sequence[Run]) -> None:
        """Write runs, online as long as a server takes them."""
        if self._mode == "online":
            runs = self._send(wandb, runs)
            if not runs:
                return
            self._mode = "offline"
            # A service of its own again: the first one still holds the ids of runs.
            wandb.teardown()
            set_up("offline", self._timeout)
            self._replaced = self._earlier()
        for run in runs:
            self._log(wandb, run)

    def _send(self, wandb: Any, runs: Sequence[Run]) -> list[Run]:
        """Write runs online, several at a time; returns those that no server took. None begins after the first such."""
        problems: list[Exception] = []

        def taken(run: Run) -> bool:
            try:
                if not problems:
                    self._log(wandb, run)
                    return True
            except Exception as problem:
                problems.append(problem)
            return False

        # Files wait for the line to the server, not for its answers: a run then has the line to itself.
        with ThreadPoolExecutor(1 if any(run.folder for run in runs) else LANES) as lanes:
            left = [run for run, sent in zip(runs, lanes.map(taken, runs), strict=True) if not sent]
        if problems:
            note(f"W&B: logging online failed, going on offline ({_one_line(problems[0])})")
        return left

    def _log(self, wandb: Any, run: Run) -> None:
        """Write one run in place of what there is of it, enter it in the ledger, and tell."""
        _remove(self._replaced.pop(run.id, ()))
        write(wandb, run, mode=self._mode, **self._where)
        (self._ledger / run.mark).touch()
        tell(logged=run.mark)

    def _earlier(self) -> dict[str, list[Path]]:
        """Run id → what there is of an earlier log of it, to be replaced: the log of a run killed half-way, or the log
        and the entry in the ledger of one whose measurement is out of date."""
        found: dict[str, list[Path]] = {}
        for path in self._ledger.iterdir():
            found.setdefault(path.name.rpartition(".")[0], []).append(path)
        for path in self._folder.iterdir():
            if match := re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+?)(?:-\d{1,3})?", path.name):
                found.setdefault(match[1], []).append(path)
        return found

    def _settle_mode(self, wandb: Any) -> str:
        """online, offline or disabled. Looks for a key and asks its server only where online is possible."""
        mode = wandb.setup().settings.mode if self._mode == "auto" else self._mode
        if mode in ("offline", "dryrun"):
            return "offline"
        if mode == "disabled":
            return "disabled"
        try:
            # Public, complete (environment, netrc, settings) and the preflight in one; True if the server agrees.
            if wandb.login(prompt=False):
                return "online"
        except Exception as problem:
            note(f"W&B: logging offline ({_one_line(problem)})")
            return "offline"
        if self._asked == "online":
            note("W&B: logging offline (no API key is configured: `wandb login` stores one)")
        return "offline"


def stopped(why: str) -> str:
    """What the user is told where no more can be logged. True whether or not anything is still training."""
    return f"W&B: logging stopped ({why}); nothing trained is lost, and running the sweep again logs what is missing"


def note(text: str) -> None:
    """A line for the user."""
    tell(note=text)


def tell(**what: str) -> None:
    """Say something to the process that trains, which may be gone. In one piece, since others may speak as well."""
    with suppress(OSError):
        print(json.dumps(what) + "\n", end="", flush=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _one_line(problem: BaseException) -> str:
    return (" ".join(str(problem).split()) or type(problem).__name__)[:200]


@contextmanager
def own_environment(folder: Path) -> Iterator[None]:
    """W&B's side files inside the sweep, no telemetry of its own; the process's environment as before afterwards."""
    changed = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "DATA", "ARTIFACT")}
    # The user's own come first.
    changed = {key: value for key, value in changed.items() if key not in os.environ}
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


def set_up(mode: str, timeout: float = TIMEOUT) -> Any:
    """Import W&B and start its service. W&B then hooks sys.exit and sys.excepthook, which are not its own: undone.

    timeout: seconds that a server has to start a run, and again to take the rest of it at its end.
    """
    import wandb

    hooks = sys.exit, sys.excepthook
    settings = {**LEAN, "init_timeout": timeout, "finish_timeout": timeout}
    wandb.setup(settings=wandb.Settings(**settings, **({} if mode == "auto" else {"mode": mode})))
    sys.exit, sys.excepthook = hooks
    return wandb


def write(wandb: Any, run: Run, **where: Any) -> None:
    """Write one run, whole. `where`: the mode, and what else `wandb.init` is told of every run."""
    with wandb.init(
        id=run.id, name=run.name, job_type=run.job_type, config=run.config, reinit="create_new", **where
    ) as live:
        last = 0
        for last, values in run.history:
            live.log(values, step=last)
        if run.media:
            live.log({key: _drawn(wandb, media) for key, media in run.media.items()}, step=last)
        if run.folder:
            live.log_artifact(_artifact(wandb, run))
        live.summary.update(run.summary)
    # W&B reports a full disk nowhere but in its own log files.
    if not Path(live.settings.sync_file).stat().st_size:
        raise OSError(f"nothing was written to {live.settings.sync_file}")


def _drawn(wandb: Any, media: Mapping[str, Any]) -> Any:
    """A table or a figure as W&B's own object."""
    if "columns" in media:
        return wandb.Table(columns=media["columns"], data=media["rows"])
    from plotly.graph_objects import Figure

    return wandb.Plotly(Figure(media["figure"], skip_invalid=True))


def _artifact(wandb: Any, run: Run) -> Any:
    """A point's files, by one name in every sweep. Never copied: what the store holds is never written to again."""
    assert run.folder is not None
    folder = Path(run.folder)
    # The numbers are the run's: W&B takes a hundred keys here.
    artifact = wandb.Artifact(f"sae-{folder.name}", type="sae", description=run.name)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            artifact.add_file(str(path), policy="immutable")
    return artifact


def main() -> None:
    """Log what comes in, with the arguments of `Writer` as JSON for an argument."""
    # Whoever stops the process that trains stops this one by it.
    ignore_signals()
    writer = Writer(**json.loads(sys.argv[1]))
    threading.Thread(target=writer.receive, daemon=True).start()
    writer.work()
    # Not by the interpreter's own end: where the log was given up, the thread still reads.
    os._exit(0)


if __name__ == "__main__":
    main()
