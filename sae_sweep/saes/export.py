"""Trained SAEs as files: SAELens's layout, taking raw activations (centring and scale folded in).

The files are those that SAELens itself would have written: a ReLU SAE as it is; TopK and BatchTopK, which choose by
the contribution z‖d‖, with decoder rows of unit norm, so that their activations are contributions. A latent that is
rescaled so does what it did. The factors are kept in the header of the weights, where SAELens does not look.
"""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import load, save
from torch import Tensor

from sae_sweep.saes.stack import Parameters
from sae_sweep.schema import COUNTED, Point

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
# SAELens's name for each architecture. It has no BatchTopK at evaluation: with its threshold that is a JumpReLU.
ARCHITECTURES = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu"}
# Metadata of the weights: what each latent's code was multiplied by, and its decoder row divided by.
FACTORS = "codes_scaled_by"
# A decoder row of zeros stays one, and its latent the last to be chosen.
SMALLEST_NORM = 1e-30


def fold(parameters: Parameters, mean: Tensor, scale: float) -> Parameters:
    """The SAE that takes raw activations instead of x = (raw − mean)·scale, and gives the same codes."""
    W_enc, W_dec = parameters.W_enc * scale, parameters.W_dec / scale
    b_enc = parameters.b_enc - W_enc @ mean
    # Contributions z‖d‖ shrink with the decoder rows, and with them the threshold on contributions.
    return Parameters(W_enc, W_dec, b_enc, parameters.b_dec / scale + mean, parameters.threshold / scale)


def unfold(parameters: Parameters, mean: Tensor, scale: float) -> Parameters:
    """The inverse of fold."""
    b_enc = parameters.b_enc + parameters.W_enc @ mean
    return Parameters(
        parameters.W_enc / scale,
        parameters.W_dec * scale,
        b_enc,
        (parameters.b_dec - mean) * scale,
        parameters.threshold * scale,
    )


def to_files(point: Point, folded: Parameters) -> dict[str, bytes]:
    """`sae_weights.safetensors` and `cfg.json` as SAELens's `SAE.load_from_disk` reads them; W_enc is [d, width]."""
    architecture = ARCHITECTURES[point.sae.architecture]
    counted = point.sae.architecture in COUNTED
    factors = folded.norms().clamp_min(SMALLEST_NORM) if counted else torch.ones_like(folded.b_enc)
    scaled = _rescaled(folded, factors)
    tensors = {"W_enc": scaled.W_enc.T, "W_dec": scaled.W_dec, "b_enc": scaled.b_enc, "b_dec": scaled.b_dec}
    if architecture == "jumprelu":
        # SAELens fires above the threshold, ours at it as well.
        tensors["threshold"] = torch.nextafter(scaled.threshold, torch.tensor(-math.inf)).expand_as(scaled.b_enc)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    weights = save(contiguous, {FACTORS: json.dumps(factors.tolist())})
    return {WEIGHTS: weights, CONFIG: json.dumps(_config(point, folded), indent=2).encode()}


def from_files(weights: bytes) -> Parameters:
    """The folded parameters that `to_files` wrote: to the bit, but to rounding where latents were rescaled."""
    tensors = load(weights)
    threshold = torch.zeros(())
    if "threshold" in tensors:
        threshold = torch.nextafter(tensors["threshold"][0], torch.tensor(math.inf))
    stored = Parameters(
        tensors["W_enc"].T.contiguous(), tensors["W_dec"], tensors["b_enc"], tensors["b_dec"], threshold
    )
    return _rescaled(stored, 1 / _factors(weights))


def _rescaled(parameters: Parameters, by: Tensor) -> Parameters:
    """The same SAE with codes `by` [width] times as large, and decoder rows so much shorter."""
    W_enc, W_dec = parameters.W_enc * by[:, None], parameters.W_dec / by[:, None]
    return Parameters(W_enc, W_dec, parameters.b_enc * by, parameters.b_dec, parameters.threshold)


def _factors(weights: bytes) -> Tensor:
    """FACTORS [width] from the header: 8 bytes that hold its length, then JSON."""
    length = int.from_bytes(weights[:8], "little")
    return torch.tensor(json.loads(json.loads(weights[8 : 8 + length])["__metadata__"][FACTORS]))


def _config(point: Point, folded: Parameters) -> dict[str, object]:
    width, d = folded.W_dec.shape
    architecture = ARCHITECTURES[point.sae.architecture]
    config: dict[str, object] = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # Without the version of the layout SAELens takes it for one older than 6.0, and drops the metadata.
        "metadata": {"sae_lens_version": "6.0.0", "point_id": point.id, "site": point.site.name},
    }
    if architecture == "topk":
        config |= {"k": point.sae.k, "rescale_acts_by_decoder_norm": False}
    return config
