"""The state in which a point's training ended, kept on request (`training.keep_state=true`), to go on from.

    <root>/states/<point without its steps>.<step>.<sha256>.safetensors

An example: a point of 4,000 steps leaves its state; the same point with 12,000 steps begins at step 4,000 and ends with
the bits that it would have had from the beginning. That holds where a longer training passes through the states of a
shorter one: the learning rate is constant after a warm-up in steps, and nothing else goes by the share of steps that
are done. Batches, draws and blocks of steps follow from the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_sweep.config.settings import Point
from sae_sweep.registry import get
from sae_sweep.saes.limits import BLOCK
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import OF_EACH, Look
from sae_sweep.store.store import Store
from sae_sweep.store.tensors import to_bytes
from sae_sweep.sweep.checkpoint import fits, metadata, of_device, put, read, step_of, tensors_of


def continues(point: Point) -> bool:
    """Whether a longer training of the point passes through the states of this one."""
    training = point.training
    in_steps = all(warmup == 0 or warmup > 1 for warmup in (training.lr_warmup, training.coefficient_warmup))
    revives = training.get("revival_until", 1.0) == 1.0
    by_share = training.k_start is not None or "p_end" in point.penalty.to_dict()
    return not get("schedule", training.schedule).by_share and in_steps and revives and not by_share


def keep(store: Store, stack: Stack, i: int, looks: Sequence[Look], device: str) -> None:
    """Write the state of SAE i, if it is asked for and of use: where a block of steps ends."""
    point = stack.points[i]
    if not (point.training.keep_state and continues(point)) or stack.step % BLOCK or i in stack.stopped:
        return
    own = [dataclasses.replace(look, **{name: getattr(look, name)[i : i + 1] for name in OF_EACH}) for look in looks]
    alone = dataclasses.replace(stack.part(slice(i, i + 1)), failed={}, stopped={})
    content = to_bytes(tensors_of(alone, own), metadata([point.id], device))
    digest = hashlib.sha256(content).hexdigest()[:16]
    store.write_checkpoint(_folder(store) / f"{_key(point)}.{stack.step}.{digest}.safetensors", content)


def begin(store: Store, stack: Stack, device: str) -> list[Look]:
    """Put a stack at step 0 where shorter trainings of all its points ended; what was seen of them, if it moved."""
    points = stack.points
    if not all(continues(point) for point in points):
        return []
    kept = [_kept(store, point, device) for point in points]
    common = set.intersection(*(set(each) for each in kept)) if _folder(store).exists() else set()
    for step in sorted(common, reverse=True):
        states = [read(store, each[step]) for each in kept]
        if all(state and fits(stack.part(slice(i, i + 1)), state, 1) for i, state in enumerate(states)):
            joined = {
                name: torch.cat([state[name] for state in states], dim=int(name in _LOOKS_BY_SAE))
                for name in states[0]
                if name != "looks.step" and all(name in state for state in states)
            }
            joined["looks.step"] = states[0]["looks.step"]
            return put(stack, joined, list(range(len(points))), step)
    return []


# [looks, 1] each.
_LOOKS_BY_SAE = {f"looks.{name}" for name in OF_EACH}


def _folder(store: Store) -> Path:
    return store.root / "states"


def _key(point: Point) -> str:
    """The id of the point, whatever its steps."""
    return dataclasses.replace(point, training=point.training.replace(steps=1)).id


def _kept(store: Store, point: Point, device: str) -> dict[int, Path]:
    """The states from which a point may go on on such a device, by their step."""
    found = _folder(store).glob(f"{_key(point)}.*.safetensors")
    return {
        step_of(path): path for path in found if 0 < step_of(path) <= point.training.steps and of_device(path, device)
    }
