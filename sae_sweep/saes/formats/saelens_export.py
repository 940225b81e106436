"""Trained SAEs as files: SAELens's layout, taking raw activations (centring and scale folded in).

The files are those that SAELens itself would have written: ReLU and Gated SAEs as they are; those that choose by the
contribution z‖d‖, or compare it with a threshold, with decoder rows of unit norm: their activations are contributions.
A latent that is rescaled so does what it did. The factors are kept in the header of the weights, where SAELens does
not look.
"""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import load
from torch import Tensor

from sae_sweep.config.settings import Point
from sae_sweep.saes.architectures import architecture_of
from sae_sweep.saes.parameters import Parameters
from sae_sweep.store.tensors import to_bytes

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
# SAELens's name for each architecture. It has no BatchTopK at evaluation: with its threshold that is a JumpReLU.
ARCHITECTURES = {
    "relu": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "matryoshka": "jumprelu",
    "tied": "standard",
}
# What an architecture is called of which SAELens has no like; only this package reads it.
OURS = "sae_sweep"
# Metadata of the weights: what each latent's code was multiplied by, and its decoder row divided by.
FACTORS = "codes_scaled_by"
# A decoder row of zeros stays one, and its latent the last to be chosen.
SMALLEST_NORM = 1e-30


def fold(parameters: Parameters, mean: Tensor, scale: float) -> Parameters:
    """The SAE that takes raw activations instead of x = (raw − mean)·scale, and gives the same codes."""
    W_enc = parameters.W_enc * scale
    shift = W_enc @ mean
    return parameters.replace(
        W_enc=W_enc,
        W_dec=parameters.W_dec / scale,
        b_enc=parameters.b_enc - shift,
        b_dec=parameters.b_dec / scale + mean,
        # Contributions z‖d‖ shrink with the decoder rows, and with them the thresholds on contributions.
        threshold=parameters.threshold / scale,
        **_extras(parameters, 1 / scale, -shift),
    )


def unfold(parameters: Parameters, mean: Tensor, scale: float) -> Parameters:
    """The inverse of fold."""
    shift = parameters.W_enc @ mean
    return parameters.replace(
        W_enc=parameters.W_enc / scale,
        W_dec=parameters.W_dec * scale,
        b_enc=parameters.b_enc + shift,
        b_dec=(parameters.b_dec - mean) * scale,
        threshold=parameters.threshold * scale,
        **_extras(parameters, scale, shift),
    )


def _extras(parameters: Parameters, by: float, shift: Tensor) -> dict[str, Tensor]:
    """Thresholds on contributions that grow `by`; b_mag where the gate's bias moved by `shift`: magnitudes see the
    same encoder, exp(r_mag) times."""
    found = {}
    if "thresholds" in parameters.tensors:
        found["thresholds"] = parameters.thresholds * by
    if "r_mag" in parameters.tensors:
        found["b_mag"] = parameters.b_mag + parameters.r_mag.exp() * shift
    return found


def to_files(point: Point, folded: Parameters) -> dict[str, bytes]:
    """`sae_weights.safetensors` and `cfg.json` as SAELens's `SAE.load_from_disk` reads them; W_enc is [d, width]."""
    architecture = ARCHITECTURES.get(point.sae.architecture, OURS)
    unit = architecture in ("topk", "jumprelu")
    scaled_by = folded.norms().clamp_min(SMALLEST_NORM) if unit else torch.ones_like(folded.b_enc)
    scaled = rescaled(folded, scaled_by)
    tensors = {"W_enc": scaled.W_enc.T, "W_dec": scaled.W_dec, "b_dec": scaled.b_dec}
    if architecture == "gated":
        tensors |= {"b_gate": scaled.b_enc, "r_mag": scaled.r_mag, "b_mag": scaled.b_mag}
    else:
        tensors["b_enc"] = scaled.b_enc
    if architecture == OURS:
        tensors |= {name: getattr(scaled, name) for name in architecture_of(point.sae.architecture).extras}
    if point.sae.architecture == "jumprelu":
        tensors["threshold"] = scaled.thresholds
    elif architecture == "jumprelu":
        # SAELens fires above the threshold, a BatchTopK SAE at it as well.
        tensors["threshold"] = torch.nextafter(scaled.threshold, torch.tensor(-math.inf)).expand_as(scaled.b_enc)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    weights = to_bytes(contiguous, {FACTORS: json.dumps(scaled_by.tolist())})
    return {WEIGHTS: weights, CONFIG: json.dumps(_config(point, folded), indent=2).encode()}


def from_files(weights: bytes) -> Parameters:
    """The folded parameters that `to_files` wrote: to the bit, but to rounding where latents were rescaled."""
    return rescaled(parameters_of(load(weights)), 1 / _own_factors(weights))


def parameters_of(tensors: dict[str, Tensor]) -> Parameters:
    """SAELens's tensors as parameters. A threshold is read both as one per latent and as the one of a BatchTopK."""
    known = {"W_enc", "W_dec", "b_enc", "b_gate", "b_dec", *_OF_SAELENS.values()}
    extras = {ours: tensors[name] for ours, name in _OF_SAELENS.items() if name in tensors}
    extras |= {name: tensor for name, tensor in tensors.items() if name not in known}
    threshold = torch.zeros(())
    if "threshold" in tensors:
        threshold = torch.nextafter(tensors["threshold"][0], torch.tensor(math.inf))
    b_enc = tensors["b_gate"] if "b_gate" in tensors else tensors["b_enc"]
    W_enc = tensors["W_enc"].T.contiguous()
    return Parameters(W_enc, tensors["W_dec"], b_enc, tensors["b_dec"], threshold, **extras)


_OF_SAELENS = {"thresholds": "threshold", "r_mag": "r_mag", "b_mag": "b_mag"}


def rescaled(parameters: Parameters, by: Tensor) -> Parameters:
    """The same SAE with codes `by` [width] times as large, and decoder rows so much shorter."""
    W_enc, W_dec = parameters.W_enc * by[:, None], parameters.W_dec / by[:, None]
    return parameters.replace(W_enc=W_enc, W_dec=W_dec, b_enc=parameters.b_enc * by)


def factors(weights: bytes) -> Tensor | None:
    """FACTORS [width] from the header: 8 bytes that hold its length, then JSON. None in a file written elsewhere."""
    length = int.from_bytes(weights[:8], "little")
    about = json.loads(weights[8 : 8 + length]).get("__metadata__") or {}
    return torch.tensor(json.loads(about[FACTORS])) if FACTORS in about else None


def _own_factors(weights: bytes) -> Tensor:
    found = factors(weights)
    assert found is not None, "not written by to_files"
    return found


def _config(point: Point, folded: Parameters) -> dict[str, object]:
    width, d = folded.W_dec.shape
    architecture = ARCHITECTURES.get(point.sae.architecture, OURS)
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
