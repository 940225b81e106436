"""The CUDA step: which kernels, in which tiles, in which memory; captured once as a CUDA graph and then replayed.

Nothing here waits for the device. Tiles and capacities follow from the shape of one SAE, an SAE's sums run in an order
of its own, and whether it takes a step by entries or by matrix products is decided on the device from its own codes
alone: so its bits depend on no pack-mate. Nor is code compiled for a number of SAEs (do_not_specialize).
In Triton's interpreter (TRITON_INTERPRET=1) the same runs on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import triton
from torch import Tensor

from sae_sweep.saes.kernels import Progress
from sae_sweep.saes.kernels import triton_dense as by_products
from sae_sweep.saes.kernels import triton_encode as encode
from sae_sweep.saes.kernels import triton_sparse as by_entries
from sae_sweep.saes.kernels import triton_update as update
from sae_sweep.saes.kernels.triton_slopes import Slopes, triton_slopes
from sae_sweep.saes.stack import Stack, adam_scale

# Up to this width matrix products beat lists of entries, however little fires.
NARROW = 512
# From this width an input's latents are looked for by SEGMENTS programs at once, in larger tiles.
WIDE, SEGMENTS = 8192, 8
# float32 products on tensor cores: three of TF32, which lose nothing that float32 would keep.
PRECISION = "tf32x3"
# Inputs, and latents, in a tile.
TILE = 64
# Words of 32 inputs' bits that are read at once.
WORDS = 128
# Programs per SAE that its gradient is split among, at least, where there are inputs enough.
PROGRAMS = 32


class CudaBackend:
    """Holds the buffers of the stack it trains: beside the gradient, a bit per input and latent is the largest."""

    def __init__(self, precision: str = PRECISION) -> None:
        """`precision`: Triton's input_precision of float32 products, "tf32", "tf32x3" or "ieee"."""
        self.precision = precision
        self._trainer: _Trainer | None = None

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        trainer = self._trainer
        if trainer is None or not trainer.fits(stack, batches):
            trainer = self._trainer = _Trainer(stack, batches.shape[1], self.precision)
        return trainer.advance(batches)


class _Trainer:
    """One stack: its buffers, and the launches of a step."""

    def __init__(self, stack: Stack, b: int, precision: str) -> None:
        self.stack, self.b, self.precision = stack, b, precision
        self.n, self.width, self.d, self.stride = len(stack.points), stack.width, stack.d, stack.flat.stride(0)
        self.k = stack.points[0].sae.k if stack.architecture.name == "topk" else 0
        self.sparse = bool(self.k) or self.width > NARROW
        self.shape = {"D": self.d, "DP": max(16, triton.next_power_of_2(self.d))}
        self.addresses = _addresses(stack)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.launched = False

        self.groups = [(triton_slopes(name), self._ints(members)) for name, members in _by_penalty(stack).items()]
        settings = [(point.penalty.scale, point.penalty.p, point.training.clip) for point in stack.points]
        self.settings = torch.tensor(settings, dtype=torch.float32, device=stack.flat.device)
        self.schedule = _schedule(stack).to(stack.flat.device)
        self.coefficients = self.schedule[:, :, 2].clone()
        self.annealed = any(point.penalty.name == "lp_annealed" for point in stack.points)
        self.step = self._zeros(1, dtype=torch.int64)
        self.x, self.metrics, self.factors = self._zeros(b, self.d), self._zeros(self.n, 4), self._zeros(self.n)
        self.norms = self._zeros(self.n, self.width)
        self.residuals, self.rows_sums = self._zeros(self.n, b, self.d), self._zeros(self.n, b, 3)
        # 1 where an SAE takes this step by matrix products.
        self.dense = self._zeros(self.n, dtype=torch.int32) + int(not self.sparse)
        self.input_sums = self._zeros(self.n, triton.cdiv(b, TILE), self.shape["DP"] + 4)
        # Latents that one program of sum_latents adds up.
        self.run = 1024 if self.sparse else 8
        self.latent_sums = self._zeros(self.n, triton.cdiv(self.width, self.run))
        self._room_for_products()
        if self.sparse:
            self._room_for_entries()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.stack.flat.device)

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.stack.flat.device)

    def _room_for_products(self) -> None:
        # Registers decide: half as many inputs where d is long, and half again where two gradients are summed.
        self.rows = TILE if self.shape["DP"] <= 64 else TILE // 2
        tiles, rows = triton.cdiv(self.width, TILE), self.rows // 2
        parts = 1 if self.k else min(triton.cdiv(self.b, rows), triton.cdiv(PROGRAMS, tiles))
        self.share = triton.cdiv(triton.cdiv(self.b, parts), rows) * rows
        self.parts = triton.cdiv(self.b, self.share)
        self.gradient = self._zeros(self.parts, self.n, self.stride)
        self.pulls = self._zeros(self.parts, self.n, self.width)
        self.slopes = self._zeros(self.n, self.b, 2)

    def _room_for_entries(self) -> None:
        wide = self.width >= WIDE and not self.k
        self.segments, self.screen_rows = (SEGMENTS, 2 * TILE) if wide else (1, TILE)
        # Mean entries per input above which products are faster, and most of one input in one segment.
        mean = self.k or min(max(self.width // 32, 32), 256)
        self.capacity = self.k or triton.next_power_of_2(4 * mean // self.segments)
        self.room = mean * self.b
        cells = (self.n, self.b, self.segments)
        self.slots = self._zeros(*cells, self.capacity, dtype=torch.int32)
        self.counts = self._zeros(*cells, dtype=torch.int32)
        self.reach, self.squares = self._zeros(self.n, self.width), self._zeros(self.n, self.width)
        self.packed = self._zeros(self.n, self.width, self.shape["DP"], dtype=torch.float16)
        # The inputs that a latent fires on, a bit each; how many so far; and the latents that fire on any.
        self.words = triton.cdiv(self.b, 32)
        self.masks = self._zeros(self.n, self.width, self.words, dtype=torch.int32)
        self.hits, self.fired = (self._zeros(self.n, self.width, dtype=torch.int32) for _ in range(2))
        self.fired_count = self._zeros(self.n, dtype=torch.int32)
        device = self.stack.flat.device
        many = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.programs = triton.cdiv(16 * many, self.n)

    def fits(self, stack: Stack, batches: Tensor) -> bool:
        """Whether the captured addresses are still those of this stack, and the batches of this size."""
        return stack is self.stack and _addresses(stack) == self.addresses and batches.shape[1:] == self.x.shape

    def advance(self, batches: Tensor) -> Progress:
        """Steps through batches [steps, b, d]."""
        assert self.stack.step + len(batches) <= len(self.schedule), "past the end of the training"
        self.step.fill_(self.stack.step)
        self.metrics.zero_()
        if self.annealed:
            self.settings[:, 1] = self.stack.exponent
            self.schedule[:, :, 2] = self.coefficients * self.stack.rescale.to(self.coefficients)
        for x in batches:
            self.x.copy_(x)
            if self.graph is None and self.launched and self.x.is_cuda:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self._launch()
            if self.graph is None:
                self._launch()  # the first step compiles the kernels
                self.launched = True
            else:
                self.graph.replay()
        self.stack.step += len(batches)
        variance = batches.square().sum(-1).mean(1).sum()
        return Progress(len(batches), variance, *self.metrics.clone().unbind(1))

    def _launch(self) -> None:
        """One step on self.x: every line is one kernel, or one per penalty of the stack."""
        shape, n, b, width, stride = self.shape, self.n, self.b, self.width, self.stride
        flat = self.stack.flat
        extra = (self.reach, self.packed) if self.sparse else (self.norms, self.norms)
        encode.measure_latents[(triton.cdiv(width, 32), n)](
            flat, self.norms, *extra, width, stride, **shape, LATENTS=32, SCREENED=self.sparse
        )
        if self.sparse:
            self._screen()
            for slopes, members in self.groups:
                self._entries(slopes, members)
        if not self.k:  # TopK's entries always have room
            for slopes, members in self.groups:
                self._products(slopes, members)
        squares = self.squares if self.sparse else self.norms
        update.sum_inputs[(triton.cdiv(b, TILE), n)](
            self.residuals, self.rows_sums, self.input_sums, b, **shape, ROWS=TILE
        )
        update.sum_latents[(self.latent_sums.shape[1], n)](
            flat, self.dense, self.gradient, self.pulls, squares, self.latent_sums, n, width, stride, self.parts,
            **shape, LATENTS=self.run, TILE=8, PARTS=min(8, triton.next_power_of_2(self.parts)),
            SPARSE=self.sparse,
        )  # fmt: skip
        update.finish_sums[(n,)](
            self.input_sums, self.latent_sums, self.gradient, self.settings, self.schedule, self.step, self.factors,
            self.metrics, b, n, width, stride, self.input_sums.shape[1], self.latent_sums.shape[1], **shape, BLOCK=64,
        )  # fmt: skip
        update.adam[(triton.cdiv(width, 32), n)](
            flat, self.stack.first, self.stack.second, self.gradient, squares, self.dense, self.factors, self.schedule,
            self.step, n, width, stride, **shape, LATENTS=32, SPARSE=self.sparse,
        )  # fmt: skip
        self.step.add_(1)

    def _screen(self) -> None:
        """Slots of the latents that may fire, and which SAEs have no room for them."""
        rows, n, width = self.screen_rows, self.n, self.width
        before = (self.x, self.stack.flat)
        after = (self.reach, self.packed, self.slots, self.counts, self.b, width, self.stride)
        if self.k:
            places = triton.next_power_of_2(self.k)
            rows = min(rows, 16)
            encode.choose[(triton.cdiv(self.b, rows), n)](
                *before, self.norms, *after, K=self.k, KP=places, **self.shape, ROWS=rows, LATENTS=TILE,
                PRECISION=self.precision,
            )  # fmt: skip
        else:
            segment = triton.cdiv(triton.cdiv(width, self.segments), TILE) * TILE
            encode.screen[(triton.cdiv(self.b, rows), self.segments, n)](
                *before, *after, segment, **self.shape, ROWS=rows, LATENTS=TILE, CAPACITY=self.capacity,
                num_warps=rows // 16,
            )  # fmt: skip
        by_entries.check_room[(n,)](
            self.counts, self.dense, self.fired_count, self.b * self.segments, self.room, CAPACITY=self.capacity,
            BLOCK=1024,
        )  # fmt: skip
        self.squares.zero_()

    def _entries(self, slopes: Slopes, members: Tensor) -> None:
        fires = self.masks, self.hits, self.fired, self.fired_count
        by_entries.decode[(self.b, len(members))](
            self.x, self.stack.flat, self.norms, self.slots, self.counts, self.dense, members, self.settings, *fires,
            self.residuals, self.rows_sums, self.slopes, self.b, self.width, self.stride, self.words,
            TERMS=slopes.terms, OUTER=slopes.outer, **self.shape, SEGMENTS=self.segments, CAPACITY=self.capacity,
            CHUNK=16, num_warps=1,
        )  # fmt: skip
        by_entries.gradients_of_latents[(self.programs, len(members))](
            self.x, self.stack.flat, self.norms, members, self.settings, self.schedule, self.step, *fires,
            self.residuals, self.slopes, self.gradient, self.squares, self.b, self.n, self.width, self.stride,
            self.words, TERM_SLOPES=slopes.term_slopes, **self.shape, CHUNK=16,
            WORDS=min(WORDS, triton.next_power_of_2(self.words)), num_warps=2,
        )  # fmt: skip

    def _products(self, slopes: Slopes, members: Tensor) -> None:
        # One stage: what a program reads lies in the L2 cache, and copies under way would take registers' place.
        tile = {**self.shape, "LATENTS": TILE, "PRECISION": self.precision, "num_stages": 1}
        common = (self.x, self.stack.flat, self.norms, self.dense, members, self.settings)
        by_products.reconstruct[(triton.cdiv(self.b, self.rows), len(members))](
            *common, self.residuals, self.rows_sums, self.slopes, self.b, self.width, self.stride,
            TERMS=slopes.terms, OUTER=slopes.outer, **tile, ROWS=self.rows,
        )  # fmt: skip
        by_products.gradients[(triton.cdiv(self.width, TILE), self.parts, len(members))](
            *common, self.schedule, self.step, self.residuals, self.slopes, self.gradient, self.pulls, self.b, self.n,
            self.width, self.stride, self.share, TERM_SLOPES=slopes.term_slopes, **tile,
            ROWS=self.rows // 2,
        )  # fmt: skip


def _addresses(stack: Stack) -> list[int]:
    return [t.data_ptr() for t in (stack.flat, stack.first, stack.second)]


def _by_penalty(stack: Stack) -> dict[str, list[int]]:
    """SAEs of the stack by the penalty whose slopes they need."""
    groups = defaultdict(list)
    for i, point in enumerate(stack.points):
        groups[point.penalty.name].append(i)
    return groups


def _schedule(stack: Stack) -> Tensor:
    """[steps, n, 3]: learning rate over Adam's first bias correction, one over the second, and the coefficient."""
    steps = range(stack.points[0].training.steps)
    corrections = [adam_scale(step) for step in steps]
    columns: dict[Any, Tensor] = {}
    for i, point in enumerate(stack.points):
        key = point.training, point.penalty.coefficient
        if key not in columns:
            rows = [stack.schedule(i, step) for step in steps]
            columns[key] = torch.tensor(
                [
                    (rate / c1, 1 / c2, coefficient)
                    for (rate, coefficient), (c1, c2) in zip(rows, corrections, strict=True)
                ]
            )
    return torch.stack([columns[point.training, point.penalty.coefficient] for point in stack.points], 1)
