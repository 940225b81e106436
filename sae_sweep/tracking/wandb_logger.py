"""The process that logs a sweep to W&B beside the trainer: `python -m sae_sweep.tracking.wandb_logger SETTINGS`.

It reads runs from its standard input, a line of JSON each, `null` after the last, and writes them; a ledger in
`<sweep>/wandb/logged/` remembers which are written whole. What it has to tell is a line of JSON on its standard output:
{"note": a line for the user} or {"logged": the mark of a run}. Where its input ends without `null`, the process that
trains is gone, and so is this one at once.

It has the priority of any process, so that nobody waits for it long, but as long as training may go on it rests after
each run. To lower its priority instead would be for good: only root may raise it again. Once nothing more is to come,
what is left goes to a server several runs at a time.
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
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from sae_sweep.signals import ignore_signals
from sae_sweep.tracking.wandb_client import Run, own_environment, set_up, write

# While training may go on: seconds of rest for each that a run took of the processor, and at most, since the first run
# takes what is loaded for it.
REST, LONGEST_REST = 100, 3.0
# Runs sent at a time: a run waits for the server most of its time.
LANES = 8


class Logger:
    """Writes runs in the order in which they come; whatever goes wrong becomes one note.

    directory: the sweep's folder. mode: auto, online, offline; asked: what the user wrote, which may be less.
    timeout: see `set_up`.
    """

    def __init__(
        self, directory: str, sweep: str, project: str, entity: str | None, mode: str, asked: str, timeout: float
    ) -> None:
        self._folder = Path(directory) / "wandb"
        self._ledger = self._folder / "logged"
        self._where = {"dir": directory, "project": project, "entity": entity, "group": sweep}
        self._mode, self._asked, self._timeout = mode, asked, timeout
        self._runs: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        # Of `_earlier`, what was not removed yet.
        self._replaced: dict[str, list[Path]] = {}

    def receive(self) -> None:
        """Take the runs as they come; after the last there is nothing any more to rest for."""
        for line in sys.stdin.buffer:
            told = json.loads(line)
            self._runs.put(Run(**told) if told else None)
            if told is None:
                self._hurry.set()
                return
        os._exit(1)

    def work(self) -> None:
        """Write all runs."""
        try:
            with own_environment(self._folder):
                self._ledger.mkdir(parents=True, exist_ok=True)
                wandb = set_up(self._asked, self._timeout)
                try:
                    self._mode = self._settle_mode(wandb)
                    if self._mode != "disabled":
                        self._drain(wandb)
                finally:
                    wandb.teardown()
        # SystemExit too: W&B's teardown exits with the status of its service.
        except (Exception, SystemExit) as problem:
            note(f"W&B: no longer logging, training goes on; running the sweep again logs it ({_one_line(problem)})")

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


def main() -> None:
    """Log what comes in, with the settings of `Logger` as JSON for an argument."""
    # Whoever stops the process that trains stops this one by it.
    ignore_signals()
    logger = Logger(**json.loads(sys.argv[1]))
    threading.Thread(target=logger.receive, daemon=True).start()
    logger.work()
    # Not by the interpreter's own end: where the log was given up, the thread still reads.
    os._exit(0)


if __name__ == "__main__":
    main()
