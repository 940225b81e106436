"""What a pack will cost: seconds and bytes, from shapes and from what a core was seen to do.

A step of an SAE is the encoder product over the whole batch, work on each input, on each active latent of an input, and
Adam on every parameter. scripts/bench_scaling.py sets these estimates against what it sees.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from sae_sweep.schema import AUTOGRAD, COUNTED, EXTRAS, OWN_INPUTS, SYNTHETIC, Evaluation, Point, Toy

# Active latents of an input, where a penalty decides: what sweeps of this kind are tuned to.
USUAL_L0 = 8
# A random start is dense: so many steps take matrix products, this many times the encoder's.
DENSE_STEPS, DENSE_PRODUCTS = 100, 5
# Steps whose batches are drawn at once (saes/train.py).
BLOCK = 25
# From so many products of the encoder in a step on, an SAE alone is shared by all cores (saes/kernels/cpu.py), of whose
# time this part is not spent on waiting for each other.
SHARED, SHARING = 1 << 25, 0.83
# Exemplars among which k-means++ chooses (saes/starts.py).
POOL_PER_LATENT, POOL_AT_LEAST = 8, 4096
# Numbers held for every parameter of every SAE: itself and Adam's two moments; and while one trains: its gradient, the
# encoder as it is read, and the gradients that threads fill in a dense step.
STATE, AT_WORK = 3, 6
# What autograd (saes/kernels/dense.py) holds at once of batch × width, on a GPU for several SAEs up to so many bytes;
# and its products of batch, width and d in a step.
COPIES, AUTOGRAD_BYTES, PRODUCTS = 12, 1 << 28, 6


@dataclass(frozen=True)
class Speed:
    """What one core of a kind of device does, or a whole GPU: seconds of each piece of work.

    product_flops, dense_flops, start_flops: FLOP/s of the encoder product, of a dense step's products, of k-means++
    input, entry, entry_number, parameter: per input; per active latent of an input, and per number of its row; per
    parameter and step
    batch_input, step: drawing an input of a batch; a step of a stack
    autograd_step, autograd_number: where autograd trains, a step of an SAE, and of it each input and latent
    toy_step; measured_input: per evaluation input, beside the encoder product; point: storing one
    process: until the first step, compiling included
    pack_bytes bounds the memory of one pack, base_bytes is what the process holds without one
    """

    product_flops: float
    dense_flops: float
    start_flops: float
    input: float
    entry: float
    entry_number: float
    parameter: float
    batch_input: float
    step: float
    autograd_step: float
    autograd_number: float
    toy_step: float
    measured_input: float
    point: float
    process: float
    pack_bytes: int
    base_bytes: int


SPEEDS = {
    # A core with 512-bit vectors at about 3.5 GHz.
    "cpu": Speed(
        product_flops=9e10,
        dense_flops=5e10,
        start_flops=1e10,
        input=1e-7,
        entry=8e-9,
        entry_number=4.5e-10,
        parameter=1.7e-9,
        batch_input=5e-7,
        step=2e-5,
        autograd_step=1e-3,
        autograd_number=1e-8,
        toy_step=1.5e-3,
        measured_input=9e-6,
        point=0.03,
        process=4.0,
        pack_bytes=2 * 2**30,
        base_bytes=2**29,
    ),
    # One data-centre GPU, float32; the host's share of measuring is that of a core.
    "cuda": Speed(
        product_flops=2e13,
        dense_flops=2e13,
        start_flops=2e12,
        input=0,
        entry=1e-10,
        entry_number=1e-12,
        parameter=1e-11,
        batch_input=0,
        step=3e-4,
        autograd_step=1e-4,
        autograd_number=1e-11,
        toy_step=5e-4,
        measured_input=9e-6,
        point=0.05,
        process=8.0,
        pack_bytes=32 * 2**30,
        base_bytes=2**30,
    ),
}


def cores(device: str) -> int:
    """How many `Speed`s work at once: the cores this process may use, or one GPU."""
    if device == "cuda":
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def activation_size(point: Point) -> int:
    """d, the length of an activation at the point's site."""
    return point.toy.d_model if point.site.name == "pre_unembed" else point.toy.d_vocab


def parameter_count(point: Point) -> int:
    """Trained numbers of the point's SAE."""
    sae, d = point.sae, activation_size(point)
    return 2 * sae.width * d + sae.width + d + len(EXTRAS.get(sae.architecture, ())) * sae.width


def by_autograd(point: Point) -> bool:
    """Whether no faster step than autograd's is known for the point (saes/kernels)."""
    return point.sae.architecture in AUTOGRAD or point.penalty.name == "exclusive_pi"


def state_bytes(point: Point) -> int:
    """Memory that an SAE takes while its pack trains, float32."""
    return 4 * STATE * parameter_count(point)


def work_bytes(point: Point, workers: int) -> int:
    """Memory of a pack beside that: SAEs at work, and a block of batches; batch × width under autograd alone."""
    batches = min(BLOCK, point.training.steps) * point.training.batch_size * activation_size(point)
    held = 4 * COPIES * point.training.batch_size * point.sae.width if by_autograd(point) else 0
    return 4 * (workers * AT_WORK * parameter_count(point) + batches) + max(
        workers * held, min(held, 1) * AUTOGRAD_BYTES
    )


def step_seconds(point: Point, speed: Speed) -> float:
    """One step of the point's SAE on one core, in the steady state."""
    d, width, b = activation_size(point), point.sae.width, point.training.batch_size
    l0 = min(width, point.sae.k if point.sae.architecture in COUNTED else USUAL_L0)
    if by_autograd(point):
        numbers = b * width * (2 * PRODUCTS * d / speed.dense_flops + speed.autograd_number)
        return speed.autograd_step + numbers + parameter_count(point) * speed.parameter
    inputs = b * (speed.input + l0 * (speed.entry + d * speed.entry_number))
    return 2 * b * width * d / speed.product_flops + inputs + parameter_count(point) * speed.parameter


def training_seconds(pack: tuple[Point, ...], speed: Speed, workers: int) -> float:
    """All steps of a pack with so many cores, batches and overheads included."""
    point = pack[0]
    steps, b = point.training.steps, point.training.batch_size
    alone = steps * (speed.step + b * speed.batch_input)
    together = sum(steps * step_seconds(each, speed) + _dense_seconds(each, speed) for each in pack)
    # Each SAE has a core; the cores share only SAEs of which there are fewer, if these are wide.
    if len(pack) >= workers:
        return alone + together * math.ceil(len(pack) / workers) / len(pack)
    wide = workers > 1 and not by_autograd(point) and b * point.sae.width * activation_size(point) >= SHARED
    return alone + together / (workers * SHARING if wide else 1)


def pack_seconds(pack: tuple[Point, ...], evaluation: Evaluation, speed: Speed, workers: int) -> float:
    """Starting, training, measuring and storing a pack with so many cores."""
    starts = {(point.sae, point.seed): point for point in pack}.values()
    # The untrained SAEs are measured too: one for all that differ in their coefficient alone.
    untrained = {(point.sae, point.seed, replace(point.penalty, coefficient=0.0)) for point in pack}
    inputs = _inputs(pack[0].toy, evaluation)
    measured = inputs * measured_seconds(pack[0].sae.width, activation_size(pack[0]), speed)
    finishing = (len(pack) + len(untrained)) * measured + len(pack) * speed.point
    starting = sum(_start_seconds(point, speed) for point in starts)
    return starting + training_seconds(pack, speed, workers) + finishing / min(workers, len(pack))


def measured_seconds(width: int, d: int, speed: Speed) -> float:
    """Measuring an SAE on one input."""
    return 2 * width * d / speed.product_flops + speed.measured_input


def toy_seconds(toy: Toy, speed: Speed) -> float:
    """Training a toy; planted ones cost nothing."""
    if toy.name in SYNTHETIC:
        return 0.0
    products = toy.k * toy.d_model * (4 * toy.d_head + 2 * toy.k) + toy.d_model * toy.d_vocab
    # A forward and a backward pass, which costs two.
    flops = 3 * 2 * toy.batch_size * products
    return toy.steps * (speed.toy_step + flops / speed.dense_flops)


def _dense_seconds(point: Point, speed: Speed) -> float:
    """What the first steps of a random start take more."""
    if point.sae.init != "random" or point.sae.architecture in COUNTED or by_autograd(point):
        return 0.0
    products = 2 * point.training.batch_size * point.sae.width * activation_size(point) * DENSE_PRODUCTS
    return min(DENSE_STEPS, point.training.steps) * products / speed.dense_flops


def _start_seconds(point: Point, speed: Speed) -> float:
    """k-means++ (saes/starts.py): a distance from every candidate of every latent to the whole pool."""
    if point.sae.init not in ("kmeans", "whitened"):
        return 0.0
    width = point.sae.width
    pool = max(POOL_PER_LATENT * width, POOL_AT_LEAST)
    return 2 * width * (2 + math.log(width)) * pool * activation_size(point) / speed.start_flops


def _inputs(toy: Toy, evaluation: Evaluation) -> int:
    """How many inputs a measurement reads: all, where they are few enough."""
    if toy.name in OWN_INPUTS:
        return evaluation.inputs
    few = toy.k * math.log(toy.d_vocab) <= math.log(evaluation.inputs) + 1
    return min(toy.d_vocab**toy.k, evaluation.inputs) if few else evaluation.inputs
