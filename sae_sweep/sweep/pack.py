"""One pack: toy → stream → train the stack → measure → store, a point at a time. The same here and on a cluster."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from sae_sweep.config.settings import Evaluation, Point, canonical, measure_id
from sae_sweep.metrics.evaluate import Measurement
from sae_sweep.saes.curve import curve
from sae_sweep.saes.folding import fold
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.recipes.target_l0 import missed
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import Look, train
from sae_sweep.signals import Interrupted
from sae_sweep.store import provenance
from sae_sweep.store.store import OF_TRAINING, Store
from sae_sweep.sweep import states
from sae_sweep.sweep.backend import pick_backend
from sae_sweep.sweep.checkpoint import EVERY, Checkpoint
from sae_sweep.sweep.context import Ground
from sae_sweep.sweep.events import Note, PointDone, PointFailed, Say, TrainProgress
from sae_sweep.sweep.memory import out_of_memory


@dataclass(frozen=True)
class Machine:
    """Where a pack runs: on which device, with how many CPU threads, and how often it is written down how far it is."""

    device: str
    threads: int
    # Between two checkpoints of a stack in training.
    checkpoint_seconds: float = EVERY

    @contextmanager
    def pool(self) -> Iterator[ThreadPoolExecutor]:
        """Our own threads, each with a PyTorch that keeps to itself: so sums have one order whatever their number."""
        threads = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield threads
        finally:
            # Whoever interrupts a run does not wait for what its threads are at.
            threads.shutdown(wait=not isinstance(sys.exception(), Interrupted), cancel_futures=True)


def run_pack(
    points: Sequence[Point], number: int, packs: int, store: Store, evaluation: Evaluation, machine: Machine, say: Say
) -> None:
    """Train points of one stack key, measure each and commit it. `number` of `packs` is for the progress it says.

    A point that fails is said and left out; the others are committed all the same.
    """
    began = time.monotonic()
    ground = Ground(points[0], store, evaluation, machine.device, say)
    starts = [ground.start(point) for point in points]
    stack = Stack.start(points, starts, machine.device)
    checkpoint = Checkpoint(store, points, machine.device, machine.checkpoint_seconds)
    looks = checkpoint.restore(stack) or states.begin(store, stack, machine.device)
    if looks:
        say(Note(f"{len(points)} points go on from step {stack.step} of {points[0].training.steps}"))
    with machine.pool() as pool:
        backend = pick_backend(stack, pool, machine.threads, say)
        steps = train(stack, ground.stream, backend, pool, looks)
        _train(stack, steps, looks, checkpoint, number, packs, say)
        del backend  # its buffers are not needed to measure
    for i in torch.nonzero(~stack.flat.isfinite().all(1)).flatten().tolist():  # what the very last step broke
        stack.failed.setdefault(i, stack.step)
    failed = {i: (step, f"loss or parameters were not finite by step {step}") for i, step in stack.failed.items()}

    def finish(i: int) -> tuple[dict[str, bytes], dict[str, Any]] | Exception:
        try:
            folded = fold(_on_cpu(stack.parameters(i)), ground.mean, ground.scale)
            stored, control = saelens.to_files(points[i], folded), _control(stack, i)
            judged = _at_coefficient(points[i], control)
            measured = ground.measure(judged, saelens.from_files(stored[saelens.WEIGHTS]))
            untrained = untrained_rows[ground.start_key(points[i])].result()
            record = _record(points[i], evaluation, machine, measured, untrained, judged)
            own = [look for look in looks if look.step <= stack.stopped.get(i, look.step)]
            record["curve"] = list(curve(stack, own, i))
            record |= _revival(stack, i, measured) | control | _stopped(stack, i)
            if not math.isfinite(record["metrics"]["loss"]):
                raise ArithmeticError("the loss on the evaluation inputs is not finite")
            return _files(points[i], stored, measured), record
        except Exception as error:  # one point's failure must not take its pack-mates with it
            if out_of_memory(error):
                raise
            return error

    alive = [i for i in range(len(points)) if i not in failed]
    with checkpoint.between_steps(stack, looks), machine.pool() as pool:
        # Queued first, so that no thread ever waits for one that has not begun.
        untrained_rows = {
            ground.start_key(points[i]): pool.submit(ground.measure_start, points[i])
            for i in {ground.start_key(points[i]): i for i in alive}.values()
        }
        for i, result in zip(alive, pool.map(finish, alive), strict=True):
            if isinstance(result, Exception):
                failed[i] = (stack.step, " ".join(f"{type(result).__name__}: {result}".split()))
                continue
            files, record = result
            record["seconds"] = (time.monotonic() - began) / len(points)
            store.commit("points", points[i].id, record, files)
            states.keep(store, stack, i, looks, machine.device)
            say(PointDone(points[i], record))
            if looks and (wrong := missed(points[i], float(looks[-1].l0[i]))):
                say(Note(wrong))
    for i, (step, reason) in failed.items():
        say(PointFailed(points[i], step, reason))
    if checkpoint.folder.exists():
        checkpoint.clear(store.ids("points"))


def measure_again(points: Sequence[Point], store: Store, evaluation: Evaluation, machine: Machine, say: Say) -> None:
    """Measure finished points of one stack key under other evaluation settings, or by a newer measure; no training."""
    ground = Ground(points[0], store, evaluation, machine.device, say)
    for point in points:
        began = time.monotonic()
        trained = store.parse("points", point.id, saelens.WEIGHTS, saelens.from_files)
        before = store.read_record("points", point.id)
        kept: dict[str, Any] = {name: before[name] for name in ("curve", *OF_TRAINING) if name in before}
        judged = _at_coefficient(point, before)
        measured, untrained = ground.measure(judged, trained), ground.measure_start(point)
        record = _record(point, evaluation, machine, measured, untrained, judged)
        record |= {**kept, "seconds": time.monotonic() - began}
        files = {"latents.parquet": _parquet(measured)}
        store.commit_measure(point.id, measure_id(evaluation), record, files)
        say(PointDone(point, record))


def _train(
    stack: Stack,
    training: Iterator[Look],
    looks: list[Look],
    checkpoint: Checkpoint,
    number: int,
    packs: int,
    say: Say,
) -> None:
    """Train to the end; adds to `looks`, what was seen of the training so far."""
    steps = stack.points[0].training.steps
    for look in training:
        looks.append(look)
        fvu, l0 = float(look.fvu.nanmedian()), float(look.l0.nanmedian())
        with checkpoint.between_steps(stack, looks):
            say(TrainProgress(number, packs, len(stack.points), look.step, steps, fvu, l0))


def _revival(stack: Stack, i: int, measured: Measurement) -> dict[str, Any]:
    """How often latents of SAE i were revived, how many the last time, and how many that ever were live at the end."""
    if stack.points[i].training.revival == "none":
        return {}
    live = int(measured.latents.live.to_numpy()[stack.ever_revived[i].cpu().numpy()].sum())
    counts = {"revived": int(stack.revived[i]), "revived_last": int(stack.last_revived[i]), "revived_live": live}
    return {"revival": counts}


def _control(stack: Stack, i: int) -> dict[str, Any]:
    """The coefficient that SAE i came to, where training drove its L0 to a target."""
    point = stack.points[i]
    if point.training.target_l0 is None:
        return {}
    return {"control": {"final_coefficient": point.penalty.coefficient * float(stack.rescale[i])}}


def _stopped(stack: Stack, i: int) -> dict[str, Any]:
    """The step at which SAE i had settled, null where it took all its steps, if it was to stop there."""
    if stack.points[i].training.until == "steps":
        return {}
    return {"until": {"stopped_at": stack.stopped.get(i)}}


def _at_coefficient(point: Point, record: Mapping[str, Any]) -> Point:
    """The point with the coefficient by which it ended training: its loss is what it was then trained for."""
    if "control" not in record:
        return point
    coefficient = record["control"]["final_coefficient"]
    return dataclasses.replace(point, penalty=point.penalty.replace(coefficient=coefficient))


def _on_cpu(parameters: Parameters) -> Parameters:
    return parameters.map(lambda tensor: tensor.detach().cpu())


def _record(
    point: Point,
    evaluation: Evaluation,
    machine: Machine,
    measured: Measurement,
    untrained: Measurement,
    judged: Point,
) -> dict[str, Any]:
    """The record of a point; judged: the same with the coefficient that its losses are of."""
    return {
        "id": point.id,
        "settings": canonical(point).to_dict(),
        "measure_id": measure_id(evaluation),
        "evaluation": evaluation.to_dict(),
        "metrics": with_loss(measured, judged),
        "untrained": with_loss(untrained, judged),
        "per_max": measured.per_max,
        "provenance": provenance.collect(machine.device),
    }


def with_loss(measured: Measurement, point: Point) -> dict[str, float | int | None]:
    """The metrics with what was trained for: E‖r‖² + coefficient · E penalty."""
    squared_error, penalty = measured.metrics["squared_error"], measured.metrics["penalty_mean"]
    entropy = measured.metrics["winner_entropy"]
    assert squared_error is not None and penalty is not None and entropy is not None
    if point.penalty.name == "exclusive_pi":  # −log π needs all inputs; over them its mean is an entropy
        penalty += entropy
    # A penalty that overflows must not turn a coefficient of 0 into nan.
    cost = point.penalty.coefficient * penalty if point.penalty.coefficient else 0.0
    return {**measured.metrics, "penalty_mean": penalty, "loss": squared_error + cost}


def _files(point: Point, stored: dict[str, bytes], measured: Measurement) -> dict[str, bytes]:
    settings = json.loads(json.dumps(canonical(point).to_dict()))
    return {
        "config.yaml": yaml.safe_dump(settings, sort_keys=False).encode(),
        "latents.parquet": _parquet(measured),
        **stored,
    }


def _parquet(measured: Measurement) -> bytes:
    buffer = io.BytesIO()
    measured.latents.to_parquet(buffer, index=False)
    return buffer.getvalue()
