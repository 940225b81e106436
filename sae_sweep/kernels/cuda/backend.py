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

from sae_sweep.kernels.cuda import dense, encode, sparse, tiling, update
from sae_sweep.kernels.cuda.captured import Capture, CapturedStep, addresses, cuda_graph, uncaptured
from sae_sweep.kernels.cuda.penalty_gradients import Slopes, triton_slopes
from sae_sweep.kernels.cuda.tiling import TILE, Tiles, power_of_two
from sae_sweep.saes.formula import Formula
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes.optimizers import bias_corrections
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import Backend, Progress

# float32 products on tensor cores: three of TF32, with a relative error of about 1e-6 where one has 3e-4 to 1e-3.
# Triton's "ieee" products run on no tensor core, and their tiles spill 16 KB a thread from registers.
PRECISION = "tf32x3"


class CudaBackend(Backend):
    """Holds the buffers of the stack it trains: beside the gradient, a bit per input and latent is the largest."""

    def __init__(self, precision: str = PRECISION, capture: Capture | None = None) -> None:
        """`precision` of float32 products by Triton's names: "tf32x3", "tf32". `capture`: by default CUDA's."""
        self.precision = precision
        self._capture = capture
        self._trainer: _Trainer | None = None

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        trainer = self._trainer
        if trainer is None or not trainer.fits(stack, batches):
            capture = self._capture or (cuda_graph if stack.flat.is_cuda else uncaptured)
            trainer = self._trainer = _Trainer(stack, batches.shape[1], self.precision, capture)
        return trainer.advance(batches)


class _Trainer:
    """One stack: its buffers, and the launches of a step."""

    def __init__(self, stack: Stack, b: int, precision: str, capture: Capture = uncaptured) -> None:
        self.stack, self.b, self.precision = stack, b, precision
        self.n, self.width, self.d, self.stride = len(stack.points), stack.width, stack.d, stack.flat.stride(0)
        self.tiles = Tiles.of(stack.points[0].sae, self.d, b)
        self.k, self.sparse = self.tiles.k, self.tiles.sparse
        self.shape = {"D": self.d, "DP": self.tiles.padded}
        self.addresses = addresses(stack)
        self.captured = CapturedStep(self._launch, capture)

        self.groups = [(triton_slopes(formula), self._ints(members)) for formula, members in _by_penalty(stack).items()]
        settings = [
            (point.penalty.get("scale", 1.0), point.penalty.get("p", 1.0), point.training.clip)
            for point in stack.points
        ]
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
        self.latent_sums = self._zeros(self.n, triton.cdiv(self.width, self.tiles.run))
        self._room_for_products()
        if self.sparse:
            self._room_for_entries()

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.stack.flat.device)

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.stack.flat.device)

    def _room_for_products(self) -> None:
        self.gradient = self._zeros(self.tiles.parts, self.n, self.stride)
        self.pulls = self._zeros(self.tiles.parts, self.n, self.width)
        self.slopes = self._zeros(self.n, self.b, 2)

    def _room_for_entries(self) -> None:
        # Latents that may fire on each input: a bit each, or the k that were chosen.
        self.candidates = self._zeros(self.n, self.b, self.k or self.tiles.latent_words, dtype=torch.int32)
        self.counts = self._zeros(self.n, self.tiles.cells, dtype=torch.int32)
        self.reach, self.squares = self._zeros(self.n, self.width), self._zeros(self.n, self.width)
        self.packed = self._zeros(self.n, self.width, self.shape["DP"], dtype=torch.float16)
        # The inputs that a latent fires on, a bit each; how many so far; and the latents that fire on any.
        self.masks = self._zeros(self.n, self.width, self.tiles.words, dtype=torch.int32)
        self.hits, self.fired = (self._zeros(self.n, self.width, dtype=torch.int32) for _ in range(2))
        self.fired_count = self._zeros(self.n, dtype=torch.int32)
        device = self.stack.flat.device
        many = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        self.programs = triton.cdiv(16 * many, self.n)

    def fits(self, stack: Stack, batches: Tensor) -> bool:
        """Whether the captured addresses are still those of this stack, and the batches of this size."""
        return stack is self.stack and addresses(stack) == self.addresses and batches.shape[1:] == self.x.shape

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
            self.captured()
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
            flat, self.dense, self.gradient, self.pulls, squares, self.latent_sums, n, width, stride, self.tiles.parts,
            **shape, LATENTS=self.tiles.run, TILE=8, PARTS=min(8, power_of_two(self.tiles.parts)),
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
        """The latents that may fire, and in which SAEs these are too many to be taken one by one."""
        n, width = self.n, self.width
        before = (self.x, self.stack.flat)
        if self.k:
            encode.choose[(triton.cdiv(self.b, 16), n)](
                *before, self.norms, self.reach, self.packed, self.candidates, self.counts, self.b, width, self.stride,
                K=self.k, KP=power_of_two(self.k), **self.shape, ROWS=16, LATENTS=TILE, PRECISION=self.precision,
            )  # fmt: skip
        else:
            segment = triton.cdiv(triton.cdiv(width, self.tiles.segments), TILE) * TILE
            words = self.candidates.view(torch.int64)  # one to a tile
            encode.screen[(triton.cdiv(self.b, TILE), self.tiles.segments, n)](
                *before, self.reach, self.packed, words, self.counts, self.b, width, self.stride, words.shape[2],
                segment, **self.shape, ROWS=TILE, LATENTS=TILE, num_warps=4,
            )  # fmt: skip
        sparse.check_room[(n,)](
            self.counts, self.dense, self.fired_count, self.tiles.cells, self.b * self.tiles.most, BLOCK=1024
        )  # fmt: skip
        self.squares.zero_()

    def _entries(self, slopes: Slopes, members: Tensor) -> None:
        fires = self.masks, self.hits, self.fired, self.fired_count
        sparse.decode[(self.b, len(members))](
            self.x, self.stack.flat, self.norms, self.candidates, self.counts, self.dense, members, self.settings,
            *fires, self.residuals, self.rows_sums, self.slopes, self.b, self.width, self.stride,
            1 if self.k else self.tiles.latent_words, self.tiles.words,
            TERMS=slopes.terms, OUTER=slopes.outer, **self.shape, K=self.k,
            WORDS=min(tiling.LATENT_WORDS, power_of_two(self.tiles.latent_words)), CHUNK=16, num_warps=1,
        )  # fmt: skip
        sparse.gradients_of_latents[(self.programs, len(members))](
            self.x, self.stack.flat, self.norms, members, self.settings, self.schedule, self.step, *fires,
            self.residuals, self.slopes, self.gradient, self.squares, self.b, self.n, self.width, self.stride,
            self.tiles.words, TERM_SLOPES=slopes.term_slopes, **self.shape, CHUNK=16,
            WORDS=min(tiling.WORDS, power_of_two(self.tiles.words)), num_warps=1,
        )  # fmt: skip

    def _products(self, slopes: Slopes, members: Tensor) -> None:
        # One stage: what a program reads lies in the L2 cache, and copies under way would take registers' place.
        tile = {**self.shape, "LATENTS": TILE, "PRECISION": self.precision, "num_stages": 1}
        common = (self.x, self.stack.flat, self.norms, self.dense, members, self.settings)
        dense.reconstruct[(triton.cdiv(self.b, self.tiles.rows), len(members))](
            *common, self.residuals, self.rows_sums, self.slopes, self.b, self.width, self.stride,
            TERMS=slopes.terms, OUTER=slopes.outer, **tile, ROWS=self.tiles.rows,
        )  # fmt: skip
        dense.gradients[(triton.cdiv(self.width, TILE), self.tiles.parts, len(members))](
            *common, self.schedule, self.step, self.residuals, self.slopes, self.gradient, self.pulls, self.b, self.n,
            self.width, self.stride, self.tiles.share, TERM_SLOPES=slopes.term_slopes, **tile,
            ROWS=self.tiles.rows // 2,
        )  # fmt: skip


def _by_penalty(stack: Stack) -> dict[Formula, list[int]]:
    """SAEs of the stack by the penalty whose slopes they need."""
    groups = defaultdict(list)
    for i, point in enumerate(stack.points):
        groups[formula_of(point.penalty)].append(i)
    return groups


def _schedule(stack: Stack) -> Tensor:
    """[steps, n, 3]: learning rate over Adam's first bias correction, one over the second, and the coefficient."""
    steps = range(stack.points[0].training.steps)
    corrections = [bias_corrections(step) for step in steps]
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
