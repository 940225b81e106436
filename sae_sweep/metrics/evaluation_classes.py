"""The ground-truth classes of an evaluation's inputs: which can be judged, and what latents may be called.

For example, a pass over 65,536 inputs drawn out of 64⁴ sees most of the 95,488 cells less than once: a latent for one
of those cells cannot be told from a dead one, while a latent for a maximum has thousands of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sae_sweep.config.settings import PARTITIONS, Evaluation
from sae_sweep.lazy import lazy
from sae_sweep.toys.classes import Factored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sae_sweep.metrics import hashing, partitions
    from sae_sweep.metrics.partitions import Classes, Floats, Ints
else:
    np = lazy("numpy")
    hashing, partitions = lazy("sae_sweep.metrics.hashing"), lazy("sae_sweep.metrics.partitions")

# Where inputs are drawn, a latent fires on at least so many of them, and a class expects as many, or it is not judged.
LIVE_INPUTS = 8
# The share of the way from the F1 of a latent that is always on to an F1 of 1 that a label must at least be.
ABOVE_BASE_RATE = 0.5
# No owner, no label, no class.
NOTHING = -1
# By so much a number may miss a threshold that it equals but for rounding.
ROUNDING = 1e-9
# A latent named finer than its maximum is a split.
FINER_THAN_M = tuple(i for i, name in enumerate(PARTITIONS) if set("m") < set(name))


@dataclass(frozen=True, eq=False)
class EvaluationClasses:
    """The classes of the inputs of one evaluation, under its distribution and its rules of counting.

    cells: the finest classes; chance [T]: the probability of each; inputs [T]: how many inputs of each the evaluation
    has, or may be expected to have; drawn: whether inputs are drawn, not enumerated.
    """

    cells: Factored
    chance: Floats
    inputs: Floats
    drawn: bool
    evaluation: Evaluation

    def classes(self, name: str) -> Classes:
        """The classes of a partition."""
        return partitions.partition(self.cells, name)

    def weights(self, name: str) -> Floats:
        """The probability of every class of a partition [classes]."""
        if name not in self._weights:
            classes = self.classes(name)
            self._weights[name] = np.bincount(classes.of_cell, self.chance, classes.count).astype(
                np.float64, copy=False
            )
        return self._weights[name]

    @cached_property
    def _weights(self) -> dict[str, Floats]:
        return {}

    @cached_property
    def live_mass(self) -> float:
        """The share of the evaluation weight that a live latent fires on: half of what the lightest cell has."""
        return float(self.chance[self.chance > 0].min() / 2)

    @property
    def live_inputs(self) -> int:
        """How many inputs a live latent fires on: any number where all inputs are there."""
        return LIVE_INPUTS if self.drawn else 0

    def countable(self, name: str) -> NDArray[np.bool_]:
        """Which classes of a partition [classes] can be judged: those that occur, and if inputs are drawn, in enough.

        A latent that is on for a whole countable class, and for nothing else, is live.
        """
        classes = self.classes(name)
        inputs = np.bincount(classes.of_cell, self.inputs, classes.count)
        return (self.weights(name) > 0) & (inputs >= self.live_inputs)

    @cached_property
    def extents(self) -> dict[str, Ints]:
        """By partition, a number for every class [classes], the same for classes of the same inputs.

        For example, at d_vocab 6 the query is 5 exactly where maximum and query both are. NOTHING for a class without
        inputs, and for one of all inputs, which says nothing.
        """
        possible = self.chance > 0
        cells = np.arange(1, len(possible) + 1, dtype=np.uint64)
        signature = np.where(possible, hashing.mixed(hashing.GOLDEN * cells), np.uint64(0))
        sums = {}
        for name in PARTITIONS:
            classes = self.classes(name)
            sums[name] = np.zeros(classes.count, np.uint64)
            np.add.at(sums[name], classes.of_cell, signature)
        silent = (np.uint64(0), signature.sum(dtype=np.uint64))
        known = np.setdiff1d(np.concatenate(list(sums.values())), silent)
        numbers = {}
        for name, of_class in sums.items():
            place = np.minimum(np.searchsorted(known, of_class), max(len(known) - 1, 0))
            numbers[name] = np.where(np.isin(of_class, silent), NOTHING, place)
        return numbers

    @cached_property
    def _class_of(self) -> Ints:
        """Which class of each partition has each extent [partitions, extents], NOTHING where none has."""
        extents = max((int(numbers.max()) for numbers in self.extents.values()), default=NOTHING) + 1
        found = np.full((len(PARTITIONS), extents), NOTHING)
        for row, name in zip(found, PARTITIONS, strict=True):
            numbers = self.extents[name]
            row[numbers[numbers != NOTHING]] = np.flatnonzero(numbers != NOTHING)
        return found

    def labels(
        self, scores: Floats, best: Ints, counts: NDArray[np.bool_], trial: Ints | None = None
    ) -> tuple[Ints, Ints]:
        """Each latent's label, as an index in PARTITIONS, and the class of that partition: two arrays [latents].

        scores, best [partitions, latents]: the largest F1 of a latent with any class of each partition, and which class
        that is. counts [latents]: which latents may have a label at all. trial [latents]: to which of several SAEs each
        latent belongs, if there are several.

        The label is the partition with the best F1 among those that reach `evaluation.f1`, beat the base rate
        (ABOVE_BASE_RATE), and beat every coarser one that does both by `evaluation.f1_gain`. Where the same inputs are
        a class of several partitions, a whole maximum is called one, and anything else by the partition that can name
        the most of what the SAE's labelled latents stand for; then by the coarsest.
        """
        admitted = self._admitted(scores, best) & counts
        # The first of the best is the coarsest: PARTITIONS are in the order of their length.
        label = np.where(admitted, scores, -1).argmax(0)
        named = np.flatnonzero(admitted.any(0))
        extent = np.empty(len(named), np.int64)
        for i, name in enumerate(PARTITIONS):
            chosen = label[named] == i
            extent[chosen] = self.extents[name][best[i, named[chosen]]]
        candidates = self._class_of[:, extent] != NOTHING
        whole = candidates[PARTITIONS.index("m")]
        votes = self._votes(extent[~whole], np.zeros_like(named) if trial is None else trial[named], whole)
        found = np.where(whole, PARTITIONS.index("m"), np.where(candidates, votes, -1).argmax(0))
        label, of_label = np.full(len(label), NOTHING), np.full(len(label), NOTHING)
        label[named], of_label[named] = found, self._class_of[found, extent]
        return label, of_label

    def _votes(self, extent: Ints, trial: Ints, whole: NDArray[np.bool_]) -> Ints:
        """How many distinct extents of each latent's SAE a partition can name [partitions, n].

        `extent`: of those latents that are not `whole` maxima.
        """
        trials, extents = int(trial.max(initial=0)) + 1, self._class_of.shape[1]
        of_trial, distinct = np.divmod(np.unique(trial[~whole] * extents + extent), max(extents, 1))
        can_name = self._class_of[:, distinct] != NOTHING
        votes = np.stack([np.bincount(of_trial[row], minlength=trials) for row in can_name])
        return votes[:, trial]

    def _admitted(self, scores: Floats, best: Ints) -> NDArray[np.bool_]:
        """Which partitions may name each latent [partitions, latents]."""
        reaches = np.zeros(scores.shape, np.bool_)
        for i, name in enumerate(PARTITIONS):
            # A latent that is always on has recall 1 and the class's weight as precision.
            base = 2 * self.weights(name) / (1 + self.weights(name))
            least = np.maximum(self.evaluation.f1, base + ABOVE_BASE_RATE * (1 - base))
            least[self.extents[name] == NOTHING] = np.inf
            reaches[i] = (best[i] != NOTHING) & (scores[i] >= least[best[i]] - ROUNDING)
        admitted = reaches.copy()
        for i, fine in enumerate(PARTITIONS):
            for j, coarse in enumerate(PARTITIONS):
                if set(coarse) < set(fine):
                    admitted[i] &= ~reaches[j] | (scores[i] >= scores[j] + self.evaluation.f1_gain - ROUNDING)
        return admitted
