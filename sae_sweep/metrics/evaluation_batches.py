"""The inputs of an evaluation as a pass takes them, with all of a measurement that depends on them alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.evaluation_classes import EvaluationClasses
from sae_sweep.metrics.limits import BLOCK_INPUTS
from sae_sweep.metrics.reconstruction import logits_of
from sae_sweep.toys.sampling import EvaluationInputs

# Up to so many numbers (64 MiB), blocks are kept for the other SAEs that are measured on the same inputs.
KEPT_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Block:
    """Inputs x [b, d], their cells, weights and the toy's own inputs as in a Chunk, in the order of their cells.

    maximum [b] int64 of each; truth: `Model.truth`; logits [b, d_vocab] float32 of the toy's output, None without one.
    """

    x: Tensor
    cell: Tensor
    weight: Tensor
    inputs: Tensor
    maximum: Tensor
    truth: Tensor | None
    logits: Tensor | None

    def part(self, at: slice) -> Block:
        """Some of its inputs."""
        if at.start == 0 and at.stop == len(self.x):
            return self
        return Block(*(None if value is None else value[at] for value in vars(self).values()))  # type: ignore[arg-type]


_kept: WeakKeyDictionary[EvaluationInputs, list[Block]] = WeakKeyDictionary()
_keeping = Lock()


def blocks(inputs: EvaluationInputs, size: int) -> Iterable[Block]:
    """All inputs, `size` at a time; kept as long as `inputs` where they are few enough."""
    outputs = inputs.model.toy.get("outputs", inputs.model.toy.maxima)
    if inputs.count * (len(inputs.mean) + outputs) > KEPT_NUMBERS:
        return _made(inputs, size)
    with _keeping:
        if inputs not in _kept:
            _kept[inputs] = list(_made(inputs, size))
        return _kept[inputs]


_classes: WeakKeyDictionary[EvaluationInputs, dict[Evaluation, EvaluationClasses]] = WeakKeyDictionary()


def classes_of(inputs: EvaluationInputs, evaluation: Evaluation) -> EvaluationClasses | None:
    """The classes of the inputs, kept as long as these are; None where a toy has none."""
    if inputs.cells is None:
        return None
    with _keeping:
        kept = _classes.setdefault(inputs, {})
        if evaluation not in kept:
            of_inputs = inputs.cells, inputs.chance, inputs.cell_inputs, not inputs.exact
            kept[evaluation] = EvaluationClasses(*of_inputs, evaluation)
        return kept[evaluation]


_accuracies: WeakKeyDictionary[EvaluationInputs, float | None] = WeakKeyDictionary()


def accuracy_of(inputs: EvaluationInputs) -> float | None:
    """The share of the inputs, by weight, that the toy answers right, kept as long as these are.

    An answer is right where its logit is above all others. None for a toy that answers nothing, or with chances.
    """
    if inputs not in _accuracies:
        # Both summed in one order, so that a toy that is always right is right on all, not on all but a rounding.
        right = whole = 0.0
        for block in blocks(inputs, BLOCK_INPUTS):
            if block.logits is None or block.truth is None or block.truth.dim() > 1:
                _accuracies[inputs] = None
                break
            rivals = (block.logits >= block.logits.gather(1, block.truth[:, None])).sum(1)
            right += float((block.weight * (rivals == 1)).cpu().numpy().sum())
            whole += float(block.weight.cpu().numpy().sum())
        else:
            _accuracies[inputs] = right / whole
    return _accuracies[inputs]


_labelled: WeakKeyDictionary[EvaluationInputs, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def labelled(inputs: EvaluationInputs, count: int) -> tuple[Tensor, Tensor]:
    """`EvaluationInputs.labelled`, kept as long as the inputs: every SAE that is measured on them asks for the same."""
    with _keeping:
        kept = _labelled.setdefault(inputs, {})
        if count not in kept:
            kept[count] = inputs.labelled(count)
        return kept[count]


def _made(inputs: EvaluationInputs, size: int) -> Iterator[Block]:
    maxima = torch.zeros(1, dtype=torch.int64, device=inputs.mean.device)
    if inputs.cells is not None:
        maxima = torch.from_numpy(inputs.cells.factors["m"]).long().to(maxima.device)
    for chunk in inputs:
        parts = (part.split(size) for part in (chunk.x, chunk.cell, chunk.weight, chunk.inputs))
        for block in zip(*parts, strict=True):
            x, cell, weight, drawn = block
            if bool((cell.diff() < 0).any()):
                order = cell.argsort(stable=True)
                x, cell, weight, drawn = (part[order] for part in block)
            logits = logits_of(inputs.model, inputs.site, x, inputs.mean, inputs.scale)
            yield Block(x, cell, weight, drawn, maxima[cell], inputs.model.truth(drawn), logits)
