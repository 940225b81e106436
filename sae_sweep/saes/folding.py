"""The same SAE in other units: on raw activations instead of normalised ones, or with its latents rescaled."""

from __future__ import annotations

from torch import Tensor

from sae_sweep.saes.parameters import Parameters

# The norm by which a decoder row of zeros is divided: it stays one, and its latent the last to be chosen.
SMALLEST_NORM = 1e-30
# The parameters that every architecture has.
SHARED = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def extras(parameters: Parameters) -> dict[str, Tensor]:
    """What architecture and encoder have beside weights and biases, by name."""
    return {name: tensor for name, tensor in parameters.tensors.items() if name not in SHARED}


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
        **{name: tensor / scale for name, tensor in extras(parameters).items() if name == "thresholds"},
        **_shifted(parameters, -shift),
        **_hidden(parameters, scale, -scale * mean),
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
        **{name: tensor * scale for name, tensor in extras(parameters).items() if name == "thresholds"},
        **_shifted(parameters, shift),
        **_hidden(parameters, 1 / scale, mean),
    )


def without_centring(parameters: Parameters) -> Parameters:
    """The SAE that gives the same codes where b_dec is not subtracted from its input first."""
    shift = -(parameters.W_enc @ parameters.b_dec)
    return parameters.replace(b_enc=parameters.b_enc + shift, **_shifted(parameters, shift))


def rescaled(parameters: Parameters, by: Tensor) -> Parameters:
    """The same SAE with codes `by` [width] times as large, and decoder rows so much shorter.

    Thresholds are on contributions, which stay. Not for Gated SAEs, whose b_mag would have to grow too.
    """
    W_enc, W_dec = parameters.W_enc * by[:, None], parameters.W_dec / by[:, None]
    return parameters.replace(W_enc=W_enc, W_dec=W_dec, b_enc=parameters.b_enc * by)


def _shifted(parameters: Parameters, by: Tensor) -> dict[str, Tensor]:
    """b_mag where the gate's bias moved by `by`: magnitudes see the same encoder, exp(r_mag) times."""
    if "r_mag" not in extras(parameters):
        return {}
    return {"b_mag": parameters.b_mag + parameters.r_mag.exp() * by}


def _hidden(parameters: Parameters, scale: float, by: Tensor) -> dict[str, Tensor]:
    """An MLP's hidden layer that takes `scale` times as large inputs, moved by `by` [d] before that."""
    if "W_hidden" not in extras(parameters):
        return {}
    W_hidden = parameters.W_hidden * scale
    return {"W_hidden": W_hidden, "b_hidden": parameters.b_hidden + parameters.W_hidden @ by}
