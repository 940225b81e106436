"""The sums of a reconstruction on the CPU, compiled: one pass over a block, each sum in an order of its own making.

Everything is float64 from float32 inputs. A number adds up over the d numbers of an input first, then over inputs one
after the other, so that neither threads nor pack-mates have a say.
"""

from __future__ import annotations

import math

import numba
import numpy as np

# The numbers of one input may be added up in as many parts as the processor likes: it always likes the same.
_jit = numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz", "reassoc"}, error_model="numpy")

LOG2E, LN2 = 1 / math.log(2), math.log(2)
# exp of less is taken to be this one's, 3e-308. 2^n is the float64 whose bits are n + 1023 before 52 zeros.
LEAST, BIAS, MANTISSA = -708.0, 1023, 52
# 1/i!, the highest power first: on |r| ≤ ln 2/2 what is left out is below 1e-14.
TAYLOR = tuple(1 / math.factorial(i) for i in range(11, -1, -1))


@_jit
def exponentials(shifted, powers):  # type: ignore[no-untyped-def]
    """exp in place of `shifted` [n] ≤ 0, as 2^k·exp(r); room for `powers` [n] int64. What is not a number stays so.

    Written out, as a loop of library calls computes one number at a time.
    """
    scales = powers.view(np.float64)
    for i in range(len(shifted)):
        value = LEAST if shifted[i] < LEAST else shifted[i]
        whole = np.rint(value * LOG2E)
        powers[i] = (np.int64(np.int32(whole)) + BIAS) << MANTISSA
        rest, series = value - whole * LN2, 0.0
        for coefficient in TAYLOR:
            series = series * rest + coefficient
        shifted[i] = series
    for i in range(len(shifted)):
        shifted[i] *= scales[i]


@_jit
def _largest(bits, row):  # type: ignore[no-untyped-def]
    """The largest number of a row, of float32 numbers as their `bits` [b, n] int32; nan if there is one, or -nan.

    Whole numbers are compared many at a time; for their bits to be in the order of the numbers, those of negative ones
    are turned round.
    """
    most = np.int32(-(2**31))
    for i in range(bits.shape[1]):
        most = max(most, bits[row, i] ^ ((bits[row, i] >> 31) & np.int32(2**31 - 1)))
    return most ^ ((most >> 31) & np.int32(2**31 - 1))


@_jit
def _normalise(logits, row, exps, powers):  # type: ignore[no-untyped-def]
    """exps [n]: what the probabilities of a row of logits [b, n] float32 are in proportion to. Returns their sum, and
    log Σ exp(logit). `powers` [n] is room."""
    # A row of one number is the only way here from a number's bits to the number.
    found = np.empty(1, np.int32)
    found[0] = _largest(logits.view(np.int32), row)
    most = np.float64(found.view(np.float32)[0])
    for i in range(len(exps)):
        exps[i] = np.float64(logits[row, i]) - most
    exponentials(exps, powers)
    total = 0.0
    for i in range(len(exps)):
        total += exps[i]
    return total, most + math.log(total)


@_jit
def add_outputs(logits, logits_hat, log_zero, token, target, weight, sums):  # type: ignore[no-untyped-def]
    """Add to `sums` [4] Σ weight · (the cross-entropies of p, q and zero, KL(p ‖ q)), p and q those of the two logits.

    logits, logits_hat [b, n] float32, log_zero [n]. What is to be predicted is `token` [b], or the distribution
    `target` [b, n] where that is not empty.
    """
    n = logits.shape[1]
    exps, powers = np.empty(n), np.empty(n, np.int64)
    for row in range(len(logits)):
        _, norm_hat = _normalise(logits_hat, row, exps, powers)
        total, norm = _normalise(logits, row, exps, powers)
        divergence = original = reconstructed = zero = 0.0
        for i in range(n):
            divergence += exps[i] * (np.float64(logits[row, i]) - np.float64(logits_hat[row, i]))
        if len(target):
            for i in range(n):
                original += target[row, i] * (norm - np.float64(logits[row, i]))
                reconstructed += target[row, i] * (norm_hat - np.float64(logits_hat[row, i]))
                zero -= target[row, i] * log_zero[i]
        else:
            at = token[row]
            original, reconstructed = norm - logits[row, at], norm_hat - logits_hat[row, at]
            zero = -log_zero[at]
        sums[0] += weight[row] * original
        sums[1] += weight[row] * reconstructed
        sums[2] += weight[row] * zero
        sums[3] += weight[row] * (divergence / total + norm_hat - norm)


@_jit
def add_inputs(x, x_hat, active, penalty, maximum, weight, sums, weights, totals):  # type: ignore[no-untyped-def]
    """Add to `sums` Σ weight · (1, x ≠ 0, ‖x̂‖/‖x‖ there, ‖x‖², ‖x - x̂‖², active, penalty), and Σ weight and Σ weight·x
    of every maximum to `weights` [maxima] and `totals` [maxima, d].

    x, x_hat [b, d] float32; active [b], penalty [b] float64, maximum [b] and weight [b].
    """
    for row in range(len(x)):
        share, at = weight[row], maximum[row]
        square = square_hat = error = 0.0
        for i in range(x.shape[1]):
            value, value_hat = np.float64(x[row, i]), np.float64(x_hat[row, i])
            rest = np.float64(x[row, i] - x_hat[row, i])
            square += value * value
            square_hat += value_hat * value_hat
            error += rest * rest
            totals[at, i] += share * value
        weights[at] += share
        sums[0] += share
        if square > 0:
            sums[1] += share
            sums[2] += share * math.sqrt(square_hat) / math.sqrt(square)
        sums[3] += share * square
        sums[4] += share * error
        sums[5] += share * active[row]
        sums[6] += share * penalty[row]
