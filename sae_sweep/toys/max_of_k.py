"""The max-of-K transformer: one attention-only layer that reads the largest of K tokens off the last position.

The recipe is that of Compact Proofs (arXiv 2406.11779): one head, no MLP, no normalisation, no BOS, learned absolute
positions, biases frozen at zero (so there are none here), every weight ~ N(0, 0.8/√d_model), attention scale √d_head.
Only the last position is read, so attention is computed for its query alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sae_sweep.config.settings import Distribution, Toy
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.aligned import product
from sae_sweep.toys.classes import Cells, count_classes
from sae_sweep.toys.model import ANSWERS, SiteKind, ToyKind
from sae_sweep.toys.sampler import Sampler, cell_weights
from sae_sweep.toys.sequences import Sequences, spelled

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8
# Steps whose inputs are drawn at once, and after which the loss is reported.
BLOCK = 50
# Inputs held at once by the exact evaluation.
ROWS = 1 << 14


def shapes(toy: Toy) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, in the order in which they are drawn."""
    vocab, model, head = toy.d_vocab, toy.d_model, toy.d_head
    return {
        "W_E": (vocab, model),
        "W_pos": (toy.k, model),
        "W_Q": (model, head),
        "W_K": (model, head),
        "W_V": (model, head),
        "W_O": (head, model),
        "W_U": (model, vocab),
    }


def stack_key(toy: Toy) -> Any:
    """Toys with the same key train as one stack."""
    return tuple(shapes(toy).values()), toy.steps, toy.batch_size


def train(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """Train toys of equal shape, steps and batch size as one stack; returns the parameters of each, on the CPU.

    Toys may differ in seed, learning rate, weight decay and distribution. Each draws its start and its inputs from a
    CPU generator of its own, so that on the CPU its bits do not depend on the others nor on the number of threads.
    `report(step, loss)` gets the mean cross-entropy in nats of the last step of every block.
    Raises ValueError if the toys cannot be stacked.
    """
    layout, steps = shapes(toys[0]), toys[0].steps
    if any(stack_key(toy) != stack_key(toys[0]) for toy in toys):
        raise ValueError("toys of one stack must have equal shapes, steps and batch sizes")
    generators = [torch.Generator().manual_seed(toy.seed) for toy in toys]
    # All parameters of a toy lie in one row, so that the optimiser's update is a few operations over the whole stack.
    flat = torch.stack([_initial(toy, generator) for toy, generator in zip(toys, generators, strict=True)]).to(device)
    params = _views(flat, layout)
    leaves = [param.requires_grad_() for param in params.values()]
    moments = torch.zeros_like(flat), torch.zeros_like(flat)
    lr = torch.tensor([[toy.lr] for toy in toys], device=device)
    decay = torch.tensor([[1 - toy.lr * toy.weight_decay] for toy in toys], device=device)
    for step, tokens in enumerate(_batches(toys, generators, device), start=1):
        # Means over the batch, sum over the stack: no toy's gradient sees another toy.
        losses = _losses(params, tokens)
        gradients = torch.autograd.grad(losses.sum(), leaves)
        _adamw(flat, torch.cat([g.flatten(1) for g in gradients], 1), moments, lr, decay, step)
        if report is not None and (step % BLOCK == 0 or step == steps):
            report(step, losses.mean().item())
    return [{name: param[i].detach().cpu().clone() for name, param in params.items()} for i in range(len(toys))]


def _initial(toy: Toy, generator: torch.Generator) -> Tensor:
    size = sum(math.prod(shape) for shape in shapes(toy).values())
    return torch.randn(size, generator=generator) * (0.8 / math.sqrt(toy.d_model))


def _views(flat: Tensor, layout: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The rows of `flat` [n, size] as parameters [n, ...] that share its memory."""
    parts = flat.split([math.prod(shape) for shape in layout.values()], 1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(layout.items(), parts, strict=True)}


def _batches(
    toys: Sequence[Toy], generators: Sequence[torch.Generator], device: str | torch.device
) -> Iterator[Tensor]:
    """Sequences [n, batch, k] for one step after the other."""
    toy, cells = toys[0], Cells(toys[0].d_vocab, toys[0].k)
    chances = {
        name: None if name == "uniform" else cell_weights(cells, Distribution(name))
        for name in {toy.distribution for toy in toys}
    }
    samplers = [Sampler(cells, chances[toy.distribution], "cpu") for toy in toys]
    for start in range(0, toy.steps, BLOCK):
        count = min(BLOCK, toy.steps - start)
        drawn = [s.draw(count * toy.batch_size, g) for s, g in zip(samplers, generators, strict=True)]
        yield from torch.stack(drawn).to(device).unflatten(1, (count, toy.batch_size)).unbind(1)


def _losses(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Cross-entropy of the last position's logits against the maximum: [n], nats, for tokens [n, batch, k]."""
    n, batch = tokens.shape[:2]
    vocab = params["W_E"].shape[1]
    # One table for the whole stack: its rows are found by the toy and the token.
    rows = tokens + vocab * torch.arange(n, device=tokens.device)[:, None, None]
    x = F.embedding(rows, params["W_E"].flatten(0, 1)) + params["W_pos"][:, None]
    query = x[:, :, -1]
    # q·k = (x_q W_Q) W_K^T x_k^T, and the head's output is linear in the attention-weighted mean of x: one query,
    # so neither keys nor values are needed for every position.
    asked = product(product(query, params["W_Q"]), params["W_K"].mT)
    scores = (x * asked[:, :, None]).sum(-1) / math.sqrt(params["W_Q"].shape[-1])
    attended = (scores.softmax(-1)[..., None] * x).sum(2)
    residual = query + product(product(attended, params["W_V"]), params["W_O"])
    logits = product(residual, params["W_U"])
    return F.cross_entropy(logits.flatten(0, 1), tokens.amax(-1).flatten(), reduction="none").view(n, batch).mean(1)


def _adamw(
    flat: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], lr: Tensor, decay: Tensor, step: int
) -> None:
    """One AdamW update in place of all parameters [n, size]: as torch.optim.AdamW, with lr and decay [n, 1] per toy.

    Products and sums are separate operations: fused ones round differently at the end of a row than within it, and a
    toy's bits would depend on its place in the stack.
    """
    first, second = moments
    with torch.no_grad():
        first.mul_(ADAM_BETAS[0]).add_(gradient * (1 - ADAM_BETAS[0]))
        second.mul_(ADAM_BETAS[1]).add_(gradient.square_().mul_(1 - ADAM_BETAS[1]))
        root = (second / (1 - ADAM_BETAS[1] ** step)).sqrt_().add_(ADAM_EPS)
        flat.mul_(decay).sub_((first / (1 - ADAM_BETAS[0] ** step)).div_(root).mul_(lr))


@dataclass(frozen=True)
class Exact:
    """Accuracy (a fraction) and cross-entropy (nats) over every input, each once."""

    accuracy: float
    loss: float


class MaxOfK:
    """A trained toy: activations at a site, and the toy's own logits from them.

    With one layer and one query, the attention scores and each token's effect on the residual are finite tables over
    (query, position, token): inputs are looked up, not multiplied through, which is what makes streams fast.
    """

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: one toy's parameters as `train` returns them, float32 on one device."""
        self.toy, self.params = toy, params

    @property
    def device(self) -> torch.device:
        """Where the parameters and all activations live."""
        return self.params["W_U"].device

    def to(self, device: str | torch.device) -> MaxOfK:
        """The same toy on `device`."""
        return MaxOfK(self.toy, {name: param.to(device) for name, param in self.params.items()})

    def width(self, site: str) -> int:
        """d: numbers per activation at `site`."""
        return self.toy.d_model if site == "pre_unembed" else self.toy.d_vocab

    def population(self, distribution: Distribution, device: str | torch.device) -> Sequences:
        """The toy's sequences under a distribution."""
        return Sequences(Cells(self.toy.d_vocab, self.toy.k), distribution, device)

    def truth(self, inputs: Tensor) -> Tensor:
        """The maximum of each sequence [batch] int64."""
        return inputs.amax(1)

    @property
    def planted(self) -> None:
        """No feature is planted here: what the toy represents is its own business."""

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32 of sequences `inputs` [batch, k] int64 below d_vocab.

        `pre_unembed`: the last position's residual (d = d_model); `post_unembed`: its logits (d = d_vocab).
        """
        # Positions before inputs: operations over the first axis and single look-ups are several times faster.
        tokens = inputs.T.contiguous()
        query = tokens[-1]
        rows = tokens + self.toy.d_vocab * torch.arange(self.toy.k, device=self.device)[:, None]
        scores = self._scores.flatten().index_select(0, (query * self._scores.shape[1] + rows).flatten())
        scores = scores.view_as(rows)
        weights = (scores - scores.amax(0)).exp()
        # Added in the order of positions: softmax(0) and sum(0) round by an input's place in the batch.
        attention = weights / sum(weights.unbind(0))
        # The query's own embedding reaches the residual whole.
        rows = torch.cat([rows, query[None] + self._scores.shape[1]]).T.contiguous()
        shares = F.pad(attention, (0, 0, 0, 1), value=1.0).T.contiguous()
        return F.embedding_bag(rows, self._effects[site], per_sample_weights=shares, mode="sum")

    def logits(self, acts: Tensor, site: str) -> Tensor:
        """The toy's logits [..., d_vocab] from (possibly reconstructed) activations [..., d] at `site`."""
        return product(acts, self.params["W_U"]) if site == "pre_unembed" else acts

    def evaluate_exact(self) -> Exact:
        """Accuracy and loss over all d_vocab^k inputs, in bounded memory."""
        d_vocab, k = self.toy.d_vocab, self.toy.k
        count = d_vocab**k
        correct, loss = 0, 0.0
        for start in range(0, count, ROWS):
            codes = torch.arange(start, min(start + ROWS, count), device=self.device)
            sequences = spelled(codes, d_vocab, k)
            logits, maxima = self.activations(sequences, "post_unembed"), sequences.amax(-1)
            # No logit above that of the maximum: an argmax would take longer than all the rest.
            correct += int((logits.gather(1, maxima[:, None])[:, 0] == logits.amax(-1)).sum())
            loss += float(F.cross_entropy(logits, maxima, reduction="none").double().sum())
        return Exact(correct / count, loss / count)

    @cached_property
    def _embedded(self) -> Tensor:
        """Every token at every position: [k, d_vocab, d_model]."""
        return self.params["W_pos"][:, None] + self.params["W_E"]

    @cached_property
    def _scores(self) -> Tensor:
        """Attention scores [query token, position · d_vocab + token]."""
        queries = product(self._embedded[-1], self.params["W_Q"])
        keys = product(self._embedded.flatten(0, 1), self.params["W_K"])
        return product(queries, keys.mT) / math.sqrt(self.toy.d_head)

    @cached_property
    def _effects(self) -> dict[str, Tensor]:
        """By site, what a token adds: attended to, at [position · d_vocab + token, d]; as the query, after these."""
        moved = product(product(self._embedded.flatten(0, 1), self.params["W_V"]), self.params["W_O"])
        effects = torch.cat([moved, self._embedded[-1]])
        return {"pre_unembed": effects, "post_unembed": product(effects, self.params["W_U"])}


def load(toy: Toy, params: dict[str, Tensor]) -> MaxOfK:
    """The toy whose parameters `train` returned. ValueError if they are those of another."""
    if {name: tuple(param.shape) for name, param in params.items()} != shapes(toy):
        raise ValueError(f"not the parameters of such a toy: {', '.join(shapes(toy))}")
    return MaxOfK(toy, params)


def _size(toy: Toy) -> tuple[int, ...]:
    return (toy.k,)


def _classes(partition: str, toy: Toy) -> int:
    return count_classes(partition, toy.d_vocab, toy.k)


def _cells(toy: Toy, distribution: Distribution) -> tuple[Cells, NDArray[np.float64]]:
    cells = Cells(toy.d_vocab, toy.k)
    return cells, cell_weights(cells, distribution)


def activation_size(toy: Toy, site: str) -> int:
    """d: numbers per activation of a transformer at `site`."""
    size: int = toy.d_model if site == "pre_unembed" else toy.d_vocab
    return size


def count_inputs(toy: Toy) -> float:
    """Sequences of k tokens there are; infinity where that is beyond a float."""
    return math.inf if toy.k * math.log(toy.d_vocab) > 300 else float(toy.d_vocab**toy.k)


def training_cost(toy: Toy) -> tuple[int, int]:
    """Steps, and multiplications of a forward and a backward pass, which costs two."""
    products = toy.k * toy.d_model * (4 * toy.d_head + 2 * toy.k) + toy.d_model * toy.d_vocab
    return toy.steps, 3 * toy.batch_size * products


TRANSFORMER = {
    "d_vocab": Setting(64, "size of the vocabulary: tokens are 0 to d_vocab − 1", ge=2),
    "k": Setting(4, "how many tokens an input has", ge=2),
    "d_model": Setting(32, "dimension of the residual stream", ge=1),
    "d_head": Setting(32, "dimension of the attention head", ge=1),
}
RECIPE = {
    "steps": Setting(3000, "steps of AdamW that train the transformer", ge=1),
    "batch_size": Setting(128, "inputs of such a step", ge=1),
    "lr": Setting(1e-3, "learning rate of AdamW", gt=0),
    "weight_decay": Setting(0.01, "weight decay of AdamW", ge=0),
}
PRE_UNEMBED = register(SiteKind(name="pre_unembed", description="the last position's residual before W_U"))
POST_UNEMBED = register(SiteKind(name="post_unembed", description="the last position's logits"))
SITES = (PRE_UNEMBED.name, POST_UNEMBED.name)

register(
    ToyKind(
        name="max_of_k",
        description="a one-layer transformer that reads the largest of k tokens off the last position",
        source="arXiv 2406.11779",
        settings={
            **TRANSFORMER,
            "distribution": Setting(
                "uniform",
                "what the transformer is trained on: all sequences alike (uniform), or all maxima alike",
                choices=("uniform", "max_stratified"),
            ),
            **RECIPE,
            **ANSWERS,
        },
        train=train,
        load=load,
        maxima=lambda toy: toy.d_vocab,
        size=_size,
        classes=_classes,
        cells=_cells,
        d=activation_size,
        inputs=count_inputs,
        trains=training_cost,
        sites=SITES,
        distributions=True,
        factors_depend=True,
        stack_key=stack_key,
    )
)
