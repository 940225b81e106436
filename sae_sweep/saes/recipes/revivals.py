"""Revival of dead latents: none, resampling, AuxK, or both. A latent is dead that has not fired for `dead_after` steps.

Steps count from its last input with a code above 0, by the architecture's own codes in training. The source of
resampling calls a latent dead after half of the interval between two rounds, 125 steps at the default interval here;
that of AuxK after 10 million inputs, in runs of thousands of millions. If `dead_after` is null, as it was before it
existed, resampling takes for dead what fires on no input of the latest block, with the SAE as the block left it.

Resampling (Bricken et al. 2023, Towards Monosemanticity, appendix "Neuron resampling"): at the end of every block of
steps (saes/train.py) into which a multiple of `revival_every` falls, until `revival_until` of the steps are done,

- each dead latent gets an input of the block, drawn without replacement, with chances in proportion to the squared
  error ‖x − x̂‖² (`revival_source=loss`; the source squares that again) or alike for all (`all`). If there are fewer
  inputs with an error than dead latents, the rest stay dead;
- its decoder row becomes u = (x − b_dec)/‖x − b_dec‖, its encoder row s·u, and its bias −s·uᵀb_dec, so that it reads
  s·uᵀ(x − b_dec); what else the architecture and the encoder have of each latent is as in an untrained SAE; Adam's
  moments of all of these become 0;
- s is `revival_scale` times the mean norm of the encoder rows of living latents, .2 of it by the source. Where the
  architecture counts, s is `revival_scale` itself, by default 1: a latent that is to be among the k largest must read
  its own input whole, and with .2 of it it would lose to whatever lives.

AuxK (Gao et al. 2024, arXiv 2406.04093, section 2.4 and appendix A.2): to the loss comes `aux_coefficient`·E‖e − ê‖²,
where e = x − x̂ is held, and ê is decoded without b_dec from the `aux_k` dead latents of largest contribution
max(pre, 0)·‖d‖ of an input, whatever the architecture chooses. It is 0 while none is dead. Their code divides it by the
variance of e, as the loss by that of x; here both are in the units of x.

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
    from sae_sweep.saes.recipes import Respond
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


def responses(stack: Stack, i: int, batches: Tensor) -> tuple[Tensor, Tensor]:
    """Which latents of SAE i fire on batches [steps, b, d]: [width]; and the squared error of each input [steps·b].

    By the reference's codes: a backend may have quicker ones.
    """
    kind, sae, point = stack.architecture, stack.parameters(i), stack.points[i]
    # What chooses over a batch must see the whole of it.
    rows = batches.shape[1] if kind.learns_threshold else max(1, NUMBERS // stack.width)
    fired = torch.zeros(stack.width, dtype=torch.bool, device=batches.device)
    errors = []
    for x in (part for batch in batches for part in batch.split(rows)):
        codes = kind.codes(x, sae, point.sae, True, point.encoder)
        fired |= (codes > 0).any(0)
        errors.append((codes @ sae.W_dec + sae.b_dec - x).square().sum(1))
    return fired, torch.cat(errors)


def resample(stack: Stack, i: int, batches: Tensor, respond: Respond = responses) -> Tensor:
    """Give the dead latents of SAE i another start at inputs of the block [steps, b, d]; which they were [width]."""
    point, sae = stack.points[i], stack.parameters(i)
    training, kind = point.training, stack.architecture
    counted = training.get("dead_after") is not None
    revived = torch.zeros(stack.width, dtype=torch.bool, device=batches.device)
    if counted and bool((stack.silent[i] < training.dead_after).all()):
        return revived
    living, errors = respond(stack, i, batches)
    if counted:
        living = stack.silent[i] < training.dead_after
    dead = torch.nonzero(~living).flatten()
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
        norms = sae.W_enc[living].norm(dim=1)
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


def kept_of(training: Training, width: int, d: int) -> int:
    """How many dead latents of an input AuxK keeps."""
    kept: int = min(width, d // 2 or 1 if training.aux_k is None else training.aux_k)
    return kept


def auxk(stack: Stack, residual: Tensor, pre: Tensor, sae: Parameters) -> Tensor:
    """aux_coefficient·E‖e − ê‖² of each SAE [n]. All SAEs of a stack have the same settings."""
    training = stack.points[0].training
    k = kept_of(training, pre.shape[-1], residual.shape[-1])
    dead = stack.silent >= training.dead_after
    codes = pre.relu() * dead[:, None, :]
    chosen = (codes * sae.norms()[..., None, :]).topk(k, dim=-1).indices
    codes = codes.new_zeros(codes.shape).scatter(-1, chosen, codes.gather(-1, chosen))
    missed = (codes @ sae.W_dec - residual).square().sum(-1).mean(-1)
    return training.aux_coefficient * missed * dead.any(-1)


# Compiled steps of these architectures know AuxK (kernels/cpu/auxiliary.py).
COMPILED_UNDER = ("relu", "topk", "batchtopk")
AFTER = "a latent is dead after this many steps without firing"
LATEST = f"{AFTER}; null: if it did not fire in the latest block of 25 steps"
DEAD_AFTER = {"dead_after": Setting(125, AFTER, ge=1)}
OF_BLOCK = {"dead_after": Setting(None, LATEST, kind="int", ge=1, optional=True, legacy=None)}
RESAMPLING = {
    "revival_every": Setting(
        250, "steps from one revival to the next; each takes place at the end of a block of 25 steps", ge=1
    ),
    "revival_until": Setting(0.8, "share of the steps after which no latent is revived any more", ge=0, le=1),
    "revival_source": Setting(
        "loss",
        "where latents start again: at inputs drawn in proportion to their squared error (loss), or all alike (all)",
        choices=("loss", "all"),
    ),
    "revival_scale": Setting(
        None,
        "norm of a revived encoder row as a share of the mean of living rows; null: 0.2. With architectures that have "
        "sae.k: the norm itself; null: 1",
        kind="float",
        optional=True,
        gt=0,
    ),
}
AUXK = {
    "aux_k": Setting(
        None,
        "how many dead latents may fit the error that is left of an input; null: half the numbers of x",
        kind="int",
        optional=True,
        ge=1,
    ),
    "aux_coefficient": Setting(1 / 32, "multiplies the squared error of that fit in the loss", gt=0),
}

register(Revival(name="none", description="dead latents stay as they are", source="–"))
register(
    Revival(
        name="resample",
        due=_due,
        revive=resample,
        description="dead latents start again at inputs that are reconstructed badly, or at any",
        source="Bricken et al. 2023, Towards Monosemanticity, appendix",
        settings={**OF_BLOCK, **RESAMPLING},
    )
)
register(
    Revival(
        name="auxk",
        auxiliary=auxk,
        copies=5,
        products=3,
        compiled_under=COMPILED_UNDER,
        version=2,
        description="the dead latents of largest contribution learn to reconstruct what the others miss",
        source="arXiv 2406.04093",
        settings={**DEAD_AFTER, **AUXK},
    )
)
register(
    Revival(
        name="both",
        due=_due,
        revive=resample,
        auxiliary=auxk,
        copies=5,
        products=3,
        compiled_under=COMPILED_UNDER,
        version=2,
        description="resample and auxk",
        source="Bricken et al. 2023; arXiv 2406.04093",
        settings={**DEAD_AFTER, **RESAMPLING, **AUXK},
    )
)
