"""The model and the inputs of a toy that is made of planted parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from sae_sweep.config.settings import Toy
from sae_sweep.lazy import lazy
from sae_sweep.toys.aligned import product
from sae_sweep.toys.classes import FeatureCells
from sae_sweep.toys.planted import Synthetic
from sae_sweep.toys.planted.chances import together
from sae_sweep.toys.planted.correlations import read_correlations, square_root
from sae_sweep.toys.planted.directions import directions, random_vectors
from sae_sweep.toys.planted.groups import Group, pair_chances, read_groups
from sae_sweep.toys.planted.magnitudes import read_magnitude
from sae_sweep.toys.planted.manifolds import Manifold, read_manifolds
from sae_sweep.toys.planted.rates import NO_SCALES, read_rates, read_scales
from sae_sweep.toys.planted.trees import Tree, read_tree

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from numpy.typing import NDArray
    from torch import Tensor
else:
    np, torch, F = lazy("numpy"), lazy("torch"), lazy("torch.nn.functional")


class Planted(Synthetic):
    """What the settings of a `planted` toy, or of a preset of it, ask for.

    An input is how active each feature is, then where on its manifold each point lies, and with noise the noise itself
    [features (+ positions) (+ d_model)], so that an input has one activation.

    A feature has one direction, a manifold one for each of its places. With `interaction`, a feature of the second
    group has a direction that all features of the first share (unless interaction is 1), and after the directions of
    all features come those that it has with each (unless it is 0), by the first group's features.
    """

    def __init__(self, toy: Toy, params: dict[str, Tensor]) -> None:
        """`params`: as `plant` returns them, float32 on one device."""
        super().__init__(toy, params)
        made: Toy = toy.kind.parts(toy)
        self.made = made
        self.tree: Tree = read_tree(made.tree, made.features)
        self.groups: list[Group] = read_groups(made.one_of, read_rates(made.rates, made.features, None), self.tree)
        self.manifolds: dict[int, Manifold] = read_manifolds(made.manifolds, made.features)
        self.cells = self._cells()

    @classmethod
    def plant(cls, toy: Toy, generator: torch.Generator) -> dict[str, Tensor]:
        """directions [rows, d_model], of manifolds also the axes that they lie in [axes, d_model]; of a `planted` toy
        itself also rates [features] (of a child: given its parent), offset [d_model], with correlations a square root
        of their matrix [features, features], and scales [features] where they are not 1."""
        shape = cls(toy, {})
        made, tree = shape.made, shape.tree
        axes = directions(made.directions, shape.axes, toy.d_model, generator).float()
        params = {"directions": axes}
        if shape.manifolds:
            params = {"axes": axes, "directions": product(shape._place_codes(), axes).contiguous()}
        if made is not toy:
            return params  # the rest follows from a preset's settings
        rates = read_rates(made.rates, made.features, generator)
        rates = [tree.rates[at] if tree.parents[at] >= 0 else rate for at, rate in enumerate(rates)]
        params["rates"] = torch.tensor(rates)
        params["offset"] = made.offset * random_vectors(1, made.d_model, generator)[0].float()
        correlations = read_correlations(made.correlations, tree, generator, shape.grouped)
        if correlations is not None:
            params["mixing"] = torch.from_numpy(square_root(correlations)).float().contiguous()
        if made.scales != NO_SCALES:
            params["scales"] = torch.tensor(read_scales(made.scales, made.features, generator))
        return params

    # -- parts ----------------------------------------------------------------------------------------------------

    @property
    def rates(self) -> Tensor:
        """The chance of each feature, given its parent where it has one [features]."""
        return self._stored("rates", lambda: read_rates(self.made.rates, self.made.features, None))

    @property
    def scales(self) -> Tensor:
        """What the magnitude of each feature is multiplied by [features]."""
        return self._stored("scales", lambda: read_scales(self.made.scales, self.made.features, None))

    @property
    def origin(self) -> Tensor:
        """The raw activation where no feature is active [d_model]."""
        return self._stored("offset", lambda: [0.0] * self.made.d_model)

    def _stored(self, name: str, otherwise: Callable[[], list[float]]) -> Tensor:
        found = self.params.get(name)
        return torch.tensor(otherwise(), device=self.device) if found is None else found

    @cached_property
    def grouped(self) -> list[int]:
        """The features that come in groups, group by group."""
        return [member for group in self.groups for member in range(self.made.features)[group.members]]

    @cached_property
    def owners(self) -> list[int]:
        """The feature of each direction, those of `pairs` left out."""
        only_pairs = range(self.made.features)[self.groups[1].members] if self.made.interaction == 1 else ()
        kept = [at for at in range(self.made.features) if at not in only_pairs]
        return [at for at in kept for _ in range(self.manifolds[at].places if at in self.manifolds else 1)]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """(feature of the first group, of the second) of each direction that they have together."""
        if self.made.interaction == 0:
            return []
        first, second = (range(self.made.features)[group.members] for group in self.groups)
        return [(one, other) for one in first for other in second]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(parent, child) of every edge of the tree between features that have one direction, by their directions."""
        place = {at: row for row, at in enumerate(self.owners) if at not in self.manifolds}
        return [(place[one], place[other]) for one, other in self.tree.edges if {one, other} <= place.keys()]

    @property
    def axes(self) -> int:
        """How many vectors all directions lie in."""
        features = dict.fromkeys(self.owners)
        return len(self.pairs) + sum(self.manifolds[at].dims if at in self.manifolds else 1 for at in features)

    def _place_codes(self) -> Tensor:
        """The activation of each direction by the axes [directions, axes]."""
        blocks = [
            self.manifolds[at].points(self.manifolds[at].place_positions())
            if at in self.manifolds
            else torch.ones(1, 1)
            for at in range(self.made.features)
        ]
        return torch.block_diag(*blocks)

    # -- inputs ---------------------------------------------------------------------------------------------------

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Independent inputs [count, features (+ positions) (+ d_model)]."""
        made = self.made
        positions = [manifold.draw(count, generator) for manifold in self.manifolds.values()]
        parts = [self._strengths(count, generator), *positions]
        if made.noise:
            noise = torch.randn(count, made.d_model, generator=generator, device=self.device)
            parts.append(made.noise**0.5 * noise)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _strengths(self, count: int, generator: torch.Generator) -> Tensor:
        """How active each feature is [count, features]."""
        made, tree, shape = self.made, self.tree, (count, self.made.features)
        magnitude, arguments = read_magnitude(made.magnitude)
        grouped = self._of_groups(count, generator) if self.groups else None
        if grouped is not None and len(self.grouped) == made.features:
            found = grouped
        else:
            if "mixing" in self.params:
                normal = torch.randn(shape, generator=generator, device=self.device)
                uniform = torch.special.ndtr(product(normal, self.params["mixing"].T))
            else:
                uniform = torch.rand(shape, generator=generator, device=self.device)
            starts = torch.tensor(tree.starts, device=self.device)
            shared = uniform[:, list(tree.leaders)]
            active = (shared >= starts) & (shared < starts + self.rates)
            if grouped is not None:
                active[:, self.grouped] = grouped[:, self.grouped] != 0
            for level in tree.levels():
                active[:, level] &= active[:, [tree.parents[child] for child in level]]
            found = active * magnitude.draw(arguments, shape, generator)
            if grouped is not None:
                found[:, self.grouped] = grouped[:, self.grouped]
        return found if made.scales == NO_SCALES else found * self.scales

    def _of_groups(self, count: int, generator: torch.Generator) -> Tensor:
        """How active each feature of a group is [count, features], 0 for the others."""
        magnitude, arguments = read_magnitude(self.made.magnitude)
        found = torch.zeros((count, self.made.features), device=self.device)
        before: Tensor | None = None
        for group in self.groups:
            chosen = group.choose(count, before, generator) * magnitude.draw(arguments, (count, 1), generator)
            found[:, group.members], before = chosen, chosen.argmax(1)
        return found

    def cell(self, inputs: Tensor) -> Tensor:
        """The cell of each input [count] int64; 0 where there are none."""
        if self.cells is None:
            return super().cell(inputs)
        if not self.groups:
            return self._places(inputs)[0]
        leading = inputs[:, self.groups[0].members].argmax(1)
        if len(self.groups) == 1:
            if not self.cells.modifiers:
                return leading
            places = torch.stack(list(self._places(inputs).values()), 1)
            return leading * self.cells.modifiers + places.gather(1, leading[:, None])[:, 0]
        others = inputs[:, self.groups[1].members]
        modifier = torch.where(others.amax(1) > 0, others.argmax(1) + 1, 0)
        return leading * (self.cells.modifiers + 1) + modifier

    def features(self, inputs: Tensor) -> Tensor:
        """How active each direction is [batch, directions]; of a manifold, that of the nearest place."""
        strengths = inputs[:, : self.made.features]
        if self.pairs:
            first, second = (strengths[:, group.members] for group in self.groups)
            own = ((first > 0)[:, :, None] * second[:, None, :]).flatten(1)
            shared = [] if self.made.interaction == 1 else [second * math.sqrt(1 - self.made.interaction)]
            return torch.cat([first, *shared, own * math.sqrt(self.made.interaction)], 1)
        if not self.manifolds:
            return strengths
        places = self._places(inputs)
        parts = [
            strengths[:, at, None] * (F.one_hot(places[at], self.manifolds[at].places) if at in places else 1)
            for at in range(self.made.features)
        ]
        return torch.cat(parts, 1)

    def activations(self, inputs: Tensor, site: str) -> Tensor:
        """Activations [batch, d] float32: the features along their directions, the noise and the offset."""
        if self.manifolds:
            codes, axes = self._codes(inputs), self.params["axes"]
        else:
            codes, axes = self.features(inputs), self.directions
        acts = product(codes.contiguous(), axes) + self.origin
        return (acts + inputs[:, -self.made.d_model :]).contiguous() if self.made.noise else acts.contiguous()

    def _codes(self, inputs: Tensor) -> Tensor:
        """The activation by the axes [batch, axes]."""
        at = self._positions(inputs)
        parts = [
            inputs[:, each, None] * (self.manifolds[each].points(at[each]) if each in at else 1)
            for each in range(self.made.features)
        ]
        return torch.cat(parts, 1)

    def coordinates(self, inputs: Tensor) -> Tensor:
        """Where each input lies on each manifold, 0 where it has no point there [batch, …] float64."""
        there = inputs[:, : self.made.features] != 0
        at = self._positions(inputs)
        return torch.cat([there[:, [each]] * self.manifolds[each].coordinates(at[each]) for each in at], 1)

    def _positions(self, inputs: Tensor) -> dict[int, Tensor]:
        """Of each manifold, where on it a point would lie [batch, positions]."""
        sizes = [manifold.positions for manifold in self.manifolds.values()]
        columns = inputs[:, self.made.features :][:, : sum(sizes)]
        return dict(zip(self.manifolds, columns.split(sizes, 1), strict=True))

    def _places(self, inputs: Tensor) -> dict[int, Tensor]:
        """Of each manifold, the place nearest to where a point would lie [batch] int64."""
        return {each: self.manifolds[each].nearest(at) for each, at in self._positions(inputs).items()}

    # -- classes and exact chances --------------------------------------------------------------------------------

    def _cells(self) -> FeatureCells | None:
        """Where all features are one manifold that is always there, its places; where they come in one group, these,
        and beside them the places of manifolds of one size; where in two, one of the first with one or none of the
        second."""
        groups, count = self.groups, self.made.features
        sizes = {manifold.places for manifold in self.manifolds.values()}
        alike = sizes.pop() if len(sizes) == 1 and len(self.manifolds) == count else 0
        if alike and count == 1 and read_rates(self.made.rates, 1, None) == [1] and not groups:
            return FeatureCells(alike)
        if not groups or len(self.grouped) < count or groups[0].chance < 1:
            return None
        if len(groups) == 1:
            return FeatureCells(count, alike, always=alike > 0)
        return FeatureCells(groups[0].size, groups[1].size) if len(groups) == 2 and not self.manifolds else None

    @property
    def chance(self) -> NDArray[np.float64]:
        """The probability of each cell [T], empty without cells."""
        if self.cells is None:
            return np.zeros(0)
        if not self.groups:
            return np.full(self.cells.count, 1 / self.cells.count)
        leading = self.groups[0].shares
        if len(self.groups) == 1:
            return np.repeat(leading / max(1, self.cells.modifiers), max(1, self.cells.modifiers))
        return pair_chances(*self.groups).ravel()

    @cached_property
    def together(self) -> NDArray[np.float64]:
        """The chance of every two directions to be active on one input [directions, directions], exactly."""
        return together(self)

    @property
    def l0(self) -> float:
        """How many features are active on an input, on average."""
        return float(np.diag(self.together).sum())

    @property
    def mean(self) -> Tensor:
        """E[activation] [d_model] float64."""
        magnitude, arguments = read_magnitude(self.made.magnitude)
        strong = [*self.owners, *(second for _, second in self.pairs)]
        scales = self.scales.double().cpu()[strong]
        if self.pairs:
            shared = torch.tensor([at in range(self.made.features)[self.groups[1].members] for at in self.owners])
            scales[: len(shared)][shared] *= math.sqrt(1 - self.made.interaction)
            scales[len(shared) :] *= math.sqrt(self.made.interaction)
        codes, axes = torch.from_numpy(np.diag(self.together).copy()) * scales, self.directions
        if self.manifolds:
            each = torch.zeros(self.made.features, dtype=torch.float64).index_add_(0, torch.tensor(self.owners), codes)
            means = [self.manifolds[at].mean() if at in self.manifolds else torch.ones(1) for at in range(len(each))]
            codes, axes = torch.cat([code * mean for code, mean in zip(each, means, strict=True)]), self.params["axes"]
        return magnitude.mean(*arguments) * codes.double() @ axes.double().cpu() + self.origin.double().cpu()
