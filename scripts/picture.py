"""The README's picture from a finished quickstart: python scripts/picture.py (needs the `bench` extra).

Left: what the latents of width-136 SAEs stand for, by start. Right: their reconstruction-versus-L0 fronts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by every kind of colour vision.
PENALTIES = {"l1": "#0072B2", "sqrt": "#E69F00", "log1p": "#009E73", "prod1p": "#CC79A7"}
STANDS_FOR = {
    "a maximum and the query": ("label_mq", "#0072B2"),
    "a whole maximum": ("label_m", "#E69F00"),
    "something else": (None, "#BBBBBB"),
    "nothing: dead": ("dead_latents", "#222222"),
}
STARTS = {
    "kmeans": "clusters\nof the data",
    "whitened": "clusters of\nwhitened data",
    "oracle m": "oracle:\nmaximum",
    "oracle mq": "oracle:\nmaximum × query",
}
MARKERS = dict(zip(STARTS, "osv^", strict=True))


def main() -> None:
    """Read the results, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("outputs/sweeps/quickstart/results.parquet"))
    parser.add_argument("--out", type=Path, default=Path("docs/quickstart.png"))
    arguments = parser.parse_args()
    frame = pd.read_parquet(arguments.results).query("width == 136")
    partition = frame["partition"].where(frame["init"] == "oracle", "").fillna("")
    frame["start"] = (frame["init"] + " " + partition).str.strip()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    draw_labels(left, frame)
    draw_fronts(right, frame)
    figure.savefig(arguments.out, dpi=130)


def draw_labels(axes: Axes, frame: pd.DataFrame) -> None:
    """Mean number of latents of each kind, stacked, a bar per start."""
    means = frame.groupby("start").mean(numeric_only=True).loc[list(STARTS)]
    named = [column for column, _ in STANDS_FOR.values() if column]
    bottom = pd.Series(0.0, means.index)
    for name, (column, colour) in STANDS_FOR.items():
        height = means[column].astype(float) if column else 136 - means[named].astype(float).sum(axis=1)
        axes.bar(list(STARTS.values()), height, bottom=bottom, color=colour, label=name, width=0.7)
        bottom += height
    axes.set(
        ylabel="latents (mean over 4 penalties × 4 coefficients)", title="What a latent stands for, by start of the SAE"
    )
    axes.set_ylim(0, 175)
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def draw_fronts(axes: Axes, frame: pd.DataFrame) -> None:
    """FVU against L0: a line per penalty and start."""
    for start, marker in MARKERS.items():
        for penalty, colour in PENALTIES.items():
            line = frame[(frame["start"] == start) & (frame["penalty"] == penalty)].sort_values("coefficient")
            axes.plot(line["l0"], line["fvu"], marker=marker, color=colour, ms=5, lw=1, alpha=0.9)
    colours = [axes.plot([], [], color=colour, label=name)[0] for name, colour in PENALTIES.items()]
    shapes = [
        axes.plot([], [], color="#555555", marker=marker, ls="", label=STARTS[start].replace("\n", " "))[0]
        for start, marker in MARKERS.items()
    ]
    axes.legend(handles=[*colours, *shapes], fontsize=8, ncols=2, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="L0: active latents per input", ylabel="FVU: unexplained variance")
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_yticks([0.005, 0.01, 0.02, 0.04], ["0.005", "0.01", "0.02", "0.04"])
    axes.minorticks_off()
    axes.set_title("Reconstruction against sparsity: lower left is better")


if __name__ == "__main__":
    main()
