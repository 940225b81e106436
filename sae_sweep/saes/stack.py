"""N SAEs of equal shape held as one set of tensors, with their optimiser state and schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sae_sweep.config.settings import Point
from sae_sweep.registry import get
from sae_sweep.saes.architectures import Architecture, architecture_of
from sae_sweep.saes.encoders import Encoder, encoder_of
from sae_sweep.saes.parameters import Parameters, shapes
from sae_sweep.saes.recipes import warmup_steps

# float32 numbers in a cache line.
ALIGNED = 16
# The tensors of a stack that have a row for each SAE: all that its training depends on.
ROWS = (
    *("flat", "first", "second", "threshold", "density", "exponent", "rescale"),
    *("silent", "dead", "revived", "last_revived", "ever_revived"),
)


@dataclass
class Stack:
    """SAEs trained together. Everything one SAE's training depends on lies in row i of each tensor.

    flat, first, second [n, parameter_count]: parameters and Adam's moments, W_enc | W_dec | b_enc | b_dec | the
    architecture's extras | the encoder's tensors (`parameters.shapes`).
    """

    points: Sequence[Point]
    d: int
    flat: Tensor
    first: Tensor
    second: Tensor
    threshold: Tensor
    # Mean L0 of the last step: decides dense or sparse work on the next (kernels/cpu/backend.py).
    density: Tensor
    # [n] float64: each penalty's exponent, and what its coefficient is multiplied by, as annealing.py and
    # recipes/target_l0.py leave them.
    exponent: Tensor
    rescale: Tensor
    # For how many steps each latent has not fired [n, width], and which were dead when last looked at.
    silent: Tensor
    dead: Tensor
    # How often latents were revived so far and how many the last time [n]; which ever were [n, width] (saes/train.py).
    revived: Tensor
    last_revived: Tensor
    ever_revived: Tensor
    step: int = 0
    # By which step an SAE broke, and at which one stopped before the others (saes/train.py).
    failed: dict[int, int] = field(default_factory=dict)
    stopped: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(cls, points: Sequence[Point], starts: Sequence[Parameters], device: str) -> Stack:
        """A stack at step 0 from one start per point."""
        n, d, width = len(points), starts[0].W_dec.shape[-1], points[0].sae.width
        names = shapes(points[0], d)
        count = sum(map(math.prod, names.values()))
        # Every row begins on a cache line: matrix libraries choose kernels, and so bits, by alignment.
        stride = -(-count // ALIGNED) * ALIGNED
        flat, first, second = (torch.zeros(n, stride, device=device)[:, :count] for _ in range(3))
        for row, p in zip(flat, starts, strict=True):
            row.copy_(torch.cat([getattr(p, name).flatten() for name in names]))
        zeros = torch.zeros(n, device=device)
        exponent = torch.tensor([point.penalty.get("p", 1.0) for point in points], dtype=torch.float64)
        return cls(
            points=points,
            d=d,
            flat=flat,
            first=first,
            second=second,
            threshold=zeros,
            density=zeros + width,
            exponent=exponent,
            rescale=torch.ones_like(exponent),
            silent=torch.zeros(n, width, dtype=torch.int64, device=device),
            dead=torch.zeros(n, width, dtype=torch.bool, device=device),
            revived=torch.zeros(n, dtype=torch.int64),
            last_revived=torch.zeros(n, dtype=torch.int64),
            ever_revived=torch.zeros(n, width, dtype=torch.bool, device=device),
        )

    @property
    def width(self) -> int:
        """Latents of each SAE."""
        return self.points[0].sae.width

    @property
    def architecture(self) -> Architecture:
        """What all SAEs of the stack share."""
        return architecture_of(self.points[0].sae.architecture)

    @property
    def encoder(self) -> Encoder:
        """Likewise."""
        return encoder_of(self.points[0].encoder.name)

    def part(self, members: slice) -> Stack:
        """Some of the SAEs, as views: what trains them trains the stack, but for its step and failures."""
        return replace(self, points=self.points[members], **{name: getattr(self, name)[members] for name in ROWS})

    def copied(self, members: Sequence[int]) -> Stack:
        """Some of the SAEs in memory of their own."""
        failed = {at: self.failed[i] for at, i in enumerate(members) if i in self.failed}
        rows: dict[str, Any] = {name: _copied(getattr(self, name), members) for name in ROWS}
        return replace(self, points=[self.points[i] for i in members], failed=failed, stopped={}, **rows)

    def put_back(self, copied: Stack, members: Sequence[int]) -> None:
        """Take over how far `copied`, which has these SAEs, has come since."""
        for name in ROWS:
            getattr(self, name)[members] = getattr(copied, name)
        self.failed |= {members[at]: step for at, step in copied.failed.items()}
        self.step = copied.step

    def parameters(self, i: int | slice = slice(None)) -> Parameters:
        """SAE i, or all of them: views, but where architecture or encoder use other numbers than they train."""
        return self.used(self.views(self.flat[i]), self.threshold[i])

    def used(self, views: Sequence[Tensor], threshold: Tensor) -> Parameters:
        """The SAE of `views` as it is used."""
        sae = Parameters(threshold=threshold, **dict(zip(shapes(self.points[0], self.d), views, strict=True)))
        for kind in (self.architecture, self.encoder):
            sae = kind.effective(sae) if kind.effective else sae
        return sae

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The views by name."""
        return dict(zip(shapes(self.points[0], self.d), self.views(flat), strict=True))

    def views(self, flat: Tensor) -> list[Tensor]:
        """W_enc, W_dec, b_enc, b_dec, extras and what the encoder has as views of [..., parameter_count]."""
        wanted = shapes(self.points[0], self.d).values()
        parts = flat.split([math.prod(shape) for shape in wanted], dim=-1)
        return [part.view(*flat.shape[:-1], *shape) for part, shape in zip(parts, wanted, strict=True)]

    def split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc, W_dec, b_enc, b_dec as views of [..., parameter_count]."""
        W_enc, W_dec, b_enc, b_dec = self.views(flat)[:4]
        return W_enc, W_dec, b_enc, b_dec

    def schedule(self, i: int, step: int) -> tuple[float, float]:
        """Learning rate and coefficient of SAE i at a step; annealing multiplies the coefficient by `rescale`.

        Linear warm-up of both; what the learning rate does then is its schedule's (saes/recipes/schedules.py).
        """
        point = self.points[i]
        training = point.training
        warm = min(1.0, (step + 1) / max(1.0, warmup_steps(training.lr_warmup, training)))
        share: float = get("schedule", training.schedule).share(training, step)
        ramp = min(1.0, (step + 1) / max(1.0, warmup_steps(training.coefficient_warmup, training)))
        return training.lr * min(warm, share), point.penalty.coefficient * ramp


def _copied(rows: Tensor, members: Sequence[int]) -> Tensor:
    """Some rows of [n, …], which begin where those of a stack do: on cache lines."""
    if rows.ndim == 1:
        return rows[members]
    return rows.new_zeros(len(members), rows.stride(0))[:, : rows.shape[1]].copy_(rows[members])
