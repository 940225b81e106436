"""Sweeps too large to train for a test, made up: every count and curve that the report draws."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from fabricated import point, sweep

from sae_sweep.config.settings import Penalty, Toy
from sae_sweep.store.store import Store

TOY = Toy(d_vocab=64, k=4)
PENALTIES = {"l1": 1.0, "sqrt": 1.0, "log1p": 0.5, "tanh": 0.5, "prod1p": 0.02}
STARTS = ("kmeans", "whitened", "random", "exemplars", "oracle")
WIDTHS = (64, 256, 512, 1024, 2048)


def large(root: Path, coefficients: int, starts: int, seeds: int) -> Store:
    """A sweep `large` of 25 · coefficients · starts · seeds points."""
    numbers = np.random.default_rng(0)
    results, more = [], {}
    for width, start, penalty, rung, seed in itertools.product(
        WIDTHS, STARTS[:starts], PENALTIES, range(coefficients), range(seeds)
    ):
        coefficient = float(f"{PENALTIES[penalty] * 2.0 ** (rung - 2):.3g}")
        at = point(TOY, penalty=Penalty(penalty, coefficient=coefficient), width=width, init=start, seed=seed)
        metrics, more[at.id] = _measured(width, start, rung, numbers)
        results.append((at, metrics))
    return sweep(root, results, "large", more, varied=["sae.width", "seed"])


def _measured(width: int, start: str, rung: int, numbers: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    noise = float(numbers.uniform(0.9, 1.1))
    l0, fvu = 8.0 * noise / (1 + rung), 0.01 * noise * (1 + rung)
    splits = numbers.integers(0, 1 + width // 64, TOY.d_vocab) * (start in ("whitened", "oracle"))
    whole = 0 if splits.any() else min(width, 3 * TOY.d_vocab)
    metrics = {
        "loss": fvu * 64,
        "l0": l0,
        "fvu": fvu,
        "live_latents": width,
        "owned_maxes": 60,
        "splits_per_max": float(splits.mean()),
        "split_maxes": int((splits > 1).sum()),
        "duplicates_per_max": max(0.0, whole / TOY.d_vocab - 1),
        "label_m": whole,
        "label_mq": int(min(splits.sum(), width)),
        "info_query": float(numbers.uniform()),
    }
    steps = np.arange(1, 41)
    shape = 1 + 5 / steps
    rows = zip((75 * steps).tolist(), (fvu * shape).tolist(), (l0 * shape).tolist(), strict=True)
    curve = [
        {"step": step, "loss": 64 * now, "fvu": now, "l0": active, "gradient": 100 * now} for step, now, active in rows
    ]
    return metrics, {"per_max": {"splits": splits.tolist(), "duplicates": [0] * TOY.d_vocab}, "curve": curve}
