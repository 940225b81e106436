"""Agreement between seeds: dictionaries planted with so much in common."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import SMALL, point, record
from safetensors.numpy import save

from sae_sweep.config.settings import Point
from sae_sweep.store.seed_agreement import agreement, live_rows, seed_agreement
from sae_sweep.store.store import Store


def test_matched_one_to_one_whatever_order_length_and_sign() -> None:
    rows = np.eye(4)[:3]
    assert agreement(rows, rows[[2, 0, 1]] * [[3.0], [-0.1], [7.0]]) == pytest.approx(1)
    assert agreement(rows, np.eye(4)[[3]]) == 0
    # Two of the same direction are matched by one alone, and what is left over was not found again.
    assert agreement(rows[[0, 0]], rows[[0, 1]]) == pytest.approx(0.5)
    assert agreement(rows, rows[:1]) == agreement(rows[:1], rows) == pytest.approx(1 / 3)
    assert agreement(rows, np.array([[1.0, 1.0, 0, 0]])) == pytest.approx(2**-0.5 / 3)
    assert agreement(rows, rows[:0]) == 0
    # The best sum, not the best of each in turn: .8 + .7 beats .9 + 0.
    left, right = np.eye(2), np.array([[0.9, 0.8], [0.7, 0.0]])
    found = agreement(left, right)
    unit = right / np.linalg.norm(right, axis=1, keepdims=True)
    assert found == pytest.approx(max(unit[0, 0] + unit[1, 1], unit[0, 1] + unit[1, 0]) / 2)


def store_of(root: Path, dictionaries: dict[Point, tuple[np.ndarray, list[bool]]]) -> Store:
    """A sweep of finished points with these decoder rows and live latents."""
    store = Store(root)
    for at, (rows, live) in dictionaries.items():
        latents = io.BytesIO()
        pd.DataFrame({"live": live}).to_parquet(latents)
        files = {
            "sae_weights.safetensors": save({"W_dec": rows.astype(np.float32)}),
            "latents.parquet": latents.getvalue(),
        }
        store.commit("points", at.id, record(at, {"loss": 1.0}), files)
    return store


def test_only_seeds_of_one_setting_are_compared(tmp_path: Path) -> None:
    eye, alive = np.eye(4), [True, True, False]
    dictionaries = {
        point(seed=0): (eye[[0, 1, 2]], alive),
        point(seed=1): (eye[[1, 0, 3]], alive),  # the same two live rows
        point(seed=2): (eye[[0, 2, 3]], alive),  # one of them
        point(seed=0, width=9): (eye[[0, 1, 2]], alive),  # alone
        point(seed=0, toy=SMALL.replace(seed=5)): (eye[[0, 1, 2]], alive),  # another toy
    }
    store = store_of(tmp_path, dictionaries)
    assert live_rows(store, point().id).tolist() == eye[:2].tolist()
    frame = pd.DataFrame(
        [
            {"point_id": at.id, "width": at.sae.width, "toy_seed": at.toy.seed, "seed": at.seed, "loss": 1.0}
            for at in dictionaries
        ]
    )
    found = seed_agreement(store, frame)
    assert found.tolist()[:3] == pytest.approx([0.75, 0.75, 0.5])
    assert found.isna().tolist() == [False] * 3 + [True] * 2
