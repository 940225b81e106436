"""How the planner and the store bear 100,000 points, without training any.

    python scripts/simulate_scale.py FOLDER [--points 100000] [--fsync]

Plans the grid of docs/scale.md and cuts it into tasks for Slurm, writes a record with files of the usual size for each
point, and reads them back as `status`, `run` and `results` do. FOLDER must not exist; it is left for you to delete.
Without --fsync nothing waits for the disk, as on a node whose filesystem acknowledges writes from memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from sae_sweep.config import overrides as config
from sae_sweep.config.columns import metric_columns
from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import measure_id, toy_id
from sae_sweep.slurm.status import status
from sae_sweep.slurm.submit import Submission
from sae_sweep.slurm.task import note
from sae_sweep.slurm.tasks import Task, make_tasks
from sae_sweep.store import results as frame
from sae_sweep.store.checksums import SCHEMA
from sae_sweep.store.store import Store
from sae_sweep.sweep.plan import plan
from sae_sweep.sweep.run import freeze

GPUS = 64
# The paper's toy; widths up to 16 times its vocabulary; 5 penalties of 10 coefficients; seeds of toy and SAE.
GRID = ["toy=max_of_k", "toy.seed=range(0,20)", "sae.width=64,128,256,512,1024", "site=pre_unembed,post_unembed"]
GRID += ["penalty=l1,sqrt,log1p,tanh,prod1p", "penalty.coefficient=0.01,0.03,0.1,0.2,0.3,0.5,1,2,3,10"]
FILES = {"config.yaml": 1_000, "latents.parquet": 12_000, "sae_weights.safetensors": 20_000, "cfg.json": 400}


def main() -> None:
    """Run the simulation and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--fsync", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    print("| what | figure |\n|---|---|")
    with timed("grid composed and checked"):
        overrides = [*GRID, f"seed=range(0,{-(-asked.points // 10_000)})", "device=cuda", "logger=none", "name=scale"]
        sweep = config.load([*overrides, f"output_dir={asked.folder}"], yes=True)
    sweep = dataclasses.replace(sweep, points=sweep.points[: asked.points])
    print(f"| points | {len(sweep.points):,} |")
    with timed("planned into packs"):
        whole = plan(sweep, set())
    with timed("cut into tasks of 30 min"):
        tasks = make_tasks(whole.packs, sweep.evaluation, "cuda", 1800, 1000)
    hours = sum(task.seconds for task in tasks) / 3600
    span = max(max(task.seconds for task in tasks) / 60, 60 * hours / GPUS)
    print(f"| packs, tasks | {len(whole.packs):,}, {len(tasks):,} |")
    print(f"| the planner's estimate | {hours:,.1f} GPU-hours: {span:.0f} min on {GPUS} GPUs |")
    print(f"| device memory of the largest task | {max(task.bytes for task in tasks) / 2**30:.1f} GiB |")
    store = Store(asked.folder)
    with mock.patch.object(os, "fsync", os.fsync if asked.fsync else lambda handle: None):
        write(sweep, store)
        submit(sweep, tasks, store)
    read(sweep, store)
    size = sum(int(path.stat().st_blocks) * 512 for path in asked.folder.rglob("*") if path.is_file())
    print(f"| files, disk | {(len(FILES) + 1) * len(sweep.points):,} files, {size / 2**30:.1f} GiB |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| memory of this process at most | {peak:.1f} GiB |")


def write(sweep: Sweep, store: Store) -> None:
    """Commit a record and files for every point."""
    content = {name: os.urandom(size) for name, size in FILES.items()}
    metrics = {name: 7 if column.kind == "Int64" else 0.123456789 for name, column in metric_columns().items()}
    row = {"loss": 1.234567, "fvu": 0.1234567, "l0": 2.345678, "gradient": 3.456789}
    curve = [{"step": step, **row} for step in range(40)]
    per_max = {"splits": [0] * 64, "duplicates": [0] * 64}
    common = {"schema": SCHEMA, "measure_id": measure_id(sweep.evaluation), "metrics": metrics, "untrained": metrics}
    common |= {"per_max": per_max, "curve": curve, "provenance": {"git_sha": "0" * 40}, "seconds": 1.0}
    with timed("sweep.yaml and points.txt written"):
        freeze(sweep, store)
    with timed("records written", len(sweep.points)):
        for point in sweep.points:
            record = {"id": point.id, "settings": point.to_dict(), **common}
            store.commit("points", point.id, record, content)


def submit(sweep: Sweep, tasks: Sequence[Task], store: Store) -> None:
    """Leave what a submission and its finished tasks leave."""
    listed = [{"points": [point.id for point in task.points], "seconds": task.seconds} for task in tasks]
    submission = Submission("once", "user", 0.0, "scale.once", listed, [{"job": "1", "count": len(tasks)}])
    folder = store.sweep(sweep.name) / "jobs" / submission.id
    folder.mkdir(parents=True)
    for number in range(len(tasks)):
        note(folder / f"task-{number}.json", state="done", failed=0, measure_id=measure_id(sweep.evaluation))
    content = json.dumps(dataclasses.asdict(submission)).encode()
    store.write_sweep_file(sweep.name, f"jobs/{submission.id}.json", content)


def read(sweep: Sweep, store: Store) -> None:
    """What the commands do with a store of this size."""
    with timed("ids listed, as `plan` and `--shard` do"):
        ids = store.ids("points")
    assert len(ids) == len(sweep.points)
    with timed("a rerun planned: nothing is left"):
        assert not plan(sweep, ids, trained_toys={toy_id(point.toy) for point in sweep.points}).packs
    with timed("`status`, by the notes of the tasks"):
        assert status(store, sweep.name).finished == len(ids)
    with timed("records read, as `status` does of tasks that are not over", len(ids)):
        assert len(store.records("points", ids)) == len(ids)
    with timed("and files looked at for changes, as `run` and `submit` do", len(ids)):
        assert len(store.records("points", ids, "changed")) == len(ids)
    with timed("every file read and its checksum verified", len(ids)):
        assert len(store.records("points", ids, "everything")) == len(ids)
    with timed("results table built and written"):
        frame.write(store, sweep.name)
    table = store.sweep(sweep.name) / "results.parquet"
    print(f"| results.parquet | {table.stat().st_size / 2**20:.1f} MiB |")


@contextmanager
def timed(what: str, count: int = 0) -> Iterator[None]:
    """A row of the table: how long the block took, and for each of `count`."""
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    each = f", {seconds / count * 1e3:.2f} ms each" if count else ""
    print(f"| {what} | {seconds:.1f} s{each} |", flush=True)


if __name__ == "__main__":
    main()
