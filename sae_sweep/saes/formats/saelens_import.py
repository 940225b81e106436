"""SAEs that others trained, in SAELens's layout, as ours: which architecture computes the same, with which parameters.

SAELens compares activations with thresholds, and chooses among them; here contributions z‖d‖ are compared and chosen
among. For a threshold the one follows from the other; a choice is the same only where decoder rows are of one norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from sae_sweep.config.settings import Sae
from sae_sweep.errors import UserError
from sae_sweep.saes.formats import saelens_export
from sae_sweep.saes.parameters import Parameters

# SAELens's architecture → the one here that computes the same, and the tensors that it has beside W_enc, W_dec, b_dec.
KNOWN = {
    "standard": ("relu", ("b_enc",)),
    "topk": ("topk", ("b_enc",)),
    "jumprelu": ("jumprelu", ("b_enc", "threshold")),
    "gated": ("gated", ("b_gate", "r_mag", "b_mag")),
}
# Settings under which it would see other inputs, or other latents, than those given.
PLAIN = {"normalize_activations": "none", "reshape_activations": "none"}
# Decoder norms within this factor are one norm.
ALIKE = 1e-3


def from_saelens(config: Mapping[str, Any], weights: bytes) -> tuple[Sae, Parameters]:
    """The settings and the parameters, taking raw activations, of `cfg.json` and `sae_weights.safetensors`.

    UserError, one line: it is of an architecture or has a setting that is not known here, or tensors are missing.
    """
    name = config.get("architecture")
    if name not in KNOWN:
        saved_as = " (SAELens saves BatchTopK as jumprelu)" if "topk" in str(name) else ""
        raise UserError(f"architecture {name!r} is not one of {', '.join(KNOWN)}{saved_as}")
    for key, plain in PLAIN.items():
        if config.get(key, plain) not in (plain, None):
            raise UserError(f"{key}={config[key]!r} is not supported: fold it into the weights ({plain!r})")
    try:
        tensors = load(weights)
        own = saelens_export.factors(weights)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{saelens_export.WEIGHTS} cannot be read: {error}") from error
    architecture, further = KNOWN[name]
    missing = sorted({"W_enc", "W_dec", "b_dec", *further} - set(tensors))
    if missing:
        raise UserError(f"{saelens_export.WEIGHTS} has no {', '.join(missing)}, which {name} needs")
    parameters = saelens_export.parameters_of({key: tensor.float() for key, tensor in tensors.items()})
    settings = Sae(architecture, width=len(parameters.W_dec), k=int(config.get("k", 1)))
    if config.get("apply_b_dec_to_input"):
        parameters = _without_centring(parameters)
    if own is not None:  # written here: its latents were rescaled, and their contributions are known
        return settings, saelens_export.rescaled(parameters, 1 / own)
    norms = parameters.norms()
    by_activations = architecture == "topk" and not config.get("rescale_acts_by_decoder_norm")
    if by_activations and norms.max() > norms.min() * (1 + ALIKE):
        raise UserError("this TopK SAE chooses by activations although its decoder rows differ in norm: fold them in")
    return settings, _on_contributions(parameters, norms)


def _on_contributions(parameters: Parameters, norms: Tensor) -> Parameters:
    """The SAE with thresholds on contributions, where it has them on activations."""
    if "thresholds" not in parameters.tensors:
        return parameters
    return parameters.replace(thresholds=parameters.thresholds * norms)


def _without_centring(parameters: Parameters) -> Parameters:
    """The SAE that gives the same codes where b_dec is not subtracted from its input first."""
    shift = -(parameters.W_enc @ parameters.b_dec)
    moved = parameters.replace(b_enc=parameters.b_enc + shift)
    if "r_mag" in parameters.tensors:
        moved = moved.replace(b_mag=parameters.b_mag + parameters.r_mag.exp() * shift)
    return moved
