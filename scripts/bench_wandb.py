"""What logging to W&B costs a sweep, against a server on this machine that works, and others that let down.

    python scripts/bench_wandb.py [--repeats 3] [--modes none "answers 429"]
    python scripts/bench_wandb.py --share
    python scripts/bench_wandb.py --rest

The quickstart, each time anew but for its toy: seconds from the start of the command until the last point lies in the
store (training), and until the command ends; and the processor time of it all, W&B's own service included. The first is
what must not grow; the second has in it what is logged after the training. The server has a process of its own, at the
lowest priority, since a real one has a machine of its own.

With --share: what logging takes of the processor while training goes on, which other work on the machine does not blur.
80 points of 40 rows are handed over at once; then the logger works beside nothing at all for half a minute.

With --rest: how long the end of a short sweep waits for its log, 80 points of 40 rows: from before the logger starts
until all is logged; the server has the priority of any process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "tracking"))
from processes import descendants
from test_wandb import record
from wandb_server import KEY, serving

from sae_sweep.config.logger import Logger
from sae_sweep.config.settings import Penalty, Point
from sae_sweep.tracking.logging import WandbLog

MODES = ("none", "offline", "online", "online, 50 ms away", "answers 500", "answers 429", "hangs", "no server")


@contextmanager
def server(mode: str, priority: int = 19) -> Iterator[dict[str, str]]:
    """The environment of a run in this mode. `priority`: the niceness of the server."""
    if mode in ("none", "offline"):
        yield {}
        return
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, mode, priority))
    process.start()
    try:
        url = here.recv()
        yield {"WANDB_BASE_URL": "http://127.0.0.1:9" if mode == "no server" else url, "WANDB_API_KEY": KEY}
    finally:
        process.terminate()
        process.join()


def _serve(there: Connection, mode: str, priority: int) -> None:
    os.nice(priority)
    # Linux shares out processors by session first.
    os.setsid()
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(priority))
    with serving() as found:
        if mode.startswith("answers"):
            # Runs begin; whatever they then send is refused.
            found.fails, found.status = "file_stream CreateArtifact CreateRunFiles", int(mode.split()[1])
        if mode.endswith("away"):
            found.delay = 0.05
        if mode == "hangs":
            found.hangs = "file_stream"
        there.send(found.url)
        time.sleep(10**6)


def measure(mode: str, toys: Path, words: list[str]) -> tuple[float, float, float]:
    """Seconds until the last point is stored, until the end, and of processors."""
    with tempfile.TemporaryDirectory() as folder, server(mode) as environment:
        if toys.exists():
            shutil.copytree(toys, Path(folder) / "outputs" / "toys")
        logger = ["logger=none"] if mode == "none" else [f"logger.mode={'offline' if mode == 'offline' else 'online'}"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        command = [sys.executable, "-m", "sae_sweep", "run", "experiment=quickstart", *logger, *words, "--json"]
        began, clock, used = time.time(), time.perf_counter(), processors()
        subprocess.run(command, cwd=folder, env={**clean, **environment}, check=True, capture_output=True)
        whole = time.perf_counter() - clock
        records = (Path(folder) / "outputs" / "points").glob("*/record.json")
        trained = max(record.stat().st_mtime for record in records) - began
        if not toys.exists():
            shutil.copytree(Path(folder) / "outputs" / "toys", toys)
        return trained, whole, processors() - used


def share(mode: str) -> list[str]:
    """Processor time of the training process for 80 points, of the logger in 12 s, and its share of a core then."""
    with tempfile.TemporaryDirectory() as folder, server(mode) as environment, mock.patch.dict(os.environ, environment):
        how, began = "offline" if mode == "offline" else "online", time.process_time()
        log = WandbLog(Path(folder) / "outputs/sweeps/s", "s", Logger(project="p", mode=how), note=lambda text: None)
        log.start()
        hand_over(log)
        own = time.process_time() - began
        assert log._logger is not None
        time.sleep(12)
        first = _used(log._logger.pid)
        time.sleep(18)
        later = (_used(log._logger.pid) - first) / 18
        log.close(0.1)
    return [mode, f"{1000 * own:.0f} ms", f"{first:.1f} s", f"{later:.1%}"]


def rest(mode: str) -> float:
    """Seconds until 80 points are logged."""
    with (
        tempfile.TemporaryDirectory() as folder,
        server(mode, priority=0) as environment,
        mock.patch.dict(os.environ, environment),
    ):
        how, began = "offline" if mode == "offline" else "online", time.perf_counter()
        with WandbLog(Path(folder) / "outputs/sweeps/s", "s", Logger(project="p", mode=how), note=print) as log:
            hand_over(log)
        return time.perf_counter() - began


def hand_over(log: WandbLog) -> None:
    """80 points of 40 rows."""
    for coefficient in range(80):
        curve = [{"step": step, "loss": 9.0 - step / 1000, "fvu": 0.5, "l0": 3.0} for step in range(40)]
        log.log_point({**record(Point(penalty=Penalty("l1", 1.0 + coefficient))), "curve": curve})


def _used(process: int) -> float:
    """Processor seconds so far of a process and those that it has started."""
    ticks = 0
    for each in (process, *descendants(process)):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def processors() -> float:
    """Processor seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("overrides", nargs="*", help="further overrides, such as training.steps=300")
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--rest", action="store_true")
    asked = parser.parse_args()
    if asked.rest:
        print("| W&B | 80 runs |\n|---|---|")
        for mode in asked.modes:
            if mode != "none":
                found = [rest(mode) for _ in range(asked.repeats)]
                print(f"| {mode} | {statistics.median(found):.1f} s |", flush=True)
        return
    if asked.share:
        print("| W&B | training process, 80 points | logger, first 12 s | then, of a core |\n|---|---|---|---|")
        for mode in asked.modes:
            if mode != "none":
                print(f"| {' | '.join(share(mode))} |", flush=True)
        return
    seconds: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in asked.modes}
    with tempfile.TemporaryDirectory() as folder:
        toys = Path(folder) / "toys"
        measure("none", toys, asked.overrides)  # trains the toy and compiles the kernels
        for repeat in range(asked.repeats):
            # In turns and in both directions, so that a machine that slows down slows all of them.
            for mode in asked.modes if repeat % 2 == 0 else reversed(asked.modes):
                seconds[mode].append(measure(mode, toys, asked.overrides))
                print(mode, *(f"{value:.2f}" for value in seconds[mode][-1]), file=sys.stderr, flush=True)
    none = [statistics.median(values) for values in zip(*seconds[asked.modes[0]], strict=True)]
    print("| W&B | until the last point | until the end | processor time |\n|---|---|---|---|")
    for mode, found in seconds.items():
        medians = [statistics.median(values) for values in zip(*found, strict=True)]
        cells = [f"{value:.1f} s ({value / base - 1:+.1%})" for value, base in zip(medians, none, strict=True)]
        print(f"| {mode} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
