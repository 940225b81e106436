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


# How much of every maximum the sequences have that a distribution prefers.
PREFERRED = 0.95


def preferring(which: Callable[[Cells], NDArray[np.bool_]], within: str) -> Weigh:
    """Every maximum equally likely, with most of it in the cells that `which` picks, and the rest uniform.

    In what is picked, the classes of the partition `within` are equally likely.
    """

    def weigh(cells: Cells, distribution: Distribution) -> tuple[str, NDArray[np.float64]]:
        picked = which(cells)
        maximum, classes = cells.partition("m").of_cell, cells.partition(within)
        sizes = cells.sizes.copy()
        sizes[picked] /= np.bincount(classes.of_cell[picked], sizes[picked], classes.count)[classes.of_cell[picked]]
        group = 2 * maximum + picked
        return "mqnc", sizes / np.bincount(group, sizes)[group] * np.where(picked, PREFERRED, 1 - PREFERRED)

    return weigh


def _query_is_maximum(cells: Cells) -> NDArray[np.bool_]:
    return cells.factors["q"] == cells.factors["m"]


def _only_copies_differ(cells: Cells) -> NDArray[np.bool_]:
    factors = cells.factors
    return _query_is_maximum(cells) & ((factors["n"] == factors["m"] - 1) | (factors["n"] < 0))


def _from_file(cells: Cells, distribution: Distribution) -> tuple[str, NDArray[np.float64]]:
    from sae_sweep.toys.sampler import read_weights

    if distribution.file is None:
        raise UserError("distribution=weights needs distribution.file, a CSV of weights per cell")
    return read_weights(cells, Path(distribution.file))


for name, weigh, description in (
    ("uniform", balanced(""), "every sequence equally likely"),
    ("max_stratified", balanced("m"), "every maximum equally likely, uniform within it"),
    ("cell_stratified", balanced("mqnc"), "every cell equally likely, uniform within it"),
    ("copies_balanced", balanced("mc"), "every (maximum, copies) equally likely, uniform within it"),
    (
        "query_is_max",
        preferring(_query_is_maximum, "m"),
        "every maximum equally likely; in 19 of 20 sequences the query is the maximum",
    ),
    (
        "copies_vary",
        preferring(_only_copies_differ, "mc"),
        "as query_is_max, with the next smaller token as runner-up and every number of copies equally likely",
    ),
):
    register(DistributionKind(name=name, description=description, weigh=weigh))

register(
    DistributionKind(
        name="weights",
        description="a CSV of weights: columns out of m, q, n, c, and weight; distribution=FILE is the short form",
        settings={
            # A path says nothing about the numbers; what the file holds does.
            "file": Setting(None, "path of the CSV", kind="str", optional=True, told=False),
            "digest": Setting(None, "of its content", kind="str", optional=True, given=False),
        },
        weigh=_from_file,
    )
)
