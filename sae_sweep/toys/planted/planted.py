"""Planted features made of parts: directions, how features come, how strong they are, manifolds, noise, an offset.

Published toys differ in these alone, so that the toy of a paper is a line of settings: rates `0.25, 0.05, 0.05, 0.05`
and the tree `0>1:0.2` are that of "A is for Absorption". A feature comes by a coin of its own (`rates`), only with
another one (`tree`), with others by a copula (`correlations`), or as one of a group (`one_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sae_sweep.config.settings import Toy
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting, register
from sae_sweep.toys.classes import count_pairs
from sae_sweep.toys.model import ToyKind
from sae_sweep.toys.planted import features, planted_kind
from sae_sweep.toys.planted.correlations import read_correlations
from sae_sweep.toys.planted.directions import DIRECTIONS
from sae_sweep.toys.planted.groups import read_groups
from sae_sweep.toys.planted.magnitudes import MAGNITUDES, read_magnitude
from sae_sweep.toys.planted.population import Planted
from sae_sweep.toys.planted.rates import NO_SCALES, read_rates, read_scales
from sae_sweep.toys.planted.text import NOTHING
from sae_sweep.toys.planted.trees import read_tree


def _check(toy: Toy) -> None:
    """UserError, one line, for parts that do not go together."""
    tree = read_tree(toy.tree, toy.features)
    read_magnitude(toy.magnitude)
    read_scales(toy.scales, toy.features, None)
    groups = read_groups(toy.one_of, read_rates(toy.rates, toy.features, None), tree)
    if groups and toy.rates.strip().startswith("loguniform"):
        raise UserError("toy.rates=loguniform is drawn with the toy, and weighs no features of toy.one_of")
    whole = len(groups) == 2 and groups[0].size + groups[1].size == toy.features
    if toy.interaction and (not whole or groups[0].chance < 1 or toy.manifolds != NOTHING or toy.tree != NOTHING):
        raise UserError("toy.interaction is of two groups of toy.one_of that hold all features, the first with the "
                        "chance 1, without a tree or manifolds")  # fmt: skip
    made = Planted(toy, {})
    read_correlations(toy.correlations, tree, None, made.grouped)
    if toy.directions == "orthonormal" and made.axes > toy.d_model:
        raise UserError(
            f"toy.directions=orthonormal: {made.axes} directions do not fit into toy.d_model={toy.d_model} numbers "
            "(toy.directions=random)"
        )


def _classes(partition: str, toy: Toy) -> int:
    cells = Planted(toy, {}).cells
    if cells is None:
        raise UserError(f"${{cells:{partition}}}: toy={toy.name} has no cells, its features come in many combinations")
    return count_pairs(partition, cells.d_vocab, cells.modifiers + (not cells.always))


def preset(parts: Callable[[Toy], dict[str, Any]], **said: Any) -> ToyKind:
    """A kind of toy that is a planted one under a name, with settings of its own.

    parts(toy): the settings of `planted` that it stands for, beside d_model; said: what else a `ToyKind` takes
    """

    def made(toy: Toy) -> Toy:
        return Toy("planted", seed=toy.seed, d_model=toy.d_model, **parts(toy))

    return planted_kind(lambda: Planted, _classes, parts=made, **said)


register(
    planted_kind(
        lambda: Planted,
        _classes,
        name="planted",
        description="features made of parts: directions, rates, magnitudes, a tree, correlations, groups, manifolds, "
        "noise, an offset",
        source="arXiv 2409.14507, 2505.11756, 2508.16560, 2602.14111, 2602.14687, 2509.02565",
        settings={
            **features(),
            "directions": Setting(
                "fitting",
                "of the features: orthonormal, random, fitting: orthonormal if they are at most d_model, else random, "
                "or least_overlap: random ones moved apart",
                choices=DIRECTIONS,
            ),
            "rates": Setting(
                "0.05",
                "chance that each feature is active: one number for all, one for each (0.2, 0.1), linear(first, last), "
                "zipf(first, "
                "exponent) or loguniform(least, most)",
                kind="text",
            ),
            "magnitude": Setting(
                "constant",
                "distribution of the magnitude of an active feature: "
                + ", ".join(MAGNITUDES)
                + "; with arguments as folded(1, 0.15): "
                "mean and spread (lognormal: of the logarithm; lomax: shape and mean; shifted: least and mean beyond)",
            ),
            "scales": Setting(
                NO_SCALES,
                "what each feature's magnitude is multiplied by, written as rates are",
                kind="text",
                legacy=NO_SCALES,
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
                kind="text",
            ),
            "one_of": Setting(
                NOTHING,
                "0-7, 8-9:0.5: of features 0 to 7 exactly one on each input, weighed by rates, and on half of them one "
                "of 8 and 9; 8-9:0.5:0.3: on .3 of those the one at the same place; all: one group",
                legacy=NOTHING,
            ),
            "interaction": Setting(
                0.0,
                "share of the square of the second group's feature that is a direction of its own with each feature of "
                "the first",
                ge=0,
                le=1,
                legacy=0.0,
            ),
            "manifolds": Setting(
                NOTHING,
                "features whose activations are points on a manifold: 0:circle(places, spread, harmonics), "
                "1:sphere(dims), 2:torus(places), *:circle(8) for all",
                legacy=NOTHING,
            ),
            "noise": Setting(0.0, "variance of the Gaussian noise that is added to each number of an activation", ge=0),
            "offset": Setting(0.0, "length of a vector that is added to every activation", ge=0),
        },
        independent=True,
        check=_check,
    )
)
