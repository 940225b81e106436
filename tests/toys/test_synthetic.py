"""Toys with planted features: what is drawn against its exact chances, and each kind from command to table."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commandline import call

from sae_sweep.config.columns import table_columns
from sae_sweep.config.settings import Distribution, Evaluation, Point, Site, Toy, canonical, toy_id
from sae_sweep.registry import kinds
from sae_sweep.toys import model
from sae_sweep.toys.planted import MAGNITUDES, Synthetic
from sae_sweep.toys.sampling import EvaluationInputs, Stream, feature_means

SYNTHETIC = tuple(name for name, kind in kinds("toy").items() if not kind.sites and name != "activations")
TOY_KEYS = {name: tuple(kind.settings) for name, kind in kinds("toy").items()}

COUNT = 40_000


def planted(name: str, **settings: object) -> Synthetic:
    toy = Toy(**{"name": name, "features": 6, "d_model": 16, **settings})  # type: ignore[arg-type]
    found = model.load(toy, model.train([toy], "cpu")[0])
    assert isinstance(found, Synthetic)
    return found


def drawn(toy: Synthetic, count: int = COUNT) -> torch.Tensor:
    return toy.draw(count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("magnitudes", MAGNITUDES.choices[1:])
def test_magnitudes_have_mean_one_and_the_tail_they_are_named_for(magnitudes: str) -> None:
    active = drawn(planted("exclusive", magnitudes=magnitudes), 400_000).amax(1)
    assert active.mean().item() == pytest.approx(1, abs=0.01)
    beyond_2 = {"uniform": 0.0, "exponential": math.exp(-2), "lomax": (1 + 2 / 2) ** -3}
    assert (active > 2).float().mean().item() == pytest.approx(beyond_2[magnitudes], abs=0.003)


def test_independent_features_come_and_go_by_themselves() -> None:
    toy = planted("independent", rate=0.3)
    active = (drawn(toy) != 0).double()
    together = (active.T @ active / COUNT).numpy()
    expected = np.full((6, 6), 0.3**2) + np.eye(6) * (0.3 - 0.3**2)
    assert together == pytest.approx(expected, abs=0.012)
    assert toy.cells is None


def test_exclusive_features_are_alone() -> None:
    toy = planted("exclusive")
    inputs = drawn(toy)
    assert ((inputs != 0).sum(1) == 1).all()
    assert np.bincount(toy.cell(inputs)) / COUNT == pytest.approx(toy.chance, abs=0.01)


@pytest.mark.parametrize("co_occurrence", [0.0, 0.5, 1.0])
def test_parents_and_modifiers_come_together_as_asked(co_occurrence: float) -> None:
    toy = planted("parents", modifiers=3, modifier_rate=0.6, co_occurrence=co_occurrence, modifier_magnitude=2.0)
    inputs = drawn(toy)
    assert np.bincount(toy.cell(inputs), minlength=24) / COUNT == pytest.approx(toy.chance, abs=0.01)
    assert toy.chance.sum() == pytest.approx(1)
    assert toy.cells is not None
    cells = toy.cells.factors
    own = (cells["q"] == cells["m"] % 3) & (cells["q"] >= 0)
    assert toy.chance[own].sum() == pytest.approx(0.6 * (co_occurrence + (1 - co_occurrence) / 3))
    assert inputs[:, 6:].amax().item() == 2
    # Parent and modifier are read back from the input.
    factors = torch.from_numpy(cells["m"]), torch.from_numpy(cells["q"])
    parent, modifier = (factor.long()[toy.cell(inputs)] for factor in factors)
    assert (inputs.gather(1, parent[:, None]) == 1).all()
    assert torch.equal(modifier >= 0, inputs[:, 6:].amax(1) > 0)


@pytest.mark.parametrize("interaction", [0.0, 0.25, 1.0])
def test_interaction_is_the_share_of_a_modifier_that_parents_do_not_share(interaction: float) -> None:
    toy = planted("parents", modifiers=2, interaction=interaction, modifier_magnitude=3.0, d_model=24)
    inputs = torch.zeros(4, 8)
    inputs[[0, 1], 2], inputs[[2, 3], 5] = 1, 1
    inputs[[1, 3], 7] = 3
    alone, modified, other_alone, other_modified = toy.activations(inputs, "pre_unembed")
    effects = modified - alone, other_modified - other_alone
    assert [effect.norm().item() for effect in effects] == pytest.approx([3, 3], rel=1e-5)
    assert torch.cosine_similarity(*effects, dim=0).item() == pytest.approx(1 - interaction, abs=1e-5)
    expected = 6 + (2 if interaction < 1 else 0) + (12 if interaction > 0 else 0)
    assert toy.features(inputs).shape == (4, expected) == (4, len(toy.directions))


def test_a_circle_goes_from_places_to_a_manifold() -> None:
    for spread in (0.0, 0.5, 1.0):
        toy = planted("circle", features=16, d_model=8, spread=spread)
        inputs = drawn(toy)
        places = inputs[:, 1]
        off = places - places.round()
        assert off.abs().max().item() == pytest.approx(spread / 2, abs=1e-3)
        assert off.square().mean().item() == pytest.approx(spread**2 / 12, abs=2e-3)
        x = toy.activations(inputs, "pre_unembed")
        assert x.norm(dim=1).numpy() == pytest.approx(np.ones(COUNT), abs=1e-5)
        assert (x @ toy.directions.T).argmax(1).eq(toy.cell(inputs)).all()
        assert np.bincount(toy.cell(inputs)) / COUNT == pytest.approx(toy.chance, abs=0.01)
    # Half a turn and a whole one.
    start, opposite, same = toy.activations(torch.tensor([[1.0, 0.0], [1.0, 8.0], [1.0, 16.0]]), "pre_unembed")
    assert ((opposite @ start).item(), (same @ start).item()) == pytest.approx((0, 1), abs=1e-5)


def test_directions_are_orthonormal_where_they_fit() -> None:
    few, many = planted("independent").directions, planted("independent", features=40).directions
    assert (few @ few.T).numpy() == pytest.approx(np.eye(6), abs=1e-6)
    assert many.norm(dim=1).numpy() == pytest.approx(np.ones(40), abs=1e-6)
    assert not torch.equal(few, planted("independent", seed=1).directions)
    assert torch.equal(few, planted("independent").directions)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_streams_and_evaluation_inputs(name: str) -> None:
    toy = planted(name)
    stream = Stream(toy, "pre_unembed", Distribution("uniform"), 0, 64, "cpu")
    x = stream.batches(0, 600)
    assert torch.equal(x[400:410], Stream(toy, "pre_unembed", Distribution("uniform"), 0, 64, "cpu").batches(400, 10))
    assert x.mean((0, 1)).numpy() == pytest.approx(np.zeros(16), abs=0.15)
    assert x.square().sum(2).mean().item() == pytest.approx(16, rel=0.02)
    evaluation = Evaluation(inputs=20_000)
    inputs = EvaluationInputs(toy, "pre_unembed", Distribution("uniform"), stream.mean, stream.scale, evaluation)
    chunks = list(inputs)
    assert sum(len(chunk.x) for chunk in chunks) == inputs.count == 20_000
    assert sum(chunk.weight.sum().item() for chunk in chunks) == pytest.approx(1)
    assert all(torch.equal(one.x, other.x) for one, other in zip(chunks, inputs, strict=True))
    means, mass = feature_means(inputs)
    active = torch.cat([toy.features(chunk.inputs) != 0 for chunk in chunks]).double()
    assert mass.numpy() == pytest.approx(active.mean(0).numpy())
    whole = torch.cat([chunk.x for chunk in chunks]).double()
    assert means.numpy() == pytest.approx(((active.T @ whole) / active.sum(0)[:, None]).numpy(), abs=1e-6)


def test_cells_are_counted_before_there_is_a_toy() -> None:
    for name in ("exclusive", "parents", "circle"):
        toy = planted(name, modifiers=3)
        assert toy.cells is not None
        for partition in ("m", "q", "mq", "mqnc", "n"):
            assert toy.cells.partition(partition).count == toy.toy.kind.classes(partition, toy.toy)


def test_ids_of_max_of_k_know_nothing_of_planted_features() -> None:
    point = canonical(Point(Toy(features=9, rate=0.5, spread=1.0, interaction=0.5)))
    assert point == canonical(Point())
    assert toy_id(point.toy) == toy_id(Toy())


def test_what_a_planted_toy_does_not_read_is_no_part_of_its_points() -> None:
    toy = Toy("exclusive", features=9)
    other = toy.replace(d_vocab=5, rate=0.5, steps=7, distribution="max_stratified")
    sites = Point(toy), Point(other, Site("post_unembed"), Distribution("cell_stratified"))
    assert sites[0].id == sites[1].id
    assert Point(toy.replace(magnitudes="lomax")).id != sites[0].id


KINDS = [*SYNTHETIC, "superposition"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


# A preset of planted, and what is one by another name.
QUICK = ("circle", "superposition")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_each_kind_runs_from_command_to_table(kind: str, root: Path, few_inputs_for_constants: None) -> None:
    words = [f"toy={kind}", "toy.features=5", "toy.d_model=4", "sae.init=kmeans,oracle"]
    words += ["penalty.coefficient=0.1", "training.steps=30", "training.batch_size=64", "evaluation.inputs=3000"]
    words += [f"output_dir={root}", f"name={kind}", "logger=none"]
    end = call("run", "--json", *words)
    assert end.code == 0, end.err
    assert (json.loads(end.out)["ran"], json.loads(end.out)["failed"]) == (2, 0)
    assert json.loads(call("run", "--json", *words).out)["skipped"] == 2
    # One with cells and one without: a report takes seconds.
    if kind in ("independent", "parents"):
        assert "MCC" in call("report", kind, "--full", "--output-dir", str(root)).out
    table = pd.read_parquet(root / "sweeps" / kind / "results.parquet")
    assert set(table_columns()) <= set(table)
    independent = kind in ("independent", "planted", "superposition")
    toy = "independent" if kind == "superposition" else kind
    assert set(table["toy"]) == {f"{toy}-5-4"} and set(table["width"]) == {5}
    measured = ["loss", "fvu", "l0", "live_latents", "mcc", "uniqueness", "feature_f1", "found_features", "shrinkage"]
    assert table[measured].notna().all(axis=None)
    assert table[["site", "distribution", "kl", "loss_recovered"]].isna().all(axis=None)
    of_cells = ["owned_maxes", "splits_per_max", "label_m", "fvu_above_ceiling", "info_query"]
    null = table[of_cells].isna().all()
    assert null[of_cells[:-1]].eq(independent).all()
    assert null["info_query"] == (kind != "parents")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["toy=circle", "toy.d_model=7"], "must be even"),
        (["toy=independent", "sae.width=${cells:mq}"], "no cells"),
        (["toy=parents", "toy.magnitudes=cauchy"], "toy.magnitudes cannot be"),
        (["toy=parents", "toy.interaction=2"], "at most 1"),
        (["toy=parentss"], "'parents'"),
    ],
)
def test_one_line_for_what_is_wrong(words: list[str], message: str) -> None:
    end = call("plan", *words)
    assert end.code == 2
    assert message in end.err and end.err.count("\n") == 1


def test_cells_of_sequences_are_those_of_max_of_k() -> None:
    end = call("cells", "toy=bigrams")
    assert end.code == 2 and "max_of_k" in end.err
