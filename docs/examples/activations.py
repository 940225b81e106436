"""Activations of one's own with labels of one's own: writes two files, sweeps them, and says what latents stand for.

    python activations.py            # a minute on a laptop; needs nothing but sae-sweep

Each row has a letter and a casing. A casing changes the activation of every letter in a direction of its own for that
letter, so an SAE with room enough can split letters by casing.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

import sae_sweep

LETTERS, CASINGS = "abcdefgh", ("lower", "upper")


def write(folder: Path, rows: int = 4000, d: int = 32) -> None:
    """acts.npy, numbers [rows, d], and factors.csv, a letter and a casing for each row."""
    draw = np.random.default_rng(0)
    letter, casing = draw.integers(len(LETTERS), size=rows), draw.integers(len(CASINGS), size=rows)
    directions = np.linalg.qr(draw.normal(size=(d, d)))[0]
    of_letter, of_casing = directions[: len(LETTERS)], directions[len(LETTERS) : 2 * len(LETTERS)]
    strength = draw.exponential(size=(rows, 1)) + 0.5
    acts = strength * (of_letter[letter] + 0.7 * casing[:, None] * of_casing[letter])
    np.save(folder / "acts.npy", acts.astype(np.float32))
    with (folder / "factors.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["letter", "casing"])
        lines.writerows([LETTERS[i], CASINGS[j]] for i, j in zip(letter, casing, strict=True))


def main(folder: Path, *overrides: str) -> None:
    """Write the files and sweep them: as many latents as letters, and as many as letters in a casing."""
    write(folder)
    results = sae_sweep.run(
        "toy=activations",
        f"toy.file={folder / 'acts.npy'}",
        f"toy.factors={folder / 'factors.csv'}",
        f"output_dir={folder / 'outputs'}",
        *overrides,
        sae__width=[len(LETTERS), len(LETTERS) * len(CASINGS)],
        penalty=["l1", "sqrt"],
        logger="none",
        name="letters",
    )
    columns = ["width", "penalty", "coefficient", "fvu", "l0", "label_m", "label_mq", "owned_maxes", "splits_per_max"]
    print(results.frame[columns].to_string(index=False))


if __name__ == "__main__":
    main(Path.cwd(), *sys.argv[1:])
