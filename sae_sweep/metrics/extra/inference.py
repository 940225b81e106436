"""The best codes for a fixed decoder: what of an SAE's loss is its encoder's, and what its dictionary's.

For example, a dictionary with a row for every (maximum, query) may have an encoder that cannot tell neighbours apart:
its codes blur, and it counts few splits. The codes found here for the same rows, by descent on the SAE's own objective,
show what the rows could do. `encoder_gap` is the loss that a perfect encoder would save.

An SAE with a penalty: min over z ≥ 0 of ‖x − b_dec − z·W_dec‖² + coefficient · penalty(z‖d‖), by FISTA (Beck and
Teboulle 2009) with a step of its own for each input, and momentum dropped where the objective would rise. On z ≥ 0 a
penalty has a slope everywhere, so that the projection on z ≥ 0 is all of the proximal step; for L1 that is the soft
threshold. For `l0`, which has no slope, it is the hard one. Where a penalty is not convex, descent starts from the
SAE's own codes and from the best single latent, and the better end counts.
An SAE that counts (TopK and its kin): at most k latents. For k = 1 the best one is known exactly; for more, orthogonal
matching pursuit (Pati et al. 1993) with non-negative codes, or the SAE's own latents refitted where these do better.
No code found has a larger objective than the SAE's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_sweep.config.columns import BESIDE, Column
from sae_sweep.lazy import lazy
from sae_sweep.metrics import information, labels, reconstruction
from sae_sweep.metrics.metric import MeasurableSAE, Measured, Metric, Value
from sae_sweep.registry import Setting, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sae_sweep.metrics import evaluate, sparse_codes
    from sae_sweep.metrics.sparse_codes import Active
else:
    torch = lazy("torch")
    evaluate, sparse_codes = lazy("sae_sweep.metrics.evaluate"), lazy("sae_sweep.metrics.sparse_codes")

# Descent ends when WINDOW steps lower the objective of the inputs at hand by less than this share of it.
TOLERANCE, WINDOW, MOST_STEPS = 1e-6, 20, 4_000
# Inputs at a time, and coordinate steps of a fit to chosen latents.
INPUTS, REFITS = 1 << 9, 50


@dataclass(frozen=True)
class Objective:
    """What codes are to minimise: a penalty, or a count of latents.

    penalty_value: a‖d‖ [b, width] to the penalty of each input [b]; k: of SAEs that count, how many latents an input
    may have, else None; hard: whether the penalty is the number of active latents; shares: whether −log π of the winner
    is a part of the penalty, whose mean over all inputs is an entropy: it is added to losses, and no part of descent.
    """

    penalty_value: Callable[[Tensor], Tensor]
    coefficient: float
    k: int | None = None
    hard: bool = False
    shares: bool = False


class PerfectEncoder:
    """The same dictionary as an SAE's, with the best codes for it."""

    def __init__(self, sae: MeasurableSAE, objective: Objective) -> None:
        self.sae, self.objective = sae, objective
        self.W_dec, self.b_dec = sae.W_dec, sae.b_dec

    def active(self, x: Tensor) -> Iterator[Active]:
        """Codes of inputs x [b, d], of some inputs after the other.

        They are sought for rows of unit length, as rows of very different lengths would hold descent up.
        """
        norms = self.W_dec.norm(dim=1)
        unit = self.W_dec / norms.clamp_min(1e-30)[:, None]
        for part in x.split(INPUTS):
            own = torch.cat([codes.contributions(norms).dense(len(norms)) for codes in self.sae.active(part)])
            found = best_codes(part, own, unit, self.b_dec, self.objective) * (norms > 0)
            yield sparse_codes.Active.of(found / norms.clamp_min(1e-30))


def best_codes(x: Tensor, own: Tensor, W_dec: Tensor, b_dec: Tensor, objective: Objective) -> Tensor:
    """The best codes found [b, width] of inputs x [b, d], at least as good as the SAE's `own` [b, width]."""
    target = x - b_dec
    if objective.k is not None:
        starts = [pursuit(target, W_dec, objective.k)]
        if objective.k > 1:
            kept = (own * W_dec.norm(dim=1)).topk(min(objective.k, own.shape[1]), dim=1).indices
            starts.append(_refit(target, W_dec, kept, own))
        ends = [own, *starts]
    else:
        ends = [descend(target, start, W_dec, objective) for start in (own, pursuit(target, W_dec, 1))]
    values = torch.stack([_value(target, end, W_dec, objective) for end in ends])
    # Codes that have more than k latents are not among those to choose from, whatever they reach.
    if objective.k is not None:
        values[0] = torch.where((own > 0).sum(1) > objective.k, torch.inf, values[0])
    values = torch.where(values.isnan(), torch.inf, values)
    return torch.stack(ends)[values.argmin(0), torch.arange(len(x), device=x.device)]


def descend(target: Tensor, start: Tensor, W_dec: Tensor, objective: Objective) -> Tensor:
    """FISTA from codes `start` [b, width], for target = x − b_dec [b, d]; never above where it starts."""
    step = torch.full_like(target[:, :1], 1 / (2 * float(torch.linalg.matrix_norm(W_dec, 2)) ** 2 + 1e-30))
    z = ahead = start
    value, momentum = _value(target, z, W_dec, objective), torch.ones_like(step)
    before = float(value.sum())
    for turn in range(1, MOST_STEPS + 1):
        found = _threshold((ahead - step * _slope(target, ahead, W_dec, objective)).clamp_min(0), step, objective)
        reached = _value(target, found, W_dec, objective)
        lower = (reached <= value)[:, None]
        further = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        # Where it would rise, back to the last codes without momentum; if there was none, by half the step.
        step = torch.where(~lower & (momentum == 1), step / 2, step)
        ahead = torch.where(lower, found + (momentum - 1) / further * (found - z), z).clamp_min(0)
        z, momentum = torch.where(lower, found, z), torch.where(lower, further, torch.ones_like(momentum))
        value = torch.where(lower[:, 0], reached, value)
        if turn % WINDOW == 0:
            now = float(value.sum())
            if not before - now > TOLERANCE * abs(before):
                break
            before = now
    return z


def pursuit(target: Tensor, W_dec: Tensor, k: int) -> Tensor:
    """Orthogonal matching pursuit: codes [b, width] of at most k latents, added one by one, all fitted anew each time.

    For k = 1 no code of one latent is better.
    """
    norms = W_dec.norm(dim=1).clamp_min(1e-30)
    codes = target.new_zeros(len(target), len(W_dec))
    chosen = torch.zeros(len(target), 0, dtype=torch.int64, device=target.device)
    for _ in range(min(k, len(W_dec))):
        gain = ((target - codes @ W_dec) @ W_dec.T / norms).scatter(1, chosen, -torch.inf)
        chosen = torch.cat([chosen, gain.argmax(1, keepdim=True)], 1)
        codes = _refit(target, W_dec, chosen, codes)
    return codes


def _refit(target: Tensor, W_dec: Tensor, chosen: Tensor, start: Tensor) -> Tensor:
    """The best non-negative codes [b, width] with latents `chosen` [b, k] alone, by coordinate descent from `start`."""
    rows = W_dec[chosen]
    gram, wanted = rows @ rows.mT, (rows @ target[:, :, None])[:, :, 0]
    size = gram.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
    found = start.gather(1, chosen)
    for _ in range(1 if chosen.shape[1] == 1 else REFITS):
        for i in range(chosen.shape[1]):
            others = (gram[:, i] * found).sum(1) - gram[:, i, i] * found[:, i]
            found[:, i] = ((wanted[:, i] - others) / size[:, i]).clamp_min(0)
    return torch.zeros_like(start).scatter(1, chosen, found)


def _value(target: Tensor, z: Tensor, W_dec: Tensor, objective: Objective) -> Tensor:
    """What codes are to minimise [b]."""
    error = (target - z @ W_dec).square().sum(1)
    if objective.k is not None or objective.coefficient == 0:
        return error
    return error + objective.coefficient * objective.penalty_value(z * W_dec.norm(dim=1))


def _slope(target: Tensor, z: Tensor, W_dec: Tensor, objective: Objective) -> Tensor:
    """Its gradient at codes z ≥ 0 [b, width]; of a count of active latents there is none."""
    slope = 2 * (z @ W_dec - target) @ W_dec.T
    if objective.hard or objective.coefficient == 0:
        return slope
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        penalty = objective.coefficient * objective.penalty_value(at * W_dec.norm(dim=1)).sum()
        return slope + torch.autograd.grad(penalty, at)[0]


def _threshold(z: Tensor, step: Tensor, objective: Objective) -> Tensor:
    """Of a penalty on the number of active latents, the proximal step: what is worth less than it costs is 0."""
    if not objective.hard:
        return z
    return z * (z.square() > 2 * step * objective.coefficient)


def measure(measured: Measured) -> dict[str, Value]:
    """The columns COLUMNS of an SAE's dictionary with the best codes for it, and what these save of its loss.

    None where there is neither a penalty nor a count that codes could trade against their error.
    """
    objective = measured.objective
    if objective is None:
        return {}
    best = evaluate.see(
        PerfectEncoder(measured.sae, objective), measured.inputs, objective.penalty_value, measured.evaluation
    )
    found = {**best.reconstruction.metrics, "winner_entropy": information.winner_entropy(best.table)}
    loss = _loss(found, objective)
    found |= {"loss": loss, "live_latents": int(best.latents.live.sum())}
    found |= labels.only_one(best.counts.metrics) if best.counts is not None else {}
    gap = _loss(measured.metrics, objective) - loss
    return {f"inferred_{name}": found.get(name) for name in OF_CODES} | {"encoder_gap": gap}


def _loss(columns: Mapping[str, Value], objective: Objective) -> float:
    """E‖r‖² + coefficient · E penalty, from columns."""
    error, penalty, entropy = (columns[name] for name in ("squared_error", "penalty_mean", "winner_entropy"))
    assert error is not None and penalty is not None and entropy is not None
    # A penalty that overflows must not turn a coefficient of 0 into nan.
    return error + (objective.coefficient * (penalty + entropy * objective.shares) if objective.coefficient else 0.0)


OF_CODES = (
    *("loss", "fvu", "l0", "live_latents", "owned_maxes", "split_maxes", "splits_per_max", "distinct_splits_per_max"),
    *(f"found_{label}" for label in labels.PURE if label.startswith("m")),
)
_OWN = {**BESIDE, **reconstruction.COLUMNS, **labels.COLUMNS}
COLUMNS = {
    **{
        f"inferred_{name}": Column(f"{_OWN[name].description}: with the best codes", kind=_OWN[name].kind, since=11)
        for name in OF_CODES
    },
    "encoder_gap": Column("the loss that the best codes for the SAE's decoder would save", since=11),
}

register(
    Metric(
        name="inference",
        version=2,
        description="the best codes for the dictionary, whatever the encoder finds",
        source="FISTA, Beck and Teboulle 2009; orthogonal matching pursuit, Pati et al. 1993",
        settings={
            "inference": Setting(
                False, "true: also search the best codes for the decoder, to tell what the encoder misses", legacy=False
            )
        },
        columns=COLUMNS,
        measure=measure,
    )
)
