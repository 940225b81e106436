"""Revival of dead latents: none, or resampling.

Resampling (Bricken et al. 2023, Towards Monosemanticity, appendix "Neuron resampling"): at the end of every block of
steps (saes/train.py) into which a multiple of `revival_every` falls, until `revival_until` of the steps are done,

- a latent is dead that fires on no input of that block, by the architecture's own codes, batch by batch, with the SAE
  as the block left it;
- each dead latent gets an input of the block, drawn without replacement, with chances in proportion to the squared
  error ‖x − x̂‖² (`revival_source=loss`; the source squares that again) or alike for all (`all`). If there are fewer
  inputs with an error than dead latents, the rest stay dead;
- its decoder row becomes u = (x − b_dec)/‖x − b_dec‖, its encoder row s·u, and its bias −s·uᵀb_dec, so that it reads
  s·uᵀ(x − b_dec); what else the architecture and the encoder have of each latent is as in an untrained SAE; Adam's
  moments of all of these become 0;
- s is `revival_scale` times the mean norm of the encoder rows of living latents, .2 of it by the source. Where the
  architecture counts, s is `revival_scale` itself, by default 1: a latent that is to be among the k largest must read
  its own input whole, and with .2 of it it would lose to whatever lives.

Everything is of one SAE alone, and its draws are from a generator of its seed and the step: pack-mates, threads and
restarts change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_sweep.config.settings import derive_seed
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.saes.parameters import Parameters
from sae_sweep.saes.recipes import Revival

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from sae_sweep.config.settings import Training
    from sae_sweep.saes.stack import Stack
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

# Pre-activations computed at once: they fit a cache.
NUMBERS = 1 << 20
OF_LIVING, WHOLE = 0.2, 1.0


def _due(training: Training, step: int, steps: int) -> bool:
    """Whether a multiple of `revival_every` is among the last `steps` before `step`, and the time is not over."""
    every = training.revival_every
    return step // every > (step - steps) // every and step <= training.revival_until * training.steps


def resample(stack: Stack, i: int, batches: Tensor) -> Tensor:
    """Give the dead latents of SAE i another start at inputs of the block [steps, b, d]; which they were [width]."""
    point, sae = stack.points[i], stack.parameters(i)
    training, kind = point.training, stack.architecture
    fired, errors = _responses(stack, i, batches)
    revived = torch.zeros_like(fired)
    dead = torch.nonzero(~fired).flatten()
    chances = errors.cpu() if training.revival_source == "loss" else torch.ones(len(errors))
    count = min(len(dead), int((chances > 0).sum()))
    if not count or not bool(errors.isfinite().all()):
        return revived
    seed = derive_seed("revival", point.sae.architecture, point.sae.width, point.seed, stack.step)
    drawn = torch.multinomial(chances, count, generator=torch.Generator().manual_seed(seed))
    inputs = batches.flatten(0, 1)[drawn.to(batches.device)]
    dead, rows = dead[:count], F.normalize(inputs - sae.b_dec, dim=1)
    scale = training.revival_scale
    if kind.counts:
        norm = WHOLE if scale is None else scale
    else:
        norms = sae.W_enc[fired].norm(dim=1)
        norm = (OF_LIVING if scale is None else scale) * (float(norms.mean()) if len(norms) else 1.0)
    fresh = Parameters(norm * rows, rows, -norm * (rows @ sae.b_dec), sae.b_dec, sae.threshold)
    fresh = stack.encoder.revived(kind.completed(fresh, count), point.encoder, norm)
    trained, *moments = (stack.named(tensor[i]) for tensor in (stack.flat, stack.first, stack.second))
    for name in ("W_enc", "W_dec", "b_enc", *kind.extras, *stack.encoder.rows):
        trained[name][dead] = getattr(fresh, name)
        for moment in moments:
            moment[name][dead] = 0.0
    revived[dead] = True
    return revived


def _responses(stack: Stack, i: int, batches: Tensor) -> tuple[Tensor, Tensor]:
    """Which latents of SAE i fire on batches [steps, b, d]: [width]; and the squared error of each input [steps·b]."""
    kind, sae, point = stack.architecture, stack.parameters(i), stack.points[i]
    fired = torch.zeros(stack.width, dtype=torch.bool, device=batches.device)
    errors = []
    # What chooses over a batch must see the whole of it.
    rows = batches.shape[1] if kind.learns_threshold else max(1, NUMBERS // stack.width)
    for x in (part for batch in batches for part in batch.split(rows)):
        codes = kind.codes(x, sae, point.sae, True, point.encoder)
        fired |= (codes > 0).any(0)
        errors.append((codes @ sae.W_dec + sae.b_dec - x).square().sum(1))
    return fired, torch.cat(errors)


register(Revival(name="none", description="dead latents stay as they are", source="–"))
register(
    Revival(
        name="resample",
        due=_due,
        revive=resample,
        description="dead latents start again at inputs that are reconstructed badly, or at any",
        source="Bricken et al. 2023, Towards Monosemanticity, appendix",
        settings={
            "revival_every": Setting(250, "steps; it happens as the block of 25 steps ends that this falls in", ge=1),
            "revival_until": Setting(0.8, "share of the steps after which none is revived", ge=0, le=1),
            "revival_source": Setting("loss", "inputs drawn by squared error, or all alike", choices=("loss", "all")),
            "revival_scale": Setting(
                None,
                "norm of a revived encoder row: of the mean of living ones, or itself where the architecture counts; "
                "null: .2 of the living, 1 where it counts",
                kind="float",
                optional=True,
                gt=0,
            ),
        },
    )
)
