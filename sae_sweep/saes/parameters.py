"""The numbers of a trained SAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from sae_sweep.registry import get

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Point


class Parameters:
    """One SAE, or a stack of them under a leading dimension: x̂ = z·W_dec + b_dec, and pre = W_enc·x + b_enc of a linear
    encoder.

    W_enc, W_dec [..., width, d] (a row per latent) · b_enc [..., width] · b_dec [..., d] · threshold [...]:
    the smallest contribution that fires at evaluation (BatchTopK; 0 elsewhere).
    Beyond these, what the architecture has of each latent, [..., width]: such as JumpReLU's `thresholds`, which a
    contribution must exceed, and Gated's `r_mag` and `b_mag`, the magnitude exp(r_mag)·W_enc·x + b_mag; and what the
    encoder has (saes/encoders).
    """

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor

    def __init__(
        self, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, threshold: Tensor, **extras: Tensor
    ) -> None:
        self.__dict__.update(W_enc=W_enc, W_dec=W_dec, b_enc=b_enc, b_dec=b_dec, threshold=threshold, **extras)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return dict(self.__dict__)

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"this SAE has no parameter {name!r}: {', '.join(self.__dict__)}")

    def replace(self, **changes: Tensor) -> Parameters:
        """The same with other tensors."""
        return Parameters(**{**self.__dict__, **changes})

    def map(self, change: Callable[[Tensor], Tensor]) -> Parameters:
        """The same with a change to each tensor."""
        return Parameters(**{name: change(tensor) for name, tensor in self.__dict__.items()})

    def norms(self) -> Tensor:
        """Decoder norms ‖d‖ [..., width]."""
        return self.W_dec.norm(dim=-1)


def shapes(point: Point, d: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what is trained of a point's SAE on activations of length d, in the order of a stack's rows."""
    width = point.sae.width
    extras = get("architecture", point.sae.architecture).extras
    shared = {"W_enc": (width, d), "W_dec": (width, d), "b_enc": (width,), "b_dec": (d,)}
    of_encoder: dict[str, tuple[int, ...]] = get("encoder", point.encoder.name).tensors(point.encoder, width, d)
    return {**shared, **dict.fromkeys(extras, (width,)), **of_encoder}


class HasParameters(Protocol):
    """What has an SAE's numbers."""

    @property
    def parameters(self) -> Parameters: ...


class SaeTensors:
    """The tensors of an SAE by their names, and x̂, for classes that hold its `parameters`."""

    @property
    def W_enc(self: HasParameters) -> Tensor:
        """Encoder rows [width, d]."""
        return self.parameters.W_enc

    @property
    def b_enc(self: HasParameters) -> Tensor:
        """Encoder bias [width]."""
        return self.parameters.b_enc

    @property
    def W_dec(self: HasParameters) -> Tensor:
        """Decoder rows [width, d]."""
        return self.parameters.W_dec

    @property
    def b_dec(self: HasParameters) -> Tensor:
        """Decoder bias [d]."""
        return self.parameters.b_dec

    def decode(self: HasParameters, codes: Tensor) -> Tensor:
        """Reconstructed activations [b, d] from codes [b, width]."""
        return codes @ self.parameters.W_dec + self.parameters.b_dec
