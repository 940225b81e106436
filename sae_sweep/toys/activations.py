"""Activations of one's own: rows of a file, and a table of factors that says what is true of each row.

    sae-sweep run toy=activations toy.file=acts.npy toy.factors=factors.csv sae.width=64

The first column of the factors takes the part of m, up to three more those of q, n and c: so `label_mq` counts latents
that stand for one value of the first factor with one of the second. `toy.held_out=late` names a column of the factors
that is true of the rows to measure on, `toy.held_out=0.2` takes that share of them; SAEs train on the others alone.
`toy.readout=readout.npz` says what the model makes of an activation: with it there are KL and loss recovered.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.config.keys import show
from sae_sweep.config.settings import PARTITIONS, Distribution, Toy, derive_seed
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.aligned import product
from sae_sweep.toys.factors import Factors, cells_of, read_factors
from sae_sweep.toys.model import ANSWERS, ToyKind
from sae_sweep.toys.readout import read_readout
from sae_sweep.toys.rows import Rows, open_rows

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch = lazy("numpy"), lazy("torch")

# Rows that are read at a time, by whoever reads them all.
CHUNK_ROWS = 1 << 16


class Activations:
    """Rows of a file as a toy, and as the population of those to train on, to measure on, or of all.

    An input is the number of a row []. Nothing was planted; there is an output where there is a read-out.
    """

    planted = None

    def __init__(
        self, toy: Toy, params: dict[str, Tensor], rows: Rows | None = None, held_out: bool | None = None
    ) -> None:
        """`params`: `cell` [N] int64 and `chance` [N] float64 of the rows, `held_out` [N] bool where some are, and what
        `read_readout` gives. `held_out`: only the rows that are held out, or only the others; None: all of them."""
        self.toy, self.params, self._part = toy, params, held_out
        self.rows = open_rows(Path(toy.file)) if rows is None else rows
        if self.rows.numbers.shape != (toy.rows, toy.d_model):
            raise UserError(f"toy.file={toy.file} has changed: it is {list(self.rows.numbers.shape)} now")
        self.cells = cells_of(_factors(toy), toy.factors_digest)[0]
        self._chance = params["chance"]
        if held_out is not None and "held_out" in params:
            self._chance = torch.where(params["held_out"] == held_out, self._chance, 0.0)
            self._chance = self._chance / self._chance.sum()
        self._listed = self._chance.nonzero()[:, 0]
        self._cumulative = self._chance[self._listed].cumsum(0)
        self.chance: NDArray[np.float64] = np.zeros(self.cells.count)
        np.add.at(self.chance, params["cell"].cpu().numpy(), self._chance.cpu().numpy())

    @property
    def device(self) -> torch.device:
        """Where inputs and activations live."""
        return self.params["cell"].device

    def to(self, device: str | torch.device, held_out: bool | None = None) -> Activations:
        """The same toy on `device`; its file stays where it is. `held_out`: see above."""
        on_device = {name: each.to(device) for name, each in self.params.items()}
        return Activations(self.toy, on_device, self.rows, held_out)

    def width(self, site: str) -> int:
        """d: numbers per activation."""
        return self.toy.d_model

    def population(self, distribution: Distribution, device: str | torch.device) -> Activations:
        """The inputs to train on; how they are weighted is the toy's own."""
        return self.to(device, held_out=False)

    def measured_population(self, distribution: Distribution, device: str | torch.device) -> Activations:
        """The inputs to measure on: those that are held out, or all."""
        return self.to(device, held_out=True)

    @property
    def total(self) -> int:
        """How many rows of some weight there are."""
        return len(self._listed)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent rows [count] by their weights."""
        uniform = torch.rand(count, dtype=torch.float64, generator=generator, device=self.device)
        found = torch.searchsorted(self._cumulative, uniform * self._cumulative[-1], right=True)
        return self._listed[found.clamp_max(self.total - 1)]

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each row [count]."""
        return self.params["cell"][inputs]

    def weighted(self, limit: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All rows of some weight where there are at most `limit`, else `limit` draws."""
        if self.total <= limit:
            listed, weight = self._listed, self._chance[self._listed]
        else:
            generator = torch.Generator(self.device).manual_seed(derive_seed("evaluation", limit))
            listed = self.draw(limit, generator)
            weight = torch.full((limit,), 1 / limit, dtype=torch.float64, device=self.device)
        for part, share in zip(listed.split(CHUNK_ROWS), weight.split(CHUNK_ROWS), strict=True):
            yield part, self.cell(part), share

    def count(self, limit: int) -> int:
        """How many inputs `weighted` gives."""
        return min(self.total, limit)

    def inputs_of_cells(self, limit: int) -> NDArray[np.float64]:
        """How many of these are of each cell [T], or may be expected to be where they are drawn."""
        if self.total > limit:
            return limit * self.chance
        listed = self.params["cell"][self._listed]
        return np.bincount(listed.cpu().numpy(), minlength=self.cells.count).astype(np.float64)

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32 of rows."""
        return self.rows.read(inputs.cpu().numpy()).to(self.device)

    def logits(self, acts: Tensor, site: str) -> Tensor | None:
        """What the read-out makes of activations [..., outputs]; None without one."""
        return product(acts, self.params["W_U"]) + self.params["b_U"] if "W_U" in self.params else None

    def truth(self, inputs: Tensor) -> Tensor | None:
        """The target of each row [batch] int64; None without any."""
        return self.params["targets"][inputs] if "targets" in self.params else None


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Absolute paths, digests and sizes of both files, and the names of the factors. UserError: they do not fit."""
    for key in ("file", "factors"):
        if settings.get(key) is None:
            raise UserError(f"toy=activations needs toy.{key}: numbers [N, d] and a table of N rows of factors")
    path, table = (_found(key, settings[key]) for key in ("file", "factors"))
    digests = {"digest": _digest(path), "factors_digest": _digest(table)}
    shape = open_rows(path).numbers.shape
    chosen = settings.get("weights"), settings.get("held_out"), settings.get("seed", 0)
    factors = _kept(table, *chosen, digests["factors_digest"])
    if len(factors.weights) != shape[0]:
        raise UserError(f"toy.factors={table} has {len(factors.weights)} rows and toy.file={path} {shape[0]}")
    sizes = {"rows": shape[0], "d_model": shape[1], "values": len(factors.values[0]), "names": ", ".join(factors.names)}
    return {"file": str(path), "factors": str(table), **digests, **sizes, **_of_readout(settings, shape)}


def _of_readout(settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The read-out's absolute path, digest and outputs; nothing without one. UserError: it is not one of such rows."""
    if settings.get("readout") is None:
        return {}
    path = _found("readout", settings["readout"])
    sizes = {name: tuple(tensor.shape) for name, tensor in _kept_readout(path, _digest(path)).items()}
    if sizes["W_U"][0] != shape[1]:
        raise UserError(f"toy.readout={path}: W_U is {list(sizes['W_U'])}, wanted [{shape[1]}, outputs]")
    if sizes.get("targets", shape[:1]) != shape[:1]:
        raise UserError(f"toy.readout={path}: there are {sizes['targets'][0]} targets and {shape[0]} rows")
    return {"readout": str(path), "readout_digest": _digest(path), "outputs": sizes["W_U"][1]}


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
def _kept(path: Path, weights: str | None, held_out: str | None, seed: int, digest: str) -> Factors:
    return read_factors(path, weights, held_out, seed)


@functools.lru_cache(maxsize=2)
def _kept_readout(path: Path, digest: str) -> dict[str, Tensor]:
    return read_readout(path)


def _unchanged(key: str, given: str, digest: str) -> Path:
    """Where a file of a toy lies. UserError if it is gone or another than when the sweep was configured."""
    path = _found(key, given)
    if _digest(path) != digest:
        raise UserError(f"toy.{key}={path} has changed since this sweep was configured")
    return path


def _factors(toy: Toy) -> Factors:
    path = _unchanged("factors", toy.factors, toy.factors_digest)
    return _kept(path, toy.weights, toy.held_out, toy.seed, toy.factors_digest)


def read(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """The cell and the weight of each row of each toy, once all its numbers were found finite."""
    found = []
    for toy in toys:
        path = _unchanged("file", toy.file, toy.digest)
        rows, factors = open_rows(path), _factors(toy)
        for first in range(0, toy.rows, CHUNK_ROWS):
            wrong = ~rows.read(slice(first, first + CHUNK_ROWS)).isfinite().all(1)
            if wrong.any():
                raise UserError(f"toy.file={path}: row {first + int(wrong.int().argmax())} holds nan or infinity")
        _, of_row = cells_of(factors, toy.factors_digest)
        params = {"cell": torch.from_numpy(of_row), "chance": torch.from_numpy(factors.weights.copy())}
        if factors.held_out is not None:
            params["held_out"] = torch.from_numpy(factors.held_out.copy())
        if toy.readout is not None:
            params |= _kept_readout(_unchanged("readout", toy.readout, toy.readout_digest), toy.readout_digest)
        found.append(params)
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
            "file": Setting(
                None, "path of the activations, an array of N rows; required", kind="str", optional=True, told=False
            ),
            "factors": Setting(
                None,
                "path of a .csv or .parquet that says what is true of each of the N rows, with a column for each "
                "factor",
                kind="str",
                optional=True,
                told=False,
            ),
            "weights": Setting(
                None, "column of that table by which rows are weighted; null: all rows alike", kind="str", optional=True
            ),
            "held_out": Setting(
                None,
                "rows to measure on and not to train on: a column of that table that is true for them, or a share such "
                "as 0.2; null: all rows are for both",
                kind="str",
                optional=True,
                legacy=None,
                verbatim=True,
            ),
            "readout": Setting(
                None,
                "path of a .npz or .safetensors with W_U, b_U and targets, from which KL and the model's loss are "
                "measured; null: neither is",
                kind="str",
                optional=True,
                told=False,
            ),
            "readout_digest": Setting(None, "of its content", kind="str", optional=True, given=False, legacy=None),
            "outputs": Setting(0, "of the read-out", given=False, legacy=0),
            # What a language model says next is seldom right: nothing is asked of a read-out but on request.
            "least_accuracy": dataclasses.replace(ANSWERS["least_accuracy"], default=0.0),
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
