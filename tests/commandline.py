"""Runs the command line as a user would: in this process, in a forked one, or in a fresh interpreter."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

from sae_sweep import signals
from sae_sweep.cli import app

# A toy and SAEs so small that training takes no time.
TINY = [
    "toy=small",
    "toy.d_vocab=5",
    "toy.k=2",
    "toy.steps=30",
    "training.steps=25",
    "training.batch_size=32",
    "sae.width=5",
    "logger=none",
]
# Two toys, four packs, sixteen points.
SEVERAL = [*TINY, "sae.width=5,7", "toy.seed=0,1", "penalty=l1,sqrt", "penalty.coefficient=0.1,1", "name=several"]
SEVERAL.remove("sae.width=5")


@dataclass(frozen=True)
class Result:
    """How a command ended; `raw` is its stdout as bytes."""

    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode()


def call(*words: str) -> Result:
    """Run a command in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
    handlers, threads = {number: signal.getsignal(number) for number in signals.SIGNALS}, torch.get_num_threads()
    try:
        with mock.patch.object(sys, "argv", ["sae-sweep", *words]), redirect_stdout(out), redirect_stderr(err):
            app.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Result(code, out.buffer.getvalue(), err.getvalue())


def fresh(*words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Result:
    """Run a command in an interpreter of its own."""
    end = subprocess.run(
        [sys.executable, "-m", "sae_sweep", *words], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True
    )
    return Result(end.returncode, end.stdout, end.stderr.decode())


def fresh_in_turn(*commands: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> list[Result]:
    """Run commands one after the other in one interpreter of their own, which takes seconds to load."""
    code = (
        "import json, sys\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from commandline import call\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    end = call(*words)\n"
        "    print(json.dumps([end.code, end.out, end.err]))"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    end = subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return [Result(code, out.encode(), err) for code, out, err in map(json.loads, end.stdout.splitlines())]


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "commandline", "warm"])


class Forked:
    """A command in a process forked from one that has everything imported: it is at work within milliseconds."""

    def __init__(self, words: Sequence[str], folder: Path, room: int | None = None) -> None:
        """`folder` takes its output as files; it works there too. Returns once it listens to signals.

        room: how many bytes of address space it may take beyond what it starts with, as by `ulimit -v`
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        listens, child_end = _SERVER.Pipe(duplex=False)
        self.process: ForkServerProcess = _SERVER.Process(target=_child, args=(list(words), folder, child_end, room))
        # The server takes neither this interpreter's sys.path nor pytest's.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            self.process.start()
        child_end.close()
        listens.recv_bytes()

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, timeout: float = 60) -> Result:
        """Its end."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {(self.folder / 'err').read_text()}"
        return Result(self.process.exitcode, (self.folder / "out").read_bytes(), (self.folder / "err").read_text())


def _child(words: list[str], folder: Path, parent: Connection, room: int | None) -> None:
    os.chdir(folder)
    if room is not None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + room, now + room))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["sae-sweep", *words]
    raise_on_signals = signals.raise_on_signals

    def ready() -> None:
        raise_on_signals()
        parent.send_bytes(b"ready")

    with mock.patch.object(signals, "raise_on_signals", ready):
        app.main()


def tables(root: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What a sweep's two table files hold, without what the machine decides."""
    folder = root / "sweeps" / name
    results, untrained = (pd.read_parquet(folder / f"{table}.parquet") for table in ("results", "untrained"))
    return results.drop(columns="seconds"), untrained.drop(columns="seconds")


def assert_same_tables(root: Path, expected: Path, name: str) -> None:
    """Every number of both tables, bit for bit."""
    for found, wanted in zip(tables(root, name), tables(expected, name), strict=True):
        pd.testing.assert_frame_equal(found, wanted, check_exact=True)
