"""What a pack will cost: seconds and bytes, from its shapes and from what a core was seen to do (hardware_profile.py).

A step of an SAE is the encoder product over the whole batch, work on each input, on each active latent of an input, and
Adam on every parameter. How many latents are active is not known before; what sweeps were seen to have is taken for it.
scripts/bench_scaling.py sets these estimates against what it sees.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sae_sweep.config.settings import Evaluation, Point, Toy, Training
from sae_sweep.kernels import gpu_knows
from sae_sweep.kernels.cuda.tiling import Tiles
from sae_sweep.kernels.limits import (
    DENSE_ABOVE,
    DENSE_AT_LEAST,
    ENTRIES,
    MOST_PARTS,
    NARROW_CHOSEN,
    NARROW_DENSE_ABOVE,
    NARROW_WIDTH,
    PART,
    ROUND_BELOW,
)
from sae_sweep.metrics.extra.inference import INPUTS, REFITS
from sae_sweep.metrics.limits import (
    BLOCK_INPUTS,
    BLOCK_NUMBERS,
    PERMUTED_INPUTS,
    PRIOR_INPUTS,
    PROBE_BATCH,
    PROBE_EPOCHS,
    PROBE_INPUTS,
    PROBE_TRAIN_SHARE,
    ROWS_HELD,
)
from sae_sweep.registry import get
from sae_sweep.saes.inits.kmeans import LLOYD_STEPS, pool_size
from sae_sweep.saes.limits import BLOCK, COPIES, TILE_INPUTS, TILE_PARTS
from sae_sweep.saes.parameters import shapes
from sae_sweep.saes.penalties import formula_of
from sae_sweep.saes.recipes import is_plain, revival_of, warmup_steps
from sae_sweep.saes.recipes.revivals import kept_of
from sae_sweep.sweep.hardware_profile import SPEEDS, Speed
from sae_sweep.toys.limits import BLOCK_ROWS, CONSTANTS_INPUTS, TABLE_INPUTS

# From so many products of the encoder in a step on, an SAE alone has two parts or more and is shared by all cores, of
# whose time this share is not spent on waiting for each other.
SHARED, SHARING = 2 * PART, 0.83
# The share of latents that is taken to be dead where an auxiliary loss trains the dead.
DEAD = 0.5
# Architectures with a dense step, and how many products of the encoder it takes.
DENSE, DENSE_PRODUCTS = ("relu", "tied"), 5
# Numbers held for every parameter of every SAE: itself and Adam's two moments; and while one trains: its gradient, the
# encoder as it is read, and the gradients that threads fill in a dense step.
STATE, AT_WORK = 3, 6
# Bytes of an active latent in a step (kernels/cpu/sparse_step.py), and entries of all lists.
LISTED_BYTES, LISTED = 28, MOST_PARTS * ENTRIES
# autograd's products of batch, width and d in a step, and the bytes of a cache that it leaves.
PRODUCTS, CACHE = 6, 1 << 25
# Bytes of each of the most active latents of the inputs that are measured at a time, seen.
MEASURED_BYTES = 50
# Rows of a firing table: bytes of each, how many take twice as long a row, and what it holds of latents of which more
# than this share fires: twice the rows at which it merges them.
ROW_BYTES, CROWDED, FOLDED_ABOVE, FOLDED_ROWS = 45, 1.5e7, 0.3, 2 * ROWS_HELD
# What of the time of such rows is left without nulls.
UNSHUFFLED = 0.7
# Information about three factors, in two ways each, has so many nulls.
NULLS = 6
# Steps that descent to the best codes was seen to take from both its starts: 160 to 440 at width 16, 840 to 1,420 at
# 136. What latents tell of the order of the tokens has so many nulls.
DESCENT_STEPS, ORDER_NULLS = 1_000, 2
# Steps of the two linear probes.
PROBE_STEPS = 2 * PROBE_EPOCHS * math.ceil(PROBE_TRAIN_SHARE * PROBE_INPUTS / PROBE_BATCH)


@dataclass(frozen=True)
class Usual:
    """How many latents fire after a start: shares of the width until Adam has moved so far in all (its learning rate
    summed over the steps); later a share of the width, and at most so many.

    Seen on two max-of-K toys and planted features, widths 16 to 8,192, under L1 and log(1 + a) over their ladders.
    """

    first: tuple[tuple[float, float], ...]
    later: float
    most: float


_RANDOM = Usual(((0.45, 0.2), (0.06, 0.35)), 1 / 8, 24)
USUAL = {
    **dict.fromkeys(("random", "random_unit", "random_scaled"), _RANDOM),
    "exemplars": Usual(((0.14, 0.06), (0.08, 0.2)), 1 / 16, 12),
    "kmeans": Usual(((0.14, 0.06), (0.08, 0.2)), 1 / 16, 12),
    "whitened": Usual(((0.06, 0.15),), 1 / 24, 10),
    "oracle": Usual((), 1 / 64, 4),
    "truth": Usual((), 1 / 64, 4),  # not seen: taken to be an oracle's
}


def cores(device: str) -> int:
    """How many `Speed`s work at once: the cores this process may use, or one GPU."""
    if device == "cuda":
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def activation_size(point: Point) -> int:
    """d, the length of an activation at the point's site."""
    size: int = point.toy.kind.d(point.toy, point.site.name)
    return size


def parameter_count(point: Point) -> int:
    """Trained numbers of the point's SAE."""
    return sum(map(math.prod, shapes(point, activation_size(point)).values()))


def by_autograd(point: Point, speed: Speed) -> bool:
    """Whether no faster step than autograd's is known for the point there (saes/kernels)."""
    by_kernels = speed.device in get("architecture", point.sae.architecture).compiled and is_plain(point, speed.device)
    if speed.device != "cpu":
        by_kernels = by_kernels and gpu_knows(formula_of(point.penalty))
    return not by_kernels or activation_size(point) > speed.longest


def state_bytes(point: Point, kind: str) -> int:
    """Memory that an SAE takes while its pack trains, float32."""
    # SAEs of a stack that go on after others have stopped do so in memory of their own.
    held = 4 * STATE * parameter_count(point) * (2 if point.training.until == "plateau" else 1)
    if kind == "cpu" or by_autograd(point, SPEEDS[kind]):
        return held
    # And of every step the learning rate, Adam's correction, and the coefficient twice.
    steps = 16 * point.training.steps
    return held + steps + Tiles.of(point.sae, activation_size(point), point.training.batch_size).bytes


def peak_bytes(packs: Collection[tuple[Point, ...]], kind: str, workers: int) -> int:
    """The most memory of the device that packs take, one after the other; 0 for none."""
    speed = SPEEDS[kind]
    # Beside a GPU, starts are sought and tables counted in the host's memory.
    held = work_bytes if kind == "cpu" else training_bytes
    peaks = [len(pack) * state_bytes(pack[0], kind) + held(pack[0], workers, speed) for pack in packs]
    return max(peaks) + speed.base_bytes if peaks else 0


def work_bytes(point: Point, workers: int, speed: Speed) -> int:
    """Memory of a pack beside that: of starting, training or measuring, whichever takes most."""
    start = 4 * _pool(point) * (point.sae.width + 2 * activation_size(point)) if _clustered(point) else 0
    l0 = untrained_l0(point)
    measured = MEASURED_BYTES * min(BLOCK_INPUTS * l0, BLOCK_NUMBERS)
    measured += ROW_BYTES * _rows(point, min(toy_inputs(point.toy), Evaluation().inputs), l0)
    return max(training_bytes(point, workers, speed), _input_bytes(point) + max(start, workers * int(measured)))


def training_bytes(point: Point, workers: int, speed: Speed) -> int:
    """Of that, what training takes: what bounds a pack, as the rest is the same for a single point."""
    if by_autograd(point, speed):
        copies = COPIES * _products(point) + revival_of(point.training).copies
        held = int(4 * copies * point.training.batch_size * point.sae.width)
        work = max(workers * held, speed.shared_bytes)
    else:
        fires = max(l0 for _, l0 in firing(point) if not _dense(point, l0))
        work = workers * LISTED_BYTES * min(int(point.training.batch_size * fires), LISTED)
        if point.encoder.name not in ("linear", "matching_pursuit"):
            work += workers * _unrolled_bytes(point)
    return _input_bytes(point) + 4 * workers * AT_WORK * parameter_count(point) + work


def _unrolled_bytes(point: Point) -> int:
    """What the step of encoders that iterate or have a hidden layer holds of an SAE: of each part of the batch the
    codes of every step, five more of their size, and a gradient."""
    d, width, units = activation_size(point), point.sae.width, point.encoder.get("hidden", 0)
    codes = (6 + point.encoder.get("steps", 0)) * width * TILE_INPUTS
    return 4 * TILE_PARTS * (codes + 2 * width * d + units * (width + d))


def firing(point: Point) -> Iterator[tuple[float, float]]:
    """Phases of training: how many steps, and how many latents usually fire in them."""
    width, training = point.sae.width, point.training
    if get("architecture", point.sae.architecture).counts:
        k = min(width, point.sae.get("k", 1))
        falling = 0.0 if training.k_start is None else training.k_anneal * training.steps
        if falling:
            yield falling, min(width, (training.k_start + k) / 2)
        yield training.steps - falling, k
        return
    usual, begun = USUAL.get(point.sae.init, USUAL["random"]), 0.0
    settled = training.target_l0 or min(usual.most, max(1.0, usual.later * width))
    for share, moved in usual.first:
        end = steps_until(moved, training)
        yield end - begun, max(share * width, settled)
        begun = end
    yield training.steps - begun, settled


def untrained_l0(point: Point) -> float:
    """How many latents usually fire before training."""
    return next(firing(point))[1]


def steps_until(moved: float, training: Training) -> float:
    """Steps until the learning rate, summed over them, comes to `moved`: it rises linearly, then stays."""
    warm = warmup_steps(training.lr_warmup, training)
    if moved < training.lr * warm / 2:
        return math.sqrt(2 * moved * warm / training.lr)
    return min(warm / 2 + moved / training.lr, training.steps)


def step_seconds(point: Point, speed: Speed, l0: float | None = None) -> float:
    """One step of the point's SAE on one core where `l0` latents fire; by default at the end of training."""
    d, width, b = activation_size(point), point.sae.width, point.training.batch_size
    codes, adam = b * width, parameter_count(point) * speed.parameter
    if by_autograd(point, speed):
        spilled = speed.spilled if 4 * COPIES * codes > CACHE else 0.0
        each = 2 * PRODUCTS * d / speed.autograd_flops + speed.autograd_code + spilled
        # Each product of an auxiliary loss is one more of those that the step has anyway.
        products = _products(point) + revival_of(point.training).products / PRODUCTS
        return speed.autograd_step + products * codes * each + adam
    if point.encoder.name == "matching_pursuit":
        return _pursuit_seconds(point, speed)
    if l0 is None:
        *_, (_, l0) = firing(point)
    if point.encoder.name != "linear":
        return _unrolled_seconds(point, speed, l0)
    seconds = _compiled_seconds(point, speed, l0)
    return seconds + (_auxiliary_seconds(point, speed) if revival_of(point.training).auxiliary else 0.0)


def _compiled_seconds(point: Point, speed: Speed, l0: float) -> float:
    """A compiled step of a linear encoder."""
    d, width, b = activation_size(point), point.sae.width, point.training.batch_size
    codes, adam = b * width, parameter_count(point) * speed.parameter
    if _narrow(point, speed):
        return _narrow_seconds(point, speed, l0)
    if _dense(point, l0):
        return speed.own_step + codes * (2 * DENSE_PRODUCTS * d / speed.dense_flops + speed.dense_code) + 3 * adam
    changes = _changes(point.sae.k, width) if point.sae.architecture == "topk" else 0.0
    of_batch = speed.counted_step if _of_batch(point) else 0.0
    flops, code, entry = speed.product_flops, speed.code, speed.entry
    if l0 < ROUND_BELOW * width:
        flops, code, entry = speed.rounded_flops, speed.rounded_code, speed.entry + speed.settled
    inputs = b * (speed.input + l0 * (entry + d * speed.entry_number) + changes * speed.chosen)
    return speed.own_step + of_batch + inputs + codes * (2 * d / flops + code) + adam


def _narrow(point: Point, speed: Speed) -> bool:
    """Whether the step of narrow SAEs trains the point (kernels/cpu/narrow.py)."""
    sae = point.sae
    if speed.device != "cpu" or sae.width > NARROW_WIDTH or formula_of(point.penalty).weighs:
        return False
    return sae.architecture == "relu" or (sae.architecture == "topk" and sae.k <= NARROW_CHOSEN)


def _narrow_seconds(point: Point, speed: Speed, l0: float) -> float:
    """The step of narrow SAEs: one product and sums over the codes above 0, or products alone."""
    d, width, b = activation_size(point), point.sae.width, point.training.batch_size
    topk = point.sae.architecture == "topk"
    dense = not topk and l0 > NARROW_DENSE_ABOVE * width
    of_input = speed.narrow_input + (0.0 if dense else l0 * d * speed.narrow_number)
    if topk and point.sae.k > 1:
        of_input += width * speed.narrow_chosen
    of_code = 2 * (DENSE_PRODUCTS if dense else 1) * d / speed.narrow_flops + speed.narrow_code
    return speed.narrow_step + b * (of_input + width * of_code) + parameter_count(point) * speed.narrow_parameter


def _pursuit_seconds(point: Point, speed: Speed) -> float:
    """k products whose results nothing keeps; of the parameters only the decoder's move."""
    d, width, b = activation_size(point), point.sae.width, point.training.batch_size
    of_input = point.sae.k * (speed.narrow_input + 2 * width * d / speed.narrow_flops)
    return speed.narrow_step + b * of_input + parameter_count(point) / 2 * speed.narrow_parameter


def _unrolled_seconds(point: Point, speed: Speed, l0: float) -> float:
    """The step of encoders that iterate or have a hidden layer: for each iteration that of narrow SAEs, with a product
    or a row more that goes back to the one before."""
    encoder, counts = point.encoder, point.sae.architecture == "topk"
    d, width, b = activation_size(point), point.sae.width, point.training.batch_size
    units = encoder.get("hidden", 0)
    reads = d + units
    dense = not counts and l0 > NARROW_DENSE_ABOVE * width
    of_input = speed.narrow_input + (0.0 if dense else l0 * (3 * d + 2 * reads) / 4 * speed.narrow_number)
    if counts and point.sae.k > 1:
        of_input += width * speed.narrow_chosen
    of_code = 2 * (3 * (d + reads) if dense else reads) / speed.narrow_flops + speed.narrow_code
    of_units = units * (6 * d / speed.narrow_flops + speed.narrow_code)
    each = b * (of_input + width * of_code + of_units)
    return speed.narrow_step + (1 + encoder.get("steps", 0)) * each + parameter_count(point) * speed.narrow_parameter


def _auxiliary_seconds(point: Point, speed: Speed) -> float:
    """AuxK in a compiled step: the dead latents as an SAE of their own; dead latents of ReLU have nothing to fit."""
    d, dead = activation_size(point), DEAD * point.sae.width
    kept = kept_of(point.training, point.sae.width, d) if get("architecture", point.sae.architecture).counts else 0
    of_input = speed.narrow_input + kept * d * speed.narrow_number
    of_code = 2 * d / speed.narrow_flops + speed.narrow_code + (speed.narrow_chosen if kept else 0.0)
    return point.training.batch_size * (of_input + dead * of_code)


def _changes(k: float, width: float) -> float:
    """How often the k largest codes of an input change while they are sought, where any order is as likely."""
    return k * (1 + math.log(max(1.0, width / k))) if k else 0.0


def training_seconds(pack: tuple[Point, ...], speed: Speed, workers: int) -> float:
    """All steps of a pack with so many cores, batches and overheads included."""
    point = pack[0]
    steps, b = point.training.steps, point.training.batch_size
    of_input = speed.batch_input if toy_inputs(point.toy) <= TABLE_INPUTS else _model_input(point.toy, speed)
    alone = steps * (speed.step + b * of_input)
    # What else differs within a pack makes no difference here.
    alike = {(each.sae.init, each.training): each for each in pack}
    count = Counter((each.sae.init, each.training) for each in pack)
    together = sum(count[key] * _steps_seconds(each, speed) for key, each in alike.items())
    return alone + side_by_side(together, point, len(pack), workers)


def side_by_side(seconds: float, point: Point, count: int, workers: int) -> float:
    """What `count` SAEs that take so long one after the other take on so many cores.

    Each SAE has a core; the cores share only SAEs of which there are fewer, if these are wide.
    """
    if count >= workers:
        return seconds * math.ceil(count / workers) / count
    products = point.training.batch_size * point.sae.width * activation_size(point)
    shared = workers > 1 and not by_autograd(point, SPEEDS["cpu"]) and products >= SHARED
    return seconds / (workers * SHARING if shared else 1)


def pack_parts(pack: tuple[Point, ...], evaluation: Evaluation, speed: Speed, workers: int) -> dict[str, float]:
    """Seconds of starting, training, measuring and storing a pack with so many cores."""
    starts = Counter(sae for sae, _ in {(point.sae, point.seed) for point in pack})
    # The untrained SAEs are measured too: one for all that differ in their coefficient alone.
    alike = {penalty: penalty.replace(coefficient=1.0) for penalty in {point.penalty for point in pack}}
    untrained = {(point.sae, point.seed, alike[point.penalty]) for point in pack}
    of_start, of_point = Counter(sae for sae, *_ in untrained), Counter(point.sae for point in pack)
    starting, measuring = _centring_seconds(pack[0].toy, speed), 0.0
    for sae, point in {point.sae: point for point in pack}.items():
        starting += starts[sae] * _start_seconds(point, speed)
        measuring += of_start[sae] * measured_seconds(point, evaluation, speed, untrained_l0(point), nulls=False)
        measuring += of_point[sae] * measured_seconds(point, evaluation, speed)
    return {
        "starts": starting,
        "training": training_seconds(pack, speed, workers),
        "measuring": measuring / min(workers, len(pack)),
        "storing": len(pack) * speed.point,
    }


def pack_seconds(pack: tuple[Point, ...], evaluation: Evaluation, speed: Speed, workers: int) -> float:
    """The sum of `pack_parts`."""
    return sum(pack_parts(pack, evaluation, speed, workers).values())


def measured_seconds(
    point: Point, evaluation: Evaluation, speed: Speed, l0: float | None = None, nulls: bool = True
) -> float:
    """Measuring an SAE of which `l0` latents fire, by default as many as at the end of training."""
    if l0 is None:
        *_, (_, l0) = firing(point)
    width, inputs = point.sae.width, min(toy_inputs(point.toy), evaluation.inputs)
    flops = speed.rounded_flops if l0 < ROUND_BELOW * width else speed.product_flops
    of_input = 2 * width * activation_size(point) / flops + l0 * speed.measured_entry
    seconds, rows = inputs * (of_input + speed.measured_input), _rows(point, inputs, l0)
    seconds += rows * speed.measured_row * (1 + rows / CROWDED) * (1 if nulls else UNSHUFFLED)
    if point.toy.kind.factors_depend:  # elsewhere factors say nothing of each other, or there are none
        asked = NULLS + (ORDER_NULLS if evaluation.order else 0)
        seconds += asked * min(evaluation.permutations * inputs, max(2 * inputs, PERMUTED_INPUTS)) * speed.dealt
        if evaluation.order:
            seconds += inputs * of_input + rows * speed.measured_row
    if evaluation.inference and nulls:
        seconds += _inferred_seconds(point, inputs, speed) + inputs * (of_input + speed.measured_input)
    if evaluation.probing:
        of_step = speed.probe_step + PROBE_BATCH * width * speed.probe_number
        seconds += PROBE_STEPS * of_step + point.toy.maxima * speed.regression
    if evaluation.priors:
        seconds += min(width, PROBE_INPUTS / PRIOR_INPUTS * l0) * speed.fit
    if evaluation.structure and width >= 2 * point.toy.maxima:  # else there is no room to split, and nothing to see
        seconds += speed.structure
    return seconds


def _inferred_seconds(point: Point, inputs: float, speed: Speed) -> float:
    """The best codes for a dictionary (metrics/extra/inference.py): by descent from two starts, or one by one."""
    blocks, codes = inputs / INPUTS, inputs * point.sae.width
    if not get("architecture", point.sae.architecture).counts:
        descends = DESCENT_STEPS if point.penalty.coefficient > 0 else 0
        return descends * (blocks * speed.descent_step + codes * speed.descent_code)
    k = min(point.sae.width, max(1, round(point.sae.k)))
    # With every latent that joins, those chosen so far are fitted anew; and the SAE's own latents are.
    refits = 1 if k == 1 else REFITS * (k * (k + 1) // 2 + k)
    return refits * blocks * speed.refit + k * codes * speed.descent_code


def toy_inputs(toy: Toy) -> float:
    """How many inputs a toy has; of those that draw their own there is no end."""
    count: float = toy.kind.inputs(toy)
    return count


def toy_seconds(toy: Toy, speed: Speed) -> float:
    """Training a toy; planted ones cost nothing."""
    steps, products = toy.kind.trains(toy)
    return steps * toy.kind.model_cost * (speed.toy_step + 2 * products / speed.dense_flops)


def _steps_seconds(point: Point, speed: Speed) -> float:
    """All steps of an SAE on one core."""
    return sum(steps * step_seconds(point, speed, l0) for steps, l0 in firing(point))


def _input_bytes(point: Point) -> int:
    """Activations that are kept: of all inputs of a small toy, and those drawn at once."""
    kept = int(toy_inputs(point.toy)) if toy_inputs(point.toy) <= TABLE_INPUTS else 0
    drawn = BLOCK_ROWS + min(BLOCK, point.training.steps) * point.training.batch_size
    return 4 * activation_size(point) * (kept + drawn)


def _clustered(point: Point) -> bool:
    return bool(get("init", point.sae.init).clusters)


def _rows(point: Point, inputs: float, l0: float) -> float:
    """Pairs of latent and cell in a firing table, at most."""
    rows = inputs * l0 if not point.toy.kind.independent else point.sae.width  # all one cell
    return min(rows, FOLDED_ROWS) if l0 > FOLDED_ABOVE * point.sae.width else rows


def _dense(point: Point, l0: float) -> bool:
    return (
        point.sae.architecture in DENSE
        and point.penalty.name != "exclusive_pi"
        and l0 > max(DENSE_ABOVE * point.sae.width, DENSE_AT_LEAST)
    )


def _of_batch(point: Point) -> bool:
    """Whether a step asks something of its whole batch first: a threshold, or shares."""
    return point.sae.architecture in ("batchtopk", "matryoshka") or point.penalty.name == "exclusive_pi"


def _products(point: Point) -> float:
    """What the encoder and the decoder compute for an input and a latent, where 1 is a linear encoder."""
    products: float = get("encoder", point.encoder.name).products(point.encoder, point.sae, activation_size(point))
    return products


def _pool(point: Point) -> int:
    return pool_size(point.sae.width)


def _model_input(toy: Toy, speed: Speed) -> float:
    return speed.model_input * toy.kind.model_cost


def _centring_seconds(toy: Toy, speed: Speed) -> float:
    return min(toy_inputs(toy), CONSTANTS_INPUTS) * _model_input(toy, speed)


def _start_seconds(point: Point, speed: Speed) -> float:
    """k-means++ (saes/inits/kmeans.py): a distance from every candidate of every latent to the whole pool."""
    if not _clustered(point):
        return 0.0
    width = point.sae.width
    distances = width * (2 + math.log(width) + LLOYD_STEPS) * _pool(point)
    return distances * (2 * activation_size(point) / speed.start_flops + speed.distance)
