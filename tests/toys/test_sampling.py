"""The stream: draws against exact probabilities; constants, batches and weighted inputs against enumeration."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_sweep.config.settings import Distribution, Evaluation, Toy, derive_seed
from sae_sweep.errors import UserError
from sae_sweep.toys import sampling
from sae_sweep.toys import sequences as sequences_module
from sae_sweep.toys.classes import Cells
from sae_sweep.toys.max_of_k import MaxOfK, train
from sae_sweep.toys.sampler import Sampler, cell_weights
from sae_sweep.toys.sampling import Chunk, EvaluationInputs, Stream
from sae_sweep.toys.sequences import weighted_inputs

NAMES = ("uniform", "max_stratified", "cell_stratified", "copies_balanced")
SITES = ("pre_unembed", "post_unembed")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes a second thread is all waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy_model(d_vocab: int = 7, k: int = 3, d_model: int = 5) -> MaxOfK:
    """A toy after a few steps: activations without structure will do here."""
    toy = Toy(d_vocab=d_vocab, k=k, d_model=d_model, d_head=4, steps=5, batch_size=16)
    return MaxOfK(toy, train([toy], "cpu")[0])


def all_inputs(d_vocab: int, k: int) -> np.ndarray:
    return np.array(list(itertools.product(range(d_vocab), repeat=k)))


def chi_square(counts: np.ndarray, chance: np.ndarray) -> float:
    """Deviation of counts from chances, in standard deviations of the χ² statistic; rare classes are pooled."""
    assert counts[chance == 0].sum() == 0
    expected = chance * counts.sum()
    order = np.argsort(expected)
    bins = np.minimum((np.cumsum(expected[order]) // 10).astype(int), np.inf)
    _, bins = np.unique(bins, return_inverse=True)
    observed, expected = np.bincount(bins, counts[order]), np.bincount(bins, expected[order])
    degrees = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


# ---- probabilities of cells


@pytest.mark.parametrize(("name", "partition"), list(zip(NAMES[1:], ("m", "mqnc", "mc"), strict=True)))
def test_every_class_is_equally_likely_and_sequences_within_it_too(name: str, partition: str) -> None:
    cells = Cells(6, 4)
    chance, classes = cell_weights(cells, Distribution(name)), cells.partition(partition)
    assert np.bincount(classes.of_cell, chance) == pytest.approx(np.full(classes.count, 1 / classes.count))
    per_sequence = chance / cells.sizes
    for number in range(classes.count):
        assert np.ptp(per_sequence[classes.of_cell == number]) == pytest.approx(0, abs=1e-15)


def test_uniform_is_by_size() -> None:
    cells = Cells(6, 4)
    assert cell_weights(cells, Distribution("uniform")) == pytest.approx(cells.sizes / 6**4)


def csv(path: Path, text: str) -> Distribution:
    path.write_text(text, encoding="utf-8")
    return Distribution("weights", file=str(path))


def test_a_file_of_weights_is_spread_over_the_cells_it_names(tmp_path: Path) -> None:
    cells = Cells(5, 3)
    m, n = cells.factors["m"], cells.factors["n"]
    got = cell_weights(cells, csv(tmp_path / "w.csv", "weight, n ,m\n3,none,2\n1,-1,4\n\n2,1,3\n0,0,3\n"))
    for (top, runner_up), share in {(2, -1): 3 / 6, (4, -1): 1 / 6, (3, 1): 2 / 6}.items():
        inside = (m == top) & (n == runner_up)
        assert got[inside] == pytest.approx(share * cells.sizes[inside] / cells.sizes[inside].sum())
    assert got.sum() == pytest.approx(1)
    every = "m,c,weight\n" + "".join(
        f"{top},{copies},7\n" for top in range(5) for copies in ((3,) if top == 0 else (1, 2, 3))
    )
    balanced = cell_weights(cells, Distribution("copies_balanced"))
    assert cell_weights(cells, csv(tmp_path / "mc.csv", every)) == pytest.approx(balanced)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "columns"),
        ("m,q\n1,1\n", 1, "columns"),
        ("weight\n1\n", 1, "columns"),
        ("m,m,weight\n1,1,1\n", 1, "columns"),
        ("m,size,weight\n1,1,1\n", 1, "columns"),
        ("m,weight\n1,1\n5,1\n", 3, "no cell has m=5"),
        ("m,n,weight\n2,2,1\n", 2, "no cell has m=2, n=2"),
        ("m,weight\n1,-1\n", 2, "number from 0"),
        ("m,weight\n1,nan\n", 2, "number from 0"),
        ("m,weight\n1,inf\n", 2, "number from 0"),
        ("m,weight\n1,much\n", 2, "number from 0"),
        ("m,weight\nnone,1\n", 2, "whole number"),
        ("m,weight\n1,1,1\n", 2, "3 values under 2 columns"),
        ("m,weight\n1,1\n2,0\n1,1\n", 4, "second weight"),
        ("m,weight\n1,0\n2,0\n", 3, "sum to 0"),
    ],
)
def test_a_bad_file_of_weights_is_one_line_with_its_place(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = tmp_path / "w.csv"
    with pytest.raises(UserError) as error:
        cell_weights(Cells(5, 3), csv(path, text))
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: ")
    assert reason in message
    assert "\n" not in message


def test_a_file_of_weights_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.csv"):
        cell_weights(Cells(5, 3), Distribution("weights", file=str(tmp_path / "gone.csv")))
    with pytest.raises(UserError, match=r"distribution\.file"):
        cell_weights(Cells(5, 3), Distribution("weights"))


# ---- drawing


@pytest.mark.parametrize(("d_vocab", "k"), [(4, 4), (5, 3), (2, 6), (9, 2), (64, 4)])
@pytest.mark.parametrize("name", NAMES)
def test_cells_are_drawn_by_their_chance(name: str, d_vocab: int, k: int) -> None:
    cells = Cells(d_vocab, k)
    chance = cell_weights(cells, Distribution(name))
    drawn = Sampler(cells, chance, "cpu").draw(200_000, torch.Generator().manual_seed(0))
    counts = np.bincount(cells.index(drawn.numpy()), minlength=cells.count)
    assert abs(chi_square(counts, chance)) < 5


@pytest.mark.parametrize(("d_vocab", "k"), [(4, 4), (3, 5), (2, 6), (9, 2)])
@pytest.mark.parametrize("by_cells", [True, False])
def test_sequences_of_a_cell_are_equally_likely(d_vocab: int, k: int, by_cells: bool) -> None:
    cells = Cells(d_vocab, k)
    chance = cell_weights(cells, Distribution("uniform")) if by_cells else None
    drawn = Sampler(cells, chance, "cpu").draw(100_000, torch.Generator().manual_seed(1)).numpy()
    codes = np.ravel_multi_index(tuple(drawn.T), (d_vocab,) * k)
    counts = np.bincount(codes, minlength=d_vocab**k)
    assert abs(chi_square(counts, np.full(d_vocab**k, d_vocab**-k))) < 5


def test_a_sequence_lies_in_the_cell_it_was_drawn_for() -> None:
    for d_vocab, k in ((6, 5), (64, 4), (16, 12)):
        cells = Cells(d_vocab, k)
        cell = torch.arange(0, cells.count, 7)
        drawn = Sampler(cells, np.ones(cells.count), "cpu").draw_within(cell, torch.Generator().manual_seed(0))
        assert np.array_equal(cells.index(drawn.numpy()), cell.numpy())


# ---- the stream


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", NAMES)
def test_constants_are_exact_where_inputs_can_be_enumerated(name: str, site: str) -> None:
    model = toy_model()
    stream = Stream(model, site, Distribution(name), 0, 8, "cpu")
    cells, inputs = Cells(7, 3), all_inputs(7, 3)
    weight = (cell_weights(cells, Distribution(name)) / cells.sizes)[cells.index(inputs)]
    raw = model.activations(torch.from_numpy(inputs), site).double().numpy()
    x = (raw - stream.mean.numpy()) * stream.scale
    assert weight @ x == pytest.approx(np.zeros(x.shape[1]), abs=1e-5)
    assert weight @ (x**2).sum(1) == pytest.approx(x.shape[1], rel=1e-5)
    assert stream.covariance().numpy() == pytest.approx((x * weight[:, None]).T @ x, abs=1e-5)


@pytest.mark.parametrize("tabled", [True, False])
def test_a_batch_depends_on_its_step_alone(tabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK_ROWS", 50)
    monkeypatch.setattr(sampling, "TABLE_INPUTS", 1 << 18 if tabled else 0)
    model = toy_model()

    def stream(data_seed: int = 3) -> Stream:
        return Stream(model, "pre_unembed", Distribution("max_stratified"), data_seed, 12, "cpu")

    whole = stream().batches(0, 23)
    assert whole.shape == (23, 12, 5)
    assert whole.dtype == torch.float32
    one = stream()
    for start, count in ((0, 1), (1, 2), (3, 13), (16, 7), (5, 1), (4, 4)):
        assert torch.equal(one.batches(start, count), whole[start : start + count])
    assert torch.equal(stream().batches(22, 1)[0], whole[22])
    assert len({batch.sum().item() for batch in whole}) == 23
    assert not torch.equal(stream(4).batches(0, 1), whole[:1])


def test_both_sites_see_the_same_inputs_and_exemplars_are_others() -> None:
    model = toy_model()
    pre, post = (Stream(model, site, Distribution("cell_stratified"), 1, 64, "cpu") for site in SITES)
    raw_pre = pre.batches(2, 1)[0] / pre.scale + pre.mean
    raw_post = post.batches(2, 1)[0] / post.scale + post.mean
    torch.testing.assert_close(model.logits(raw_pre, "pre_unembed"), raw_post, atol=1e-5, rtol=1e-5)
    exemplars = pre.exemplars(64, 0)
    assert exemplars.shape == (64, 5)
    assert torch.equal(exemplars, pre.exemplars(64, 0))
    assert not torch.equal(exemplars, pre.exemplars(64, 1))
    assert not torch.equal(exemplars, pre.batches(0, 1)[0])


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((7, 3, 5), "uniform"),
        ((7, 3, 5), "max_stratified"),
        ((33, 4, 31), "uniform"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((33, 4, 31), "max_stratified"), ((9, 20, 8), "uniform"), ((9, 20, 8), "max_stratified"))
        ),
    ],
)
def test_the_stream_has_the_same_bits_on_any_threads(shape: tuple[int, int, int], name: str) -> None:
    model = toy_model(*shape)

    def bits() -> list[torch.Tensor]:
        stream = Stream(model, "pre_unembed", Distribution(name), 0, 37, "cpu")
        return [stream.batches(0, 100), stream.exemplars(999, 0), stream.mean, stream.covariance()]

    one = bits()
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(bits(), one, strict=True))


def test_large_toys_are_normalised_from_a_sample() -> None:
    model = toy_model(64, 4, 8)
    for name in ("uniform", "cell_stratified"):
        x = Stream(model, "pre_unembed", Distribution(name), 0, 512, "cpu").batches(0, 200).flatten(0, 1).double()
        assert x.mean(0).abs().max() < 0.03
        assert x.square().sum(1).mean().item() == pytest.approx(8, rel=0.02)


def test_activations_that_do_not_vary_are_refused(tmp_path: Path) -> None:
    # One sequence in the cell: (0, 0, 6).
    only = csv(tmp_path / "one.csv", "m,q,n,c,weight\n6,6,0,1,1\n")
    with pytest.raises(UserError, match="do not vary"):
        Stream(toy_model(), "pre_unembed", only, 0, 8, "cpu")
    broken = toy_model()
    broken.params["W_E"][0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        Stream(broken, "pre_unembed", Distribution("uniform"), 0, 8, "cpu")


def test_seeds_do_not_collide() -> None:
    seeds = {derive_seed(word, seed, block) for word in ("a", "b") for seed in range(30) for block in range(30)}
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- inputs to measure on


def evaluation_inputs(model: MaxOfK, distribution: Distribution, inputs: int) -> EvaluationInputs:
    stream = Stream(model, "pre_unembed", distribution, 0, 8, "cpu")
    evaluation = Evaluation().replace(inputs=inputs)
    return EvaluationInputs(model, "pre_unembed", distribution, stream.mean, stream.scale, evaluation)


def joined(chunks: list[Chunk]) -> Chunk:
    fields = [field.name for field in dataclasses.fields(Chunk)]
    return Chunk(*(torch.cat([getattr(chunk, field) for chunk in chunks]) for field in fields))


@pytest.mark.parametrize("name", NAMES)
def test_enumeration_has_every_input_once_in_the_order_of_cells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences_module, "CHUNK_ROWS", 100)
    inputs = evaluation_inputs(toy_model(), Distribution(name), 343)
    chunks = list(inputs)
    assert [len(chunk.x) for chunk in chunks] == [100, 100, 100, 43]
    whole = joined(chunks)
    assert inputs.exact
    assert inputs.count == 343 == len(set(map(tuple, whole.inputs.tolist())))
    assert np.array_equal(inputs.cells.index(whole.inputs.numpy()), whole.cell.numpy())
    assert (whole.cell.diff() >= 0).all()
    assert np.bincount(whole.cell, whole.weight) == pytest.approx(inputs.chance)
    assert (whole.weight @ whole.x.double()).numpy() == pytest.approx(np.zeros(5), abs=1e-5)
    assert (whole.weight @ whole.x.double().square().sum(1)).item() == pytest.approx(5, rel=1e-5)


def test_inputs_of_no_weight_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences_module, "CHUNK_ROWS", 10)
    some = csv(tmp_path / "some.csv", "m,weight\n2,1\n5,3\n6,0\n")
    exact = evaluation_inputs(toy_model(), some, 343)
    chunks = list(exact)
    assert [len(chunk.x) for chunk in chunks] == [10] * 11
    whole = joined(chunks)
    assert exact.count == len(whole.x) == (3**3 - 2**3) + (6**3 - 5**3)
    assert set(whole.inputs.amax(1).tolist()) == {2, 5}
    drawn = joined(list(evaluation_inputs(toy_model(), some, 300)))
    assert set(drawn.inputs.amax(1).tolist()) == {2, 5}
    assert (drawn.weight > 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_unbiased_under_the_distribution(name: str) -> None:
    """Means over many sample sizes, each a sample of its own, against the exact expectation."""
    cells = Cells(12, 4)
    chance = cell_weights(cells, Distribution(name))
    inputs = all_inputs(12, 4)
    weight = (chance / cells.sizes)[cells.index(inputs)]

    def measured(sequences: np.ndarray, cell: np.ndarray, weights: np.ndarray) -> np.ndarray:
        copies, first_is_query = cells.factors["c"][cell] >= 2, sequences[:, 0] == sequences[:, -1]
        values = np.stack([copies, cells.factors["q"][cell], first_is_query, sequences[:, 0] * sequences[:, 1]])
        return values @ weights

    exact = measured(inputs, cells.index(inputs), weight)
    estimates = []
    for count in range(1000, 1060):
        parts = zip(*weighted_inputs(cells, chance, count, "cpu"), strict=True)
        sequences, cell, weights = (torch.cat(part).numpy() for part in parts)
        assert len(cell) == count
        assert weights.sum() == pytest.approx(1)
        assert np.array_equal(cells.index(sequences), cell)
        assert (np.diff(cell) >= 0).all()
        estimates.append(measured(sequences, cell, weights))
    error = np.std(estimates, axis=0, ddof=1) / np.sqrt(len(estimates))
    assert (np.abs(np.mean(estimates, axis=0) - exact) < 4 * error + 1e-12).all()
    # Half of the draws are for light cells: no cell's weight is more than twice its natural one.
    assert weights.max() < 2.2 / 1000


def test_every_pass_over_a_sample_is_the_same() -> None:
    inputs = evaluation_inputs(toy_model(), Distribution("uniform"), 200)
    assert not inputs.exact
    assert inputs.count == 200
    one, other = joined(list(inputs)), joined(list(inputs))
    assert len(one.x) == 200
    for field in dataclasses.fields(Chunk):
        assert torch.equal(getattr(one, field.name), getattr(other, field.name))
