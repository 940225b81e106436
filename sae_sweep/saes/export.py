"""Trained SAEs as files: SAELens's layout, taking raw activations (centring and scale folded in)."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load, save
from torch import Tensor

from sae_sweep.saes.stack import Parameters
from sae_sweep.schema import Point

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


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
    """`sae_weights.safetensors` and `cfg.json` as SAELens's `SAE.load_from_disk` reads them.

    SAELens stores W_enc [d, width], and BatchTopK as the JumpReLU it is at evaluation, with one threshold per latent
    on the activation; ours is one threshold on the contribution, so each latent's is divided by its decoder norm.
    """
    tensors = {
        "W_enc": folded.W_enc.T.contiguous(),
        "W_dec": folded.W_dec.contiguous(),
        "b_enc": folded.b_enc.contiguous(),
        "b_dec": folded.b_dec.contiguous(),
    }
    width, d = folded.W_dec.shape
    architecture = {"relu": "standard", "topk": "topk", "batchtopk": "jumprelu"}[point.sae.architecture]
    config = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": width,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"point_id": point.id, "site": point.site.name},
    }
    if architecture == "topk":
        config |= {"k": point.sae.k, "rescale_acts_by_decoder_norm": True}
    if architecture == "jumprelu":
        tensors["threshold"] = folded.threshold / folded.norms()
    return {WEIGHTS: save(tensors), CONFIG: json.dumps(config, indent=2).encode()}


def from_files(weights: bytes) -> Parameters:
    """The folded parameters that `to_files` wrote."""
    tensors = load(weights)
    threshold = torch.zeros(())
    if "threshold" in tensors:
        threshold = (tensors["threshold"] * tensors["W_dec"].norm(dim=1)).mean()
    return Parameters(tensors["W_enc"].T.contiguous(), tensors["W_dec"], tensors["b_enc"], tensors["b_dec"], threshold)
