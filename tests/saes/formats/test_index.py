"""Every layout of every library is recognised, and gives the codes that its library gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from layouts import ALL, DICTIONARY_LEARNING, GEMMA_SCOPE, OF_OTHER_VERSIONS, SAELENS, SPARSIFY, X

from sae_sweep.errors import UserError
from sae_sweep.saes.formats.index import FORMATS, read_sae


@pytest.mark.parametrize("name", ALL)
def test_codes_and_reconstructions_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    layout = ALL[name]
    sae = read_sae(layout.write(tmp_path))
    assert name.startswith(sae.library)
    codes = layout.codes(X)
    assert 0 < (codes > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode(X), codes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(X)), layout.reconstruction(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layouts", [SAELENS, DICTIONARY_LEARNING, SPARSIFY, GEMMA_SCOPE])
def test_a_file_of_weights_is_as_good_as_its_folder(layouts: dict, tmp_path: Path) -> None:
    layout = next(iter(layouts.values()))
    folder = layout.write(tmp_path)
    assert torch.equal(read_sae(folder / layout.weights).encode(X), read_sae(folder).encode(X))
    if layout.config is not None:
        assert torch.equal(read_sae(folder / layout.settings).encode(X), read_sae(folder).encode(X))


def test_an_npz_file_of_any_name_is_gemma_scopes(tmp_path: Path) -> None:
    GEMMA_SCOPE["jumprelu"].write(tmp_path)
    (tmp_path / "params.npz").rename(tmp_path / "layer_3.npz")
    assert read_sae(tmp_path / "layer_3.npz").library == "Gemma Scope"


def test_a_byte_order_mark_is_no_matter(tmp_path: Path) -> None:
    folder = SAELENS["new"].write(tmp_path)
    path = folder / "cfg.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_sae(folder).kind == "standard"


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_sae(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_what_is_no_sae_is_one_line_that_says_what_is(tmp_path: Path) -> None:
    nowhere, empty, file = tmp_path / "nowhere", tmp_path / "empty", tmp_path / "notes.txt"
    empty.mkdir()
    file.write_text("hello")
    for path in (nowhere, empty, file):
        message = refused(path)
        assert all(known.WEIGHTS in message and known.NAME in message for known in FORMATS)


def test_two_saes_in_a_folder_ask_for_the_file(tmp_path: Path) -> None:
    SAELENS["new"].write(tmp_path)
    DICTIONARY_LEARNING["AutoEncoder"].write(tmp_path)
    assert "holds sae_weights.safetensors and ae.pt: give the file" in refused(tmp_path)
    assert read_sae(tmp_path / "ae.pt").library == "dictionary_learning"


@pytest.mark.parametrize("library", [SAELENS, DICTIONARY_LEARNING, SPARSIFY, GEMMA_SCOPE])
@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 9])
def test_a_file_that_is_damaged_is_one_line(library: dict, content: bytes, tmp_path: Path) -> None:
    layout = next(iter(library.values()))
    folder = layout.write(tmp_path)
    (folder / layout.weights).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize(("settings", "message"), [("", "not JSON"), ("[1]", "holds a list"), ("\xff", "not JSON")])
def test_settings_that_cannot_be_read_are_one_line(settings: str, message: str, tmp_path: Path) -> None:
    folder = SAELENS["new"].write(tmp_path)
    (folder / "cfg.json").write_bytes(settings.encode("latin-1"))
    assert message in refused(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(UserError, match=r"cfg\.json: No such file"):
        read_sae(folder)


# Tensors that no number comes from: counts, and the threshold that a TopK SAE has for other calls than `encode`.
IDLE = {("AutoEncoderTopK", "threshold"), ("BatchTopKSAE", "k"), ("MatryoshkaBatchTopKSAE", "group_sizes")}
BROKEN = {
    "wanted": lambda tensor: torch.zeros(*tensor.shape, 2),
    "floating-point": lambda tensor: tensor.long(),
    "of": lambda tensor: torch.full_like(tensor, torch.nan),
    "finite": lambda tensor: torch.full_like(tensor, torch.inf),
}
# One layout of each reader of tensors.
OF_EACH_READER = [
    *(f"SAELens-{name}" for name in ("topk_by_activation", "jumprelu", "gated")),
    *(f"SAELens before 6-{name}" for name in OF_OTHER_VERSIONS),
    *(f"dictionary_learning-{name}" for name in DICTIONARY_LEARNING),
    "sparsify-topk",
    "Gemma Scope-jumprelu",
]


@pytest.mark.parametrize("name", OF_EACH_READER)
def test_each_tensor_is_checked_before_use(name: str, tmp_path: Path) -> None:
    layout = ALL[name]
    for tensor, values in layout.tensors.items():
        if not values.is_floating_point() or (name.split("-")[1], tensor) in IDLE:
            continue
        for said, change in BROKEN.items():
            broken = dataclasses.replace(layout, tensors={**layout.tensors, tensor: change(values)})
            message = refused(broken.write(tmp_path))
            assert layout.weights in message
            assert said in message
        if tensor != "scaling_factor":
            others = {other: kept for other, kept in layout.tensors.items() if other != tensor}
            message = refused(dataclasses.replace(layout, tensors=others).write(tmp_path))
            assert f"has no {'threshold' if tensor == 'log_threshold' else tensor}" in message


@pytest.mark.parametrize("name", ALL)
def test_a_tensor_that_is_not_known_is_refused_by_name(name: str, tmp_path: Path) -> None:
    layout = ALL[name]
    tensors = {**layout.tensors, "W_skip": torch.eye(16)}
    assert "W_skip is not known" in refused(dataclasses.replace(layout, tensors=tensors).write(tmp_path))
