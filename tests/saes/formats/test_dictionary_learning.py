"""dictionary_learning's files: what is refused, and that nothing but tensors is unpickled."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import DICTIONARY_LEARNING, WIDTH, X, pre

from sae_sweep.errors import UserError
from sae_sweep.saes.formats.index import read_sae

TOPK = DICTIONARY_LEARNING["AutoEncoderTopK"]


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_sae(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "IdentityDict"}, "dict_class of config.json is 'IdentityDict', wanted one of AutoEncoder"),
        ({"dict_class": None}, "is None"),
        ({"k": 4}, "trainer.k of config.json is 4, but k of ae.pt is 3"),
        ({"dict_size": 25}, "trainer.dict_size of config.json is 25, but the encoder has 24"),
        ({"activation_dim": 768}, "trainer.activation_dim of config.json is 768, but the encoder has 16"),
    ],
)
def test_settings_that_are_not_known_or_disagree(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert TOPK.config is not None
    config = {"trainer": {**TOPK.config["trainer"], **trainer}}
    assert message in refused(dataclasses.replace(TOPK, config=config).write(tmp_path))


@pytest.mark.parametrize("config", [{}, {"trainer": None}, {"trainer": []}])
def test_settings_without_a_trainer(config: dict[str, Any], tmp_path: Path) -> None:
    assert "trainer.dict_class" in refused(dataclasses.replace(TOPK, config=config).write(tmp_path))


def test_older_files_keep_k_in_the_settings_alone(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TOPK.tensors.items() if name not in ("k", "threshold")}
    sae = read_sae(dataclasses.replace(TOPK, tensors=tensors).write(tmp_path))
    torch.testing.assert_close(sae.encode(X), TOPK.codes(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [0, WIDTH + 1])
def test_k_is_at_most_the_width(k: int, tmp_path: Path) -> None:
    assert TOPK.config is not None
    config = {"trainer": {**TOPK.config["trainer"], "k": k}}
    layout = dataclasses.replace(TOPK, config=config, tensors={**TOPK.tensors, "k": torch.tensor(k)})
    assert f"is {k}, wanted a whole number from 1 to {WIDTH}" in refused(layout.write(tmp_path))


def test_a_threshold_that_training_has_not_set_lets_everything_fire(tmp_path: Path) -> None:
    layout = DICTIONARY_LEARNING["BatchTopKSAE"]
    tensors = {**layout.tensors, "threshold": torch.tensor(-1.0)}
    sae = read_sae(dataclasses.replace(layout, tensors=tensors).write(tmp_path))
    torch.testing.assert_close(sae.encode(X), pre(X, True).relu(), atol=1e-5, rtol=1e-5)


def test_batchtopk_before_it_had_a_threshold_is_refused(tmp_path: Path) -> None:
    layout = DICTIONARY_LEARNING["BatchTopKSAE"]
    tensors = {name: tensor for name, tensor in layout.tensors.items() if name != "threshold"}
    assert "selects latents over a batch" in refused(dataclasses.replace(layout, tensors=tensors).write(tmp_path))


def test_the_backup_of_a_training_is_refused(tmp_path: Path) -> None:
    folder = TOPK.write(tmp_path)
    torch.save({"step": 3, "ae": TOPK.tensors, "optimizer": {}, "config": {}, "norm_factor": 2.0}, folder / "ae.pt")
    assert "training that has not ended" in refused(folder)


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.parametrize("save", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload))])
def test_code_in_a_file_is_not_run(save: Any, tmp_path: Path) -> None:
    folder, trace = TOPK.write(tmp_path / "sae"), tmp_path / "trace"
    save({"encoder.weight": Payload(trace)}, folder / "ae.pt")
    assert "nothing else is unpickled" in refused(folder)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"encoder.weight": [1.0]}, {"state_dict": TOPK.tensors}])
def test_what_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    folder = TOPK.write(tmp_path)
    torch.save(content, folder / "ae.pt")
    assert "by name" in refused(folder)
    assert json.loads((folder / "config.json").read_text())["trainer"]["k"] == 3
