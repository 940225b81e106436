"""Tokens in context: a small transformer that learns, for each of several contexts, a bigram table of its own.

An input is k − 1 words of one context, each context having WORDS words of its own, and then a token; the target is the
next token, whose distribution depends on token and context both. Tables are highly correlated between contexts, by
`contrast` less than fully: with contrast small, outputs hardly tell contexts apart. One layer: attention of one head
from the last position, then an MLP; no normalisation. The cell of an input is its token m and its context q.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sae_sweep.config.settings import Distribution, Toy, derive_seed
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.aligned import product
from sae_sweep.toys.classes import FeatureCells, count_pairs
from sae_sweep.toys.max_of_k import BLOCK, RECIPE, SITES, TRANSFORMER, activation_size, training_cost
from sae_sweep.toys.model import ToyKind
from sae_sweep.toys.sampled_population import SampledPopulation

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")

# Words of each context; hidden units of the MLP for each of the residual's numbers.
WORDS, HIDDEN = 4, 4
# Standard deviation of the logits of a bigram table: some five likely successors of a token among 32.
SHARPNESS = 2.0


def stack_key(toy: Toy) -> Any:
    """Each toy is trained by itself."""
    return toy


def tables(toy: Toy) -> Tensor:
    """P(next | context, token) [contexts, d_vocab, d_vocab] float32: logits √(1−c)·shared + √c·the context's own.

    Logits of two contexts correlate by 1 − contrast.
    """
    generator = torch.Generator().manual_seed(derive_seed("bigrams", toy.seed))
    shared, own = (torch.randn(n, toy.d_vocab, toy.d_vocab, generator=generator) for n in (1, toy.contexts))
    return (SHARPNESS * (math.sqrt(1 - toy.contrast) * shared + math.sqrt(toy.contrast) * own)).softmax(-1)


def train(
    toys: Sequence[Toy], device: str | torch.device, report: Callable[[int, float], None] | None = None
) -> list[dict[str, Tensor]]:
    """Train each toy by AdamW on the cross-entropy with the true distribution; the parameters, on the CPU.

    `report(step, loss)` gets the loss in nats every BLOCK steps and at the last.
    """
    return [_train(toy, device, report) for toy in toys]


def load(toy: Toy, params: dict[str, Tensor]) -> Bigrams:
    """The toy whose parameters `train` returned."""
    return Bigrams(toy, params)


def _train(toy: Toy, device: str | torch.device, report: Callable[[int, float], None] | None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(toy.seed)
    shapes = {
        "W_E": (toy.d_vocab + toy.contexts * WORDS, toy.d_model),
        "W_pos": (toy.k, toy.d_model),
        "W_Q": (toy.d_model, toy.d_head),
        "W_K": (toy.d_model, toy.d_head),
        "W_V": (toy.d_model, toy.d_head),
        "W_O": (toy.d_head, toy.d_model),
        "W_in": (toy.d_model, HIDDEN * toy.d_model),
        "W_out": (HIDDEN * toy.d_model, toy.d_model),
        "W_U": (toy.d_model, toy.d_vocab),
    }
    # Kept from growing with the input's size; embeddings as those of max-of-K.
    drawn = {name: torch.randn(shape, generator=generator) * 0.8 for name, shape in shapes.items()}
    params = {
        name: (p / math.sqrt(max(p.shape[0], toy.d_model))).to(device).requires_grad_() for name, p in drawn.items()
    }
    model = Bigrams(toy, params)
    optimiser = torch.optim.AdamW(params.values(), lr=toy.lr, weight_decay=toy.weight_decay)
    for step in range(1, toy.steps + 1):
        inputs = draw(toy, toy.batch_size, generator).to(device)
        logits = model.logits(model.activations(inputs, "pre_unembed"), "pre_unembed")
        loss = F.cross_entropy(logits, model.truth(inputs))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if report is not None and (step % BLOCK == 0 or step == toy.steps):
            report(step, loss.item())
    return {name: param.detach().cpu().clone() for name, param in params.items()}


def draw(toy: Toy, count: int, generator: torch.Generator) -> Tensor:
    """Independent inputs [count, k] int64: words d_vocab + WORDS·context + i, then the token; all equally likely."""
    device = generator.device
    context = torch.randint(toy.contexts, (count, 1), generator=generator, device=device)
    words = torch.randint(WORDS, (count, toy.k - 1), generator=generator, device=device)
    token = torch.randint(toy.d_vocab, (count, 1), generator=generator, device=device)
    return torch.cat([toy.d_vocab + WORDS * context + words, token], 1)


class Bigrams(SampledPopulation):
    """A trained toy, and its own population of inputs: `Model` and `Population` of toys/model.py."""

    planted = None

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `train` returns them, float32 on one device."""
        self.toy, self.params = toy, params
        self.cells = FeatureCells(toy.d_vocab, toy.contexts, always=True)

    @property
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T]: all alike."""
        return np.full(self.cells.count, 1 / self.cells.count)

    @property
    def device(self) -> torch.device:
        """Where the parameters and all activations live."""
        return self.params["W_U"].device

    def to(self, device: str | torch.device) -> Bigrams:
        """The same toy on `device`."""
        return Bigrams(self.toy, {name: param.to(device) for name, param in self.params.items()})

    def width(self, site: str) -> int:
        """d: numbers per activation at `site`."""
        return self.toy.d_model if site == "pre_unembed" else self.toy.d_vocab

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32 of the last position: its residual after the MLP, or the logits."""
        p = self.params
        x = p["W_E"][inputs] + p["W_pos"]
        query = x[:, -1]
        asked = product(product(query, p["W_Q"]), p["W_K"].T)
        weights = ((x * asked[:, None]).sum(-1) / math.sqrt(self.toy.d_head)).softmax(-1)
        attended = (weights[..., None] * x).sum(1)
        residual = query + product(product(attended, p["W_V"]), p["W_O"])
        residual = residual + product(torch.relu(product(residual, p["W_in"])), p["W_out"])
        return (residual if site == "pre_unembed" else product(residual, p["W_U"])).contiguous()

    def logits(self, acts: Tensor, site: str) -> Tensor:
        """The toy's logits [..., d_vocab] from (possibly reconstructed) activations [..., d] at `site`."""
        return product(acts, self.params["W_U"]) if site == "pre_unembed" else acts

    def truth(self, inputs: Tensor) -> Tensor:
        """The distribution of the next token [batch, d_vocab] float32."""
        return self._tables.flatten(0, 1)[self._context(inputs) * self.toy.d_vocab + inputs[:, -1]]

    @cached_property
    def _tables(self) -> Tensor:
        return tables(self.toy).to(self.device)

    def _context(self, inputs: Tensor) -> Tensor:
        return (inputs[:, 0] - self.toy.d_vocab) // WORDS

    def population(self, distribution: Distribution, device: str | torch.device) -> Bigrams:
        """Its inputs; the distribution is always the toy's own."""
        return self.to(device)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, k] int64."""
        return draw(self.toy, count, generator)

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of token and context [count] int64."""
        return inputs[:, -1] * self.toy.contexts + self._context(inputs)


register(
    ToyKind(
        name="bigrams",
        description="tokens in context: a transformer with a bigram table for each context, highly correlated",
        source="LessWrong comment EkibeZomncsPxfYwu (P8, Nix)",
        settings={
            **TRANSFORMER,
            **RECIPE,
            "contexts": Setting(4, "how many contexts there are, each with a bigram table of its own", ge=2),
            "contrast": Setting(
                0.2, "how much the tables differ: the logits of two contexts correlate by 1 − contrast", ge=0, le=1
            ),
        },
        defaults={"d_vocab": 16, "batch_size": 256, "lr": 3e-3},
        train=train,
        load=load,
        maxima=lambda toy: toy.d_vocab,
        size=lambda toy: (toy.contexts,),
        classes=lambda partition, toy: count_pairs(partition, toy.d_vocab, toy.contexts),
        cells=lambda toy, distribution: (Bigrams(toy, {}).cells, Bigrams(toy, {}).chance),
        d=activation_size,
        inputs=lambda toy: math.inf,
        trains=training_cost,
        sites=SITES,
        model_cost=4.0,
        stack_key=stack_key,
    )
)
