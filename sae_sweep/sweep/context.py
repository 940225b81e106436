"""What the points of a pack share: their toy, its activations, and what they are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from sae_sweep.config.settings import Encoder, Evaluation, Penalty, Point, Sae, Toy, toy_id
from sae_sweep.errors import UserError
from sae_sweep.metrics.evaluate import MeasurableSAE, Measurement, measure
from sae_sweep.metrics.evaluation_batches import accuracy_of
from sae_sweep.metrics.extra.inference import Objective
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.saes.architectures import architecture_of
from sae_sweep.saes.encoders import encoder_of
from sae_sweep.saes.folding import fold, unfold
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.formats.index import read_sae
from sae_sweep.saes.formats.loaded import LoadedSae
from sae_sweep.saes.inits import start
from sae_sweep.saes.inits.trained import POINT, resolve
from sae_sweep.saes.parameters import Parameters, SaeTensors
from sae_sweep.saes.penalties import formula_of, penalty_value
from sae_sweep.store import provenance
from sae_sweep.store.store import NotThere, Store, StoreDamaged
from sae_sweep.store.tensors import to_bytes
from sae_sweep.sweep.events import Say, ToyAccuracy, ToyProgress
from sae_sweep.toys import model
from sae_sweep.toys.classes import Factored
from sae_sweep.toys.sampling import EvaluationInputs, Stream, feature_means

# Codes in the largest dense tensor of a measurement, and on a GPU, which a few inputs at a time would leave idle.
DENSE_NUMBERS, GPU_DENSE_NUMBERS = 1 << 22, 1 << 27
# From this width on matching pursuit of one step is measured by lists, a hundred times as fast; narrower SAEs were
# measured by dense codes before, whose last bits differ.
LISTED_AT_LEAST = 1 << 14
# The inputs that class means are taken over: all of them, or a million drawn.
CLASS_INPUTS = Evaluation(inputs=1 << 20)


class Ground:
    """What the points of a pack share: the toy, its activations, its cells, and the inputs they are measured on."""

    def __init__(self, point: Point, store: Store, evaluation: Evaluation, device: str, say: Say | None) -> None:
        """`say` hears how often the toy is right; where it is None, that is not measured."""
        toy = trained_toy(point.toy, store, device, say or (lambda event: None)).to(device)
        self.evaluation, self.device, self.distribution = evaluation, device, point.distribution
        self.store = store
        self.stream = Stream(
            toy, point.site.name, point.distribution, point.data_seed, point.training.batch_size, device
        )
        self.inputs = EvaluationInputs(
            toy, point.site.name, point.distribution, self.stream.mean, self.stream.scale, evaluation
        )
        self.mean, self.scale = self.stream.mean.cpu(), self.stream.scale
        if say is not None and (accuracy := accuracy_of(self.inputs)) is not None:
            say(ToyAccuracy(point.toy, point.distribution, accuracy))
        self._starts: dict[tuple[Sae, Encoder, int], Parameters] = {}

    def start(self, point: Point) -> Parameters:
        """The point's start; SAEs that differ in penalty and coefficient alone share one."""
        key = (point.sae, point.encoder, point.seed)
        if key not in self._starts:
            self._starts[key] = start(point, self)
        return self._starts[key]

    def exemplars(self, count: int, seed: int) -> Tensor:
        """Independent draws of activations [count, d]."""
        return self.stream.exemplars(count, seed).cpu()

    def covariance(self) -> Tensor:
        """Covariance of the activations [d, d]."""
        return self.stream.covariance()

    def trained(self, sae: Sae) -> Parameters:
        """The SAE that `sae.start` names, for normalised activations. UserError: it is not what it was, or gone."""
        return unfold(trained_sae(sae, self.store), self.mean, self.scale)

    def class_means(self, partition: str) -> tuple[Tensor, Tensor]:
        """Mean activation [classes, d] and probability [classes] of a partition's classes, or of planted features.

        Over inputs of their own: what an SAE is trained to must not depend on how it will be measured.
        """
        about = self.stream.site, self.distribution, self.stream.mean, self.stream.scale
        inputs = EvaluationInputs(self.stream.model, *about, CLASS_INPUTS, trained_on=True)
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

    def truth(self) -> tuple[Tensor, Tensor]:
        """The planted features' unit directions [features, d], and x [d] where none is active."""
        planted = self.stream.model.planted
        if planted is None:
            raise UserError(f"sae.init=truth: toy={self.stream.model.toy.name} has no planted features")
        origin = (planted.origin.cpu() - self.mean) * self.scale
        return torch.nn.functional.normalize(planted.directions.cpu(), dim=1), origin

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

    def measure(self, point: Point, folded: Parameters, nulls: bool = True) -> Measurement:
        """Measure an SAE as it is stored, so that a later measurement of the stored file gives the same bits."""
        parameters = unfold(folded, self.mean, self.scale)
        sae = PointSae(point, parameters.map(lambda tensor: tensor.to(self.device)))
        counts = architecture_of(point.sae.architecture).counts
        return self._measured(sae, point.penalty, nulls, k=max(1, round(point.sae.k)) if counts else None)

    def measure_loaded(self, sae: LoadedSae, penalty: Penalty) -> Measurement:
        """Measure an SAE that a file describes."""
        return self._measured(_Loaded(sae.normalised(self.mean, self.scale).to(self.device)), penalty, True)

    def _measured(self, sae: MeasurableSAE, penalty: Penalty, nulls: bool, k: int | None = None) -> Measurement:
        """`k`: of an SAE that counts its active latents, how many an input may have."""
        formula = formula_of(penalty)
        objective = Objective(
            lambda contributions: penalty_value(formula, contributions, penalty.get("scale", 1.0), penalty.last_p),
            penalty.coefficient,
            k=k,
            hard=penalty.name == "l0",
            shares=formula.weighs,
        )
        # With neither a penalty nor a count there is nothing that codes trade against their error.
        limited = nulls and (k is not None or penalty.coefficient > 0)
        values = objective.penalty_value, self.evaluation
        return measure(sae, self.inputs, *values, nulls=nulls, objective=objective if limited else None)

    def measure_start(self, point: Point) -> Measurement:
        """Measure the untrained SAE of a point: the same for every coefficient of its penalty."""
        # What shuffled labels make of an untrained SAE nobody asks, and where much fires that takes longest.
        return self.measure(point, fold(self.start(point), self.mean, self.scale), nulls=False)

    def start_key(self, point: Point) -> Any:
        """Points with the same key have the same `measure_start`."""
        return point.sae, point.encoder, point.seed, point.penalty.replace(coefficient=0.0)


@dataclass(frozen=True)
class PointSae(SaeTensors):
    """A point's SAE as measures see it, with parameters folded or not."""

    point: Point
    parameters: Parameters

    @cached_property
    def _lister(self) -> Callable[[Tensor], Iterator[tuple[Any, ...]]]:
        from sae_sweep.kernels.cpu.sparse_encode import Lister  # compiled: of no use on a GPU

        return Lister(self.parameters, self.point.sae.architecture, self.point.sae.get("k", 1))

    @cached_property
    def _is_listed(self) -> bool:
        sae, encoder = self.point.sae, self.point.encoder.name
        product = encoder_of(encoder).is_product(sae) and (encoder == "linear" or sae.width >= LISTED_AT_LEAST)
        return product and architecture_of(sae.architecture).listed

    def active(self, x: Tensor) -> Iterator[Active]:
        """The codes as lists, some inputs at a time: no tensor that is held grows with all inputs times the width."""
        if x.device.type == "cpu" and self._is_listed:
            for lists in self._lister(x):
                yield Active(*map(torch.from_numpy, lists))
        else:
            yield from _dense_codes(self, x)

    def encode(self, x: Tensor) -> Tensor:
        kind = architecture_of(self.point.sae.architecture)
        return kind.codes(x, self.parameters, self.point.sae, encoder=self.point.encoder)


def _dense_codes(sae: PointSae | LoadedSae, x: Tensor) -> Iterator[Active]:
    """Codes of inputs x [b, d], as many inputs at a time as the largest dense tensor has room for."""
    most = GPU_DENSE_NUMBERS if x.is_cuda else DENSE_NUMBERS
    for part in x.split(max(1, most // len(sae.parameters.W_dec))):
        yield Active.of(sae.encode(part))


@dataclass(frozen=True)
class _Loaded(SaeTensors):
    """A loaded SAE as measures see it."""

    sae: LoadedSae

    @property
    def parameters(self) -> Parameters:
        return self.sae.parameters

    def active(self, x: Tensor) -> Iterator[Active]:
        yield from _dense_codes(self.sae, x)


def train_toys(toys: Sequence[Toy], store: Store, device: str, say: Say) -> None:
    """Train and store the toys that are missing: those of equal shape as one stack."""
    finished = store.ids("toys")
    groups: dict[Any, list[Toy]] = {}
    for toy in dict.fromkeys(toys):
        if toy_id(toy) not in finished:
            groups.setdefault(model.stack_key(toy), []).append(toy)
    for group in groups.values():
        steps, _ = group[0].kind.trains(group[0])

        def report(step: int, loss: float, toy: Toy = group[0], steps: int = steps) -> None:
            say(ToyProgress(toy, step, steps, loss))

        for toy, params in zip(group, model.train(group, device, report), strict=True):
            record = {"id": toy_id(toy), "settings": toy.to_dict()}
            record["provenance"] = provenance.collect(device)
            store.commit("toys", toy_id(toy), record, {"toy.safetensors": to_bytes(params)})


def trained_toy(toy: Toy, store: Store, device: str, say: Say) -> model.Model:
    """A toy of the store, on the CPU; trained first if it is missing or damaged. UserError: it cannot be loaded."""
    train_toys([toy], store, device, say)
    with suppress(StoreDamaged):
        return load_toy(toy, store)
    train_toys([toy], store, device, say)  # the damaged one was set aside
    try:
        return load_toy(toy, store)
    except StoreDamaged as error:  # training it yet again would not help
        raise UserError(f"a toy cannot be loaded, though it was just trained anew: {error}") from None


def trained_sae(sae: Sae, store: Store) -> Parameters:
    """The SAE that `sae.start` names, on raw activations. UserError: it is not what it was, or there is none."""
    if resolve({"start": sae.start})["start_digest"] != sae.start_digest:
        raise UserError(f"sae.init={sae.start} is not what it was when the sweep was configured")
    try:
        if POINT.fullmatch(sae.start):
            return store.parse("points", sae.start, saelens.WEIGHTS, saelens.from_files)
        return read_sae(sae.start).as_ours()[1]
    except NotThere as error:
        raise UserError(f"sae.init={sae.start}: {error}") from error
    except StoreDamaged:
        raise
    except UserError as error:
        raise UserError(f"sae.init: {error}") from error


def load_toy(toy: Toy, store: Store) -> model.Model:
    """A stored toy, on the CPU."""
    return store.parse("toys", toy_id(toy), "toy.safetensors", lambda content: model.load(toy, load_tensors(content)))
