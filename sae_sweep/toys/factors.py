"""A table of factors: what is true of each row of a file, which rows are held out, and the classes that this makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sae_sweep.config.keys import nearest, show
from sae_sweep.config.settings import derive_seed
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.toys.classes import FACTORS, NONE, Partition, partition_by

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray
else:
    np, pd = lazy("numpy"), lazy("pandas")


@dataclass(frozen=True)
class Factors:
    """What is true of each row of a file.

    names: of the factors, m's first; values: of each, those it has, sorted; codes: of each [N] int32, a place among the
    values; weights: of the rows [N] float64, 1 in sum; held_out: which rows [N] are measured on and not trained on,
    None where all rows are for both
    """

    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    codes: tuple[NDArray[np.int32], ...]
    weights: NDArray[np.float64]
    held_out: NDArray[np.bool_] | None = None


def read_factors(path: Path, weights: str | None, held_out: str | None = None, seed: int = 0) -> Factors:
    """The factors of a .csv or .parquet file. UserError, one line, for what cannot be meant.

    weights: the column that weights the rows; held_out: the column that holds some out, or the share that is, of which
    `seed` then says which rows these are
    """
    where = f"toy.factors={path}"
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, encoding="utf-8-sig")
    except Exception as error:  # whatever the readers raise on files that are damaged
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if weights is not None and weights not in table:
        raise UserError(f"toy.weights={show(weights)} is no column of {path}: {', '.join(map(str, table))}")
    names = [str(name) for name in table if name not in (weights, held_out)]
    if not 1 <= len(names) <= len(FACTORS):
        raise UserError(f"{where} has {len(names)} factors, wanted one to four: {', '.join(names[:6])}")
    codes, values = [], []
    for name in names:
        missing = table[name].isna()
        if missing.any():
            raise UserError(f"{where}: row {int(missing.argmax())} has no {name}")
        found, kinds = pd.factorize(table[name], sort=True)
        if len(kinds) < 2:
            raise UserError(f"{where}: {name} is {kinds[0]} in every row and tells nothing apart: leave it out")
        codes.append(found.astype(np.int32))
        values.append(tuple(map(str, kinds)))
    share = np.ones(len(table)) if weights is None else table[weights].to_numpy("float64")
    if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise UserError(f"{where}: {weights} must hold finite numbers from 0, and not only 0")
    apart = None if held_out is None else _held_out(where, table, held_out, seed)
    for part in () if apart is None else (apart, ~apart):
        if not share[part].sum() > 0:
            raise UserError(f"{where}: toy.held_out={held_out} leaves no row of any weight on one of its sides")
    return Factors(tuple(names), tuple(values), tuple(codes), share / share.sum(), apart)


def _held_out(where: str, table: pd.DataFrame, held_out: str, seed: int) -> NDArray[np.bool_]:
    """Which rows of a table of factors [N] are held out, by a column of it or as a share."""
    if held_out in table:
        column = table[held_out]
        if not column.isin((0, 1)).all():  # true and false are 1 and 0
            raise UserError(f"{where}: {held_out} must be true or false (1 or 0) in every row, to hold rows out")
        return column.to_numpy(bool)
    try:
        count = round(float(held_out) * len(table))
    except ValueError:
        columns = list(map(str, table))
        raise UserError(
            f"toy.held_out={show(held_out)} is neither a share nor a column of the factors{nearest(held_out, columns)}"
        ) from None
    if not 0 < count < len(table):
        raise UserError(f"toy.held_out={held_out} is no share of {len(table)} rows: it must lie between 0 and 1")
    found = np.zeros(len(table), bool)
    found[np.random.default_rng(derive_seed("held_out", seed)).permutation(len(table))[:count]] = True
    return found


@dataclass(frozen=True)
class TableCells:
    """The classes of rows that differ in no factor; `name` tells tables apart. See `classes.Factored`."""

    name: str
    d_vocab: int
    factors: dict[str, NDArray[np.int32]] = field(compare=False)
    names: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()

    @property
    def count(self) -> int:
        """T, the number of cells."""
        return len(self.factors["m"])

    def partition(self, name: str) -> Partition:
        """The cells told apart by the factors in `name` only."""
        return partition_by(self.factors, name)

    def spelled(self, factor: str, value: int) -> str:
        """A value of a factor in the user's words, as in "letter=a"; nothing of a factor that the table lacks."""
        place = FACTORS.index(factor)
        if place >= len(self.names):
            return ""
        return f"{self.names[place]}={self.values[place][value - (factor == 'c')]}"


def cells_of(factors: Factors, name: str) -> tuple[TableCells, NDArray[np.int64]]:
    """The cells of a table of factors, and the cell of each row [N]."""
    cells, of_row = np.unique(np.stack(factors.codes, 1), axis=0, return_inverse=True)
    columns = {factor: np.full(len(cells), NONE, np.int32) for factor in FACTORS}
    columns["c"][:] = 1
    for factor, column in zip(FACTORS, cells.T, strict=False):
        columns[factor] = np.ascontiguousarray(column) + np.int32(factor == "c")
    found = TableCells(name, len(factors.values[0]), columns, factors.names, factors.values)
    return found, of_row.reshape(-1).astype(np.int64)
