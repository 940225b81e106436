"""How the inputs of max-of-K are distributed: by which classes they are balanced, or weights from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Kind, Setting, register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sae_sweep.config.settings import Distribution
    from sae_sweep.toys.classes import Cells
else:
    np = lazy("numpy")

Weigh = Callable[["Cells", "Distribution"], "tuple[str, NDArray[np.float64]]"]


@dataclass(frozen=True, kw_only=True)
class DistributionKind(Kind):
    """`weigh(cells, distribution)`: a partition of the cells, and the weight of each of its classes.

    Within a class sequences are equally likely.
    """

    family = "distribution"
    weigh: Weigh


def balanced(partition: str) -> Weigh:
    """Every class of the partition equally likely."""
    return lambda cells, distribution: (partition, np.ones(cells.partition(partition).count))


def _from_file(cells: Cells, distribution: Distribution) -> tuple[str, NDArray[np.float64]]:
    from sae_sweep.toys.sampler import read_weights

    if distribution.file is None:
        raise UserError("distribution=weights needs distribution.file, a CSV of weights per cell")
    return read_weights(cells, Path(distribution.file))


for name, partition, description in (
    ("uniform", "", "every sequence equally likely"),
    ("max_stratified", "m", "every maximum equally likely, uniform within it"),
    ("cell_stratified", "mqnc", "every cell equally likely, uniform within it"),
    ("copies_balanced", "mc", "every (maximum, copies) equally likely, uniform within it"),
):
    register(DistributionKind(name=name, description=description, weigh=balanced(partition)))

register(
    DistributionKind(
        name="weights",
        description="a CSV of weights: columns out of m, q, n, c, and weight; distribution=FILE is the short form",
        settings={
            # A path says nothing about the numbers; what the file holds does.
            "file": Setting(None, "the CSV", kind="str", optional=True, told=False),
            "digest": Setting(None, "of its content", kind="str", optional=True, given=False),
        },
        weigh=_from_file,
    )
)
