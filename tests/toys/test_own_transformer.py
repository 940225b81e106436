"""Parameters of others' transformers: which names and shapes are taken, and what is refused; pickled ones converted."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commandline import Result, call
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_sweep.api import load_toy
from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.store.store import Store
from sae_sweep.toys.checkpoint import BIASES, MODULES, Checkpoint, parameters_of
from sae_sweep.toys.max_of_k import MaxOfK

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"
VOCAB, CONTEXT, MODEL, HEADS, HEAD = 7, 3, 6, 2, 4


def parameters(heads: int = HEADS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "W_E": (VOCAB, MODEL),
        "W_pos": (CONTEXT, MODEL),
        "W_Q": (heads, MODEL, HEAD),
        "W_K": (heads, MODEL, HEAD),
        "W_V": (heads, MODEL, HEAD),
        "W_O": (heads, HEAD, MODEL),
        "W_U": (MODEL, VOCAB),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def state(heads: int = HEADS) -> dict[str, Tensor]:
    """As the state dict of a HookedTransformer: biases of zero, and buffers."""
    biases = dict.fromkeys(("b_Q", "b_K", "b_V"), (heads, HEAD)) | {"b_O": (MODEL,), "b_U": (VOCAB,)}
    found = {f"{MODULES[name]}.{name}": tensor for name, tensor in parameters(heads).items()}
    found |= {f"{BIASES[name]}.{name}": torch.zeros(shape) for name, shape in biases.items()}
    return found | {
        "blocks.0.attn.mask": torch.ones(CONTEXT, CONTEXT).tril().bool(),
        "blocks.0.attn.IGNORE": torch.tensor(-torch.inf),
    }


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("heads", [1, HEADS, 4])
def test_names_of_transformerlens_and_ours(heads: int) -> None:
    assert same(parameters_of(state(heads)), parameters(heads))
    assert same(parameters_of({f"model.{name}": tensor for name, tensor in state(heads).items()}), parameters(heads))
    assert same(parameters_of(parameters(heads)), parameters(heads))


def test_a_single_head_may_lack_its_dimension() -> None:
    flat = {name: tensor[0] if tensor.ndim == 3 else tensor for name, tensor in parameters(1).items()}
    assert same(parameters_of(flat), parameters(1))


def test_other_precisions_become_float32() -> None:
    got = parameters_of({name: tensor.double() for name, tensor in parameters().items()})
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert same(got, parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed.W_E": None}, "the model has no W_E, only W_pos"),
        ({"W_E": torch.zeros(VOCAB, MODEL)}, "W_E is there twice"),
        ({"blocks.0.mlp.W_in": torch.zeros(2, 2)}, "blocks.0.mlp.W_in is not known, wanted one attention-only layer"),
        ({"blocks.0.ln1.w": torch.ones(MODEL)}, "blocks.0.ln1.w is not known"),
        ({"blocks.1.attn.W_Q": torch.zeros(2, 2)}, "blocks.1.attn.W_Q is of a further layer, wanted one layer"),
        ({"embed.W_U": torch.zeros(2, 2)}, "embed.W_U is not known"),
        ({"unembed.b_U": torch.full((VOCAB,), -0.25)}, "b_U has a bias of 0.25, wanted zero"),
        ({"unembed.b_U": torch.full((VOCAB,), torch.nan)}, "b_U has 7 of 7 numbers that are nan"),
        ({"embed.W_E": torch.zeros(VOCAB, MODEL).long()}, "W_E holds int64, wanted floating-point"),
        ({"embed.W_E": torch.full((VOCAB, MODEL), torch.inf)}, "W_E has 42 of 42 numbers that are nan or infinite"),
        ({"embed.W_E": torch.zeros(VOCAB)}, "W_E is [7], wanted a matrix"),
        ({"unembed.W_U": torch.zeros(0, 3)}, "W_U is [0, 3], wanted a matrix"),
        ({"unembed.W_U": torch.zeros(VOCAB, MODEL)}, "W_U is [7, 6], wanted [6, 6]"),
        ({"pos_embed.W_pos": torch.zeros(CONTEXT, 5)}, "W_pos is [3, 5], wanted [3, 6]"),
        ({"blocks.0.attn.W_O": torch.zeros(HEADS, MODEL, HEAD)}, "W_O is [2, 6, 4], wanted [2, 4, 6]"),
        ({"blocks.0.attn.W_K": torch.zeros(1, MODEL, HEAD)}, "W_K is [1, 6, 4], wanted [2, 6, 4]"),
        ({"blocks.0.attn.W_V": torch.zeros(MODEL)}, "W_V is [6], wanted a matrix for each head"),
    ],
)
def test_what_is_no_such_transformer_is_one_line(changes: dict[str, Tensor | None], message: str) -> None:
    changed = {name: tensor for name, tensor in (state() | changes).items() if tensor is not None}
    with pytest.raises(UserError) as error:
        parameters_of(changed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


TOY = Toy(d_vocab=VOCAB, k=CONTEXT, d_model=MODEL, d_head=HEAD)
SEQUENCES = torch.cartesian_prod(*[torch.arange(VOCAB)] * CONTEXT)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_activations_are_those_of_attention_written_out(heads: int) -> None:
    found = parameters_of(state(heads))
    x = found["W_E"][SEQUENCES] + found["W_pos"]
    residual = x[:, -1].clone()
    for head in range(heads):
        query, keys = x[:, -1] @ found["W_Q"][head], x @ found["W_K"][head]
        attention = ((keys * query[:, None]).sum(-1) / HEAD**0.5).softmax(1)
        residual += (attention[..., None] * (x @ found["W_V"][head])).sum(1) @ found["W_O"][head]
    model = Checkpoint(TOY, found)
    got = model.activations(SEQUENCES, "pre_unembed")
    torch.testing.assert_close(got, residual, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        model.activations(SEQUENCES, "post_unembed"), residual @ found["W_U"], atol=1e-4, rtol=1e-5
    )
    assert torch.equal(model.activations(SEQUENCES[100:101], "pre_unembed"), got[100:101])
    correct = ((residual @ found["W_U"]).argmax(1) == SEQUENCES.amax(1)).double().mean()
    assert model.evaluate_exact().accuracy == pytest.approx(float(correct))


def test_one_head_is_a_max_of_k_transformer() -> None:
    flat = {name: tensor[0] if tensor.ndim == 3 else tensor for name, tensor in parameters(1).items()}
    expected = MaxOfK(TOY, flat).activations(SEQUENCES, "pre_unembed")
    got = Checkpoint(TOY, parameters_of(flat)).activations(SEQUENCES, "pre_unembed")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def convert(monkeypatch: pytest.MonkeyPatch, source: Path, target: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", str(source), str(target)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(ended.value.code or 0)


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["model", "state_dict", None])
def test_a_pickled_checkpoint_is_converted_without_running_its_code(
    place: str | None, legacy: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Beside the tensors lie objects of a package that is not installed, and code."""
    absent = ModuleType("absent")
    exec("class Config(dict):\n    pass\n", vars(absent))
    absent.Config.__module__ = "absent"
    monkeypatch.setitem(sys.modules, "absent", absent)
    config = absent.Config(steps=3)
    config.seed = 123
    trace, source, target = tmp_path / "trace", tmp_path / "max.pth", tmp_path / "model.safetensors"
    beside = {"run_config": config, "dtype": torch.float32, "code": Payload(trace), "losses": [1.0]}
    content: dict[str, Any] = beside | {place: state()} if place else state()
    if place == "state_dict":
        content[place] = {f"model.{name}": torch.nn.Parameter(tensor, False) for name, tensor in state().items()}
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "absent")
    assert convert(monkeypatch, source, target) == 0
    assert same({name: load_file(target)[name] for name in MODULES}, parameters())
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", [1, 2], {"model": 3}, {"model": {"W_E": torch.zeros(2, 2)}}])
def test_what_cannot_be_converted_is_one_line(
    content: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "max.pth", tmp_path / "model.safetensors"
    source.write_bytes(content) if isinstance(content, bytes) else torch.save(content, source)
    assert convert(monkeypatch, source, target) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not target.exists()


def run(*words: str) -> Result:
    return call("run", "toy=checkpoint", *words, "sae.width=8", "training.steps=5", "logger=none", "device=cpu")


@pytest.mark.slow
def test_a_sweep_on_a_transformer_from_a_file(tmp_path: Path) -> None:
    file, out = tmp_path / "model.safetensors", tmp_path / "out"
    save_file({name: tensor for name, tensor in state().items() if not name.endswith("IGNORE")}, file)
    ended = run(f"toy.file={file}", "penalty.coefficient=0.1", f"output_dir={out}", "name=one")
    assert ended.code == 0, ended.err
    (id,) = Store(out).ids("toys")
    model = load_toy(id, out)
    expected = Checkpoint(TOY, parameters()).activations(SEQUENCES, "pre_unembed")
    assert torch.equal(model.activations(SEQUENCES, "pre_unembed"), expected)
    moved = tmp_path / "moved.safetensors"
    file.rename(moved)
    assert run(f"toy.file={moved}", "penalty.coefficient=0.1", f"output_dir={out}", "name=two").code == 0
    assert len(Store(out).ids("points")) == 1


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    special, other = tmp_path / "special.safetensors", tmp_path / "other.safetensors"
    save_file({**parameters(), "W_U": torch.zeros(MODEL, VOCAB - 1)}, special)
    other.write_text("hello")
    for words, message in (
        ((), "toy=checkpoint needs toy.file"),
        ((f"toy.file={tmp_path / 'nowhere'}",), "No such file"),
        ((f"toy.file={other}",), "is no safetensors file"),
        ((f"toy.file={special}",), "W_E has 7 tokens and W_U 6, wanted as many: special tokens are not supported"),
    ):
        ended = run(*words, f"output_dir={tmp_path / 'out'}")
        assert (ended.code, ended.err.strip().count("\n")) == (2, 0)
        assert message in ended.err
