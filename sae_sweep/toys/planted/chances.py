"""Exact chances of planted features to be active together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sae_sweep.lazy import lazy
from sae_sweep.toys.planted.groups import Group, pair_chances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sae_sweep.toys.planted.planted import Planted

    Floats = NDArray[np.float64]
else:
    np = lazy("numpy")

# Nodes of Gauss-Legendre: with them a chance of two correlated features is exact to about 1e-9.
NODES = 64


def together(toy: Planted) -> Floats:
    """See `Planted.together`.

    Each feature needs itself and its ancestors. Edges of different groups are independent of all else, so their rates
    multiply; children that exclude each other never meet; roots meet as their correlation or their group says. The
    places of a manifold exclude each other, and are equally likely.
    """
    needs = [toy.tree.ancestry(feature) for feature in toy.owners] + [list(pair) for pair in toy.pairs]
    rates = toy.rates.double().cpu().numpy()
    of_roots = np.outer(rates, rates) + np.diag(rates * (1 - rates))
    if "mixing" in toy.params:
        mixing = toy.params["mixing"].double().cpu().numpy()
        of_roots = both_below(rates, mixing @ mixing.T)
    of_roots = _of_roots(of_roots, toy.groups)
    if toy.tree.edges or toy.pairs:
        found = np.array([[_chance_of({*one, *other}, toy, rates, of_roots) for other in needs] for one in needs])
    else:
        found = of_roots[np.ix_(toy.owners, toy.owners)]
    if not toy.manifolds:
        return found
    owners = np.array(toy.owners)
    share = np.array([1 / toy.manifolds[at].places if at in toy.manifolds else 1.0 for at in toy.owners])
    apart = np.where(owners[:, None] == owners, 0.0, found * np.outer(share, share))
    np.fill_diagonal(apart, np.diag(found) * share)
    return apart


def _chance_of(needed: set[int], toy: Planted, rates: Floats, of_roots: Floats) -> float:
    """The chance that all of some features, ancestors among them, are active on one input."""
    below = [feature for feature in needed if toy.tree.parents[feature] >= 0]
    roots = sorted(needed.difference(below))
    twice = any(sum(group.first <= root < group.first + group.size for root in roots) > 1 for group in toy.groups)
    if twice or len({toy.tree.leaders[feature] for feature in below}) < len(below):
        return 0.0
    return float(of_roots[roots[0], roots[-1]] * np.prod(rates[below]))


def _of_roots(apart: Floats, groups: Sequence[Group]) -> Floats:
    """The chance of every two roots to be active together [features, features].

    apart: the same where no features come in groups, of which those outside groups keep theirs
    """
    found = apart.copy()
    each = np.diag(apart).copy()
    for group in groups:
        each[group.members] = group.shares
    for group in groups:
        found[group.members] = np.outer(each[group.members], each)
        found[:, group.members] = found[group.members].T
        found[group.members, group.members] = np.diag(group.shares)
    if len(groups) > 1 and groups[1].follows:
        first, second = groups[:2]
        joint = pair_chances(first, second)[:, 1:]
        found[first.members, second.members], found[second.members, first.members] = joint, joint.T
        found[second.members, second.members] = np.diag(joint.sum(0))
    return found


def both_below(rates: Floats, correlations: Floats) -> Floats:
    """P(u_i < rates_i and u_j < rates_j) [n, n], where u = Φ(g) and normal numbers g have these correlations [n, n].

    p_i·p_j + 1/2π ∫ exp(-(a² + b² - 2ab·sin θ) / (2cos² θ)) dθ from 0 to arcsin ρ, with a and b the quantiles of the
    rates (Plackett 1954).
    """
    from scipy.special import ndtri

    quantiles = ndtri(np.clip(rates, 0.0, 1 - 1e-16))
    a, b = quantiles[:, None, None], quantiles[None, :, None]
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    end = np.arcsin(np.clip(correlations, -1, 1))[..., None]
    theta = end * (nodes + 1) / 2
    inner = np.exp(-(a * a + b * b - 2 * a * b * np.sin(theta)) / (2 * np.cos(theta) ** 2))
    found: Floats = np.outer(rates, rates) + (inner * weights).sum(-1) * end[..., 0] / (4 * np.pi)
    np.fill_diagonal(found, rates)
    return found
