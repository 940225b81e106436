"""dictionary_learning's layout: `ae.pt`, a state dict, beside `config.json`. Nothing but tensors is unpickled.

What is read follows `load_dictionary` of github.com/saprmarks/dictionary_learning: the class is `trainer.dict_class`,
and its `encode`, as it is called by default, gives the codes.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sae_sweep.errors import UserError
from sae_sweep.saes.folding import SMALLEST_NORM, rescaled, without_centring
from sae_sweep.saes.formats.loaded import LoadedSae
from sae_sweep.saes.formats.tensors import Tensors, agree, count
from sae_sweep.saes.parameters import Parameters

NAME, WEIGHTS, CONFIG = "dictionary_learning", "ae.pt", "config.json"


def read(weights: bytes, config: Mapping[str, Any]) -> LoadedSae:
    """The SAE of `ae.pt` and what `config.json` says of its trainer. UserError names what is wrong or not known."""
    trainer = config.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(kind, str) or kind not in _READERS:
        raise UserError(f"trainer.dict_class of {CONFIG} is {kind!r}, wanted one of {', '.join(_READERS)}")
    tensors = Tensors(WEIGHTS, _state(weights))
    sae = _READERS[kind](kind, tensors, trainer)
    tensors.nothing_left(f"dict_class {kind}")
    width, d = sae.W_dec.shape
    agree(f"trainer.dict_size of {CONFIG}", trainer.get("dict_size"), width, "the encoder")
    agree(f"trainer.activation_dim of {CONFIG}", trainer.get("activation_dim"), d, "the encoder")
    return sae


def _state(weights: bytes) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles by other protocols than torch's own
            state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign pickle can raise whatever there is
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{WEIGHTS} is no file of tensors alone, and nothing else is unpickled: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{WEIGHTS} holds a {type(state).__name__}, wanted tensors by name")
    if {"ae", "optimizer"} <= set(state):
        raise UserError(f"{WEIGHTS} is the backup of a training that has not ended, wanted the SAE at its end")
    return state


def _auto_encoder(kind: str, tensors: Tensors, trainer: Mapping[str, Any]) -> LoadedSae:
    """AutoEncoder: ReLU of the centred input. Loading it gives its decoder rows unit norm."""
    parameters = without_centring(_linear(tensors, "bias"))
    return LoadedSae(NAME, kind, "relu", rescaled(parameters, parameters.norms().clamp_min(SMALLEST_NORM)))


def _auto_encoder_new(kind: str, tensors: Tensors, trainer: Mapping[str, Any]) -> LoadedSae:
    """AutoEncoderNew: ReLU of the input as it is."""
    return LoadedSae(NAME, kind, "relu", _linear(tensors, "decoder.bias"))


def _gated(kind: str, tensors: Tensors, trainer: Mapping[str, Any]) -> LoadedSae:
    """GatedAutoEncoder: a gate and a magnitude of the centred input."""
    parameters = _linear(tensors, "decoder_bias", encoder_bias="gate_bias")
    width = len(parameters.W_dec)
    extras = {"r_mag": tensors.take("r_mag", width), "b_mag": tensors.take("mag_bias", width)}
    return LoadedSae(NAME, kind, "gated", without_centring(parameters.replace(**extras)))


def _jumprelu(kind: str, tensors: Tensors, trainer: Mapping[str, Any]) -> LoadedSae:
    """JumpReluAutoEncoder: activations above a threshold of each latent's own, of the input as it is."""
    parameters = _matrices(tensors)
    thresholds = tensors.take("threshold", len(parameters.W_dec))
    return LoadedSae(NAME, kind, "jumprelu", parameters.replace(thresholds=thresholds))


def _topk(kind: str, tensors: Tensors, trainer: Mapping[str, Any]) -> LoadedSae:
    """AutoEncoderTopK: the k largest activations of the centred input. Its threshold is for other calls than encode."""
    parameters = without_centring(_linear(tensors, "b_dec"))
    tensors.drop("threshold")
    return LoadedSae(NAME, kind, "topk", parameters, _k(tensors, trainer, len(parameters.W_dec)))


def _batch_topk(kind: str, tensors: Tensors, trainer: Mapping[str, Any]) -> LoadedSae:
    """BatchTopKSAE, and Matryoshka, whose nested levels are all in use: activations above one learned threshold.

    Before training has set it the threshold is −1: whatever is active fires.
    """
    matryoshka = kind.startswith("Matryoshka")
    parameters = without_centring(_matrices(tensors) if matryoshka else _linear(tensors, "b_dec"))
    if "threshold" not in tensors:  # older than the threshold: what fires depends on the batch
        raise UserError(f"{WEIGHTS} has no threshold, and a {kind} without one selects latents over a batch")
    thresholds = tensors.take_spread("threshold", len(parameters.W_dec))
    _k(tensors, trainer, len(parameters.W_dec))
    tensors.drop("group_sizes")
    return LoadedSae(NAME, kind, "jumprelu", parameters.replace(thresholds=thresholds))


_READERS: dict[str, Callable[[str, Tensors, Mapping[str, Any]], LoadedSae]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _batch_topk,
}


def _linear(tensors: Tensors, decoder_bias: str, encoder_bias: str = "encoder.bias") -> Parameters:
    """Layers of torch.nn.Linear: encoder.weight [width, d], decoder.weight [d, width]."""
    width, d = tensors.size("encoder.weight")
    return Parameters(
        tensors.take("encoder.weight", width, d),
        tensors.take("decoder.weight", d, width).T.contiguous(),
        tensors.take(encoder_bias, width),
        tensors.take(decoder_bias, d),
        torch.zeros(()),
    )


def _matrices(tensors: Tensors) -> Parameters:
    """Matrices that inputs are multiplied by: W_enc [d, width], W_dec [width, d]."""
    d, width = tensors.size("W_enc")
    W_enc, W_dec = tensors.take("W_enc", d, width).T.contiguous(), tensors.take("W_dec", width, d)
    return Parameters(W_enc, W_dec, tensors.take("b_enc", width), tensors.take("b_dec", d), torch.zeros(()))


def _k(tensors: Tensors, trainer: Mapping[str, Any], width: int) -> int:
    """k, which stands in both files, in the weights of older versions not."""
    kept, said = tensors.take_whole("k"), trainer.get("k")
    if kept is not None and said is not None and kept != said:
        raise UserError(f"trainer.k of {CONFIG} is {said!r}, but k of {WEIGHTS} is {kept}")
    return count(f"trainer.k of {CONFIG}", said if kept is None else kept, width)
