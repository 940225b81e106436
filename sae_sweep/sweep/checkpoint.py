"""A stack in the middle of its training, on the disk, so that whoever takes up its points goes on with the same bits.

    <root>/checkpoints/<stack>/<pack>.<step>.<sha256>.safetensors

<stack> stands for the stack key, <pack> for the ids of the points. Everything that a step depends on lies in rows of
tensors, a row per SAE, and the batches follow from the step: so what was begun as one pack may go on as parts of it,
such as those points of it that were not measured yet.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from sae_sweep.config.settings import Point
from sae_sweep.saes.stack import ROWS, Stack
from sae_sweep.saes.train import OF_EACH, Look
from sae_sweep.signals import Interrupted
from sae_sweep.store.atomic import environment
from sae_sweep.store.store import Store
from sae_sweep.store.tensors import to_bytes
from sae_sweep.sweep.plan import stack_key, stacks

# Seconds of training between two checkpoints.
EVERY = 60.0
# Of the time, at most this share goes into writing them.
LARGEST_SHARE = 0.05


class Checkpoint:
    """The checkpoint of one pack. Only the same kind of device takes it up: another would end with other bits."""

    def __init__(self, store: Store, points: Sequence[Point], device: str, every: float = EVERY) -> None:
        """`every`: seconds between two checkpoints."""
        self.store, self.device, self.every = store, device, every
        self.ids = [point.id for point in points]
        self.folder = _folder(store, points[0])
        self._name = _digest(" ".join(self.ids))
        self._next = time.monotonic() + every

    def restore(self, stack: Stack) -> list[Look]:
        """Put the stack where its training was left, if it was begun; returns what was seen of it so far."""
        for path in sorted(self.folder.glob("*.safetensors"), key=step_of, reverse=True):
            ids = _ids(path, self.device)
            ours = set(self.ids) <= set(ids)
            # By its name it is of this pack, whatever has become of what it says.
            if not ours and not path.name.startswith(f"{self._name}."):
                continue
            tensors = read(self.store, path)
            if ours and tensors:
                rows = [ids.index(id) for id in self.ids]
                if fits(stack, tensors, len(ids)):
                    return put(stack, tensors, rows, step_of(path))
        return []

    def save(self, stack: Stack, looks: Sequence[Look]) -> None:
        """Write the stack as it stands between two steps, in place of what was written before."""
        began = time.monotonic()
        content = to_bytes(tensors_of(stack, looks), metadata(self.ids, self.device))
        name = f"{self._name}.{stack.step}.{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        self.store.write_checkpoint(self.folder / name, content)
        for older in self.folder.glob(f"{self._name}.*.safetensors"):
            if older.name != name:
                older.unlink(missing_ok=True)
        self._next = time.monotonic() + max(self.every, (time.monotonic() - began) / LARGEST_SHARE)

    @contextmanager
    def between_steps(self, stack: Stack, looks: Sequence[Look]) -> Iterator[None]:
        """The stack does not change inside: it is saved if its time has come, or if an interruption does."""
        if time.monotonic() >= self._next:
            self.save(stack, looks)
        try:
            yield
        except Interrupted:
            self.save(stack, looks)
            raise

    def clear(self, finished: Collection[str]) -> None:
        """Remove it, and any other of the same stack whose points are all finished."""
        over = {*self.ids, *finished}
        for path in self.folder.glob("*.safetensors"):
            if over.issuperset(_ids(path)):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # others are at work there, or nothing ever was
            self.folder.rmdir()
            self.folder.parent.rmdir()


def steps_kept(store: Store, points: Sequence[Point], device: str) -> int:
    """How far the points' training is on the disk: the steps behind their checkpoints, summed over the points."""
    kept: dict[str, int] = {}
    for stack in stacks(points):
        for path in _folder(store, stack[0]).glob("*.safetensors"):
            kept |= {id: max(step_of(path), kept.get(id, 0)) for id in _ids(path, device)}
    return sum(kept.get(point.id, 0) for point in points)


def read(store: Store, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, none if it is gone; one that is damaged is set aside and named."""
    try:
        inode, content = path.stat().st_ino, path.read_bytes()
    except FileNotFoundError:  # another process has finished these points, or is further
        return {}
    damage = "it does not match its checksum"
    if hashlib.sha256(content).hexdigest()[:16] == path.name.split(".")[2]:
        try:
            return load_tensors(content)
        except SafetensorError:
            damage = "it holds no tensors"
    with environment(path, "set aside"):
        store.set_aside(path, inode, damage)
    return {}


def metadata(ids: Sequence[str], device: str) -> dict[str, str]:
    """What stands in a checkpoint beside tensors."""
    return {"ids": json.dumps(ids), "device": device}


def of_device(path: Path, device: str) -> bool:
    """Whether a checkpoint is of such a device."""
    return bool(_ids(path, device))


def _folder(store: Store, point: Point) -> Path:
    return store.root / "checkpoints" / _digest(repr(stack_key(point)))


def tensors_of(stack: Stack, looks: Sequence[Look]) -> dict[str, Tensor]:
    """The stack as it stands between two steps, and what was seen of it."""
    tensors = {name: getattr(stack, name).detach().cpu().contiguous() for name in ROWS}
    for name, steps in (("failed", stack.failed), ("stopped", stack.stopped)):
        tensors[name] = torch.tensor([steps.get(i, -1) for i in range(len(stack.points))])
    if looks:
        tensors["looks.step"] = torch.tensor([look.step for look in looks])
        tensors |= {f"looks.{name}": torch.stack([getattr(look, name) for look in looks]) for name in OF_EACH}
    return tensors


def fits(stack: Stack, tensors: dict[str, Tensor], n: int) -> bool:
    """Whether these are `n` rows of such a stack: a store may come from anywhere."""
    for name in ROWS:
        own, found = getattr(stack, name), tensors.get(name)
        if found is None or (found.dtype, found.shape) != (own.dtype, (n, *own.shape[1:])):
            return False
    return "failed" in tensors and all(steps.shape == (n,) for steps in _ended(tensors))


def _ended(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """By which step each SAE failed or stopped, −1 where it did not: one from before any could stop knows of none."""
    return tensors["failed"], tensors.get("stopped", torch.full_like(tensors["failed"], -1))


def put(stack: Stack, tensors: dict[str, Tensor], rows: list[int], step: int) -> list[Look]:
    """Give a stack those rows of the tensors, and its step; what was seen of these SAEs so far."""
    for name in ROWS:
        getattr(stack, name).copy_(tensors[name][rows])
    stack.failed, stack.stopped = (
        {i: at for i, at in enumerate(steps[rows].tolist()) if at >= 0} for steps in _ended(tensors)
    )
    stack.step = step
    if "looks.step" not in tensors:
        return []
    # What a checkpoint is too old to know is not known.
    unknown = torch.full_like(tensors["looks.loss"], torch.nan)
    columns = [tensors.get(f"looks.{name}", unknown)[:, rows] for name in OF_EACH]
    return [Look(int(at), *(column[n] for column in columns)) for n, at in enumerate(tensors["looks.step"])]


def _ids(path: Path, device: str | None = None) -> list[str]:
    """The points of a checkpoint; none if it is gone, broken, or of another kind of device."""
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = file.metadata() or {}
        return [] if device not in (None, about["device"]) else [str(id) for id in json.loads(about["ids"])]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return []


def step_of(path: Path) -> int:
    """The step that a checkpoint is of, by its name."""
    part = path.name.split(".")[1]
    return int(part) if part.isdigit() else -1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
