"""SAELens's files: what is written is what is read, and every key that changes the numbers is honoured or refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import OF_OTHER_VERSIONS, SAELENS, WIDTH, Layout
from safetensors.torch import load
from stacks import PENALTIES, points, start_of

from sae_sweep.config.settings import Sae
from sae_sweep.errors import UserError
from sae_sweep.registry import kinds
from sae_sweep.saes.folding import fold, unfold
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.formats.index import read_sae
from sae_sweep.saes.parameters import Parameters
from sae_sweep.store.tensors import to_bytes

MEAN, SCALE = torch.linspace(-2, 2, 16), 0.37


def with_threshold(parameters: Parameters) -> Parameters:
    return parameters.replace(threshold=torch.tensor(0.8))


def run(parameters: Parameters, architecture: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kind = kinds("architecture")[architecture]
    codes = kind.codes(x, parameters, Sae(architecture, width=40, k=3))
    return codes, codes @ parameters.W_dec + parameters.b_dec


def test_every_architecture_is_covered() -> None:
    assert set(kinds("architecture")) == set(saelens.ARCHITECTURES)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_files_hold_the_same_sae(architecture: str) -> None:
    point = points(PENALTIES[:1], architecture)[0]
    parameters = with_threshold(start_of(point))
    parameters.W_dec[7] = 0
    files = saelens.to_files(point, fold(parameters, MEAN, SCALE))
    back = unfold(saelens.from_files(files[saelens.WEIGHTS]), MEAN, SCALE)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 3
    for got, expected in zip(run(back, architecture, x), run(parameters, architecture, x), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back.norms(), parameters.norms())


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_the_layout_of_the_files(architecture: str) -> None:
    point = points(PENALTIES[:1], architecture)[0]
    parameters = with_threshold(start_of(point))
    files = saelens.to_files(point, parameters)
    config = json.loads(files[saelens.CONFIG])
    tensors = load(files[saelens.WEIGHTS])
    assert (config["d_in"], config["d_sae"]) == (16, 40) == tuple(tensors["W_enc"].shape)
    assert config["architecture"] == saelens.ARCHITECTURES[architecture]
    assert config.get("k") == (3 if architecture == "topk" else None)
    norms = torch.ones(40) if config["architecture"] in ("topk", "jumprelu") else parameters.norms()
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), norms)
    biases = {"b_gate", "r_mag", "b_mag"} if architecture == "gated" else {"b_enc"}
    biases |= {"threshold"} if config["architecture"] == "jumprelu" else set()
    assert set(tensors) == {"W_enc", "W_dec", "b_dec", *biases}


def test_what_is_not_rescaled_is_read_to_the_bit() -> None:
    relu, batchtopk = (points(PENALTIES[:1], architecture)[0] for architecture in ("relu", "batchtopk"))
    parameters = with_threshold(start_of(relu))
    read = saelens.from_files(saelens.to_files(relu, parameters)[saelens.WEIGHTS])
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(getattr(read, name), getattr(parameters, name)), name
    assert saelens.from_files(saelens.to_files(batchtopk, parameters)[saelens.WEIGHTS]).threshold == torch.tensor(0.8)


@pytest.mark.parametrize("architecture", kinds("architecture"))
def test_what_is_written_here_is_read_with_the_codes_that_it_had(architecture: str, tmp_path: Path) -> None:
    point = points(PENALTIES[:1], architecture)[0]
    parameters = with_threshold(start_of(point))
    parameters = parameters.replace(W_dec=parameters.W_dec * torch.logspace(-1, 1, 40)[:, None])
    effective = kinds("architecture")[architecture].effective
    parameters = effective(parameters) if effective else parameters
    for name, content in saelens.to_files(point, fold(parameters, MEAN, SCALE)).items():
        (tmp_path / name).write_bytes(content)
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 3
    codes, reconstruction = run(parameters, architecture, x)
    sae = read_sae(tmp_path)
    torch.testing.assert_close(sae.encode(x / SCALE + MEAN), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((sae.decode(codes) - MEAN) * SCALE, reconstruction, atol=1e-5, rtol=1e-5)


def test_what_saelens_has_no_like_for_is_stored_whole_and_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(saelens.ARCHITECTURES, "gated")
    point = points(PENALTIES[:1], "gated")[0]
    parameters = start_of(point)
    for name, content in saelens.to_files(point, parameters).items():
        (tmp_path / name).write_bytes(content)
    back = saelens.from_files((tmp_path / saelens.WEIGHTS).read_bytes())
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "r_mag", "b_mag"):
        assert torch.equal(getattr(back, name), getattr(parameters, name)), name
    assert json.loads((tmp_path / saelens.CONFIG).read_text())["architecture"] == "sae_sweep"
    with pytest.raises(UserError, match="whose architecture or encoder no other library has: load it by its id"):
        read_sae(tmp_path)


PLAIN_LAYOUT = SAELENS["new"]


def refused(folder: Path, layout: Layout, **config: Any) -> str:
    assert layout.config is not None
    changed = {key: value for key, value in {**layout.config, **config}.items() if value is not ABSENT}
    with pytest.raises(UserError) as error:
        read_sae(dataclasses.replace(layout, config=changed).write(folder))
    return str(error.value)


ABSENT = object()
BY_ACTIVATION, GATED = SAELENS["topk_by_activation"], SAELENS["gated"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"architecture": name}, name) for name in ("crosscoder", "abstopk", "transcoder", "matching_pursuit")),
        ({"architecture": None}, "architecture None is not one of standard"),
        ({"architecture": ["topk"]}, "architecture ['topk'] is not one of standard"),
        *(({"normalize_activations": how}, repr(how)) for how in ("layer_norm", "constant_norm_rescale")),
        ({"normalize_activations": True}, "expected_average_only_in"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"hook_point": "blocks.0.attn.hook_z"}, "hook_z"),
        ({"metadata": {"hook_name": "a", "hook_name_out": "b"}}, "hook_name_out is 'b'"),
        ({"metadata": "a"}, "metadata"),
        ({"d_out": 40}, "d_out is 40 and d_in 16"),
        ({"activation_fn": "gelu"}, "activation_fn of cfg.json is 'gelu'"),
        ({"activation_fn": "topk"}, "activation_fn of cfg.json is 'topk'"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, "signed"),
        ({"activation_fn_kwargs": [2]}, "activation_fn_kwargs of cfg.json is [2], wanted an object"),
        ({"dtype": "int8"}, "dtype of cfg.json is 'int8', wanted one of"),
        ({"d_sae": 24576}, "d_sae of cfg.json is 24576, but W_dec has 24"),
        ({"d_in": 768}, "d_in of cfg.json is 768, but W_dec has 16"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no', wanted true or false"),
    ],
)
def test_a_key_that_changes_the_numbers_is_refused_by_name(config: dict, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, PLAIN_LAYOUT, **config)


@pytest.mark.parametrize("k", [0, -1, 2.5, WIDTH + 1, 10**400, True, None, "3", math.nan, ABSENT])
def test_k_is_a_whole_number_up_to_the_width(k: Any, tmp_path: Path) -> None:
    message = refused(tmp_path, BY_ACTIVATION, k=k)
    assert f"k (latents kept of {WIDTH})" in message.replace("k of cfg.json", "k") or "SAELens's default" in message
    assert f"wanted a whole number from 1 to {WIDTH}" in message


def test_topk_is_not_also_relu(tmp_path: Path) -> None:
    assert "'relu'" in refused(tmp_path, BY_ACTIVATION, activation_fn="relu")
    assert "'topk'" in refused(tmp_path, GATED, activation_fn="topk", activation_fn_kwargs={"k": 2})


def test_a_scaling_factor_asks_for_its_key(tmp_path: Path) -> None:
    layout = OF_OTHER_VERSIONS["scaling_factor"]
    message = refused(tmp_path, layout, finetuning_scaling_factor=False)
    assert "scaling_factor is not 1, but finetuning_scaling_factor of cfg.json is not true" in message


@pytest.mark.parametrize("factors", ["[1, 2]", str([0.0] * WIDTH), "1"])
def test_factors_that_do_not_fit_are_refused(factors: str, tmp_path: Path) -> None:
    folder = PLAIN_LAYOUT.write(tmp_path)
    tensors = load((folder / "sae_weights.safetensors").read_bytes())
    (folder / "sae_weights.safetensors").write_bytes(to_bytes(tensors, {"codes_scaled_by": factors}))
    with pytest.raises(UserError, match="codes_scaled_by of its header holds no 24 positive numbers"):
        read_sae(folder)


def test_a_checkpoint_of_batchtopk_must_say_how_it_chooses(tmp_path: Path) -> None:
    layout = OF_OTHER_VERSIONS["batchtopk_in_training"]
    assert "has no rescale_acts_by_decoder_norm" in refused(tmp_path, layout, rescale_acts_by_decoder_norm=ABSENT)


def test_tensors_that_do_not_fit_are_an_error_and_no_abort() -> None:
    """Four pebibytes of one number: safetensors itself would panic."""
    with pytest.raises(MemoryError):
        to_bytes({"W_enc": torch.zeros(1).expand(1 << 50)})
