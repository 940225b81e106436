"""What a core of the machine at hand, or a whole GPU, was seen to do: the numbers behind the planner's seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from sae_sweep.kernels import LONGEST
from sae_sweep.saes.limits import GPU_BYTES


@dataclass(frozen=True)
class Speed:
    """Seconds of each piece of work, and FLOP/s, of one core of a kind of device or of a GPU.

    process: from the command to the first step of training, and from the last table written to the end
    toy_step: training a toy, beside its products
    batch_input, model_input: an activation looked up, and computed where a toy has too many to keep
    start_flops, distance: k-means++: FLOP/s of its distances, and seconds of each beside that

    Training: step: of a stack, own_step: of each of its SAEs, counted_step: more where a threshold, or
    shares, are found for a batch
    product_flops: FLOP/s of the encoder product; code: a number that it makes
    chosen: where the largest are kept, one that takes the place of another
    rounded_flops, rounded_code: the same where few latents fire; settled: more, per active latent
    input; entry, entry_number: per active latent of an input, and per number of its row
    parameter: Adam, per step
    dense_flops, dense_code: the same products, and numbers, of a step in which much of the dictionary fires
    narrow_step, narrow_input, narrow_number, narrow_flops, narrow_code, narrow_parameter: what own_step, input,
    entry_number, product_flops, code and parameter are, of the step of narrow SAEs; narrow_chosen: more for a number of
    the product where several of an input are kept
    device: cpu or cuda; longest: numbers of an activation up to which steps of our own train there
    autograd_step, autograd_flops, autograd_code: where autograd trains; spilled: more, where it leaves the cache

    Measuring: measured_input, measured_entry: per input, and per active latent of one; measured_row: each pair of a
    latent and a cell, in the table itself and in its nulls
    dealt: an input whose latent is dealt anew for a null; point: storing one; logged: logging it to W&B
    On request: probe_step, probe_number: a step of a probe, and each code that it reads; regression: those of a
    concept; fit: priors of a latent; structure: all of it; descent_step, descent_code: a step of descent to the best
    codes of a block of inputs, and each of its codes; refit: a coordinate of such a block, fitted once

    pack_bytes bounds the memory of one pack, base_bytes is what the process holds without one, shared_bytes what SAEs
    that autograd trains at once on a GPU share
    """

    process: float
    toy_step: float
    batch_input: float
    model_input: float
    start_flops: float
    distance: float
    step: float
    own_step: float
    counted_step: float
    product_flops: float
    code: float
    chosen: float
    rounded_flops: float
    rounded_code: float
    settled: float
    input: float
    entry: float
    entry_number: float
    parameter: float
    dense_flops: float
    dense_code: float
    narrow_step: float
    narrow_input: float
    narrow_number: float
    narrow_flops: float
    narrow_code: float
    narrow_chosen: float
    narrow_parameter: float
    device: str
    longest: float
    autograd_step: float
    autograd_flops: float
    autograd_code: float
    spilled: float
    measured_input: float
    measured_entry: float
    measured_row: float
    dealt: float
    point: float
    logged: float
    probe_step: float
    probe_number: float
    regression: float
    fit: float
    structure: float
    descent_step: float
    descent_code: float
    refit: float
    pack_bytes: int
    base_bytes: int
    shared_bytes: int


# A core of an Intel Xeon (Emerald Rapids) with 512-bit vectors. Training: least squares of relative errors over 101
# steps of widths 16 to 65,536, batches of 64 to 16,384, L0 1 to 64, d 32 and 64, of which 94% are within 20%; the rest
# from the phases of whole sweeps. scripts/bench_scaling.py sets all of it against what it sees.
# The step of narrow SAEs: the same fit over 25 steps of widths 16 to 1,056, batches of 64 to 4,096, L0 1 to 200, d 32
# and 64, all of which are within 12%, on a core of an AMD EPYC (Zen 3, AVX2); AVX-512 should be quicker.
XEON = Speed(
    process=5.6,
    toy_step=8e-4,
    batch_input=3e-7,
    model_input=4.5e-7,
    start_flops=5e10,
    distance=4e-9,
    step=2e-5,
    own_step=1.8e-5,
    counted_step=3.5e-4,
    product_flops=1.3e11,
    code=1.7e-10,
    chosen=3e-8,
    rounded_flops=2.3e11,
    rounded_code=0.0,
    settled=2.4e-8,
    input=1.35e-7,
    entry=1.85e-8,
    entry_number=1.9e-10,
    parameter=3.8e-9,
    dense_flops=1e11,
    dense_code=1.3e-8,
    narrow_step=6e-6,
    narrow_input=9e-8,
    narrow_number=2.6e-10,
    narrow_flops=8.4e10,
    narrow_code=4.2e-10,
    narrow_chosen=4e-10,
    narrow_parameter=1.7e-9,
    device="cpu",
    longest=math.inf,
    autograd_step=6e-4,
    autograd_flops=4e10,
    autograd_code=2e-8,
    spilled=1.3e-8,
    measured_input=2.1e-6,
    measured_entry=6e-8,
    measured_row=1.5e-7,
    dealt=3.5e-8,
    point=0.02,
    logged=0.075,
    probe_step=4.5e-4,
    probe_number=6e-9,
    regression=0.05,
    fit=0.045,
    structure=2.5,
    descent_step=6e-4,
    descent_code=1.2e-8,
    refit=4.5e-5,
    pack_bytes=2 * 2**30,
    base_bytes=600 * 2**20,
    shared_bytes=0,
)

# Without products of bytes nothing is rounded (kernels/cpu/int8_prefilter.py).
_CPUINFO = Path("/proc/cpuinfo")
_ROUNDS = _CPUINFO.exists() and "avx512_vnni" in _CPUINFO.read_text()
# Without Triton no kernel of ours runs on a GPU.
_TRITON = find_spec("triton") is not None
CORE = XEON if _ROUNDS else replace(XEON, rounded_flops=XEON.product_flops, rounded_code=XEON.code, settled=0.0)
SPEEDS = {
    "cpu": CORE,
    # One data-centre GPU, float32; the host's share is that of a core. Guessed: not measured on one yet.
    "cuda": replace(
        CORE,
        process=8.0,
        toy_step=5e-4,
        batch_input=0.0,
        model_input=0.0,
        start_flops=2e12,
        distance=0.0,
        step=3e-4,
        own_step=0.0,
        product_flops=2e13,
        code=0.0,
        chosen=0.0,
        rounded_flops=2e13,
        rounded_code=0.0,
        settled=0.0,
        input=0.0,
        entry=1e-10,
        entry_number=1e-12,
        parameter=1e-11,
        dense_flops=2e13,
        dense_code=1e-11,
        device="cuda",
        longest=LONGEST if _TRITON else 0,
        autograd_step=1e-4,
        autograd_flops=2e13,
        autograd_code=1e-11,
        spilled=0.0,
        pack_bytes=32 * 2**30,
        base_bytes=2**30,
        shared_bytes=GPU_BYTES,
    ),
}
