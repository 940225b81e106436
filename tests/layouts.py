"""Files of one SAE in every layout that is read, with the codes that their library gives, worked out by its formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, D, K = 24, 16, 3
_GENERATOR = torch.Generator().manual_seed(3)


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR)


# Decoder rows from 0.3 to 3 long, so that activations and contributions choose different latents.
W_ENC, W_DEC = _draw(D, WIDTH) / D**0.5, _draw(WIDTH, D) / D**0.5 * torch.logspace(-0.5, 0.5, WIDTH)[:, None]
B_ENC, B_DEC = _draw(WIDTH) / 4, _draw(D) / 2
B_MAG, R_MAG, FACTOR = _draw(WIDTH) / 4, _draw(WIDTH) / 3, torch.linspace(0.5, 2, WIDTH)
THRESHOLD = torch.linspace(0.1, 1, WIDTH)
NORMS = W_DEC.norm(dim=1)
UNIT = W_DEC / NORMS[:, None]
X = _draw(300, D) * 2


def pre(x: Tensor, centred: bool) -> Tensor:
    """Pre-activations [b, width] of activations x [b, d], of which b_dec is subtracted first if centred."""
    return (x - B_DEC * centred) @ W_ENC + B_ENC


def largest(codes: Tensor, k: int = K) -> Tensor:
    """The k largest of each row, zero elsewhere."""
    least = codes.topk(k, dim=1).values[:, -1:]
    return codes * (codes >= least)


def above(codes: Tensor, threshold: Tensor | float) -> Tensor:
    """What exceeds the threshold, zero elsewhere."""
    return codes * (codes > threshold)


@dataclass
class Layout:
    """Files, and what their library computes: codes [b, width] of activations [b, d], and what decodes them."""

    config: dict[str, Any] | None
    tensors: dict[str, Tensor]
    codes: Callable[[Tensor], Tensor]
    W_dec: Tensor = field(default_factory=lambda: W_DEC)
    save: Callable[[dict[str, Tensor], Path], None] = lambda tensors, path: save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path
    )
    weights: str = "sae_weights.safetensors"
    settings: str = "cfg.json"

    def write(self, folder: Path) -> Path:
        """The files in a folder."""
        folder.mkdir(exist_ok=True, parents=True)
        self.save(self.tensors, folder / self.weights)
        if self.config is not None:
            (folder / self.settings).write_text(json.dumps(self.config))
        return folder

    def reconstruction(self, x: Tensor) -> Tensor:
        """What the library makes of x [b, d]."""
        return self.codes(x) @ self.W_dec + B_DEC


PLAIN = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC}
GATED = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "b_gate": B_ENC, "r_mag": R_MAG, "b_mag": B_MAG}
# What versions 3 to 5 wrote beside what matters.
OLD = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.7.hook_resid_pre",
    "hook_layer": 7,
    "hook_head_index": None,
    "d_in": D,
    "d_sae": WIDTH,
    "dtype": "torch.float32",
    "device": "cuda",
    "prepend_bos": True,
    "dataset_path": "x/y",
    "context_size": 128,
    "normalize_activations": "none",
    "finetuning_scaling_factor": False,
    "sae_lens_training_version": "3.22.0",
}
NEW = {"d_in": D, "d_sae": WIDTH, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.12"}}


def magnitudes(x: Tensor, centred: bool) -> Tensor:
    """Codes of the gated SAE."""
    gate = pre(x, centred)
    return ((gate - B_ENC) * R_MAG.exp() + B_MAG).relu() * (gate > 0)


# Those that SAELens 6.54 itself loads.
SAELENS = {
    "new": Layout(
        {**NEW, "architecture": "standard", "apply_b_dec_to_input": False}, PLAIN, lambda x: pre(x, False).relu()
    ),
    "new_centred": Layout({**NEW, "architecture": "standard"}, PLAIN, lambda x: pre(x, True).relu()),
    "old_without_architecture": Layout({**OLD, "activation_fn": "relu"}, PLAIN, lambda x: pre(x, True).relu()),
    "old_normalize_false": Layout(
        {**OLD, "normalize_activations": False, "architecture": "standard", "activation_fn_str": "relu"},
        PLAIN,
        lambda x: pre(x, True).relu(),
    ),
    "k_null": Layout({**NEW, "architecture": "standard", "k": None}, PLAIN, lambda x: pre(x, True).relu()),
    "scaling_factor_of_1": Layout(OLD, {**PLAIN, "scaling_factor": torch.ones(WIDTH)}, lambda x: pre(x, True).relu()),
    "topk_by_activation": Layout(
        {**NEW, "architecture": "topk", "k": K}, PLAIN, lambda x: largest(pre(x, True).relu())
    ),
    "topk_by_contribution": Layout(
        {**NEW, "architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        PLAIN,
        lambda x: largest(pre(x, True).relu() * NORMS),
        UNIT,
    ),
    "topk_kwargs": Layout(
        {**OLD, "architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        PLAIN,
        lambda x: largest(pre(x, True).relu()),
    ),
    "topk_as_standard": Layout(
        {**OLD, "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        PLAIN,
        lambda x: largest(pre(x, True).relu()),
    ),
    "jumprelu": Layout(
        {**NEW, "architecture": "jumprelu"},
        {**PLAIN, "threshold": THRESHOLD},
        lambda x: above(pre(x, True).relu(), THRESHOLD),
    ),
    "gated": Layout({**NEW, "architecture": "gated"}, GATED, lambda x: magnitudes(x, True)),
    "gated_not_centred": Layout(
        {**NEW, "architecture": "gated", "apply_b_dec_to_input": False}, GATED, lambda x: magnitudes(x, False)
    ),
}
# Those that only versions before 6, or its training, give another meaning than SAELens 6.54 does.
OF_OTHER_VERSIONS = {
    "tanh_relu": Layout(
        {**OLD, "architecture": "standard", "activation_fn_str": "tanh-relu"},
        PLAIN,
        lambda x: pre(x, True).relu().tanh(),
    ),
    "scaling_factor": Layout(
        {**OLD, "finetuning_scaling_factor": True},
        {**PLAIN, "scaling_factor": FACTOR},
        lambda x: pre(x, True).relu(),
        W_DEC * FACTOR[:, None],
    ),
    "scalar_threshold": Layout(
        {**OLD, "architecture": "jumprelu"},
        {**PLAIN, "threshold": torch.tensor(0.5)},
        lambda x: above(pre(x, True).relu(), 0.5),
    ),
    "log_threshold": Layout(
        {**OLD, "architecture": "jumprelu"},
        {**PLAIN, "log_threshold": THRESHOLD.log()},
        lambda x: above(pre(x, True).relu(), THRESHOLD),
    ),
    "batchtopk_in_training": Layout(
        {**NEW, "architecture": "batchtopk", "k": 2.5, "rescale_acts_by_decoder_norm": True},
        {**PLAIN, "topk_threshold": torch.tensor(0.7, dtype=torch.float64)},
        lambda x: above(pre(x, True).relu() * NORMS, 0.7),
        UNIT,
    ),
    "matryoshka_in_training": Layout(
        {**NEW, "architecture": "matryoshka_batchtopk", "k": 2.5, "rescale_acts_by_decoder_norm": False},
        {**PLAIN, "topk_threshold": torch.tensor(0.7, dtype=torch.float64)},
        lambda x: above(pre(x, True).relu(), 0.7),
    ),
}


def _learning(kind: str, tensors: dict[str, Tensor], codes: Callable[[Tensor], Tensor], **further: Any) -> Layout:
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": WIDTH, "lr": 1e-3, **further}
    config = {"trainer": trainer, "buffer": {"d_submodule": D, "ctx_len": 128}}
    return Layout(config, tensors, codes, save=torch.save, weights="ae.pt", settings="config.json")


LINEAR = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
_COUNT = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.5)}
DICTIONARY_LEARNING = {
    "AutoEncoder": _learning("AutoEncoder", {**LINEAR, "bias": B_DEC}, lambda x: pre(x, True).relu() * NORMS),
    "AutoEncoderNew": _learning("AutoEncoderNew", {**LINEAR, "decoder.bias": B_DEC}, lambda x: pre(x, False).relu()),
    "GatedAutoEncoder": _learning(
        "GatedAutoEncoder",
        {
            "encoder.weight": W_ENC.T,
            "decoder.weight": W_DEC.T,
            "decoder_bias": B_DEC,
            "gate_bias": B_ENC,
            "r_mag": R_MAG,
            "mag_bias": B_MAG,
        },
        lambda x: magnitudes(x, True),
    ),
    "JumpReluAutoEncoder": _learning(
        "JumpReluAutoEncoder", {**PLAIN, "threshold": THRESHOLD}, lambda x: above(pre(x, False).relu(), THRESHOLD)
    ),
    "AutoEncoderTopK": _learning(
        "AutoEncoderTopK", {**LINEAR, **_COUNT, "b_dec": B_DEC}, lambda x: largest(pre(x, True).relu()), k=K
    ),
    "BatchTopKSAE": _learning(
        "BatchTopKSAE", {**LINEAR, **_COUNT, "b_dec": B_DEC}, lambda x: above(pre(x, True).relu(), 0.5), k=K
    ),
    "MatryoshkaBatchTopKSAE": _learning(
        "MatryoshkaBatchTopKSAE",
        {**PLAIN, **_COUNT, "group_sizes": torch.tensor([8, 16])},
        lambda x: above(pre(x, True).relu(), 0.5),
        k=K,
        group_sizes=[8, 16],
    ),
}
DICTIONARY_LEARNING["AutoEncoder"].W_dec = UNIT
SPARSE = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
_SPARSIFY = {"num_latents": WIDTH, "k": K, "normalize_decoder": True, "multi_topk": True, "d_in": D}


def _groups(x: Tensor) -> Tensor:
    codes = pre(x, True).relu().unflatten(1, (K, -1))
    return (codes * (codes == codes.amax(2, keepdim=True))).flatten(1)


SPARSIFY = {
    "topk": Layout(
        {**_SPARSIFY, "activation": "topk"}, SPARSE, lambda x: largest(pre(x, True).relu()), weights="sae.safetensors"
    ),
    "groupmax": Layout({**_SPARSIFY, "activation": "groupmax"}, SPARSE, _groups, weights="sae.safetensors"),
}


def save_npz(tensors: dict[str, Tensor], path: Path) -> None:
    """Arrays as numpy keeps them."""
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]


GEMMA_SCOPE = {
    "jumprelu": Layout(
        None,
        {**PLAIN, "threshold": THRESHOLD},
        lambda x: above(pre(x, False).relu(), THRESHOLD),
        save=save_npz,
        weights="params.npz",
    )
}
ALL = {
    f"{library}-{name}": layout
    for library, layouts in {
        "SAELens": SAELENS,
        "SAELens before 6": OF_OTHER_VERSIONS,
        "dictionary_learning": DICTIONARY_LEARNING,
        "sparsify": SPARSIFY,
        "Gemma Scope": GEMMA_SCOPE,
    }.items()
    for name, layout in layouts.items()
}
