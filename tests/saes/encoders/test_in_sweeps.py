"""Encoders in a sweep: trained, measured, stored and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commandline import TINY, call

from sae_sweep import load_sae, load_sweep, load_toy


def test_each_is_trained_measured_stored_and_loaded(tmp_path: Path) -> None:
    place = [f"output_dir={tmp_path}", "name=encoders"]
    words = ["sae=topk", "encoder=mlp,lista,matching_pursuit", "evaluation.inference=true", *place]
    done = call("run", "--json", *TINY, *words)
    assert done.code == 0, done.err
    table = load_sweep("encoders", tmp_path)
    assert set(table["encoder.name"]) == {"mlp", "lista", "matching_pursuit"}
    assert table["encoder_gap"].notna().all()
    sequences = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    maxima = sequences.amax(1)
    weight = (1 / torch.bincount(maxima).double())[maxima]
    for _, row in table.iterrows():
        sae, toy = load_sae(row["point_id"], tmp_path), load_toy(row["point_id"], tmp_path)
        acts = toy.activations(sequences, row["site"])
        error = (sae.decode(sae.encode(acts)) - acts).double().square().sum(1)
        centred = acts.double() - (weight @ acts.double()) / weight.sum()
        fvu = float((weight @ error) / (weight @ centred.square().sum(1)))
        assert fvu == pytest.approx(row["fvu"], rel=1e-3, abs=1e-6)
        if row["encoder.name"] == "matching_pursuit":
            # Of one step no code of one latent is better.
            assert row["encoder_gap"] == pytest.approx(0.0, abs=1e-4)
            inspected = call("inspect", row["point_id"], f"--output-dir={tmp_path}")
            assert inspected.code == 0, inspected.err
            scored = call("score", f"{tmp_path}/points/{row['point_id']}", *TINY[:1], "--json")
            assert scored.code == 0, scored.err
