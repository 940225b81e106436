"""Activations of one's own: rows of a file, and a table of factors that says what is true of each row.

    sae-sweep run toy=activations toy.file=acts.npy toy.factors=factors.csv sae.width=64

The first column of the factors takes the part of m, up to three more those of q, n and c: so `label_mq` counts latents
that stand for one value of the first factor with one of the second.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.config.keys import show
from sae_sweep.config.settings import PARTITIONS, Distribution, Toy, derive_seed
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.classes import FACTORS, NONE, Partition, partition_by
from sae_sweep.toys.model import ToyKind

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, pd, torch = lazy("numpy"), lazy("pandas"), lazy("torch")

# Rows that are read at a time, by whoever reads them all.
CHUNK_ROWS = 1 << 16
# NumPy's name of what safetensors calls each type; bfloat16 is read as whole numbers and seen as what it is.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "int16"}


@dataclass(frozen=True)
class Rows:
    """Activations [N, d] of a file; `numbers` may be mapped from it, so that they need not fit into memory."""

    numbers: NDArray[Any]
    bfloat16: bool = False

    def read(self, which: Any) -> Tensor:
        """Some of the rows [b, d], float32: by their numbers [b], or a slice."""
        found = torch.from_numpy(np.array(self.numbers[which]))
        return found.view(torch.bfloat16).float() if self.bfloat16 else found.float()


def open_rows(path: Path) -> Rows:
    """The rows of a .npy, .npz, .safetensors or .parquet file. UserError: it is none, or holds no single matrix."""
    try:
        if path.suffix == ".npy":
            rows = Rows(np.load(path, mmap_mode="r", allow_pickle=False))
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                rows = Rows(arrays[_only(path, list(arrays.files))])
        elif path.suffix == ".safetensors":
            rows = _of_safetensors(path)
        elif path.suffix == ".parquet":
            rows = Rows(pd.read_parquet(path).to_numpy("float32"))
        else:
            raise UserError(f"toy.file={path} must end in .npy, .npz, .safetensors or .parquet")
    except UserError:
        raise
    except Exception as error:  # whatever the readers raise on files that are damaged
        raise UserError(f"toy.file={path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if rows.numbers.ndim != 2 or not rows.numbers.size:
        raise UserError(f"toy.file={path} holds {list(rows.numbers.shape)}, wanted [rows, numbers]")
    if not rows.bfloat16 and rows.numbers.dtype.kind not in "fiu":
        raise UserError(f"toy.file={path} holds {rows.numbers.dtype}, wanted numbers")
    return rows


def _only(path: Path, names: Sequence[str]) -> str:
    if len(names) != 1:
        raise UserError(f"toy.file={path} holds {len(names)} arrays ({', '.join(names[:6])}), wanted one")
    return names[0]


def _of_safetensors(path: Path) -> Rows:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    about = header[_only(path, list(header))]
    if about["dtype"] not in _TYPES:
        raise UserError(f"toy.file={path} holds {about['dtype']}, wanted one of {', '.join(_TYPES)}")
    begin = 8 + length + about["data_offsets"][0]
    numbers = np.memmap(path, _TYPES[about["dtype"]], "r", begin, tuple(about["shape"]))
    return Rows(numbers, about["dtype"] == "BF16")


@dataclass(frozen=True)
class Factors:
    """What is true of each row of a file.

    names: of the factors, m's first; values: of each, those it has, sorted; codes: of each [N] int32, a place among the
    values; weights: of the rows [N] float64, 1 in sum
    """

    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    codes: tuple[NDArray[np.int32], ...]
    weights: NDArray[np.float64]


def read_factors(path: Path, weights: str | None) -> Factors:
    """The factors of a .csv or .parquet file. UserError, one line, for what cannot be meant."""
    where = f"toy.factors={path}"
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, encoding="utf-8-sig")
    except Exception as error:  # whatever the readers raise on files that are damaged
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if weights is not None and weights not in table:
        raise UserError(f"toy.weights={show(weights)} is no column of {path}: {', '.join(map(str, table))}")
    names = [str(name) for name in table if name != weights]
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
    return Factors(tuple(names), tuple(values), tuple(codes), share / share.sum())


@dataclass(frozen=True)
class TableCells:
    """The classes of rows that differ in no factor; `name` tells tables apart. See `classes.Factored`."""

    name: str
    d_vocab: int
    factors: dict[str, NDArray[np.int32]] = field(compare=False)

    @property
    def count(self) -> int:
        """T, the number of cells."""
        return len(self.factors["m"])

    def partition(self, name: str) -> Partition:
        """The cells told apart by the factors in `name` only."""
        return partition_by(self.factors, name)


def cells_of(factors: Factors, name: str) -> tuple[TableCells, NDArray[np.int64]]:
    """The cells of a table of factors, and the cell of each row [N]."""
    cells, of_row = np.unique(np.stack(factors.codes, 1), axis=0, return_inverse=True)
    columns = {factor: np.full(len(cells), NONE, np.int32) for factor in FACTORS}
    columns["c"][:] = 1
    for factor, column in zip(FACTORS, cells.T, strict=False):
        columns[factor] = np.ascontiguousarray(column) + np.int32(factor == "c")
    return TableCells(name, len(factors.values[0]), columns), of_row.reshape(-1).astype(np.int64)


class Activations:
    """Rows of a file as a toy; an input is the number of a row [].  There is no output, and nothing was planted."""

    planted = None

    def __init__(self, toy: Toy, params: dict[str, Tensor], rows: Rows | None = None) -> None:
        """`params`: `cell` [N] int64 and `chance` [N] float64 of the rows."""
        self.toy, self.params = toy, params
        self.rows = open_rows(Path(toy.file)) if rows is None else rows
        if self.rows.numbers.shape != (toy.rows, toy.d_model):
            raise UserError(f"toy.file={toy.file} has changed: it is {list(self.rows.numbers.shape)} now")
        self.cells = cells_of(_factors(toy), toy.factors_digest)[0]
        chance = params["chance"].cpu().numpy()
        self.chance: NDArray[np.float64] = np.zeros(self.cells.count)
        np.add.at(self.chance, params["cell"].cpu().numpy(), chance)
        self._cumulative = params["chance"].cumsum(0)

    @property
    def device(self) -> torch.device:
        """Where inputs and activations live."""
        return self.params["cell"].device

    def to(self, device: str | torch.device) -> Activations:
        """The same toy on `device`; its file stays where it is."""
        return Activations(self.toy, {name: each.to(device) for name, each in self.params.items()}, self.rows)

    def width(self, site: str) -> int:
        """d: numbers per activation."""
        return self.toy.d_model

    def population(self, distribution: Distribution, device: str | torch.device) -> Activations:
        """Its inputs; how they are weighted is the toy's own."""
        return self.to(device)

    @property
    def total(self) -> int:
        """How many rows there are."""
        return self.toy.rows

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent rows [count] by their weights."""
        uniform = torch.rand(count, dtype=torch.float64, generator=generator, device=self.device)
        found = torch.searchsorted(self._cumulative, uniform * self._cumulative[-1], right=True)
        return found.clamp_max(self.total - 1)

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each row [count]."""
        return self.params["cell"][inputs]

    def weighted(self, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows of some weight where there are at most `limit`, else `limit` draws."""
        if self.total <= limit:
            listed = self.params["chance"].nonzero()[:, 0]
            weight = self.params["chance"][listed]
        else:
            generator = torch.Generator(self.device).manual_seed(derive_seed("evaluation", limit))
            listed = self.draw(limit, generator)
            weight = torch.full((limit,), 1 / limit, dtype=torch.float64, device=self.device)
        for part, share in zip(listed.split(CHUNK_ROWS), weight.split(CHUNK_ROWS), strict=True):
            yield part, self.cell(part), share

    def count(self, limit: int) -> int:
        """How many inputs `weighted` gives."""
        return int((self.params["chance"] > 0).sum()) if self.total <= limit else limit

    def inputs_of_cells(self, limit: int) -> NDArray[np.float64]:
        """How many of these are of each cell [T], or may be expected to be where they are drawn."""
        if self.total > limit:
            return limit * self.chance
        listed = self.params["cell"][self.params["chance"] > 0]
        return np.bincount(listed.cpu().numpy(), minlength=self.cells.count).astype(np.float64)

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32 of rows."""
        return self.rows.read(inputs.cpu().numpy()).to(self.device)

    def logits(self, acts: Tensor, site: str) -> None:
        """There is no output."""

    def truth(self, inputs: Tensor) -> None:
        """There is nothing to predict."""


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute paths, digests and sizes of both files, and the names of the factors. UserError: they do not fit."""
    for key in ("file", "factors"):
        if settings.get(key) is None:
            raise UserError(f"toy=activations needs toy.{key}: numbers [N, d] and a table of N rows of factors")
    path, table = (_found(key, settings[key]) for key in ("file", "factors"))
    digests = {"digest": _digest(path), "factors_digest": _digest(table)}
    shape = open_rows(path).numbers.shape
    factors = _kept(table, settings.get("weights"), digests["factors_digest"])
    if len(factors.weights) != shape[0]:
        raise UserError(f"toy.factors={table} has {len(factors.weights)} rows and toy.file={path} {shape[0]}")
    sizes = {"rows": shape[0], "d_model": shape[1], "values": len(factors.values[0]), "names": ", ".join(factors.names)}
    return {"file": str(path), "factors": str(table), **digests, **sizes}


def _found(key: str, given: str) -> Path:
    try:
        path = Path(given).expanduser().resolve()
        path.open("rb").close()
    except (OSError, RuntimeError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"toy.{key}={show(given)}: {reason}") from error
    return path


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _digest_of(path: Path, time: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _kept(path: Path, weights: str | None, digest: str) -> Factors:
    return read_factors(path, weights)


def _factors(toy: Toy) -> Factors:
    path = _found("factors", toy.factors)
    if _digest(path) != toy.factors_digest:
        raise UserError(f"toy.factors={path} has changed since this sweep was configured")
    return _kept(path, toy.weights, toy.factors_digest)


def read(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """The cell and the weight of each row of each toy, once all its numbers were found finite."""
    found = []
    for toy in toys:
        path = _found("file", toy.file)
        if _digest(path) != toy.digest:
            raise UserError(f"toy.file={path} has changed since this sweep was configured")
        rows, factors = open_rows(path), _factors(toy)
        for first in range(0, toy.rows, CHUNK_ROWS):
            wrong = ~rows.read(slice(first, first + CHUNK_ROWS)).isfinite().all(1)
            if wrong.any():
                raise UserError(f"toy.file={path}: row {first + int(wrong.int().argmax())} holds nan or infinity")
        _, of_row = cells_of(factors, toy.factors_digest)
        found.append({"cell": torch.from_numpy(of_row), "chance": torch.from_numpy(factors.weights.copy())})
    return found


def load(toy: Toy, params: dict[str, Tensor]) -> Activations:
    """The toy whose parameters `read` returned. ValueError if they are those of another."""
    if len(params["cell"]) != toy.rows:
        raise ValueError("not the rows of such a toy")
    return Activations(toy, params)


def _classes(partition: str, toy: Toy) -> int:
    if partition not in (*PARTITIONS, "mqnc"):
        raise UserError(f"${{cells:{partition}}}: no such partition of the factors {toy.names}")
    return cells_of(_factors(toy), toy.factors_digest)[0].partition(partition).count


register(
    ToyKind(
        name="activations",
        description="rows of a file, with a table that says what is true of each: .npy, .npz, .safetensors, .parquet",
        settings={
            # A path says nothing about the numbers; what the file holds does.
            "file": Setting(None, "numbers [N, d]", kind="str", optional=True, told=False),
            "factors": Setting(None, "a .csv or .parquet of N rows of factors", kind="str", optional=True, told=False),
            "weights": Setting(None, "the column of the factors that weights rows", kind="str", optional=True),
            "digest": Setting(None, "of the file's content", kind="str", optional=True, given=False),
            "factors_digest": Setting(None, "of the content", kind="str", optional=True, given=False),
            "names": Setting("", "of the factors: the first is m, the next are q, n and c", told=False, given=False),
            "rows": Setting(0, "N", given=False),
            "d_model": Setting(0, "d", given=False),
            "values": Setting(0, "of the first factor", given=False),
        },
        train=read,
        load=load,
        resolve=resolve,
        maxima=lambda toy: toy.values,
        size=lambda toy: (toy.d_model,),
        classes=_classes,
        d=lambda toy, site: toy.d_model,
        inputs=lambda toy: toy.rows,
        trains=lambda toy: (0, 0),
        factors_depend=True,
    )
)
