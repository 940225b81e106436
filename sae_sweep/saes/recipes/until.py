"""How long an SAE is trained: `training.until`, its steps or until its loss has settled.

An example: `training.until=plateau training.steps=40000 training.schedule=constant`. After 4,500 steps an SAE's curve
foretells that twice as many would lower its loss by 1.4%, and so it does, by up to 2%, each time that it is asked until
9,000. There the SAE stops, while its pack-mates go on. One that never settles takes all `training.steps`.

What is foretold is the column `plateau` (store/plateau.py), which is not to exceed STILL_MOVING. It is asked CHECKS
times for every doubling of the step, and never while the rate or the coefficient still rises; what it says must hold
for a whole doubling, as one answer on an early curve is worth little. Held against stored curves of 150 SAEs (6,000 to
10,000 steps, up to where the rate begins to fall), twice the steps lowered the loss by more than 2% after all in 57 of
107 that the first such answer would have stopped, and in 4 of 57 after a doubling of them.

Where dead latents are resampled it is asked just before a round of that, so that the last ones that were revived have
had the time between two rounds. The answers follow from the SAE's own losses and the step: pack-mates, threads and
restarts change nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sae_sweep.registry import register
from sae_sweep.saes.limits import BLOCK
from sae_sweep.saes.recipes import Control, warmup_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_sweep.config.settings import Training
    from sae_sweep.saes.stack import Stack
    from sae_sweep.saes.train import Look

register(
    Control(
        name="until",
        description="training ends after its steps, or once twice as many would not lower the loss by more than 2%",
        source="ours: extrapolated from the SAE's own training curve",
    )
)

CHECKS = 4


def settled(stack: Stack, looks: Sequence[Look], i: int) -> bool:
    """Whether SAE i is to stop after the last look, given all of them."""
    from sae_sweep.saes.curve import curve
    from sae_sweep.store.plateau import STILL_MOVING, plateau

    training, step = stack.points[i].training, looks[-1].step
    if training.until != "plateau" or not _asked(training, step):
        return False
    asked = [count for count, look in enumerate(looks, 1) if _asked(training, look.step)][-CHECKS - 1 :]
    return len(asked) > CHECKS and all(
        plateau(list(curve(stack, looks[:count], i))) <= STILL_MOVING for count in reversed(asked)
    )


def _asked(training: Training, step: int) -> bool:
    """Whether it is asked after so many steps, a multiple of BLOCK, if an SAE has settled."""
    if step < max(warmup_steps(each, training) for each in (training.lr_warmup, training.coefficient_warmup)):
        return False
    # Counted in blocks, or in rounds of revival: whether the next block ends one of them that begins another part of an
    # octave.
    every = max(BLOCK, training.get("revival_every", BLOCK))
    before, now = step // every, (step + BLOCK) // every
    return 0 < before < now and math.floor(CHECKS * math.log2(before)) < math.floor(CHECKS * math.log2(now))
