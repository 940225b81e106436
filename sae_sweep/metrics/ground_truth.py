"""How well an SAE's latents and decoder rows match features that were planted (SynthSAEBench, arXiv 2602.14687)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.metric import Measured, Metric, Value, with_nulls
from sae_sweep.registry import register
from sae_sweep.toys.aligned import product

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from sae_sweep.metrics import nulls
    from sae_sweep.metrics.partitions import Floats, Ints
else:
    np, torch, nulls = lazy("numpy"), lazy("torch"), lazy("sae_sweep.metrics.nulls")

# A feature that overlaps another by more than NO_OVERLAP and at most SMALL_OVERLAP, in |cos|, does so a little (P7).
NO_OVERLAP, SMALL_OVERLAP = 1e-4, 0.3
# Of features or latents that never are on, a share is 0, not undefined.
NEVER = 1e-300


@dataclass(frozen=True)
class Detection:
    """How often latents fire and features are active, in inputs of equal weight.

    both [width, features]: on the same input; fired [width]; active [features]; total: inputs.
    """

    both: Ints
    fired: Ints
    active: Ints
    total: int

    @property
    def f1(self) -> Floats:
        """F1 of every latent as a detector of every feature [width, features]."""
        return 2 * self.both / np.maximum(self.fired[:, None] + self.active, NEVER)

    def precision(self, latent: Ints, feature: Ints) -> Floats:
        """Of the inputs on which each latent fires, the share with its feature."""
        return self.both[latent, feature] / np.maximum(self.fired[latent], NEVER)

    def recall(self, latent: Ints, feature: Ints) -> Floats:
        """Of the inputs with each feature, the share on which its latent fires."""
        return self.both[latent, feature] / np.maximum(self.active[feature], NEVER)


class DetectionCounter:
    """Builds a `Detection` from batches of inputs: `add` them in any order, then read `detection`."""

    def __init__(self, width: int, features: int, fires_above: float, device: torch.device) -> None:
        """A latent fires where a‖d‖ > `fires_above`, a feature is active where it is not 0."""
        self.fires_above = fires_above
        self._both = torch.zeros(width, features, dtype=torch.float64, device=device)
        self._fired = torch.zeros(width, dtype=torch.int64, device=device)
        self._active = torch.zeros(features, dtype=torch.int64, device=device)
        self._total = 0

    def add(self, norms: Tensor, features: Tensor) -> None:
        """Count a batch: a‖d‖ `norms` [b, width] and how active each feature is [b, features], on one device."""
        fires, active = norms > self.fires_above, features != 0
        # Whole numbers below 2^24: float32 sums them exactly, in whatever order.
        self._both += fires.float().T @ active.float()
        self._fired += fires.sum(0)
        self._active += active.sum(0)
        self._total += len(norms)

    @property
    def detection(self) -> Detection:
        """The counts of all inputs added so far."""
        both, fired, active = (counts.long().cpu().numpy() for counts in (self._both, self._fired, self._active))
        return Detection(both, fired, active, self._total)


def planted_metrics(
    detection: Detection, W_dec: Tensor, directions: Tensor, live: NDArray[np.bool_], f1: float
) -> dict[str, Value]:
    """The columns on planted features, for decoder rows [width, d] and true `directions` [features, d].

    mcc: mean |cos| of the pairs of a one-to-one matching of rows and directions that has the largest sum (Hungarian);
    uniqueness: distinct best matches by |cos|, over latents; feature_precision, _recall, _f1: means over latents, dead
    ones included, each as a detector of its best match; found_features: features that some live latent detects with an
    F1 of at least `f1`, whatever its decoder row. killed_features: features that none so detects, and along which no
    live row lies either (|cos| < `f1`); killed_small_overlap: those of them whose largest overlap with another feature
    is small.
    """
    from scipy.optimize import linear_sum_assignment

    cosine = cosines(W_dec, directions).abs().cpu().numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    latents, matches = np.arange(len(cosine)), cosine.argmax(1)
    f1_of_all = detection.f1
    found = (f1_of_all[live] >= f1).any(0)
    killed = ~found & ~(cosine[live] >= f1).any(0)
    overlap = (cosines(directions, directions).abs().cpu().numpy() * (1 - np.eye(len(directions)))).max(1)
    small = (overlap > NO_OVERLAP) & (overlap <= SMALL_OVERLAP)
    return {
        "mcc": float(cosine[rows, columns].mean()),
        "uniqueness": len(np.unique(matches)) / len(matches),
        "feature_precision": float(detection.precision(latents, matches).mean()),
        "feature_recall": float(detection.recall(latents, matches).mean()),
        "feature_f1": float(f1_of_all[latents, matches].mean()),
        "found_features": int(found.sum()),
        "killed_features": int(killed.sum()),
        "killed_small_overlap": int((killed & small).sum()),
    }


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """cos of every pair of rows [a, d] and others [b, d]: [a, b] float64, 0 for a row of zeros."""
    left, right = (torch.nn.functional.normalize(each.double(), dim=1) for each in (rows, others))
    return product(left, right.T)


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE; none of a toy without planted features."""
    planted, evaluation = measured.inputs.model.planted, measured.evaluation
    if planted is None or measured.detection is None:
        return {}
    of = measured.detection, measured.sae.W_dec, planted.directions, measured.latents.live
    return planted_metrics(*of, evaluation.f1) | (nulls.shuffled_features(*of, evaluation) if measured.nulls else {})


MEASURES = {
    "mcc": Column("mean |cos| of decoder rows and planted directions matched one to one", since=7),
    "uniqueness": Column("distinct best matches by |cos|, over latents", since=7),
    "feature_precision": Column("precision of latents as detectors of their best match, mean over latents", since=7),
    "feature_recall": Column("recall of latents as detectors of their best match, mean over latents", since=7),
    "feature_f1": Column("F1 of latents as detectors of their best match, mean over latents", since=7),
    "found_features": Column("planted features that some live latent detects", kind="Int64", since=7),
    "killed_features": Column(
        "planted features that no live latent detects and along which no live row lies", kind="Int64", since=7
    ),
    "killed_small_overlap": Column(
        "of these, the ones whose largest overlap with another feature is small", kind="Int64", since=7
    ),
}
COLUMNS = MEASURES | with_nulls(MEASURES, MEASURES, 8, 10)

register(
    Metric(
        name="planted",
        description="how well latents and decoder rows match planted features",
        source="SynthSAEBench, arXiv 2602.14687",
        columns=COLUMNS,
        measure=measure,
    )
)
