"""Where an SAE begins. On toys whose splits are worth little variance, the init decides much of what is found.

An exemplar's latent j has the decoder xⱼ/‖xⱼ‖ and an encoder such that the pre-activation is ‖xⱼ‖ at xⱼ itself and
crosses zero where the projection on it (in the encoder's metric S) has fallen to `margin` of that:
W_enc = g‖x‖·Sx/(xᵀSx), b_enc = −(g−1)‖x‖, g = 1/(1−margin). S = I, or for whitened and oracle inits
(Σ + ridge·λ_max·I)⁻¹, which looks along the directions that tell neighbouring exemplars apart.

Where an architecture has thresholds, the margin is one: JumpReLU's W_enc = ‖x‖·Sx/(xᵀSx), b_enc = 0, θ = margin·‖x‖.
Matryoshka's first levels get the first exemplars: k-means++ takes those that are furthest apart first, the oracle the
heaviest classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from sae_sweep.config.settings import derive_seed
from sae_sweep.lazy import lazy
from sae_sweep.registry import Kind, Setting, get
from sae_sweep.saes.architectures import architecture_of
from sae_sweep.saes.encoders import encoder_of
from sae_sweep.saes.parameters import Parameters

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from sae_sweep.config.settings import Point, Sae
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

MARGIN = Setting(
    0.5, "a latent that begins at an input x fires where the projection on x is above this share of ‖x‖", ge=0, lt=1
)
RIDGE = Setting(
    1e-2,
    "added to the covariance before it is inverted, as a share of its largest eigenvalue; smaller: small differences "
    "between inputs count for more",
    gt=0,
)


class Source(Protocol):
    """What an init may look at: the activations that the SAE will be trained on, and the device they are drawn on."""

    device: str

    def exemplars(self, count: int, seed: int) -> Tensor:
        """Independent draws [count, d]."""
        ...

    def covariance(self) -> Tensor:
        """Σ [d, d]."""
        ...

    def trained(self, sae: Sae) -> Parameters:
        """The trained SAE that `sae.start` names, on these activations."""
        ...

    def class_means(self, partition: str) -> tuple[Tensor, Tensor]:
        """Mean activation [classes, d] and probability [classes] of each class of inputs."""
        ...

    def truth(self) -> tuple[Tensor, Tensor]:
        """Unit directions [features, d] of planted features, and x [d] where none is active. UserError without any."""
        ...


@dataclass(frozen=True, kw_only=True)
class Init(Kind):
    """`make(point, source, generator)`: the untrained SAE, without what its architecture and encoder alone have.

    clusters: it looks for clusters among many inputs, which takes time that grows with the square of the width
    resolve(settings): settings that follow from others, such as the digest of a file. UserError: they are no good
    """

    family = "init"
    make: Callable[[Point, Source, torch.Generator], Parameters]
    clusters: bool = False
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda settings: {}


def start(point: Point, source: Source) -> Parameters:
    """The untrained SAE of a point, on the CPU.

    Depends on the point's init, seed, width and architecture, never on its penalty or coefficient: SAEs that
    differ in those alone are a paired comparison.
    """
    sae = point.sae
    seed = derive_seed("init", sae.architecture, sae.width, point.seed)
    generator = torch.Generator().manual_seed(seed)
    made: Parameters = get("init", sae.init).make(point, source, generator)
    made = architecture_of(sae.architecture).completed(made, sae.width)
    return encoder_of(point.encoder.name).completed(made, point, generator)


def latents_at(exemplars: Tensor, point: Point, metric: Tensor, generator: torch.Generator) -> Parameters:
    """A latent at each exemplar [n, d], n at most the width, and spare ones that are off; `metric` is S [d, d]."""
    sae, kind = point.sae, architecture_of(point.sae.architecture)
    if kind.at_exemplars is None:
        parameters = from_exemplars(exemplars, sae.margin, metric)
    else:
        parameters = kind.at_exemplars(from_exemplars(exemplars, 0.0, metric), exemplars.norm(dim=1), sae.margin)
    return padded(parameters, sae.width, kind.off, generator)


def from_exemplars(exemplars: Tensor, margin: float, metric: Tensor) -> Parameters:
    """One latent per exemplar [width, d], as the head of this file says; `metric` is S [d, d]."""
    norms = exemplars.norm(dim=1).clamp_min(1e-6)
    seen = exemplars @ metric
    gain = 1 / (1 - margin)
    along = (exemplars * seen).sum(1).clamp_min(1e-12)
    W_enc = gain * (norms / along)[:, None] * seen
    zero = torch.zeros(())
    return Parameters(W_enc, exemplars / norms[:, None], -(gain - 1) * norms, torch.zeros(exemplars.shape[1]), zero)


def directions(width: int, d: int, generator: torch.Generator) -> Parameters:
    """Decoder rows uniform on the sphere, the same encoder, no bias."""
    rows = F.normalize(torch.randn(width, d, generator=generator), dim=1)
    return Parameters(rows.clone(), rows, torch.zeros(width), torch.zeros(d), torch.zeros(()))


def spectrum(source: Source, ridge: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues [d] of Σ + ridge·λ_max·I and its axes [d, d], float32."""
    values, axes = torch.linalg.eigh(source.covariance().double().cpu())
    return (values.clamp_min(0) + ridge * values[-1]).float(), axes.float()


def draw_seed(generator: torch.Generator) -> int:
    """A seed for draws of inputs."""
    return int(torch.randint(2**62, (), generator=generator))


def padded(parameters: Parameters, width: int, off: float, generator: torch.Generator) -> Parameters:
    """Spare latents are off: their pre-activation is negative for every input, so they never fire nor train."""
    spare, d = width - len(parameters.W_dec), parameters.W_dec.shape[1]
    if not spare:
        return parameters
    return parameters.replace(
        W_enc=torch.cat([parameters.W_enc, torch.zeros(spare, d)]),
        W_dec=torch.cat([parameters.W_dec, directions(spare, d, generator).W_dec]),
        b_enc=torch.cat([parameters.b_enc, torch.full((spare,), off)]),
    )
