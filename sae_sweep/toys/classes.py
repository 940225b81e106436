"""The ground truth of max-of-K: cells (maximum m, query q, runner-up n, copies c), counted and ranked in closed form.

A sequence of K tokens below d_vocab lies in the cell of m, its largest token; q, its last token; n, its largest token
below m, or none; c, how often m occurs. Formulas: N(m) cells have maximum m, T(d, K) are there in all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from sae_sweep.config.keys import nearest
from sae_sweep.config.settings import PARTITIONS
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

FACTORS = "mqnc"
# The runner-up of a sequence that consists of copies of its maximum.
NONE = -1


def cells_per_max(m: Any, k: int) -> Any:
    """N(m) = 1 + 2m(K-1) + (K-2)·m(m-1)/2, the number of cells with maximum `m` (an int or an int array)."""
    return 1 + 2 * m * (k - 1) + (k - 2) * (m * (m - 1) // 2)


def count_cells(d_vocab: Any, k: int) -> Any:
    """T(d, K) = d + (K-1)·d(d-1) + (K-2)·d(d-1)(d-2)/6, the number of cells: those with a maximum below `d_vocab`."""
    d = d_vocab
    return d + (k - 1) * d * (d - 1) + (k - 2) * (d * (d - 1) * (d - 2) // 6)


def count_classes(partition: str, d_vocab: int, k: int) -> int:
    """How many non-empty classes a partition of the cells has (REFERENCE: closed forms, k ≥ 2).

    With q or n below the maximum, at most k − 1 places are left for copies; q < n < m needs three places.
    """
    pairs = d_vocab * (d_vocab - 1) // 2
    triples = pairs * (d_vocab - 2) // 3
    counts = {
        "m": d_vocab,
        "q": d_vocab,
        "n": d_vocab,
        "c": k,
        "mq": d_vocab + pairs,
        "mn": d_vocab + pairs,
        "mc": 1 + (d_vocab - 1) * k,
        "mqn": d_vocab + 2 * pairs + (triples if k > 2 else 0),
        "mqc": 1 + (d_vocab - 1) * k + (k - 1) * pairs,
        "mnc": d_vocab + (k - 1) * pairs,
        "mqnc": d_vocab + 2 * (k - 1) * pairs + (k - 2) * triples,
        # Gross's rough count of the last, about eleven times it (REFERENCE, P2).
        "rough": d_vocab**3 * k,
    }
    if partition not in counts:
        raise UserError(f"${{cells:{partition}}}: no such partition{nearest(partition, counts)}")
    return counts[partition]


def count_pairs(partition: str, of_m: int, of_q: int) -> int:
    """How many classes a partition has where every q comes with every m, and there is no n nor c to tell apart."""
    if partition not in PARTITIONS:
        raise UserError(f"${{cells:{partition}}}: no such partition{nearest(partition, PARTITIONS)}")
    return (of_m if "m" in partition else 1) * (of_q if "q" in partition else 1)


@dataclass(frozen=True)
class Partition:
    """Cells merged into classes that differ in the named factors only. `of_cell` [T] int64 in 0..count-1."""

    name: str
    of_cell: NDArray[np.int64]
    count: int


class Factored(Protocol):
    """Classes of inputs, each known by its factors: a maximum (or leading feature) m, and what comes with it.

    Hashable, so that what is derived from equal cells can be kept.
    """

    @property
    def d_vocab(self) -> int:
        """How many values m takes, 0 among them."""

    @property
    def count(self) -> int:
        """T, the number of cells."""

    @property
    def factors(self) -> dict[str, NDArray[np.int32]]:
        """`m`, `q`, `n` and `c` of every cell: four int32 arrays [T], -1 for none."""

    def partition(self, name: str) -> Partition:
        """The cells told apart by the factors in `name` only."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Cells:
    """All cells of max-of-`k` over `d_vocab` tokens, in the order of (m, q, n, c), no runner-up first."""

    d_vocab: int
    k: int

    @property
    def count(self) -> int:
        """T, the number of cells."""
        return int(count_cells(self.d_vocab, self.k))

    @cached_property
    def factors(self) -> dict[str, NDArray[np.int32]]:
        """`m`, `q`, `n` (-1 for none) and `c` of every cell: four int32 arrays [T], cells in their order."""
        columns = np.empty((4, self.count), np.int32)
        for m in range(self.d_vocab):
            q, n, c = np.nonzero(_occupied(m, self.k))
            block = slice(count_cells(m, self.k), count_cells(m + 1, self.k))
            columns[:, block] = np.stack([np.full_like(q, m), q, n + NONE, c + 1])
        return dict(zip(FACTORS, columns, strict=True))

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """Sequences in every cell [T]; float64, so exact below 2^53. They sum to d_vocab^k.

        c=K: 1. q=m: C(K-1, c-1)·[(n+1)^(K-c) - n^(K-c)]. q=n<m: C(K-1, c)·(n+1)^(K-1-c).
        q<n<m: C(K-1, c)·[(n+1)^(K-1-c) - n^(K-1-c)].
        """
        m, q, n, c = (self.factors[name] for name in FACTORS)
        # Copies of m before the last token, and the places left there for smaller tokens.
        copies = c - (q == m)
        places = self.k - 1 - copies
        ways = np.array([math.comb(self.k - 1, i) for i in range(self.k)], np.float64)[copies]
        below = np.maximum(n, 0).astype(np.float64)
        # One of those tokens must be n, unless the query is.
        without_n = np.where((n == NONE) | (n == q), 0.0, below**places)
        return ways * ((below + 1) ** places - without_n)

    def index(self, sequences: NDArray[Any]) -> NDArray[np.int64]:
        """Cell [...] int64 of each sequence [..., k] of tokens below d_vocab, by counting the cells before it."""
        tokens = np.asarray(sequences, np.int64)
        if tokens.shape[-1] != self.k:
            raise ValueError(f"sequences of {self.k} tokens expected, not {tokens.shape[-1]}")
        k, q, m = self.k, tokens[..., -1], tokens.max(-1)
        is_max = tokens == m[..., None]
        n, c = np.where(is_max, NONE, tokens).max(-1), is_max.sum(-1)
        # Every smaller query has K-1 cells where it is the runner-up and K-2 for each runner-up between it and m.
        smaller_queries = q * (k - 1) + (k - 2) * (q * (m - 1) - q * (q - 1) // 2)
        among_runner_ups = np.where(n > q, (k - 1) + (n - q - 1) * (k - 2), 0)
        under_max_query = np.where(n == NONE, 0, 1 + n * (k - 1) + c - 1)
        rank = smaller_queries + np.where(q == m, under_max_query, among_runner_ups + c - 1)
        return count_cells(m, k) + rank

    def partition(self, name: str) -> Partition:
        """The cells told apart by the factors in `name` only: see `partition_by`."""
        return partition_by(self.factors, name)


@dataclass(frozen=True)
class FeatureCells:
    """Cells by leading feature or token m and by modifier or context q; n is none and c 1 throughout.

    With `always` every input has one of the `modifiers`, else there is none of them too.
    """

    d_vocab: int
    modifiers: int = 0
    always: bool = False

    @property
    def count(self) -> int:
        """T, the number of cells: m by m, without a modifier first."""
        return self.d_vocab * (self.modifiers + (not self.always))

    @cached_property
    def factors(self) -> dict[str, NDArray[np.int32]]:
        """`m`, `q`, `n` and `c` of every cell: four int32 arrays [T], -1 for none."""
        m, q = np.divmod(np.arange(self.count, dtype=np.int32), np.int32(self.modifiers + (not self.always)))
        first = 0 if self.always else NONE
        return {"m": m, "q": q + np.int32(first), "n": np.full_like(m, NONE), "c": np.ones_like(m)}

    def partition(self, name: str) -> Partition:
        """The cells told apart by the factors in `name` only."""
        return partition_by(self.factors, name)


def partition_by(factors: Mapping[str, NDArray[np.int32]], name: str) -> Partition:
    """The cells told apart by the factors in `name` only: a part of "mqnc" in that order ("" is one class).

    Classes are numbered in the order of their factors. Raises ValueError for any other name.
    """
    if name != "".join(factor for factor in FACTORS if factor in name):
        raise ValueError(f"a partition is a part of {FACTORS!r} in that order, not {name!r}")
    code = np.zeros(len(factors["m"]), np.int64)
    for factor in name:
        code = code * (int(factors[factor].max()) + 2) + factors[factor] + 1
    classes, of_cell = np.unique(code, return_inverse=True)
    return Partition(name, of_cell.astype(np.int64, copy=False), len(classes))


def _occupied(m: int, k: int) -> NDArray[np.bool_]:
    """Which (q, n + 1, c - 1) have a sequence with maximum `m`: bool [m + 1, m + 1, k]."""
    q, n, c = np.ogrid[0 : m + 1, NONE:m, 1 : k + 1]
    all_copies = (q == m) & (n == NONE) & (c == k)
    query_is_max = (q == m) & (n > NONE) & (c < k)
    # A runner-up above the query takes a place of its own.
    query_below = (q < m) & (n >= q) & (c + (n > q) < k)
    return all_copies | query_is_max | query_below
