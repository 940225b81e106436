"""JumpReLU: a latent fires where its contribution exceeds a threshold of its own, which is trained.

Four ways to train it, by their sources:

- the slope of the jump passes to thresholds and pre-activations (`sae.slopes=both`), under any penalty: the default;
- it passes to thresholds alone (`sae.slopes=thresholds`), under penalty=l0 (Rajamanoharan et al. 2024, arXiv
  2407.14435; they write θ for max(pre, 0)‖d‖ in the slope of the code, which is as much to half a bandwidth);
- to both, under penalty=tanh, with a loss that pulls what does not fire up to its threshold (`sae.preact=3e-6`;
  Anthropic, Circuits Updates, January 2025: Σ λ_P·max(θ − pre·‖d‖, 0); their tanh(4a) is penalty.scale=0.25);
- a quadratic loss pulls L0 to a target: l0_weight·(L0/l0_target − 1)², L0 the mean over the batch, with the slope of
  the jump (`penalty=none sae.l0_target=20`; dictionary_learning's JumpReluTrainer, where slopes=thresholds). L0 comes
  near the target, where the error balances it; `training.target_l0`, which moves a coefficient, comes to it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.architectures import BY_PENALTY, Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.config.settings import Sae
    from sae_sweep.saes.parameters import Parameters
else:
    torch = lazy("torch")

# Thresholds where no exemplar says better; activations have E‖x‖² = d.
THRESHOLD = 0.1


@functools.cache
def _step() -> Any:
    class Step(torch.autograd.Function):
        """H(u) with the slope of a rectangle passed straight through: 1/bandwidth where |u| < bandwidth/2."""

        @staticmethod
        def forward(ctx, u: Tensor, bandwidth: float) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.save_for_backward(u)
            ctx.bandwidth = bandwidth
            return (u > 0).to(u.dtype)

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            (u,) = ctx.saved_tensors
            return gradient * (u.abs() < ctx.bandwidth / 2) / ctx.bandwidth, None

    return Step


def straight_through_gate(pre: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """H(max(pre, 0)‖d‖ − θ): whether a latent's contribution exceeds its threshold.

    By default the slope reaches thresholds and pre-activations alike. Where thresholds alone have it, Adam normalises
    away how large it is, and the coefficient hardly moves L0.
    """
    contributions = pre.relu() * sae.norms()[..., None, :]
    if settings.slopes == "thresholds":
        contributions = contributions.detach()
    fires: Tensor = _step().apply(contributions - sae.thresholds[..., None, :], settings.bandwidth)
    return fires


def below_thresholds(x: Tensor, pre: Tensor, codes: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """preact·Σ max(θ − pre·‖d‖, 0), mean over the batch: latents that do not fire come nearer to it."""
    if not settings.preact:
        return x.new_zeros(())
    short = (sae.thresholds[..., None, :] - pre * sae.norms()[..., None, :]).relu()
    return settings.preact * short.sum(-1).mean(-1)


def off_target(x: Tensor, pre: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    """l0_weight·(L0/l0_target − 1)², L0 the mean over the batch: 0 on target, l0_weight where nothing fires."""
    if settings.l0_target is None:
        return x.new_zeros(())
    l0 = straight_through_gate(pre, sae, settings).sum(-1).mean(-1)
    return settings.l0_weight * (l0 / settings.l0_target - 1).square()


def _losses(x: Tensor, pre: Tensor, codes: Tensor, sae: Parameters, settings: Sae) -> Tensor:
    return below_thresholds(x, pre, codes, sae, settings) + off_target(x, pre, sae, settings)


def _within_the_width(settings: Sae) -> None:
    """UserError if more latents are to fire than there are."""
    if settings.l0_target is not None and settings.l0_target > settings.width:
        raise UserError(f"sae.l0_target={settings.l0_target:g} is more than sae.width={settings.width}")


def _is_default(settings: Sae) -> bool:
    return bool(settings.slopes == "both" and not settings.preact and settings.l0_target is None)


def jumprelu(pre: Tensor, sae: Parameters, settings: Sae, training: bool) -> Tensor:
    """z = max(pre, 0)·H(max(pre, 0)‖d‖ − θ)."""
    return pre.relu() * straight_through_gate(pre, sae, settings)


def _with_thresholds(sae: Parameters, norms: Tensor, margin: float) -> Parameters:
    return sae.replace(thresholds=(margin * norms).clamp_min(THRESHOLD))


def _completed(sae: Parameters, width: int) -> Parameters:
    known = sae.tensors.get("thresholds", sae.b_enc.new_zeros(0))
    rest = torch.full((width - len(known),), THRESHOLD)
    return sae.replace(thresholds=torch.cat([known, rest]))


register(
    Architecture(
        name="jumprelu",
        activate=jumprelu,
        description="a threshold of each latent's own on its contribution; slopes pass straight through the jump. "
        "penalty=l0 counts what fires",
        formula="max(pre, 0)·H(max(pre, 0)·‖d‖ > θ)",
        prior=f"{BY_PENALTY}; of penalty=l0 a spike and a flat slab, improper",
        source="arXiv 2407.14435",
        settings={
            "bandwidth": Setting(
                0.5,
                "contributions within half of this of a threshold move it; wider: a smoother and more biased gradient",
                gt=0,
            ),
            "slopes": Setting(
                "both",
                "what the gradient through the jump trains: thresholds and pre-activations (both), or thresholds alone",
                choices=("both", "thresholds"),
                legacy="both",
            ),
            "preact": Setting(
                0.0,
                "multiplies a further loss, how far latents that do not fire are below their thresholds, which keeps "
                "them from dying; 0: none",
                ge=0,
                legacy=0.0,
            ),
            "l0_target": Setting(
                None,
                "mean L0 to which a quadratic loss pulls; null: there is none",
                kind="float",
                optional=True,
                gt=0,
                legacy=None,
            ),
            "l0_weight": Setting(1.0, "multiplies that loss: what it is where nothing fires", gt=0, legacy=1.0),
        },
        check=_within_the_width,
        auxiliary=_losses,
        compiles=_is_default,
        extras=("thresholds",),
        fires=straight_through_gate,
        at_exemplars=_with_thresholds,
        completed=_completed,
        compiled=("cpu",),
    )
)
