"""A penalty with a name of its own, registered from a script and swept beside L1.

python penalty.py                # half a minute on a laptop
"""

from __future__ import annotations

import sys

import sae_sweep
from sae_sweep import PenaltyFormula, Setting, register

register(
    PenaltyFormula(
        name="saturating",
        description="approaches 1 as a latent's contribution grows",
        formula="a/(a + s)",
        prior="improper: it does not fall to 0",
        settings={"scale": Setting(1.0, "the contribution at which half of it is reached", gt=0)},
        ladder=(0.1, 0.2, 0.4, 0.8),
    )
)


def main(*overrides: str) -> None:
    """Sweep both penalties from the same start and print the rows."""
    results = sae_sweep.run(
        "toy=small", *overrides, sae__width=136, sae__init="whitened", penalty=["l1", "saturating"], logger="none"
    )
    print(results.frame[["penalty", "coefficient", "fvu", "l0", "splits_per_max"]].to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
