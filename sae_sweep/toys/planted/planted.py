"""Planted features made of parts: directions, rates, magnitudes, a tree, correlations, noise and an offset.

Published toys differ in these alone, so that the toy of a paper is a line of settings: rates `0.25, 0.05, 0.05, 0.05`
and the tree `0>1:0.2` are that of "A is for Absorption".
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.lazy import lazy
from sae_sweep.registry import Setting, register
from sae_sweep.toys.aligned import product
from sae_sweep.toys.planted import Synthetic, features, planted_kind, unit_vectors
from sae_sweep.toys.planted.parts import (
    MAGNITUDES,
    NOTHING,
    Tree,
    both_below,
    read_correlations,
    read_magnitude,
    read_rates,
    read_tree,
    square_root,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")


class Planted(Synthetic):
    """What a `planted` toy's settings ask for. No cells: features come in many combinations.

    An input is how active each feature is, and with noise the noise itself beside it [features (+ d_model)], so that an
    input has one activation.
    """

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """directions [features, d_model], rates [features] (of a child: given its parent), offset [d_model], and with
        correlations a square root of their matrix [features, features]."""
        tree = read_tree(toy.tree, toy.features)
        orthonormal = toy.directions == "orthonormal" or (toy.directions == "fitting" and toy.features <= toy.d_model)
        directions = (
            unit_vectors(toy.features, toy.d_model, generator)
            if orthonormal
            else _random_vectors(toy.features, toy.d_model, generator)
        )
        rates = read_rates(toy.rates, toy.features, generator)
        rates = [tree.rates[at] if tree.parents[at] >= 0 else rate for at, rate in enumerate(rates)]
        params = {"directions": directions.float(), "rates": torch.tensor(rates)}
        params["offset"] = toy.offset * _random_vectors(1, toy.d_model, generator)[0].float()
        correlations = read_correlations(toy.correlations, tree, generator)
        if correlations is not None:
            params["mixing"] = torch.from_numpy(square_root(correlations)).float().contiguous()
        return params

    @cached_property
    def tree(self) -> Tree:
        """Which feature comes only with which other."""
        return read_tree(self.toy.tree, self.toy.features)

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of every edge of the tree."""
        return self.tree.edges

    @property
    def origin(self) -> Tensor:
        """The raw activation where no feature is active [d_model]."""
        return self.params["offset"]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, features (+ d_model)]."""
        toy, tree, shape = self.toy, self.tree, (count, self.toy.features)
        if "mixing" in self.params:
            normal = torch.randn(shape, generator=generator, device=self.device)
            uniform = torch.special.ndtr(product(normal, self.params["mixing"].T))
        else:
            uniform = self._uniform(shape, generator)
        starts = torch.tensor(tree.starts, device=self.device)
        shared = uniform[:, list(tree.leaders)]
        active = (shared >= starts) & (shared < starts + self.params["rates"])
        for level in tree.levels():
            active[:, level] &= active[:, [tree.parents[child] for child in level]]
        magnitude, arguments = read_magnitude(toy.magnitude)
        inputs = active * magnitude.draw(arguments, shape, generator)
        if toy.noise == 0:
            return inputs
        noise = torch.randn(count, toy.d_model, generator=generator, device=self.device)
        return torch.cat([inputs, toy.noise**0.5 * noise], 1)

    def features(self, inputs: Tensor) -> Tensor:
        """How active each planted feature is [batch, features]."""
        return inputs[:, : self.toy.features]

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32: the features along their directions, the noise and the offset."""
        acts = product(self.features(inputs).contiguous(), self.directions) + self.params["offset"]
        return (acts + inputs[:, self.toy.features :]).contiguous() if self.toy.noise else acts.contiguous()

    # -- exact chances --------------------------------------------------------------------------------------------

    @cached_property
    def together(self) -> NDArray[np.float64]:
        """The chance of every two features to be active on one input [features, features]; the diagonal: of each.

        Each feature needs itself and its ancestors. Edges of different groups are independent of all else, so their
        rates multiply; children that exclude each other never meet; roots meet as their correlation says.
        """
        tree, count = self.tree, self.toy.features
        rates = self.params["rates"].double().cpu().numpy()
        mixing = self.params["mixing"].double().cpu().numpy() if "mixing" in self.params else np.eye(count)
        of_roots = both_below(rates, mixing @ mixing.T)
        needs = [tree.ancestry(feature) for feature in range(count)]
        found = np.empty((count, count))
        for one in range(count):
            for other in range(one, count):
                needed = {*needs[one], *needs[other]}
                below = [feature for feature in needed if tree.parents[feature] >= 0]
                if len({tree.leaders[feature] for feature in below}) < len(below):
                    chance = 0.0
                else:
                    chance = of_roots[needs[one][-1], needs[other][-1]] * np.prod(rates[below])
                found[one, other] = found[other, one] = chance
        return found

    @property
    def l0(self) -> float:
        """How many features are active on an input, on average."""
        return float(np.diag(self.together).sum())

    @property
    def mean(self) -> Tensor:
        """E[activation] [d_model] float64."""
        magnitude, arguments = read_magnitude(self.toy.magnitude)
        strength = torch.from_numpy(np.diag(self.together).copy()) * magnitude.mean(*arguments)
        return strength @ self.directions.double().cpu() + self.params["offset"].double().cpu()


def _random_vectors(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Unit vectors [count, d] float64, each uniform on the sphere."""
    return F.normalize(torch.randn(count, d, dtype=torch.float64, generator=generator), dim=1)


def _check(toy: Toy) -> None:
    if toy.directions == "orthonormal" and toy.features > toy.d_model:
        raise UserError(
            f"toy.directions=orthonormal: {toy.features} directions do not fit into toy.d_model={toy.d_model} numbers "
            "(toy.directions=random)"
        )
    read_rates(toy.rates, toy.features, None)
    read_magnitude(toy.magnitude)
    read_correlations(toy.correlations, read_tree(toy.tree, toy.features), None)


def _no_classes(partition: str, toy: Toy) -> int:
    raise UserError(f"${{cells:{partition}}}: toy=planted has no cells, its features come in many combinations")


register(
    planted_kind(
        lambda: Planted,
        _no_classes,
        name="planted",
        description="features made of parts: directions, rates, magnitudes, a tree, correlations, noise, an offset",
        source="arXiv 2409.14507, 2505.11756, 2508.16560, 2602.14111",
        settings={
            **features(),
            "directions": Setting(
                "fitting",
                "of the features: orthonormal, random, or fitting: orthonormal if they are at most d_model, else "
                "random",
                choices=("fitting", "orthonormal", "random"),
            ),
            "rates": Setting(
                "0.05",
                "chance that each feature is active: one number for all, one for each (0.2, 0.1), linear(first, last), "
                "zipf(first, "
                "exponent) or loguniform(least, most)",
            ),
            "magnitude": Setting(
                "constant",
                "distribution of the magnitude of an active feature: "
                + ", ".join(MAGNITUDES)
                + "; with arguments as folded(1, 0.15): "
                "mean and spread (lognormal: of the logarithm; lomax: shape and mean)",
            ),
            "tree": Setting(
                NOTHING,
                "which features come only with another: 0>1:0.2 has feature 1 come only with feature 0, on a fifth of "
                "its inputs; 0>1:0.2|2:0.3 has 1 or 2 come with it, never both",
            ),
            "correlations": Setting(
                NOTHING,
                "of features that have no parent, between the normal numbers that decide whether each is active: one "
                "number for all, 0~1:0.4 for a pair, 0~*:0.4 "
                "for one with every other, lowrank(rank, strength), or random(least, most): of seven pairs in ten, "
                "with either sign",
            ),
            "noise": Setting(0.0, "variance of the Gaussian noise that is added to each number of an activation", ge=0),
            "offset": Setting(0.0, "length of a vector that is added to every activation", ge=0),
        },
        independent=True,
        check=_check,
    )
)
