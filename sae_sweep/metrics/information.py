"""How much the top latent tells of query, runner-up and copies: a function of the table of top latents.

A code of one latent at a time may know a factor only because it knows the maximum, or another factor that comes with
it, or because it has so many latents that any factor would seem known. So information is taken given the maximum
(`info`), or given the maximum and both other factors (`unique`), and corrected for what a permutation would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from sae_sweep.config.columns import Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics.limits import PERMUTED_INPUTS
from sae_sweep.metrics.metric import Measured, Metric, Value, with_nulls
from sae_sweep.registry import register
from sae_sweep.toys.classes import FACTORS, Factored

if TYPE_CHECKING:
    import numpy as np

    from sae_sweep.metrics import compiled_information as compiled
    from sae_sweep.metrics import firing, hashing, nulls, partitions, segment_sums
    from sae_sweep.metrics.firing import FiringTable
    from sae_sweep.metrics.partitions import Classes, Floats, Ints
else:
    np, compiled = lazy("numpy"), lazy("sae_sweep.metrics.compiled_information")
    firing, hashing = lazy("sae_sweep.metrics.firing"), lazy("sae_sweep.metrics.hashing")
    nulls, partitions = lazy("sae_sweep.metrics.nulls"), lazy("sae_sweep.metrics.partitions")
    segment_sums = lazy("sae_sweep.metrics.segment_sums")

FACTOR = {"query": "q", "runner_up": "n", "copies": "c"}
# Entropies below this (nats) are zero; so is what a null leaves of 1.
ZERO = 1e-9


def information(table: FiringTable, cells: Factored, permutations: int) -> dict[str, float | None]:
    """The columns info_* and unique_*: (value - null)/(1 - null), None where the factor is known without the latent.

    Also None where the null is 1: every input has a top latent of its own, so that any factor would seem known. With
    their own nulls shuffled_* and the spread of these: each permutation of the null, corrected by all the others.
    """
    asked: dict[str, tuple[Classes, Classes, Ints]] = {}
    for column, factor in FACTOR.items():
        others = "".join(name for name in FACTORS if name != factor)
        for kind, given in (("info", "m"), ("unique", others)):
            asked[f"{kind}_{column}"] = _nested(cells, factor, given)
    return shares_told(table, asked, permutations)


def shares_told(
    table: FiringTable, asked: Mapping[str, tuple[Classes, Classes, Ints]], permutations: int
) -> dict[str, float | None]:
    """For each column, the share that the top latent tells of rows given groups, corrected, with its null and spread.

    asked: rows, groups, and the cells in the order of both, by column.
    """
    metrics: dict[str, float | None] = {}
    permuted: dict[str, list[float | None] | None] = {}
    tops = _tops(table)
    for column, of in asked.items():
        value, shares = share_between(table, *of[:2]), null_shares(table, tops, of, permutations)
        metrics[column] = corrected(value, None if shares is None else float(shares.mean()))
        permuted[column] = None if shares is None else _corrected_by_others(shares)
    return metrics | nulls.summary(permuted)


def winner_entropy(table: FiringTable) -> float:
    """Entropy (nats) of which latent is on top, none being one of the values: E[−log π] of `exclusive_pi`."""
    latent = table.top_latent + 1
    return float(np.log(table.total)) - _w_log_w(latent, table.top_weight) / table.total


def cofiring(table: FiringTable) -> float | None:
    """How often two latents fire together, over how often they would if each fired by itself.

    Σ P(i and j)/Σ P(i)P(j) over i ≠ j: 1 for independent latents, 0 for a code of one latent at a time. None if at most
    one latent ever fires.
    """
    chance = table.fired / table.total
    expected = float(chance.sum() ** 2 - (chance**2).sum())
    return None if expected < ZERO else table.together / table.total / expected


def corrected(value: float | None, null: float | None) -> float | None:
    """(value - null)/(1 - null), or None if either is, or if the null is 1."""
    if value is None or null is None or 1 - null < ZERO:
        return None
    return (value - null) / (1 - null)


def _corrected_by_others(shares: Floats) -> list[float | None]:
    """Each of several shares [n], by the mean of all others as its null."""
    others = (shares.sum() - shares) / (len(shares) - 1)
    return [corrected(share, null) for share, null in zip(shares.tolist(), others.tolist(), strict=True)]


def share_told(table: FiringTable, cells: Factored, factor: str, given: str) -> float | None:
    """I(top latent; factor | given)/H(factor | given), no latent being one of the values; None if the entropy is 0.

    `given`: the name of a partition without `factor`. Plug-in estimate in evaluation weights.
    """
    return share_between(table, *_nested(cells, factor, given)[:2])


def share_between(table: FiringTable, rows: Classes, groups: Classes) -> float | None:
    """I(top latent; row | group)/H(row | group), each of the `rows` within one of the `groups` of cells."""
    entropy = _entropy(table, rows, groups)
    if entropy < ZERO * table.total:
        return None
    tops = table.top_starts, table.top_latent, table.top_weight, table.width + 1
    joint, by_group = (
        compiled.class_w_log_w(classes.order, np.append(classes.starts, table.cells), *tops)
        for classes in (rows, groups)
    )
    return (joint - by_group + entropy) / entropy


def _entropy(table: FiringTable, rows: Classes, groups: Classes) -> float:
    """H(rows | groups), times all evaluation weight."""
    by_group, by_row = (_log_sum(np.add.reduceat(table.cell_weight[c.order], c.starts)) for c in (groups, rows))
    return by_group - by_row


@lru_cache(maxsize=4 * len(FACTOR))
def _nested(cells: Factored, factor: str, given: str) -> tuple[Classes, Classes, Ints]:
    """The classes of `given` and `factor` together, those of `given` alone, and the cells in the order of both.

    Kept, as every SAE of a sweep needs the same.
    """
    both = "".join(name for name in FACTORS if name in given + factor)
    rows, groups = partitions.partition(cells, both), partitions.partition(cells, given)
    return rows, groups, np.lexsort((rows.of_cell, groups.of_cell))


def _w_log_w(keys: Ints, weights: Floats) -> float:
    """Σ w·log w over the distinct keys, w being the sum of a key's weights."""
    return _log_sum(segment_sums.sum_by(keys, weights)[1])


def _log_sum(total: Floats) -> float:
    """Σ w·log w."""
    return float((total * np.log(total, where=total > 0, out=np.zeros_like(total))).sum())


def _tops(table: FiringTable) -> tuple[Ints, Ints, Ints]:
    """The starts, latents and counts of the rows of top latents, those of each cell in an order of their own.

    That order follows from where each latent is on top, so that latents in another order are permuted alike.
    """
    rows = hashing.mixed(
        hashing.mixed(table.top_cell.astype(np.uint64)) + hashing.GOLDEN * table.top_count.astype(np.uint64)
    )
    content = np.zeros(table.width + 1, np.uint64)
    np.add.at(content, table.top_latent - firing.NO_LATENT, rows)
    order = np.lexsort((content[table.top_latent - firing.NO_LATENT], table.top_cell))
    return table.top_starts, table.top_latent[order], table.top_count[order]


def null_shares(
    table: FiringTable, tops: tuple[Ints, Ints, Ints], of: tuple[Classes, Classes, Ints], permutations: int
) -> Floats | None:
    """`share_between` of rows and groups when the top latents are permuted among the inputs of each group.

    of: rows, groups, and the cells in the order of both. Of each permutation [permutations]; None if the entropy is 0.
    Inputs keep their cell and their weight (the mean of their cell), so that the entropy stays what it is; each keeps
    to its group, so that the latents of a group stay too. A fixed seed. `tops`: as of `_tops`. There are at least two
    permutations, and fewer than asked for where the inputs are so many that one is an average in itself.
    """
    rows, groups, order = of
    entropy = _entropy(table, rows, groups)
    if entropy < ZERO * table.total:
        return None
    counts = np.bincount(table.top_cell, table.top_count, table.cells)
    mean_weight = np.divide(table.cell_weight, counts, out=np.zeros(table.cells), where=counts > 0)
    units, weight, row_start, group_start = compiled.units(order, rows.of_cell, groups.of_cell, mean_weight, *tops)
    times = max(2, min(permutations, PERMUTED_INPUTS // len(units)))
    return (compiled.permute(units, weight, row_start, group_start, table.width + 1, times) + entropy) / entropy


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE; without classes of inputs, what is not about factors."""
    table, permutations = measured.table, measured.evaluation.permutations
    found: dict[str, Value] = {"winner_entropy": winner_entropy(table), "cofiring": cofiring(table)}
    if measured.classes is not None:
        told = information(table, measured.classes.cells, permutations)
        found |= told if measured.nulls else {name: told[name] for name in TOLD}
    return found


TOLD = {
    f"{kind}_{factor}": Column(
        f"share of what is open of the {words} given {given} that the top latent tells, corrected for chance",
        f"information on the {words}{alone}",
        since=1,
    )
    for kind, given, alone in (("info", "the maximum", ""), ("unique", "the maximum and the other factors", " alone"))
    for factor, words in (("query", "query"), ("runner_up", "runner-up"), ("copies", "copies"))
}
COLUMNS = {
    **TOLD,
    **with_nulls(TOLD, TOLD, 8, 10),
    "winner_entropy": Column("entropy of which latent is on top, nats; that none is counts as one", since=2),
    "cofiring": Column(
        "Σ P(i and j) / Σ P(i)P(j) over pairs of latents: 1 if each fires by itself, 0 for one at a time", since=7
    ),
}

register(
    Metric(
        name="information",
        description="what the top latent tells of query, runner-up and copies; which are on top, and fire together",
        columns=COLUMNS,
        measure=measure,
    )
)
