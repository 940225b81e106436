"""How likely each cell of max-of-K is under a declared distribution, and how many of an evaluation's inputs it gets.

No PyTorch here: configurations are checked by it.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sae_sweep.config.settings import Distribution
from sae_sweep.errors import UserError
from sae_sweep.toys.classes import FACTORS, NONE, Cells

# Each class of the partition is equally likely, sequences within a class too.
_BALANCED = {"uniform": "", "max_stratified": "m", "cell_stratified": "mqnc", "copies_balanced": "mc"}


def cell_weights(cells: Cells, distribution: Distribution) -> NDArray[np.float64]:
    """Probability of every cell [T] under `distribution`; within a cell sequences are equally likely.

    Raises UserError where a file of weights cannot be read.
    """
    if distribution.name == "weights":
        if distribution.file is None:
            raise UserError("distribution=weights needs distribution.file, a CSV of weights per cell")
        name, weights = _read_weights(cells, Path(distribution.file))
    else:
        name = _BALANCED[distribution.name]
        weights = np.ones(cells.partition(name).count)
    of_cell = cells.partition(name).of_cell
    # Sizes are divided first: their sum d_vocab^k may be far beyond what the weights need.
    share = cells.sizes / np.bincount(of_cell, cells.sizes)[of_cell]
    return (weights / weights.sum())[of_cell] * share


def _read_weights(cells: Cells, path: Path) -> tuple[str, NDArray[np.float64]]:
    """The partition that the columns of a CSV of weights name, and each class's weight, 0 if not listed."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [column.strip() for column in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(value.strip() for value in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the weights in {path}: {error}") from error
    name = "".join(factor for factor in FACTORS if factor in header)
    if not name or sorted(header) != sorted([*name, "weight"]):
        raise UserError(f"{path}:1: the columns must be some of m, q, n, c, and weight; found: {', '.join(header)}")
    partition = cells.partition(name)
    columns = np.stack([cells.factors[factor] for factor in name], 1)
    _, first = np.unique(partition.of_cell, return_index=True)
    class_of = {tuple(values): index for index, values in enumerate(columns[first].tolist())}
    weights = np.full(partition.count, np.nan)
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}:{line}: {len(row)} values under {len(header)} columns")
        values = {column: value.strip() for column, value in zip(header, row, strict=True)}
        key = tuple(_factor(values[factor], factor, f"{path}:{line}") for factor in name)
        if key not in class_of:
            cell = ", ".join(f"{factor}={values[factor]}" for factor in name)
            raise UserError(f"{path}:{line}: no cell has {cell} at d_vocab {cells.d_vocab}, k {cells.k}")
        if not math.isnan(weights[class_of[key]]):
            raise UserError(f"{path}:{line}: a second weight for the same cells")
        weights[class_of[key]] = _weight(values["weight"], f"{path}:{line}")
    weights = np.nan_to_num(weights, nan=0.0)
    if not 0 < weights.sum() < math.inf:
        raise UserError(f"{path}:{max([line for line, _ in rows], default=1)}: the weights sum to {weights.sum():g}")
    return name, weights


def _factor(text: str, factor: str, place: str) -> int:
    if factor == "n" and text == "none":
        return NONE
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place}: {factor} must be a whole number, not {text!r}") from None


def _weight(text: str, place: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{place}: a weight must be a number from 0, not {text!r}")
    return weight


def systematic_draws(chance: NDArray[np.float64], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """How many of `count` draws each cell gets, and what each of its draws weighs: two arrays [T].

    Systematic sampling: draw i takes the cell at (i + ½)/count of the cumulative proposal, which is half the declared
    `chance` [T] and half every possible cell alike, so that light cells are seen. Weights undo the proposal.
    """
    possible = chance > 0
    proposal = chance / (2 * chance.sum()) + possible / (2 * possible.sum())
    cumulative = np.cumsum(proposal)
    ends = np.ceil(count * (cumulative / cumulative[-1]) - 0.5).astype(np.int64)
    draws = np.diff(ends, prepend=0)
    weight = np.divide(chance, proposal, out=np.zeros_like(chance), where=possible)
    return draws, weight / (weight @ draws)


def inputs_of_cells(cells: Cells, chance: NDArray[np.float64], limit: int) -> NDArray[np.float64]:
    """How many inputs of each cell [T] an evaluation has that takes all sequences up to `limit`, else draws so many."""
    if cells.d_vocab**cells.k <= limit:
        return np.where(chance > 0, cells.sizes, 0.0)
    return systematic_draws(chance, limit)[0].astype(np.float64)
