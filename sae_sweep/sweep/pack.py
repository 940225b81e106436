"""One pack: toy → stream → train the stack → measure → store, a point at a time. The same here and on a cluster."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import yaml
from safetensors.torch import load as load_tensors
from torch import Tensor

from sae_sweep import provenance
from sae_sweep.interruption import Interrupted
from sae_sweep.measures.active import Active
from sae_sweep.measures.measure import Measurement, measure
from sae_sweep.saes import export
from sae_sweep.saes.architectures import ARCHITECTURES
from sae_sweep.saes.kernels import LISTED, Backend, pick_backend
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.penalties import penalty_value
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.starts import start
from sae_sweep.saes.train import Look, train
from sae_sweep.schema import Evaluation, Point, Sae, Toy, canonical, measure_id, toy_id
from sae_sweep.store import Store, StoreDamaged
from sae_sweep.sweep.checkpoint import EVERY, Checkpoint
from sae_sweep.sweep.events import Event, Note, PointDone, PointFailed, ToyProgress, TrainProgress
from sae_sweep.tensors import to_bytes
from sae_sweep.toys import model
from sae_sweep.toys.cells import Factored
from sae_sweep.toys.stream import EvaluationInputs, Stream, feature_means

# Rows kept of a training curve.
CURVE_ROWS = 40
# Codes in the largest dense tensor of a measurement.
DENSE_NUMBERS = 1 << 22
# The inputs that class means are taken over: all of them, or a million drawn.
CLASS_INPUTS = Evaluation(inputs=1 << 20)

# What a RuntimeError says that is one of too little memory.
_OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "can't start new thread")

Say = Callable[[Event], None]


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
    looks = checkpoint.restore(stack)
    if looks:
        say(Note(f"{len(points)} points go on from step {stack.step} of {points[0].training.steps}"))
    with machine.pool() as pool:
        backend = pick_backend(stack, pool, machine.threads)
        _train(stack, ground.stream, backend, looks, checkpoint, number, packs, say)
    for i in torch.nonzero(~stack.flat.isfinite().all(1)).flatten().tolist():  # what the very last step broke
        stack.failed.setdefault(i, stack.step)
    failed = {i: (step, f"loss or parameters were not finite by step {step}") for i, step in stack.failed.items()}

    def finish(i: int) -> tuple[dict[str, bytes], dict[str, Any]] | Exception:
        try:
            folded = export.fold(_on_cpu(stack.parameters(i)), ground.mean, ground.scale)
            stored = export.to_files(points[i], folded)
            measured = ground.measure(points[i], export.from_files(stored[export.WEIGHTS]))
            untrained = untrained_rows[ground.start_key(points[i])].result()
            record = _record(points[i], evaluation, machine, measured, untrained)
            record["curve"] = list(_curve(looks, i))
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
            say(PointDone(points[i], record))
    for i, (step, reason) in failed.items():
        say(PointFailed(points[i], step, reason))
    if checkpoint.folder.exists():
        checkpoint.clear(store.ids("points"))


def measure_again(points: Sequence[Point], store: Store, evaluation: Evaluation, machine: Machine, say: Say) -> None:
    """Measure finished points of one stack key under other evaluation settings, or by a newer measure; no training."""
    ground = Ground(points[0], store, evaluation, machine.device, say)
    for point in points:
        began = time.monotonic()
        trained = store.parse("points", point.id, export.WEIGHTS, export.from_files)
        measured, untrained = ground.measure(point, trained), ground.measure_start(point)
        record = _record(point, evaluation, machine, measured, untrained)
        record |= {"curve": store.read_record("points", point.id)["curve"], "seconds": time.monotonic() - began}
        files = {"latents.parquet": _parquet(measured)}
        store.commit_measure(point.id, measure_id(evaluation), record, files)
        say(PointDone(point, record))


class Ground:
    """What the points of a pack share: the toy, its activations, its cells, and the inputs they are measured on."""

    def __init__(self, point: Point, store: Store, evaluation: Evaluation, device: str, say: Say) -> None:
        toy = trained_toy(point.toy, store, device, say).to(device)
        self.evaluation, self.device, self.distribution = evaluation, device, point.distribution
        self.stream = Stream(
            toy, point.site.name, point.distribution, point.data_seed, point.training.batch_size, device
        )
        self.inputs = EvaluationInputs(
            toy, point.site.name, point.distribution, self.stream.mean, self.stream.scale, evaluation
        )
        self.mean, self.scale = self.stream.mean.cpu(), self.stream.scale
        self._starts: dict[tuple[Sae, int], Parameters] = {}

    def start(self, point: Point) -> Parameters:
        """The point's start; SAEs that differ in penalty and coefficient alone share one."""
        key = (point.sae, point.seed)
        if key not in self._starts:
            self._starts[key] = start(point, self)
        return self._starts[key]

    def exemplars(self, count: int, seed: int) -> Tensor:
        """Independent draws of activations [count, d]."""
        return self.stream.exemplars(count, seed).cpu()

    def covariance(self) -> Tensor:
        """Covariance of the activations [d, d]."""
        return self.stream.covariance()

    def class_means(self, partition: str) -> tuple[Tensor, Tensor]:
        """Mean activation [classes, d] and probability [classes] of a partition's classes, or of planted features.

        Over inputs of their own: what an SAE is trained to must not depend on how it will be measured.
        """
        inputs = EvaluationInputs(
            self.stream.model, self.stream.site, self.distribution, self.stream.mean, self.stream.scale, CLASS_INPUTS
        )
        if inputs.cells is None:
            return feature_means(inputs)
        if "+" in partition:
            return self._additive_means(inputs.cells, *partition.split("+"))
        classes = inputs.cells.partition(partition)
        of_cell = torch.as_tensor(classes.of_cell)
        sums = torch.zeros(classes.count, len(self.mean), dtype=torch.float64)
        mass = torch.zeros(classes.count, dtype=torch.float64)
        for chunk in inputs:
            members, weight = of_cell[chunk.cell.cpu()], chunk.weight.cpu()
            sums.index_add_(0, members, chunk.x.cpu().double() * weight[:, None])
            mass.index_add_(0, members, weight)
        return sums / mass.clamp_min(1e-300)[:, None], mass

    def _additive_means(self, cells: Factored, first: str, second: str) -> tuple[Tensor, Tensor]:
        """Means uᵢ of the classes of one factor and vⱼ of another such that uᵢ + vⱼ fits the mean of both best.

        Least squares in the classes' probabilities, with Σ P(j)·vⱼ = 0; u above v, each with its class's probability.
        """
        means, mass = self.class_means(first + second)
        of_both = cells.partition(first + second).of_cell
        parts = [cells.partition(name) for name in (first, second)]
        design = torch.zeros(len(mass), sum(part.count for part in parts), dtype=torch.float64)
        for part, column in zip(parts, (0, parts[0].count), strict=True):
            design[torch.as_tensor(of_both), torch.as_tensor(part.of_cell + column)] = 1
        root = mass.sqrt()[:, None]
        fitted = torch.linalg.lstsq(root * design, root * means, driver="gelsd").solution
        chance = design.T @ mass
        u, v = fitted.split([part.count for part in parts])
        centre = chance[len(u) :] @ v
        return torch.cat([u + centre, v - centre]), chance

    def measure(self, point: Point, folded: Parameters) -> Measurement:
        """Measure an SAE as it is stored, so that a later measurement of the stored file gives the same bits."""
        parameters = export.unfold(folded, self.mean, self.scale)
        sae = PointSae(point, Parameters(*(getattr(parameters, f.name).to(self.device) for f in _FIELDS)))
        penalty = point.penalty
        return measure(
            sae,
            self.inputs,
            lambda contributions: penalty_value(penalty.name, contributions, penalty.scale, penalty.last_p),
            self.evaluation,
        )

    def measure_start(self, point: Point) -> Measurement:
        """Measure the untrained SAE of a point: the same for every coefficient of its penalty."""
        return self.measure(point, export.fold(self.start(point), self.mean, self.scale))

    def start_key(self, point: Point) -> Any:
        """Points with the same key have the same `measure_start`."""
        return point.sae, point.seed, dataclasses.replace(point.penalty, coefficient=0.0)


@dataclass(frozen=True)
class PointSae:
    """A point's SAE as measures see it, with parameters folded or not."""

    point: Point
    parameters: Parameters

    @property
    def W_dec(self) -> Tensor:
        return self.parameters.W_dec

    @property
    def b_dec(self) -> Tensor:
        return self.parameters.b_dec

    @cached_property
    def _lister(self) -> Callable[[Tensor], Iterator[tuple[Any, ...]]]:
        from sae_sweep.saes.kernels.listing import Lister  # compiled: of no use on a GPU

        return Lister(self.parameters, self.point.sae.architecture, self.point.sae.k)

    def active(self, x: Tensor) -> Iterator[Active]:
        """The codes as lists, some inputs at a time: no tensor that is held grows with all inputs times the width."""
        if x.device.type == "cpu" and self.point.sae.architecture in LISTED:
            for lists in self._lister(x):
                yield Active(*map(torch.from_numpy, lists))
        else:
            for part in x.split(max(1, DENSE_NUMBERS // len(self.W_dec))):
                yield Active.of(self.encode(part))

    def encode(self, x: Tensor) -> Tensor:
        return ARCHITECTURES[self.point.sae.architecture].codes(x, self.parameters, self.point.sae)


_FIELDS = dataclasses.fields(Parameters)


def train_toys(toys: Sequence[Toy], store: Store, device: str, say: Say) -> None:
    """Train and store the toys that are missing: those of equal shape as one stack."""
    finished = store.ids("toys")
    groups: dict[Any, list[Toy]] = {}
    for toy in dict.fromkeys(toys):
        if toy_id(toy) not in finished:
            groups.setdefault(model.stack_key(toy), []).append(toy)
    for group in groups.values():
        steps = group[0].steps

        def report(step: int, loss: float, toy: Toy = group[0], steps: int = steps) -> None:
            say(ToyProgress(toy, step, steps, loss))

        for toy, params in zip(group, model.train(group, device, report), strict=True):
            record = {"schema": 1, "id": toy_id(toy), "settings": dataclasses.asdict(toy)}
            record["provenance"] = provenance.collect(device)
            store.commit("toys", toy_id(toy), record, {"toy.safetensors": to_bytes(params)})


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, numpy or a thread to be started found too little memory, on the device or on the CPU."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def trained_toy(toy: Toy, store: Store, device: str, say: Say) -> model.Model:
    """A toy of the store, on the CPU; trained first if it is missing or damaged."""
    while True:
        train_toys([toy], store, device, say)
        with suppress(StoreDamaged):
            return load_toy(toy, store)


def load_toy(toy: Toy, store: Store) -> model.Model:
    """A stored toy, on the CPU."""
    return store.parse("toys", toy_id(toy), "toy.safetensors", lambda content: model.load(toy, load_tensors(content)))


def _train(
    stack: Stack,
    stream: Stream,
    backend: Backend,
    looks: list[Look],
    checkpoint: Checkpoint,
    number: int,
    packs: int,
    say: Say,
) -> None:
    """Train to the end; adds to `looks`, what was seen of the training so far."""
    steps = stack.points[0].training.steps
    for look in train(stack, stream, backend):
        looks.append(look)
        fvu, l0 = float(look.fvu.median()), float(look.l0.median())
        with checkpoint.between_steps(stack, looks):
            say(TrainProgress(number, packs, len(stack.points), look.step, steps, fvu, l0))


def _curve(looks: list[Look], i: int) -> Iterator[dict[str, Any]]:
    """SAE i's rows of the curve: about CURVE_ROWS evenly spaced looks, the last among them.

    Of the gradient's norm the largest since the row before: a peak is not to fall between two rows.
    """
    stride = -(-len(looks) // CURVE_ROWS)
    for at in range((len(looks) - 1) % stride, len(looks), stride):
        look, since = looks[at], looks[max(0, at - stride + 1) : at + 1]
        yield {
            "step": look.step,
            "loss": float(look.loss[i]),
            "fvu": float(look.fvu[i]),
            "l0": float(look.l0[i]),
            "gradient": max(float(each.gradient[i]) for each in since),
        }


def _on_cpu(parameters: Parameters) -> Parameters:
    return Parameters(*(getattr(parameters, f.name).detach().cpu() for f in _FIELDS))


def _record(
    point: Point, evaluation: Evaluation, machine: Machine, measured: Measurement, untrained: Measurement
) -> dict[str, Any]:
    return {
        "schema": 1,
        "id": point.id,
        "settings": dataclasses.asdict(canonical(point)),
        "measure_id": measure_id(evaluation),
        "evaluation": dataclasses.asdict(evaluation),
        "metrics": with_loss(measured, point),
        "untrained": with_loss(untrained, point),
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
    settings = json.loads(json.dumps(dataclasses.asdict(canonical(point))))
    return {
        "config.yaml": yaml.safe_dump(settings, sort_keys=False).encode(),
        "latents.parquet": _parquet(measured),
        **stored,
    }


def _parquet(measured: Measurement) -> bytes:
    buffer = io.BytesIO()
    measured.latents.to_parquet(buffer, index=False)
    return buffer.getvalue()
