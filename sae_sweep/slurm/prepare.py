"""What is left of a sweep and not on its way, cut into tasks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sae_sweep.config import overrides
from sae_sweep.config.grid import Sweep
from sae_sweep.config.launcher import Launcher
from sae_sweep.config.settings import toy_id
from sae_sweep.errors import UserError
from sae_sweep.slurm.limits import Room
from sae_sweep.slurm.status import live_points
from sae_sweep.slurm.tasks import Task, make_tasks
from sae_sweep.store.store import Store
from sae_sweep.sweep import run as runner
from sae_sweep.sweep.plan import Pack, Plan, stacks


@dataclass(frozen=True)
class Prepared:
    """`sweep` as the nodes will run it, `plan` what is left of it, `packs` what of that is in no live job."""

    sweep: Sweep
    store: Store
    plan: Plan
    packs: list[Pack]
    trained: set[str]
    launcher: Launcher
    tasks: list[Task]

    def cut(self, most: int) -> list[Task]:
        """The packs as at most so many tasks. UserError where one needs more memory than it is to have."""
        launcher, device = self.launcher, self.sweep.device
        workers = launcher.cpus if device == "cpu" else 1
        target = 60 * launcher.target_minutes
        tasks = make_tasks(self.packs, self.sweep.evaluation, device, target, most, self.trained, workers)
        largest = max((task.bytes for task in tasks), default=0)
        if device == "cpu" and largest > launcher.megabytes() * 2**20:
            needed = largest / 2**30
            raise UserError(f"launcher.memory={launcher.memory} is less than a task needs: {needed:.1f} GiB")
        return tasks

    def fitted(self, room: Room) -> list[Task]:
        """The tasks, made longer where Slurm takes fewer than they are; but not longer than a job may run."""
        most = room.jobs * self.launcher.per_job
        if most >= len(self.tasks) or not room.reason:
            return self.tasks
        longer = self.cut(most)
        fit = all(task.seconds <= 60 * self.launcher.time - self.launcher.signal_seconds for task in longer)
        return longer if fit else self.tasks


def prepare(sweep: Sweep) -> Prepared:
    """Look at the store and the queue; reads nothing but these and writes nothing. UserError: cannot be meant."""
    launcher = Launcher.of(sweep.launcher)
    if sweep.device == "auto":
        # What is here says nothing about the nodes.
        sweep = dataclasses.replace(sweep, device="cuda" if launcher.gpu_count else "cpu")
    if sweep.device == "cuda" and not launcher.gpu_count and "gres" not in launcher.additional:
        raise UserError("device=cuda needs launcher.gpus=1")
    overrides.check_writable(sweep.output_dir)
    runner.check_weights(sweep)
    store = Store(sweep.output_dir)
    work = runner.look(sweep, store)
    alive = live_points(store, sweep.name)
    packs = [tuple(point for point in pack if point.id not in alive) for pack in work.plan.packs]
    packs += stacks(point for point in work.stale if point.id not in alive)
    trained = {toy_id(point.toy) for point in sweep.points} - {toy_id(toy) for toy in work.toys}
    found = Prepared(sweep, store, work.plan, [pack for pack in packs if pack], trained, launcher, [])
    return dataclasses.replace(found, tasks=found.cut(launcher.max_tasks))
