"""SAELens's layout: `sae_weights.safetensors` beside `cfg.json`, of any version; written and read.

Written files are those that SAELens itself would have written: ReLU and Gated SAEs as they are; those that choose by
the contribution z‖d‖, or compare it with a threshold, with decoder rows of unit norm: their activations are
contributions. A latent that is rescaled so does what it did. The factors are kept in the header of the weights, where
SAELens does not look.

What is read, and which default stands for what is absent, follows SAELens's own loaders, 2.0 to 6.54. Versions before
6 kept what selects latents in `activation_fn`, and called keys by other names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from sae_sweep.config.settings import Point
from sae_sweep.errors import UserError
from sae_sweep.saes.architectures import architecture_of
from sae_sweep.saes.encoders.matching_pursuit import by_projection
from sae_sweep.saes.folding import SMALLEST_NORM, extras, rescaled, without_centring
from sae_sweep.saes.formats.loaded import ALIKE, LoadedSae
from sae_sweep.saes.formats.tensors import Tensors, agree, count, flag, whole
from sae_sweep.saes.parameters import Parameters
from sae_sweep.store.tensors import to_bytes

NAME, WEIGHTS, CONFIG = "SAELens", "sae_weights.safetensors", "cfg.json"

# Writing

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
# Matching pursuit of one step is a TopK of tied rows.
PURSUIT = "matching_pursuit"
# What the architecture is called of which SAELens has no like.
OURS = "sae_sweep"
# Metadata of the weights: what each latent's code was multiplied by, and its decoder row divided by.
FACTORS = "codes_scaled_by"


def to_files(point: Point, folded: Parameters) -> dict[str, bytes]:
    """`sae_weights.safetensors` and `cfg.json` as SAELens's `SAE.load_from_disk` reads them; W_enc is [d, width].

    Where SAELens has no architecture that computes the same, they hold all parameters under an architecture that
    SAELens refuses by name.
    """
    architecture = _architecture_of(point)
    unit = architecture in ("topk", "jumprelu", PURSUIT)
    scaled_by = folded.norms().clamp_min(SMALLEST_NORM) if unit else torch.ones_like(folded.b_enc)
    scaled = rescaled(folded, scaled_by)
    tensors = {"W_dec": scaled.W_dec, "b_dec": scaled.b_dec}
    if architecture != PURSUIT:
        tensors["W_enc"] = scaled.W_enc.T
        tensors["b_gate" if architecture == "gated" else "b_enc"] = scaled.b_enc
    if architecture in ("gated", OURS):
        tensors |= extras(scaled)
    elif point.sae.architecture == "jumprelu":
        tensors["threshold"] = scaled.thresholds
    if architecture_of(point.sae.architecture).learns_threshold:
        # SAELens fires above the threshold, a BatchTopK SAE at it as well.
        tensors["threshold"] = torch.nextafter(scaled.threshold, torch.tensor(-math.inf)).expand_as(scaled.b_enc)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    weights = to_bytes(contiguous, {FACTORS: json.dumps(scaled_by.tolist())})
    return {WEIGHTS: weights, CONFIG: json.dumps(_config(point, folded), indent=2).encode()}


def from_files(weights: bytes) -> Parameters:
    """The folded parameters that `to_files` wrote: to the bit, but to rounding where latents were rescaled.

    A threshold is read both as one per latent and as the one of a BatchTopK.
    """
    tensors, scaled_by = load(weights), _factors(weights)
    assert scaled_by is not None, "not written by to_files"
    W_dec, b_dec, threshold = tensors.pop("W_dec"), tensors.pop("b_dec"), torch.zeros(())
    if "W_enc" not in tensors:
        unknown = Parameters(W_dec, W_dec, torch.zeros(len(W_dec)), b_dec, threshold)
        return by_projection(rescaled(unknown, 1 / scaled_by))
    W_enc, b_enc = tensors.pop("W_enc").T.contiguous(), tensors.pop("b_gate" if "b_gate" in tensors else "b_enc")
    if "threshold" in tensors:
        tensors["thresholds"] = tensors.pop("threshold")
        threshold = torch.nextafter(tensors["thresholds"][0], torch.tensor(math.inf))
    return rescaled(Parameters(W_enc, W_dec, b_enc, b_dec, threshold, **tensors), 1 / scaled_by)


def _factors(weights: bytes) -> Tensor | None:
    """FACTORS [width] from the header: 8 bytes that hold its length, then JSON. None in a file written elsewhere."""
    length = int.from_bytes(weights[:8], "little")
    about = json.loads(weights[8 : 8 + length]).get("__metadata__") or {}
    return torch.tensor(json.loads(about[FACTORS])) if FACTORS in about else None


def _architecture_of(point: Point) -> str:
    """SAELens's name for what computes the same."""
    if point.encoder.name == "matching_pursuit" and point.sae.k > 1:
        return PURSUIT
    if point.encoder.name in ("linear", "matching_pursuit"):
        return ARCHITECTURES.get(point.sae.architecture, OURS)
    return OURS


def _config(point: Point, folded: Parameters) -> dict[str, object]:
    width, d = folded.W_dec.shape
    architecture = _architecture_of(point)
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
    if architecture == PURSUIT:
        config |= {"max_iterations": point.sae.k, "residual_threshold": 0.0, "stop_on_duplicate_support": False}
        config["apply_b_dec_to_input"] = True
    return config


# Reading

# SAELens's architecture → the one here that selects latents alike. The last two are saved so only while they train.
KNOWN = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    PURSUIT: PURSUIT,
}
_IN_TRAINING = ("batchtopk", "matryoshka_batchtopk")
# Keys that older versions called otherwise.
_RENAMED = {"activation_fn_str": "activation_fn", "hook_point": "hook_name"}
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
# What SAELens takes where `cfg.json` has no k.
_DEFAULT_K = 100
# And where that of a matching pursuit does not say when to stop.
_DEFAULT_RESIDUAL = 1e-2


def read(weights: bytes, config: Mapping[str, Any]) -> LoadedSae:
    """The SAE of `sae_weights.safetensors` and what `cfg.json` says. UserError names what is wrong or not known."""
    config = {_RENAMED.get(key, key): value for key, value in config.items()}
    kind, squashed = _architecture(config)
    _refuse_other_inputs(config)
    dtype = _dtype(config.get("dtype"))
    tensors = Tensors.of_safetensors(WEIGHTS, weights)
    width, d = tensors.size("W_dec")
    agree(f"d_sae of {CONFIG}", config.get("d_sae"), width, "W_dec")
    agree(f"d_in of {CONFIG}", config.get("d_in"), d, "W_dec")
    if kind == PURSUIT:
        return _pursuit(tensors, config, dtype)
    parameters = _parameters(tensors, kind, width, d, dtype)
    scaling = _scaling(tensors, config, width, dtype)
    rescales = _rescales(config, kind, parameters)
    tensors.nothing_left(f"architecture {kind}")
    k = count(*_k(config), width) if kind == "topk" else None
    if flag("apply_b_dec_to_input", config.get("apply_b_dec_to_input", True)):
        parameters = without_centring(parameters)
    own = _factors(weights)
    if own is not None and (own.shape != (width,) or not (own > 0).all() or not own.isfinite().all()):
        raise UserError(f"{WEIGHTS}: {FACTORS} of its header holds no {width} positive numbers")
    if own is not None:  # written here: its latents were rescaled, and their contributions are known
        parameters = rescaled(parameters, 1 / own)
    elif rescales:
        # SAELens multiplies activations by decoder norms and divides codes again: rows of unit norm do the same.
        parameters = rescaled(parameters, parameters.norms().clamp_min(SMALLEST_NORM))
    if scaling is not None:
        parameters = parameters.replace(W_dec=parameters.W_dec * scaling[:, None])
    return LoadedSae(NAME, kind, KNOWN[kind], parameters, k, by_contribution=own is not None, squashed=squashed)


def _pursuit(tensors: Tensors, config: Mapping[str, Any], dtype: torch.dtype) -> LoadedSae:
    """A matching pursuit by the rows as they are. What is centred by b_dec is decoded with it, and else neither is."""
    width, d = tensors.size("W_dec")
    W_dec, b_dec = tensors.take("W_dec", width, d, dtype=dtype), tensors.take("b_dec", d, dtype=dtype)
    tensors.nothing_left(f"architecture {PURSUIT}")
    if not flag("apply_b_dec_to_input", config.get("apply_b_dec_to_input", True)):
        b_dec = torch.zeros_like(b_dec)
    most, until = config.get("max_iterations"), config.get("residual_threshold", _DEFAULT_RESIDUAL)
    if isinstance(until, bool) or not isinstance(until, int | float) or not until >= 0:
        raise UserError(f"residual_threshold of {CONFIG} is {until!r}, wanted a number from 0")
    return LoadedSae(
        NAME,
        PURSUIT,
        PURSUIT,
        Parameters(W_dec, W_dec, -(W_dec @ b_dec), b_dec, torch.zeros(())),
        k=d if most is None else whole(f"max_iterations of {CONFIG}", most, 1),
        until=float(until),
        once=flag("stop_on_duplicate_support", config.get("stop_on_duplicate_support", True)),
    )


def _architecture(config: Mapping[str, Any]) -> tuple[str, bool]:
    """SAELens's architecture, and whether codes are tanh of what they would be otherwise."""
    kind, activation = config.get("architecture", "standard"), config.get("activation_fn")
    if kind == OURS:
        raise UserError(f"{CONFIG} is of a point whose architecture or encoder no other library has: load it by its id")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise UserError(f"architecture {kind!r} is not one of {', '.join(KNOWN)}")
    kwargs = _kwargs(config)
    further = set(kwargs) - {"k"}
    if further:
        raise UserError(f"activation_fn_kwargs of {CONFIG} has {', '.join(sorted(further))}, which is not known")
    if activation == "topk" and (kind == "topk" or (kind == "standard" and kwargs.get("k") is not None)):
        return "topk", False
    if activation is None or (activation == "relu" and kind != "topk"):
        return kind, False
    if activation == "tanh-relu" and kind in ("standard", "jumprelu", "gated"):
        return kind, True
    given = f" and {kwargs}" if kwargs else ""
    raise UserError(f"activation_fn of {CONFIG} is {activation!r}{given}, which is not known for architecture {kind!r}")


def _kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = config.get("activation_fn_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise UserError(f"activation_fn_kwargs of {CONFIG} is {kwargs!r}, wanted an object")
    return kwargs


def _refuse_other_inputs(config: Mapping[str, Any]) -> None:
    """UserError if the SAE would see other inputs than those given, or reconstruct others."""
    normalises = config.get("normalize_activations")
    if normalises is True:  # what versions before 3 called so
        normalises = "expected_average_only_in"
    if normalises not in (None, False, "none"):
        raise UserError(f"normalize_activations is {normalises!r}, wanted 'none': fold the scale into the weights")
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"metadata of {CONFIG} is {metadata!r}, wanted an object")
    old_hook = config.get("hook_name")
    reshapes = config.get("reshape_activations") or ("hook_z" if "hook_z" in str(old_hook) else "none")
    if reshapes != "none":
        raise UserError(f"reshape_activations is {reshapes!r}, wanted 'none': activations here are rows [inputs, d]")
    other = metadata.get("hook_name_out") or config.get("hook_name_out")
    if other not in (None, metadata.get("hook_name") or old_hook):
        raise UserError(f"hook_name_out is {other!r}: a transcoder, which predicts other activations than it reads")
    d_in, d_out = config.get("d_in"), config.get("d_out")
    if d_out not in (None, d_in):
        raise UserError(f"d_out is {d_out!r} and d_in {d_in!r}: a transcoder, which predicts other activations")


def _dtype(name: Any) -> torch.dtype:
    """The type that SAELens holds the weights in, to which it rounds them."""
    short = str(name).removeprefix("torch.")
    if name is None:
        return torch.float64
    if short not in _DTYPES:
        raise UserError(f"dtype of {CONFIG} is {name!r}, wanted one of {', '.join(_DTYPES)}")
    return _DTYPES[short]


def _parameters(tensors: Tensors, kind: str, width: int, d: int, dtype: torch.dtype) -> Parameters:
    W_enc = tensors.take("W_enc", d, width, dtype=dtype).T.contiguous()
    W_dec, b_dec = tensors.take("W_dec", width, d, dtype=dtype), tensors.take("b_dec", d, dtype=dtype)
    b_enc = tensors.take("b_gate" if kind == "gated" else "b_enc", width, dtype=dtype)
    extras = {}
    if kind == "gated":
        extras = {name: tensors.take(name, width, dtype=dtype) for name in ("r_mag", "b_mag")}
    elif kind in _IN_TRAINING:
        extras = {"thresholds": tensors.take_spread("topk_threshold", width)}
    elif kind == "jumprelu" and "log_threshold" in tensors:  # while it trains
        extras = {"thresholds": tensors.take("log_threshold", width, dtype=dtype).exp()}
    elif kind == "jumprelu":
        extras = {"thresholds": tensors.take_spread("threshold", width, dtype)}
    return Parameters(W_enc, W_dec, b_enc, b_dec, torch.zeros(()), **extras)


def _scaling(tensors: Tensors, config: Mapping[str, Any], width: int, dtype: torch.dtype) -> Tensor | None:
    """What codes are multiplied by before they are decoded [width]; None if by nothing."""
    names = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in tensors]
    if not names:
        return None
    factor = tensors.take(names[0], width, dtype=dtype)
    if torch.allclose(factor, torch.ones(())):  # kept by versions before 3 in every file
        return None
    if not flag("finetuning_scaling_factor", config.get("finetuning_scaling_factor")):
        raise UserError(f"{WEIGHTS}: {names[0]} is not 1, but finetuning_scaling_factor of {CONFIG} is not true")
    return factor


def _rescales(config: Mapping[str, Any], kind: str, parameters: Parameters) -> bool:
    """Whether activations are multiplied by decoder norms before they are compared."""
    key = "rescale_acts_by_decoder_norm"
    if kind not in ("topk", *_IN_TRAINING):
        return False
    if kind in _IN_TRAINING and key not in config:
        # SAELens has had the key since 6.14, and takes what is older for something that it may not be.
        norms = parameters.norms()
        if norms.max() > norms.min() * (1 + ALIKE):
            raise UserError(f"{CONFIG} has no {key}, and decoder rows differ in norm: say true or false")
    return flag(key, config.get(key, False))


def _k(config: Mapping[str, Any]) -> tuple[str, Any]:
    """Where k stands, and what stands there."""
    kwargs = _kwargs(config)
    if kwargs.get("k") is not None:
        return f"activation_fn_kwargs.k of {CONFIG}", kwargs["k"]
    if "k" in config:
        return f"k of {CONFIG}", config["k"]
    return f"k, which {CONFIG} does not say: by SAELens's default it", _DEFAULT_K
