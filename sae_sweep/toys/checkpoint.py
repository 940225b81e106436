"""Trained max-of-K transformers of others: one attention-only layer, any number of heads, read from tensors by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.aligned import product
from sae_sweep.toys.classes import count_classes
from sae_sweep.toys.max_of_k import SITES, TRANSFORMER, MaxOfK, activation_size, count_inputs
from sae_sweep.toys.model import ANSWERS, ToyKind

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

# Parameter → the module of a TransformerLens HookedTransformer that it belongs to.
MODULES = {
    "W_E": "embed",
    "W_pos": "pos_embed",
    "W_Q": "blocks.0.attn",
    "W_K": "blocks.0.attn",
    "W_V": "blocks.0.attn",
    "W_O": "blocks.0.attn",
    "W_U": "unembed",
}
BIASES = {
    "b_Q": "blocks.0.attn",
    "b_K": "blocks.0.attn",
    "b_V": "blocks.0.attn",
    "b_O": "blocks.0.attn",
    "b_U": "unembed",
}
# What TransformerLens keeps beside parameters: which positions are hidden from others, and by which number.
BUFFERS = ("blocks.0.attn.mask", "blocks.0.attn.IGNORE")


def parameters_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a one-layer attention-only transformer, float32, under the names of TransformerLens.

    W_E [d_vocab, d_model], W_pos [n_ctx, d_model], W_Q, W_K, W_V [heads, d_model, d_head], W_O [heads, d_head,
    d_model], W_U [d_model, outputs]. Tensors may be called so, or as in a state dict of TransformerLens (`embed.W_E`,
    `blocks.0.attn.W_Q`, also after `model.`); those of a single head may lack the first dimension. UserError, one line:
    a tensor is missing, not known, of another shape, not floating point or not finite, or a bias is not zero.
    """
    named: dict[str, Tensor] = _short_names(tensors)
    biases = {name: named.pop(name) for name in BIASES if name in named}
    missing = [name for name in MODULES if name not in named]
    if missing:
        raise UserError(f"the model has no {', '.join(missing)}, only {', '.join(named) or 'no parameters'}")
    for name, tensor in (named | biases).items():
        if not tensor.is_floating_point():
            raise UserError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, wanted floating-point numbers")
        broken = int((~tensor.isfinite()).sum())
        if broken:
            raise UserError(f"{name} has {broken} of {tensor.numel()} numbers that are nan or infinite, wanted finite")
    for name, tensor in biases.items():
        if tensor.any():
            raise UserError(
                f"{name} has a bias of {float(tensor.abs().max()):.3g}, wanted zero: biases are not supported"
            )
    heads = {name: _by_head(name, named[name]) for name in ("W_Q", "W_K", "W_V", "W_O")}
    parameters = {name: (named | heads)[name].detach().float().contiguous() for name in MODULES}
    for name, shape in _shapes(parameters).items():
        found = tuple(parameters[name].shape)
        if found != shape:
            raise UserError(f"{name} is {list(found)}, wanted {list(shape)}")
    return parameters


def _short_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and biases by the last part of their names. UserError for what is neither, or is there twice."""
    known = MODULES | BIASES
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        whole = name.removeprefix("model.")
        module, _, short = whole.rpartition(".")
        if whole in BUFFERS:
            continue
        if module.startswith("blocks.") and not module.startswith("blocks.0."):
            raise UserError(f"{name} is of a further layer, wanted one layer")
        if short not in known or module not in ("", known[short]):
            raise UserError(f"{name} is not known, wanted one attention-only layer of {', '.join(known)}")
        if short in found:
            raise UserError(f"{short} is there twice, once as {name}")
        found[short] = tensor
    return found


def _by_head(name: str, tensor: Tensor) -> Tensor:
    """A head's matrix [heads, …]; a single head's may lack the first dimension."""
    if tensor.ndim not in (2, 3):
        raise UserError(f"{name} is {list(tensor.shape)}, wanted a matrix for each head")
    return tensor[None] if tensor.ndim == 2 else tensor


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes that fit the embedding, the positions, the outputs and the heads there are."""
    for name in ("W_E", "W_pos", "W_U"):
        if parameters[name].ndim != 2 or 0 in parameters[name].shape:
            raise UserError(f"{name} is {list(parameters[name].shape)}, wanted a matrix")
    d_vocab, d_model = parameters["W_E"].shape
    heads, _, d_head = parameters["W_Q"].shape
    into, out = (heads, d_model, d_head), (heads, d_head, d_model)
    return {
        "W_E": (d_vocab, d_model),
        "W_pos": (parameters["W_pos"].shape[0], d_model),
        "W_Q": into,
        "W_K": into,
        "W_V": into,
        "W_O": out,
        "W_U": (d_model, parameters["W_U"].shape[1]),
    }


class Checkpoint(MaxOfK):
    """A max-of-K transformer of any number of heads, whose parameters are those of `parameters_of`.

    Attention scores and what a token adds through a head are tables over (head, query, position, token), as those of
    one head are in MaxOfK.
    """

    def to(self, device: str | torch.device) -> Checkpoint:
        """The same toy on `device`."""
        return Checkpoint(self.toy, {name: param.to(device) for name, param in self.params.items()})

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32 of sequences `inputs` [batch, k] int64 below d_vocab, as those of MaxOfK."""
        tokens = inputs.T.contiguous()
        query, heads, size = tokens[-1], len(self.params["W_Q"]), self.toy.k * self.toy.d_vocab
        rows = tokens + self.toy.d_vocab * torch.arange(self.toy.k, device=self.device)[:, None]
        found, shares = [], []
        for head in range(heads):
            scores = self._scores[head].flatten().index_select(0, (query * size + rows).flatten()).view_as(rows)
            weights = (scores - scores.amax(0)).exp()
            # Added in the order of positions: softmax(0) and sum(0) round by an input's place in the batch.
            shares.append(weights / sum(weights.unbind(0)))
            found.append(rows + head * size)
        # The query's own embedding reaches the residual whole.
        every = torch.cat([*found, query[None] + heads * size]).T.contiguous()
        share = F.pad(torch.cat(shares), (0, 0, 0, 1), value=1.0).T.contiguous()
        return F.embedding_bag(every, self._effects[site], per_sample_weights=share, mode="sum")

    @cached_property
    def _scores(self) -> Tensor:
        """Attention scores [heads, query token, position · d_vocab + token]."""
        queries = product(self._embedded[-1], self.params["W_Q"])
        keys = product(self._embedded.flatten(0, 1), self.params["W_K"])
        return product(queries, keys.mT) / math.sqrt(self.params["W_Q"].shape[-1])

    @cached_property
    def _effects(self) -> dict[str, Tensor]:
        """By site, what a token adds: attended to, at [(head, position, token), d]; as the query, after these."""
        moved = product(product(self._embedded.flatten(0, 1), self.params["W_V"]), self.params["W_O"])
        effects = torch.cat([moved.flatten(0, 1), self._embedded[-1]])
        return {"pre_unembed": effects, "post_unembed": product(effects, self.params["W_U"])}


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The file's absolute path and digest, and the sizes of its transformer, from its header: no tensor is loaded.

    UserError: there is no such file, or it is not one of such a transformer.
    """
    if settings.get("file") is None:
        raise UserError("toy=checkpoint needs toy.file, a safetensors file (scripts/convert_checkpoint.py makes one)")
    try:
        path = Path(settings["file"]).expanduser().resolve()
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        shapes = {name: tuple(about["shape"]) for name, about in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"toy.file={settings['file']}: {error.strerror or error}") from error
    except (ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"toy.file={settings['file']} is no safetensors file") from error
    try:
        sizes = _sizes(_short_names(shapes))
    except UserError as error:
        raise UserError(f"toy.file={settings['file']}: {error}") from error
    return {"file": str(path), "digest": hashlib.sha256(content).hexdigest()[:16], **sizes}


def _sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Settings of a transformer from the shapes of its parameters; all shapes are checked when they are loaded."""
    for name, dimensions in (("W_E", (2,)), ("W_pos", (2,)), ("W_U", (2,)), ("W_Q", (2, 3))):
        if len(shapes.get(name, ())) not in dimensions:
            raise UserError(f"{name} is {list(shapes[name])}, wanted a matrix" if name in shapes else f"has no {name}")
    d_vocab, outputs = shapes["W_E"][0], shapes["W_U"][1]
    if d_vocab != outputs:
        raise UserError(f"W_E has {d_vocab} tokens and W_U {outputs}, wanted as many: special tokens are not supported")
    *heads, d_model, d_head = shapes["W_Q"]
    return {
        "d_vocab": d_vocab,
        "k": shapes["W_pos"][0],
        "d_model": d_model,
        "d_head": d_head,
        "heads": heads[0] if heads else 1,
    }


def read(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """The parameters of each toy, from its file. UserError if it is not what it was, or no such transformer."""
    from safetensors.torch import load as load_tensors

    found = []
    for toy in toys:
        content = Path(toy.file).read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != toy.digest:
            raise UserError(f"toy.file={toy.file} has changed since this sweep was configured")
        try:
            found.append(parameters_of(load_tensors(content)))
        except UserError as error:
            raise UserError(f"toy.file={toy.file}: {error}") from error
    return found


def load(toy: Toy, params: dict[str, Tensor]) -> Checkpoint:
    """The toy whose parameters `read` returned. ValueError if they are those of another."""
    if (len(params["W_E"]), len(params["W_pos"]), len(params["W_Q"])) != (toy.d_vocab, toy.k, toy.heads):
        raise ValueError("not the parameters of such a toy")
    return Checkpoint(toy, params)


register(
    ToyKind(
        name="checkpoint",
        description="a trained one-layer attention-only max-of-k transformer of any number of heads, from a file",
        settings={
            # A path says nothing about the numbers; what the file holds does.
            "file": Setting(
                None,
                "path of a .safetensors of the transformer, its tensors named as in TransformerLens; required",
                kind="str",
                optional=True,
                told=False,
            ),
            "digest": Setting(None, "of its content", kind="str", optional=True, given=False),
            **{name: Setting(setting.default, setting.help, given=False) for name, setting in TRANSFORMER.items()},
            "heads": Setting(1, "of attention", given=False),
            **ANSWERS,
        },
        train=read,
        load=load,
        resolve=resolve,
        maxima=lambda toy: toy.d_vocab,
        size=lambda toy: (toy.k,),
        classes=lambda partition, toy: count_classes(partition, toy.d_vocab, toy.k),
        d=activation_size,
        inputs=count_inputs,
        trains=lambda toy: (0, 0),
        sites=SITES,
        distributions=True,
        factors_depend=True,
    )
)
