"""BatchTopK: the k·b largest contributions of a batch of b inputs fire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import Architecture
from sae_sweep.saes.architectures.topk import NO_MARGIN, at_most_the_width

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters

# Of an input on average: a batch of b inputs has k·b active latents, rounded.
MEAN_K = {
    "k": Setting(
        1,
        "how many latents an input keeps on average over a batch; may be a fraction, such as 1.5",
        kind="number",
        gt=0,
    )
}
OF_BATCH = "flat on the codes of a batch of b in which at most k·b latents are active, none elsewhere"


def batchtopk(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """Keep the k·b largest contributions of the batch; at evaluation those that reach the learned threshold."""
    codes = pre.relu()
    contributions = codes * sae.norms()[..., None, :]
    threshold = sae.threshold
    if training:
        batch = contributions.flatten(-2)
        threshold = kth_largest(batch, min(chosen_of(settings, pre.shape[-2]), batch.shape[-1]))
    return codes * (contributions >= threshold[..., None, None])


def chosen_of(settings: Sae, b: int) -> int:
    """How many entries of a batch of b inputs stay: k of an input on average, which need not be whole."""
    return max(1, round(settings.k * b))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of values [..., count] -> [...]."""
    if values.is_cuda:  # where `kthvalue` gives each row to one block of threads, and `topk` to all
        return values.topk(k, dim=-1, sorted=False).values.amin(-1)
    return values.kthvalue(values.shape[-1] - k + 1, dim=-1).values


register(
    Architecture(
        name="batchtopk",
        activate=batchtopk,
        description="the k·batch largest contributions of a batch; a learned threshold at evaluation",
        formula="max(pre, 0)·H(max(pre, 0)·‖d‖ ≥ θ), θ the (k·b)-th largest of a batch of b",
        prior=OF_BATCH,
        source="arXiv 2412.06410",
        settings=MEAN_K,
        check=at_most_the_width,
        counts=True,
        learns_threshold=True,
        defaults=NO_MARGIN,
        compiled=("cpu",),
        listed=True,
    )
)
