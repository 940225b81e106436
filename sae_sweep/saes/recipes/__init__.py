"""How an SAE is trained: the ingredients of a recipe, each chosen by a setting of `training`.

An example: `training.optimizer=adamw training.schedule=cosine training.decoder_norm=unit training.revival=resample`.
What is chosen when nothing is said is Adam, a warm-up and a linear decay, free decoder rows and no revival.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_sweep.registry import Kind, get

if TYPE_CHECKING:
    from torch import Tensor

    from sae_sweep.config.settings import Point, Training
    from sae_sweep.saes.parameters import Parameters
    from sae_sweep.saes.stack import Stack

# A stack, which SAE of it, batches [steps, b, d]: which latents fire on them [width], the squared error of each input.
Respond = Callable[["Stack", int, "Tensor"], tuple["Tensor", "Tensor"]]


def warmup_steps(warmup: float, training: Training) -> float:
    """Of a warm-up that is a share of the steps, or, above 1, a number of them, how many steps it is."""
    return warmup if warmup > 1 else warmup * training.steps


@dataclass(frozen=True, kw_only=True)
class Ingredient(Kind):
    """compiled: whether the compiled steps know it, with its settings at their defaults."""

    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Optimizer(Ingredient):
    """`update(stack, gradient, rates, corrections)`: what a step makes of a gradient, in place, for every SAE.

    gradient [n, parameter_count] · learning rates [n] · corrections: the two bias corrections of the step, [] each
    """

    family = "optimizer"
    update: Callable[[Stack, Tensor, Tensor, tuple[Tensor, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class Schedule(Ingredient):
    """`share(training, step)`: the share of `training.lr` at a step counted from 0, warm-up left out.

    by_share: whether it goes by how many steps there are in all, so that training cannot end before them
    """

    family = "schedule"
    share: Callable[[Training, int], float]
    by_share: bool = True
    compiled: bool = True  # a rate is a number that any step is given


@dataclass(frozen=True, kw_only=True)
class DecoderNorm(Ingredient):
    """What is done to decoder rows [..., width, d], in place.

    constrain(gradient, rows): to their gradient, before it is measured and clipped
    restore(rows): to the rows after the step
    """

    family = "decoder_norm"
    constrain: Callable[[Tensor, Tensor], None] | None = None
    restore: Callable[[Tensor], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Revival(Ingredient):
    """What is done for latents that have not fired for `dead_after` steps, a setting of every kind that does anything.

    `revive(stack, i, batches, respond)` gives dead latents of SAE i another start, in place, and returns which [width].
    It is asked after every block of steps whether it is `due(training, step, steps)`, where `steps` were the last ones;
    batches [·, b, d] are those of the block. `respond(stack, i, batches)`: which latents fire on them [width], and the
    squared error of each input.
    `auxiliary(stack, residual, pre, sae)`: what the loss of each SAE gains in a step [n], from x − x̂ [n, b, d], held,
    and the pre-activations [n, b, width]. copies, products: how many tensors of batch × width it holds at once, and
    how many products of batch, width and d it takes. compiled_under: architectures whose compiled steps on the CPU
    know it.
    """

    family = "revival"
    due: Callable[[Training, int, int], bool] = lambda training, step, steps: False
    revive: Callable[[Stack, int, Tensor, Respond], Tensor] | None = None
    auxiliary: Callable[[Stack, Tensor, Tensor, Parameters], Tensor] | None = None
    copies: int = 0
    products: int = 0
    compiled_under: tuple[str, ...] = ()

    @property
    def revives(self) -> bool:
        """Whether it does anything."""
        return bool(self.revive or self.auxiliary)


@dataclass(frozen=True, kw_only=True)
class Control(Ingredient):
    """What moves or ends while an SAE trains; a setting of `training` by its own name, which all recipes have."""

    family = "control"


def revival_of(training: Training) -> Revival:
    """What the recipe does for dead latents."""
    revival: Revival = get("revival", training.revival)
    return revival


def is_plain(point: Point, device: str = "cpu") -> bool:
    """Whether the compiled steps know its encoder and how it is trained there; else the reference step takes it."""
    training, known = point.training, get("architecture", point.sae.architecture).compiles(point.sae)
    revival, encoder = revival_of(training), get("encoder", point.encoder.name)
    if not (known and encoder.compiles(point, device)):
        return False
    if revival.auxiliary and point.sae.architecture not in revival.compiled_under:
        return False
    if device == "cuda" and revival.revives:  # its kernels do not count for how long a latent has not fired
        return False
    return all(
        kind.compiled and all(training.get(name) == setting.default for name, setting in kind.settings.items())
        for kind in training.chosen.values()
        if isinstance(kind, Optimizer | DecoderNorm)
    )


def of_step(point: Point) -> tuple[Any, ...]:
    """What one step of a whole stack has in common: nothing where it is linear, and compiled steps know its recipe."""
    training = point.training
    auxiliary = revival_of(training).auxiliary
    if point.encoder.name == "linear" and is_plain(point) and not auxiliary:
        return ()
    keys = ("optimizer", "decoder_norm", *(("revival",) if auxiliary else ()))
    kinds = (training.chosen[key] for key in keys)
    return point.encoder, *((kind.name, *(training.get(name) for name in kind.settings)) for kind in kinds)
