"""Small toys' inputs and codes with known answers, for the tests of the measures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics.evaluation_classes import EvaluationClasses
from sae_sweep.metrics.firing import FiringCounter, FiringTable, Fold
from sae_sweep.metrics.sparse_codes import Active
from sae_sweep.toys.classes import Cells
from sae_sweep.toys.max_of_k import MaxOfK, shapes
from sae_sweep.toys.sampler import cell_weights

CUT = 0.01


class Planted:
    """All inputs of max-of-k over d_vocab tokens: `sequences` [N, k], `cell` [N], `weight` [N] under a distribution."""

    def __init__(self, d_vocab: int, k: int, distribution: str = "max_stratified") -> None:
        self.cells = Cells(d_vocab, k)
        self.sequences = np.array(list(itertools.product(range(d_vocab), repeat=k)))
        self.cell = self.cells.index(self.sequences)
        self.chance = cell_weights(self.cells, Distribution(distribution))
        self.weight = (self.chance / self.cells.sizes)[self.cell]

    def classes(self, evaluation: Evaluation | None = None, drawn: bool = False) -> EvaluationClasses:
        """The classes of an evaluation of all inputs, or of one that is taken to have drawn them."""
        return EvaluationClasses(self.cells, self.chance, self.cells.sizes, drawn, evaluation or Evaluation())

    def factor(self, name: str) -> NDArray[np.int32]:
        """m, q, n or c of every input [N]."""
        return self.cells.factors[name][self.cell]

    def one_per(self, partition: str) -> NDArray[np.float32]:
        """A code [N, classes] with one latent for each class of a partition, active by 1 on all of it."""
        classes = self.cells.partition(partition)
        return np.eye(classes.count, dtype=np.float32)[classes.of_cell[self.cell]]

    def table(self, norms: NDArray[np.float32], fold: Fold | None = None) -> FiringTable:
        """The firing table of contributions a‖d‖ [N, width]."""
        counter = FiringCounter(norms.shape[1], self.cells.count, CUT, fold)
        counter.add(torch.from_numpy(np.asarray(norms, np.float32)), self.cell, self.weight)
        return counter.table


@dataclass
class LookUp:
    """The SAE whose code of an input is the row of `codes` [N, width] for the nearest of known inputs `x` [N, d]."""

    x: Tensor
    codes: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def active(self, x: Tensor) -> Iterator[Active]:
        yield Active.of(self.codes[torch.cdist(x.double(), self.x.double()).argmin(1)])


def untrained(toy: Toy) -> MaxOfK:
    """A toy of small weights: attention stays soft, so that no two inputs have the same activations."""
    generator = torch.Generator().manual_seed(0)
    return MaxOfK(toy, {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes(toy).items()})
