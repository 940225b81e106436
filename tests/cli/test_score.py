"""`score`: what it says of an SAE we trained is what was stored; SAEs of others are read as they were meant."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from commandline import TINY, call
from safetensors.torch import save_file
from stacks import PENALTIES, points, start_of

from sae_sweep.config.settings import Sae
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds
from sae_sweep.saes.formats.saelens_import import from_saelens
from sae_sweep.store.store import Store

KINDS = ["sae=relu", "sae=tied", "sae=topk", "sae=batchtopk", "sae=matryoshka", "sae=gated", "sae=jumprelu penalty=l0"]


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_a_trained_sae_is_what_was_stored(kind: str, tmp_path: Path) -> None:
    setting = [*TINY, "device=cpu", f"output_dir={tmp_path}"]
    assert call("run", *kind.split(), "penalty.coefficient=0.1", *setting).code == 0
    store = Store(tmp_path)
    (id,) = store.ids("points")
    record = store.read_record("points", id)
    penalty = record["settings"]["penalty"]
    words = [f"penalty={penalty['name']}", f"penalty.coefficient={penalty['coefficient']}"]
    words += ["sae=jumprelu"] if penalty["name"] == "l0" else []
    toy = [word for word in setting if word.startswith(("toy", "device", "output_dir"))]
    said = json.loads(call("score", str(tmp_path / "points" / id), *toy, *words, "--json").out)
    assert said["metrics"].keys() == record["metrics"].keys()
    for name, value in record["metrics"].items():
        expected = value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
        assert said["metrics"][name] == expected, name


def written(folder: Path, architecture: str, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"architecture": architecture, **config}))
    return folder


def read(folder: Path):
    settings = json.loads((folder / "cfg.json").read_text())
    return from_saelens(settings, (folder / "sae_weights.safetensors").read_bytes())


def some(architecture: str) -> dict[str, torch.Tensor]:
    """Tensors of an SAE whose decoder rows differ in norm."""
    start = start_of(points(PENALTIES[:1], architecture)[0])
    W_dec = start.W_dec * torch.logspace(-1, 1, 40)[:, None]
    return {"W_enc": start.W_enc.T, "W_dec": W_dec, "b_enc": start.b_enc, "b_dec": start.b_dec}


def encoded(folder: Path, x: torch.Tensor) -> torch.Tensor:
    settings, parameters = read(folder)
    return kinds("architecture")[settings.architecture].codes(x, parameters, settings)


X = torch.randn(300, 16, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("centred", [False, True])
def test_thresholds_of_activations_and_centring(centred: bool, tmp_path: Path) -> None:
    tensors = {**some("jumprelu"), "threshold": torch.linspace(0, 2, 40)}
    folder = written(tmp_path, "jumprelu", tensors, apply_b_dec_to_input=centred)
    pre = (X - tensors["b_dec"] * centred) @ tensors["W_enc"] + tensors["b_enc"]
    expected = pre.relu() * (pre > tensors["threshold"])
    torch.testing.assert_close(encoded(folder, X), expected, atol=1e-5, rtol=1e-5)
    assert 0 < (expected > 0).float().mean() < 0.5


def test_topk_chooses_by_contributions_or_is_refused(tmp_path: Path) -> None:
    tensors = some("topk")
    folder = written(tmp_path, "topk", tensors, k=3, rescale_acts_by_decoder_norm=True)
    norms = tensors["W_dec"].norm(dim=1)
    rank = (X @ tensors["W_enc"] + tensors["b_enc"]).relu() * norms
    chosen = torch.zeros_like(rank).scatter(1, rank.topk(3).indices, 1.0)
    torch.testing.assert_close(encoded(folder, X) * norms, rank * chosen, atol=1e-4, rtol=1e-4)
    written(tmp_path, "topk", tensors, k=3)
    with pytest.raises(UserError, match="differ in norm"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("crosscoder", {}, "not one of standard, topk, jumprelu, gated"),
        ("batchtopk", {}, "SAELens saves BatchTopK as jumprelu"),
        ("standard", {"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ("gated", {}, "has no b_gate, b_mag, r_mag"),
    ],
)
def test_what_is_not_known_is_one_line(architecture: str, config: dict, message: str, tmp_path: Path) -> None:
    written(tmp_path, architecture, some("relu"), **config)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_wrong_folders_and_lengths_exit_2(tmp_path: Path) -> None:
    toy = ["toy=small", f"output_dir={tmp_path / 'out'}", "device=cpu"]
    missing = call("score", str(tmp_path / "nowhere"), *toy)
    assert (missing.code, "cfg.json" in missing.err) == (2, True)
    folder = written(tmp_path / "sae", "standard", some("relu"))
    short = call("score", str(folder), *toy)
    assert short.code == 2
    assert "activations of length 16, but pre_unembed of this toy has 32" in short.err
    two = call("score", str(folder), *toy, "site=pre_unembed,post_unembed")
    assert (two.code, "one setting at a time, got 2" in two.err) == (2, True)


def test_a_gated_sae_keeps_its_gate_and_magnitude(tmp_path: Path) -> None:
    tensors = some("relu")
    tensors["b_gate"] = tensors.pop("b_enc")
    generator = torch.Generator().manual_seed(2)
    tensors |= {"r_mag": torch.randn(40, generator=generator) / 3, "b_mag": torch.randn(40, generator=generator)}
    folder = written(tmp_path, "gated", tensors, apply_b_dec_to_input=True)
    seen = X - tensors["b_dec"]
    gate = seen @ tensors["W_enc"] + tensors["b_gate"] > 0
    magnitude = (seen @ (tensors["W_enc"] * tensors["r_mag"].exp()) + tensors["b_mag"]).relu()
    torch.testing.assert_close(encoded(folder, X), gate * magnitude, atol=1e-5, rtol=1e-5)
    assert read(folder)[0] == Sae("gated").replace(width=40)
    assert not math.isnan(float(read(folder)[1].b_mag.sum()))
