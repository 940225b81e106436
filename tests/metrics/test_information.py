"""Information of the top latent: published figures, brute force, and codes that know exactly one thing."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import CUT, Planted

from sae_sweep.config.columns import shuffled, spread
from sae_sweep.config.settings import Distribution
from sae_sweep.metrics.firing import NO_LATENT, FiringCounter, FiringTable
from sae_sweep.metrics.information import (
    TOLD,
    _nested,
    _tops,
    cofiring,
    corrected,
    information,
    null_shares,
    share_told,
    winner_entropy,
)
from sae_sweep.toys.classes import FACTORS, Cells
from sae_sweep.toys.sampler import cell_weights


def top_table(cells, latent_of_cell, chance) -> FiringTable:
    """The table of a code with one top latent per cell, every sequence an input."""
    none = np.zeros(0, np.int64)
    every = np.arange(cells.count)
    counts = cells.sizes.astype(np.int64)
    width = int(latent_of_cell.max()) + 1
    empty = (none, none, np.zeros(0), np.zeros(0), none)
    return FiringTable(width, cells.count, *empty, every, latent_of_cell, chance, counts)


@pytest.mark.parametrize(
    ("distribution", "runner_up", "copies"), [("max_stratified", 0.196, 0.048), ("uniform", 0.200, 0.032)]
)
def test_what_a_query_code_tells_of_the_rest(distribution, runner_up, copies):
    """The floors that a code of (m, q) alone reaches at (64, 4), all 16.8 million inputs (REFERENCE §8)."""
    cells = Cells(64, 4)
    table = top_table(cells, cells.partition("mq").of_cell, cell_weights(cells, Distribution(distribution)))
    assert share_told(table, cells, "q", "m") == pytest.approx(1)
    assert share_told(table, cells, "n", "m") == pytest.approx(runner_up, abs=5e-4)
    assert share_told(table, cells, "c", "m") == pytest.approx(copies, abs=5e-4)
    # Given the query as well, it tells nothing more.
    assert share_told(table, cells, "n", "mqc") == pytest.approx(0, abs=1e-9)
    assert share_told(table, cells, "c", "mqn") == pytest.approx(0, abs=1e-9)


PLANTED = Planted(8, 4)


@pytest.mark.parametrize(("partition", "column"), [("mq", "query"), ("mn", "runner_up"), ("mc", "copies")])
def test_codes_that_know_one_factor(partition, column):
    found = information(PLANTED.table(PLANTED.one_per(partition)), PLANTED.cells, 20)
    assert found[f"info_{column}"] == pytest.approx(1)
    assert found[f"unique_{column}"] == pytest.approx(1)
    for other in {"query", "runner_up", "copies"} - {column}:
        assert found[f"unique_{other}"] == pytest.approx(0, abs=1e-9)
        assert 0 <= found[f"info_{other}"] < 0.35


def test_code_of_the_maximum_tells_nothing_more():
    found = information(PLANTED.table(PLANTED.one_per("m")), PLANTED.cells, 20)
    assert set(found) == {*TOLD, *map(shuffled, TOLD), *map(spread, TOLD)}
    assert list(found.values()) == pytest.approx([0] * 18, abs=1e-9)


def test_code_of_every_cell_tells_everything():
    found = information(PLANTED.table(PLANTED.one_per("mqnc")), PLANTED.cells, 20)
    assert [found[name] for name in TOLD] == pytest.approx([1] * 6)


@pytest.mark.parametrize("distribution", ["uniform", "max_stratified"])
def test_many_latents_at_random_tell_nothing(distribution):
    """512 latents, 4,096 inputs: most of the query and the runner-up seems known, and the null says that it is not."""
    planted = Planted(16, 3, distribution)
    norms = np.zeros((len(planted.cell), 512), np.float32)
    norms[np.arange(len(norms)), np.random.default_rng(0).integers(0, 512, len(norms))] = 1
    table = planted.table(norms)
    assert share_told(table, planted.cells, "q", "m") > 0.75
    assert share_told(table, planted.cells, "n", "m") > 0.75
    found = information(table, planted.cells, 50)
    assert found["info_query"] == pytest.approx(0, abs=0.05)
    assert found["info_runner_up"] == pytest.approx(0, abs=0.05)


def test_null_of_1_is_no_answer():
    planted = Planted(4, 3)
    found = information(planted.table(np.eye(len(planted.cell), dtype=np.float32)), planted.cells, 5)
    assert found["info_query"] is None
    assert corrected(0.5, 1.0) is None
    assert corrected(0.6, 0.2) == pytest.approx(0.5)
    assert corrected(None, None) is None


def test_factors_that_are_known_anyway_are_null():
    """With two tokens, the runner-up is what copies and query leave; copies follow from the runner-up."""
    planted = Planted(5, 2)
    found = information(planted.table(planted.one_per("mq")), planted.cells, 5)
    assert found["unique_copies"] is None
    assert found["info_copies"] is not None
    assert found["info_query"] == pytest.approx(1)


def test_no_latent_is_a_value_too():
    """A latent that fires on query 0 alone: where none fires the query is another."""
    planted = Planted(2, 3)
    norms = (planted.factor("q") == 0).astype(np.float32)[:, None]
    assert share_told(planted.table(norms), planted.cells, "q", "m") == pytest.approx(1)


def share_by_hand(top, factor, given, weight):
    """I(top; factor | given)/H(factor | given) from lists, one entry an input."""
    entropy = told = 0.0
    for value in set(given):
        inputs = [i for i, g in enumerate(given) if g == value]
        total = sum(weight[i] for i in inputs)
        joint, of_factor, of_top = defaultdict(float), defaultdict(float), defaultdict(float)
        for i in inputs:
            joint[top[i], factor[i]] += weight[i] / total
            of_factor[factor[i]] += weight[i] / total
            of_top[top[i]] += weight[i] / total
        entropy -= total * sum(p * math.log(p) for p in of_factor.values())
        told += total * sum(p * math.log(p / of_top[t] / of_factor[f]) for (t, f), p in joint.items())
    return told / entropy


def random_case(seed, distribution):
    planted = Planted(3, 3, distribution)
    norms = np.random.default_rng(seed).random((len(planted.cell), 3)).astype(np.float32)
    norms[norms < 0.4] = 0
    top = np.where(norms.max(1) > CUT, norms.argmax(1), -1)
    return planted, planted.table(norms), top


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(["uniform", "cell_stratified"]), st.sampled_from("qnc"), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_share_against_brute_force(seed, distribution, factor, alone):
    planted, table, top = random_case(seed, distribution)
    given_ = "".join(name for name in FACTORS if name != factor) if not alone else "m"
    values = list(zip(*(planted.factor(name) for name in given_), strict=True))
    share = share_told(table, planted.cells, factor, given_)
    assert share == pytest.approx(share_by_hand(top, planted.factor(factor), values, planted.weight))


@pytest.mark.parametrize("distribution", ["uniform", "cell_stratified"])
def test_null_is_the_mean_over_permutations(distribution):
    """All 7! orders of maximum 1's seven inputs (maximum 0 has one), weights staying with their inputs."""
    planted = Planted(2, 3, distribution)
    top = np.array([0, 1, 1, 2, 0, 0, 1, 2])
    norms = np.eye(3, dtype=np.float32)[top]
    maximum, query = planted.factor("m"), planted.factor("q")
    ones = np.flatnonzero(maximum == 1)
    shares = []
    for order in itertools.permutations(ones):
        dealt = top.copy()
        dealt[ones] = top[list(order)]
        shares.append(share_by_hand(dealt, query, maximum, planted.weight))
    table = planted.table(norms)
    found = null_shares(table, _tops(table), _nested(planted.cells, "q", "m"), 20_000)
    assert found.mean() == pytest.approx(np.mean(shares), abs=4 * np.std(shares) / math.sqrt(20_000))
    assert found.std() == pytest.approx(np.std(shares), rel=0.03)


def test_same_table_same_null():
    _, table, _ = random_case(0, "uniform")
    first, second = (null_shares(table, _tops(table), _nested(Cells(3, 3), "q", "m"), 3) for _ in "ab")
    assert (first == second).all() and (first > 0).all() and len(set(first)) == 3


def test_the_null_of_information_is_what_the_others_leave():
    """Each permutation corrected by the others: no more than chance in the mean, and the spread that a value has."""
    planted = Planted(4, 3)
    norms = np.eye(5, dtype=np.float32)[np.random.default_rng(0).integers(0, 5, len(planted.cell))]
    table = planted.table(norms)
    shares = null_shares(table, _tops(table), _nested(planted.cells, "q", "m"), 200)
    found = information(table, planted.cells, 200)
    spread_of_shares = shares.std(ddof=1) / (1 - shares.mean())
    assert found["shuffled_info_query_sd"] == pytest.approx(spread_of_shares, rel=0.02) != 0
    assert abs(found["shuffled_info_query"]) < 0.01 * spread_of_shares
    assert information(table, planted.cells, 1)["shuffled_info_query_sd"] > 0


def test_the_entropy_of_the_winner() -> None:
    table = FiringTable(
        3, 4, *[np.zeros(0, np.int64)] * 2, *[np.zeros(0)] * 2, np.zeros(0, np.int64),
        top_cell=np.array([0, 1, 2, 3]), top_latent=np.array([NO_LATENT, 2, 2, 0]),
        top_weight=np.array([1.0, 2.0, 2.0, 3.0]), top_count=np.ones(4, np.int64),
    )  # fmt: skip
    shares = np.array([1, 4, 3]) / 8
    assert winner_entropy(table) == pytest.approx(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]], 0),  # one at a time
        ([[1, 1], [1, 0], [0, 1], [0, 0]], 1),  # each by itself
        ([[1, 1], [1, 1], [0, 0], [0, 0]], 2),  # always both
        ([[1, 0], [1, 0], [0, 0], [0, 0]], None),  # one alone
    ],
)
def test_cofiring_against_independence(codes: list[list[int]], expected: float | None) -> None:
    counter = FiringCounter(len(codes[0]), 1, 0.01)
    for rows in (codes, codes[::-1]):
        counter.add(torch.tensor(rows).float(), np.zeros(len(rows), np.int64), np.full(len(rows), 1 / 8))
    assert cofiring(counter.table) == (None if expected is None else pytest.approx(expected))


def test_a_latent_at_the_cut_does_not_fire_beside_another() -> None:
    counter = FiringCounter(2, 1, 0.5)
    counter.add(torch.tensor([[0.5, 1], [1, 0], [1, 1]]), np.zeros(3, np.int64), np.full(3, 1 / 3))
    assert counter.table.together == pytest.approx(2 / 3)


def test_cofiring_is_weighted() -> None:
    counter = FiringCounter(2, 1, 0.01)
    counter.add(torch.tensor([[1.0, 1], [1, 0], [0, 1]]), np.zeros(3, np.int64), np.array([0.5, 0.25, 0.25]))
    assert cofiring(counter.table) == pytest.approx(0.5 / 0.75**2)
