"""The packs of a plan, one after the other, on this machine."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from sae_sweep.config.settings import Evaluation, Point
from sae_sweep.errors import EnvironmentProblem, UserError
from sae_sweep.store.store import Store
from sae_sweep.sweep.context import train_toys
from sae_sweep.sweep.cost import cores
from sae_sweep.sweep.events import Note, PointFailed, Say
from sae_sweep.sweep.memory import out_of_memory
from sae_sweep.sweep.pack import Machine, measure_again, run_pack
from sae_sweep.sweep.plan import Work, device_kind, stacks


def this_machine(device: str) -> Machine:
    """The device to run on and the threads to use. EnvironmentProblem if it is not there."""
    kind = device_kind(device)
    if kind == "cuda" and not torch.cuda.is_available():
        if device == "cuda":
            raise EnvironmentProblem("device=cuda: PyTorch sees no GPU here (device=cpu trains on the processor)")
        kind = "cpu"
    if kind == "cpu":
        torch.set_num_threads(1)  # our own threads take the cores (kernels/cpu/backend.py)
    return Machine(kind, cores("cpu"))


def execute(work: Work, store: Store, evaluation: Evaluation, machine: Machine, say: Say) -> None:
    """Train toys, measure what is stale, train the packs; what happens is said as it happens."""
    train_toys(work.toys, store, machine.device, say)
    for again in stacks(work.stale):
        measure_again(again, store, evaluation, machine, say)
    packs = work.plan.packs
    for number, pack in enumerate(packs, start=1):
        _run_or_split(pack, number, len(packs), store, evaluation, machine, say)


def _run_or_split(
    pack: Sequence[Point], number: int, packs: int, store: Store, evaluation: Evaluation, machine: Machine, say: Say
) -> None:
    """Run a pack; one that does not fit into memory is halved, down to single points."""
    try:
        run_pack(pack, number, packs, store, evaluation, machine, say)
        return
    except EnvironmentProblem:
        raise
    except UserError as error:  # nothing can be trained on such a toy
        for point in pack:
            say(PointFailed(point, None, str(error)))
        return
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if len(pack) == 1:
            say(PointFailed(pack[0], None, "out of memory, even alone"))
            return
    say(Note(f"a pack of {len(pack)} points does not fit into memory: trying halves"))
    # What was too much is still held, by tracebacks that hold each other.
    gc.collect()
    finished = store.ids("points")
    left = [point for point in pack if point.id not in finished]
    for half in (left[: len(left) // 2], left[len(left) // 2 :]):
        if half:
            _run_or_split(half, number, packs, store, evaluation, machine, say)
