"""The CPU step: a dense encoder product, then work on the active latents only (sparse_step.py).

Parts and slices follow from shapes, sums run in a fixed order, and an SAE touches nothing of its pack-mates: so its
bits depend neither on the stack nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sae_sweep.kernels.cpu.architecture_steps import FURTHER, TOTALS, Setting, steps_of
from sae_sweep.kernels.cpu.auxiliary import add_to_active, find_dead, fit_dead, value
from sae_sweep.kernels.cpu.batchtopk import HALF, drop_below, norm_scaled_acts, rank_in, tally
from sae_sweep.kernels.cpu.dense_gradient import add_gradient
from sae_sweep.kernels.cpu.function_pointers import address_of
from sae_sweep.kernels.cpu.narrow import NarrowTrainer, auxiliary_of, is_narrow
from sae_sweep.kernels.cpu.penalty_gradients import compile_slopes
from sae_sweep.kernels.cpu.penalty_loops import penalises
from sae_sweep.kernels.cpu.pursuit import PursuitTrainer
from sae_sweep.kernels.cpu.simd import LANES
from sae_sweep.kernels.cpu.sparse_encode import Lister
from sae_sweep.kernels.cpu.sparse_step import GROUP, LISTED, Encoder, Sae, Workspace, encoder_of, refresh
from sae_sweep.kernels.cpu.steps import (
    CLIP,
    DENSITY,
    ERROR,
    L0,
    LIST,
    LOSS,
    METRICS,
    NORM,
    PLACE,
    STATE,
    STEP,
    arrange,
    encode_parts,
    find_idle,
    square_slices,
    take_steps,
)
from sae_sweep.kernels.cpu.tile_stack import TileStack, TileTrainer
from sae_sweep.kernels.cpu.unrolled import UnrolledTrainer
from sae_sweep.kernels.cpu.win_rates import count_wins, log_shares
from sae_sweep.kernels.cpu.work_queue import QUEUE_SIZE, abort_on_error, publish
from sae_sweep.kernels.limits import DENSE_ABOVE, DENSE_AT_LEAST, ENTRIES, MOST_PARTS, PART, ROUND_BELOW
from sae_sweep.saes.architectures.batchtopk import chosen_of
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes.optimizers import bias_corrections
from sae_sweep.saes.stack import Stack
from sae_sweep.saes.train import THRESHOLD_RATE, Backend, Progress

# Gradients that the threads of a dense step fill.
DENSE_PARTS = 4
# What trains the SAEs of an encoder, of a linear one the narrow ones.
TRAINERS: dict[str, type[TileTrainer]] = {
    "linear": NarrowTrainer,
    "matching_pursuit": PursuitTrainer,
    **dict.fromkeys(("ista", "lista", "mlp"), UnrolledTrainer),
}
# From this width on what latents respond is listed. Lists are quicker from 16,384 on (TopK of one latent there by 15
# times), but dense codes revived SAEs of up to 65,535 latents before there were lists, and those keep their bits.
LISTED_AT_LEAST = 1 << 16
# BatchTopK looks for its threshold above this share of the last.
GUESS = np.float32(0.9)

Array = np.ndarray[Any, Any]
Share = Callable[..., Iterable[Any]]


class CpuBackend(Backend):
    """Threads share the SAEs of a stack, or the parts and slices of one SAE when there are fewer SAEs than threads."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """`pool` must keep PyTorch to one thread each: threads of its own would fight ours and reorder sums."""
        self.pool, self.threads = pool, threads
        self.by_tiles = {trainer: TileStack(trainer, pool, threads) for trainer in set(TRAINERS.values())}

    def advance(self, stack: Stack, batches: Tensor) -> Progress:
        """Train every SAE of the stack on batches [steps, b, d], in place."""
        sums: dict[int, Array] = {}
        tiled = [i for i in range(len(stack.points)) if stack.encoder.name != "linear" or is_narrow(stack, i)]
        if tiled:
            by_tiles = self.by_tiles[TRAINERS[stack.encoder.name]]
            sums.update(zip(tiled, by_tiles.advance(stack, tiled, batches), strict=True))
        wide = [i for i in range(len(stack.points)) if i not in sums]
        n = len(wide)
        across, within = (map, self.pool.map) if n < self.threads else (self.pool.map, map)
        threads = self.threads if n < self.threads else 1

        def train(i: int) -> Array:
            return _Trainer(stack, i, batches.shape[1], threads, within).advance(batches)

        sums.update(zip(wide, across(train, wide), strict=True))
        stack.step += len(batches)
        columns = torch.tensor(np.array([sums[i] for i in range(len(stack.points))]), dtype=torch.float32).unbind(1)
        return Progress(len(batches), batches.square().sum(-1).mean(1).sum(), *columns)

    def responses(self, stack: Stack, i: int, batches: Tensor) -> tuple[Tensor, Tensor]:
        """Which latents of SAE i fire on batches [steps, b, d]: [width]; and the squared error of each input.

        Of wide SAEs from lists of the active latents: the reference's codes are dense, and have room for few inputs.
        """
        point, kind = stack.points[i], stack.architecture
        # Codes that a whole batch decides are no list of one input's.
        listed = kind.listed and not kind.learns_threshold and stack.encoder.is_product(point.sae)
        if not listed or stack.width < LISTED_AT_LEAST:
            return super().responses(stack, i, batches)
        sae, fired, decoded = stack.parameters(i), torch.zeros(stack.width, dtype=torch.bool), []
        lister = Lister(sae, point.sae.architecture, point.sae.get("k", 1))
        for x in batches:
            for lists in lister(x):
                starts, latents, codes = map(torch.from_numpy, lists)
                fired[latents] = True
                decoded.append(F.embedding_bag(latents, sae.W_dec, starts[:-1], mode="sum", per_sample_weights=codes))
        return fired, (torch.cat(decoded) + sae.b_dec - batches.flatten(0, 1)).square().sum(1)


class _Trainer:
    """One SAE of the stack: views of its rows, what a step needs beside them, and the step."""

    def __init__(self, stack: Stack, i: int, b: int, threads: int, share: Share) -> None:
        self.stack, self.i, self.point = stack, i, stack.points[i]
        width, d, formula = stack.width, stack.d, formula_of(stack.points[i].penalty)
        # BatchTopK keeps so many entries of a batch.
        self.chosen = chosen_of(self.point.sae, b) if stack.architecture.learns_threshold else 0
        self.steps, self.weighs = steps_of(stack.architecture.name), formula.weighs
        dense = self.steps.dense and not self.weighs
        self.slopes = compile_slopes(formula, self.steps.at_zero)
        self.setting = Setting(
            address_of(self.slopes, penalises),
            *self.steps.addresses,
            shares=np.empty(width, np.float32),
            scale=float(self.point.penalty.get("scale", 1.0)),
            exponent=float(stack.exponent[i]),
            clip=float(self.point.training.clip),
            dense_above=float(max(DENSE_ABOVE * width, DENSE_AT_LEAST)) if dense else np.inf,
            residual_column=self.steps.residual_column,
        )
        parts = min(MOST_PARTS, max(1, b * width * d // PART))
        # How many threads share a step, and the map that shares it.
        self.threads, self.share = (threads, share) if parts > 1 else (1, cast(Share, map))
        self.guess = GUESS * np.float32(stack.threshold[i])
        self.sae = self._sae()
        self.work = self._workspace(b, parts)
        self.auxiliary = auxiliary_of(stack, b)

    def _sae(self) -> Sae:
        stack, i, (width, d) = self.stack, self.i, (self.stack.width, self.stack.d)
        flat, first, second = (rows[i].numpy() for rows in (stack.flat, stack.first, stack.second))
        # The rows as they are used. Torch's memory begins on a cache line: libraries choose kernels by that.
        W_enc, W_dec = flat[: 2 * width * d].reshape(2, width, d)
        if self.steps.unit:
            W_enc = W_dec = torch.empty(width, d).numpy()
        norms, ones = np.ones((2, -(-width // LANES) * LANES), np.float32)
        k = self.point.sae.k if stack.architecture.name == "topk" else 0
        # What decides which latents count is their norm-scaled activation, or only its sign.
        weights, rounded = norms if k or self.chosen else ones, float(stack.density[i]) < ROUND_BELOW * width
        # The gradient of an extra parameter to which no latent adds stays 0.
        gradient, (active, idle, fired) = np.zeros(flat.size, np.float32), np.zeros((3, width), np.uint8)
        own = np.array(self.steps.own(self.point), np.float64)
        encoder = encoder_of(W_enc, weights, rounded, k, self.steps.floor)
        return Sae(
            flat, first, second, gradient, W_dec, norms, own, active, idle, fired, stack.silent[i].numpy(), encoder
        )  # fmt: skip

    def _workspace(self, b: int, parts: int) -> Workspace:
        width, d = self.sae.W_dec.shape
        cuts, slices = _cut(b, parts, GROUP), _cut(width, 1 if parts == 1 else 2 * parts, LANES)
        parts, capacity = len(cuts), ENTRIES + width
        codes = np.empty((parts, capacity, LISTED), np.float32)
        sums = np.empty((parts * capacity, self.steps.columns), np.float32)
        begins, stops = np.empty((2, parts), np.int64)
        return Workspace(
            codes=codes,
            latents=codes.view(np.int32),
            starts=np.empty((parts, int((cuts[:, 1] - cuts[:, 0]).max()) + 1), np.int64),
            sums=sums,
            rows=sums.view(np.int32),
            bounds=np.empty(width + 1, np.int64),
            places=np.empty((parts, width), np.int32),
            residuals=np.empty((b * self.steps.levels(self.point), d), np.float32),
            g_bdec=np.empty((parts, d), np.float32),
            totals=np.empty((parts, TOTALS)),
            parts=cuts,
            slices=slices,
            begins=begins,
            stops=stops,
            squares=np.empty(len(slices)),
        )

    def advance(self, batches: Tensor) -> Array:
        """Steps through batches [steps, b, d]; loss, squared error and L0 before each step, summed over the steps, and
        the largest norm of their gradients."""
        sae, work, width = self.sae, self.work, self.stack.width
        find_idle(sae)
        self.steps.refresh(sae._replace(idle=np.zeros_like(sae.idle)), 0, width)
        totals, largest, step = np.zeros(3), 0.0, 0
        while step < len(batches):
            kind, ahead, floor = LIST, batches[step:], np.float32(self.steps.floor)
            work.begins[:], work.totals[:], work.g_bdec[:] = work.parts[:, 0], 0, 0
            if float(self.stack.density[self.i]) > self.setting.dense_above:
                kind, ahead = CLIP, batches[step : step + 1]
                self._dense_gradient(ahead[0], self.stack.step + step)
            elif self.chosen:
                ahead = batches[step : step + 1]
                kind, floor = self._choose(ahead[0].numpy(), self.stack.step + step)
            elif self.weighs:
                ahead = batches[step : step + 1]
                kind = self._weigh(ahead[0].numpy())
            if self.auxiliary.after:
                # Steps in which no latent can be dead yet.
                without = self.auxiliary.after - 1 - int(sae.silent.max())
                ahead = ahead[: max(1, without)]
                if without < 1:
                    kind = self._fit_dead(ahead, self.stack.step + step, kind, floor)
            taken, metrics = self._steps(ahead, self.stack.step + step, kind, floor)
            totals += metrics[[LOSS, ERROR, L0]]
            largest, step = max(largest, metrics[NORM]), step + taken
        return np.append(totals, largest)

    def _encoder(self, floor: np.float32) -> Encoder:
        """The encoder whose latents have to exceed `floor`."""
        return self.sae.encoder._replace(floor=floor)

    def _fit_dead(self, batch: Tensor, step: int, kind: int, floor: np.float32) -> int:
        """All phases before CLIP, from `kind` on, and the auxiliary loss of dead latents; the phase to go on with."""
        sae, work, auxiliary = self.sae, self.work, self.auxiliary
        if kind != CLIP:
            self._steps(batch, step, kind, floor, unfinished=True)
        if find_dead(sae.flat, sae.norms, sae.fired, sae.silent, auxiliary):
            np.divide(work.residuals, np.float32(-2 / len(work.residuals)), out=auxiliary.left)
            parts = range(len(auxiliary.work.cuts))
            list(self.share(lambda part: fit_dead(batch[0].numpy(), auxiliary, part), parts))
            add_to_active(sae, auxiliary)
            square_slices(sae, work)
            work.totals[0, FURTHER] = value(auxiliary)
        return CLIP

    def _steps(
        self, batches: Tensor, first: int, kind: int, floor: np.float32, unfinished: bool = False
    ) -> tuple[int, Array]:
        """Steps from a phase of the first on, with no Python between them, until too many latents fire.

        floor: what a norm-scaled activation has to exceed; unfinished: whether they end before CLIP. Returns how many
        they were, and their metrics.
        """
        schedule = np.array([self._scheduled(step) for step in range(first, first + len(batches))])
        queue, state, metrics = np.zeros(QUEUE_SIZE, np.int64), np.zeros(STATE, np.int64), np.zeros(METRICS)
        setting = self.setting._replace(unfinished=int(unfinished))
        records = self.sae._replace(encoder=self._encoder(floor)), setting, self.work

        def work(_: int) -> None:
            with abort_on_error(queue):
                take_steps(batches.numpy(), schedule, *records, queue, state, metrics)

        publish(queue, kind, 1 if kind == CLIP else len(self.work.parts))
        with abort_on_error(queue):
            list(self.share(work, range(self.threads)))
        if not unfinished:
            self.stack.density[self.i] = metrics[DENSITY]
        return int(state[STEP]), metrics

    def _encode(self, x: Array, floor: np.float32) -> None:
        """List the latents that fire; `stops` receives where each part ran out of room, or its end."""
        encoder = self._encoder(floor)
        self._over(lambda chunk: encode_parts(x, chunk, encoder, self.work))

    def _weigh(self, x: Array) -> int:
        """exclusive_pi: learn the shares of a batch; the phase to go on with, PLACE if all of it is listed, or LIST."""
        work, wins, rounds = self.work, np.zeros(self.stack.width, np.int64), 0
        own = self.stack.parameters(self.i).tensors.get("thresholds")
        thresholds = np.zeros(self.stack.width, np.float32) if own is None else own.numpy()
        while rounds == 0 or (work.stops < work.parts[:, 1]).any():
            work.begins[:] = work.stops if rounds else work.begins
            self._encode(x, np.float32(self.steps.floor))
            for part, rows in enumerate(work.stops - work.begins):
                lists = work.codes[part], work.latents[part], work.starts[part]
                count_wins(self.sae.norms, thresholds, *lists, rows, wins)
            rounds += 1
        self.setting.shares[:] = log_shares(wins)
        if rounds > 1:
            work.begins[:] = work.parts[:, 0]
            return LIST
        arrange(work)
        return PLACE

    def _choose(self, x: Array, step: int) -> tuple[int, np.float32]:
        """BatchTopK: the phase to go on with, and what the norm-scaled activations that are kept exceed.

        The phase is PLACE if what is kept is listed already, else LIST.
        """
        least = self._least_listed(x)
        listed = least is not None
        if least is None:
            least = self._least_counted(x)
        # The threshold for evaluation, as the reference learns it.
        if least > 0:
            self.stack.threshold[self.i].lerp_(torch.tensor(least), 1.0 if step == 0 else THRESHOLD_RATE)
        self.guess = GUESS * least
        if listed:
            arrange(self.work)
        return PLACE if listed else LIST, np.nextafter(least, np.float32(0))

    def _least_listed(self, x: Array) -> np.float32 | None:
        """The smallest norm-scaled activation to keep, and lists of the entries that stay.

        None if the entries that reach the guess are more than the lists hold, or fewer than are to be kept.
        """
        if not self.guess > 0:
            return None
        work, norms = self.work, self.sae.norms
        self._encode(x, np.nextafter(self.guess, np.float32(0)))
        parts = [
            (norms, work.codes[part], work.latents[part], work.starts[part], end - begin)
            for part, (begin, end) in enumerate(work.parts)
        ]
        if (work.stops < work.parts[:, 1]).any():
            return None
        candidates = np.concatenate([norm_scaled_acts(*part) for part in parts])
        if len(candidates) < self.chosen:
            return None
        least: np.float32 = np.partition(candidates, len(candidates) - self.chosen)[len(candidates) - self.chosen]
        for part in parts:
            drop_below(least, *part)
        return least

    def _least_counted(self, x: Array) -> np.float32:
        """The same from two counts over all norm-scaled activations.

        The first counts the upper halves of their bits, the second the lower halves.
        """
        upper, rank = self._count(x, -1, self.chosen)
        if upper < 0:
            return np.float32(0)
        lower, _ = self._count(x, upper, rank)
        return np.int32(upper << HALF | lower).view(np.float32)

    def _count(self, x: Array, upper: int, rank: int) -> tuple[int, int]:
        """Which half of the bits the rank-th largest has, or the smallest, and its rank among those that have it."""
        sae, parts = self.sae, self.work.parts
        counts = np.zeros((len(parts), 1 << HALF), np.int64)
        exact = encoder_of(sae.encoder.W_enc, sae.encoder.weights, rounded=False)
        refresh(sae.flat, *sae.W_dec.shape, exact, sae.norms)
        self._over(lambda chunk: tally(x, parts, chunk, exact, upper, counts))
        total = counts.sum(0)
        return rank_in(total, min(rank, int(total.sum())))

    def _dense_gradient(self, batch: Tensor, step: int) -> None:
        """All phases before CLIP by matrix products: for the steps in which much of the dictionary fires."""
        sae, work, (width, d) = self.sae, self.work, self.sae.W_dec.shape
        shares = batch.tensor_split(min(len(work.parts), DENSE_PARTS))
        gradients = torch.zeros(len(shares), sae.flat.size)
        of_error, of_penalty = np.float32(2 / len(batch)), np.float32(self._scheduled(step)[2] / len(batch))
        _, _, b_enc, b_dec = self.stack.split(self.stack.flat[self.i])
        W_enc, W_dec, norms = map(torch.from_numpy, (sae.encoder.W_enc, sae.W_dec, sae.norms[:width]))
        penalty = self.slopes, self.setting.scale, self.setting.exponent
        weights, fired = (float(of_error), float(of_penalty)), np.zeros((len(shares), width), np.uint8)

        residuals = torch.from_numpy(work.residuals).tensor_split(len(shares))

        def add(part: int) -> None:
            into = self.stack.split(gradients[part])
            work.totals[part] = add_gradient(
                shares[part], (W_enc, W_dec, b_enc, b_dec), norms, into, penalty, weights, fired[part], residuals[part]
            )

        list(self.share(add, range(len(shares))))
        torch.sum(gradients, 0, out=torch.from_numpy(sae.gradient))
        biases = 2 * width * d + width
        work.g_bdec[0] = sae.gradient[biases : biases + d]
        # No entry is listed, so nothing is added to these sums.
        sae.active[:], work.bounds[:], sae.fired[:] = 1, 0, fired.max(0)
        self.steps.finish_gradient(sae, work, len(batch), True, of_penalty, 0, width)
        square_slices(sae, work)

    def _scheduled(self, step: int) -> tuple[float, float, float]:
        """Learning rate over Adam's first bias correction, the second correction, and the coefficient."""
        rate, coefficient = self.stack.schedule(self.i, step)
        correction1, correction2 = bias_corrections(step)
        return rate / correction1, correction2, coefficient * float(self.stack.rescale[self.i])

    def _over(self, function: Callable[[tuple[int, int]], object]) -> None:
        """Call `function` with shares (begin, end) of the parts, one for each thread."""
        list(self.share(function, map(tuple, _cut(len(self.work.parts), self.threads, 1).tolist())))


def _cut(size: int, pieces: int, grain: int) -> Array:
    """Begin and end of about so many equal pieces of range(size), each but the last a multiple of `grain`: [·, 2]."""
    length = -(-size // (pieces * grain)) * grain
    begins = np.arange(0, size, length)
    return np.stack([begins, np.minimum(begins + length, size)], axis=1)
