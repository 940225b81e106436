"""What no column may depend on: the order of latents and of inputs, the length of rows; and what copies change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from planted import LookUp
from test_planted_saes import inputs_of, perfect

from sae_sweep.config.columns import LABELS
from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.extra.inference import Objective
from sae_sweep.metrics.labels import PURE
from sae_sweep.registry import kinds
from sae_sweep.toys import model as toys
from sae_sweep.toys.sampling import Chunk, EvaluationInputs, Stream

EVALUATION = Evaluation(permutations=4)
INPUTS = inputs_of(5, 3, EVALUATION)
# Metrics that are asked for, of few probes and steps: what they may depend on does not depend on how many.
ASKED = ("probing", "structure", "inference", "order")
FEW = {
    "metric.PROBE_INPUTS": 1_000,
    "extra.probing.PROBE_EPOCHS": 20,
    "extra.probing.PROBE_BATCH": 100,
    "extra.priors.MOST": 200,
    "extra.structure.META_STEPS": 20,
    "extra.structure.SEMI_NMF_STEPS": 20,
}
ONE = Objective(lambda norms: norms.sum(1), 0.0, k=1)


def noisy() -> LookUp:
    """Latents of (m, q) with levels of their own, losses and additions; whole maxima; and one that is dead."""
    rng = np.random.default_rng(0)
    split, whole = perfect(INPUTS, "mq"), perfect(INPUTS, "m")
    told = torch.cat([split.codes, whole.codes, whole.codes[:, 4:], torch.zeros(len(split.codes), 1)], 1).numpy()
    codes = told * rng.exponential(1.0, told.shape) * (rng.random(told.shape) > 0.05)
    codes += 0.3 * (rng.random(told.shape) < 0.02) * (np.arange(told.shape[1]) < told.shape[1] - 1)
    codes[codes > 0] += 0.3
    rows = torch.cat([split.W_dec, whole.W_dec, whole.W_dec[4:], torch.ones(1, 8)])
    return LookUp(
        split.x,
        torch.from_numpy(codes).float(),
        rows + 0.05 * torch.from_numpy(rng.normal(size=rows.shape)).float(),
        torch.zeros(8),
    )


def columns(sae: LookUp, inputs: EvaluationInputs = INPUTS) -> dict[str, Any]:
    return measure(sae, inputs, lambda norms: norms.sum(1), EVALUATION).metrics


def asked_for(sae: LookUp, inputs: EvaluationInputs = INPUTS, names: tuple[str, ...] = ASKED) -> dict[str, Any]:
    """The columns of metrics that are asked for."""
    with pytest.MonkeyPatch.context() as patch:
        for name, few in FEW.items():
            patch.setattr(f"sae_sweep.metrics.{name}", few)
        evaluation = EVALUATION.replace(**dict.fromkeys(names, True))
        found = measure(sae, inputs, ONE.penalty_value, evaluation, nulls=False, objective=ONE).metrics
    return {column: found[column] for name in names for column in kinds("metric")[name].columns}


@cache
def planted() -> tuple[EvaluationInputs, LookUp]:
    """Features that come and go by themselves, and latents that detect four of six of them, two twice, with noise."""
    toy = Toy(name="independent", features=6, rate=0.25, magnitudes="exponential", d_model=8)
    model = toys.load(toy, toys.train([toy], "cpu")[0])
    stream = Stream(model, "", Distribution("uniform"), 0, 64, "cpu")
    inputs = EvaluationInputs(model, "", Distribution("uniform"), stream.mean, stream.scale, Evaluation(inputs=1_500))
    rng, features = np.random.default_rng(0), [0, 1, 2, 3, 2, 0]
    x, drawn = (torch.cat([getattr(chunk, name) for chunk in inputs]) for name in ("x", "inputs"))
    assert model.planted is not None
    has = (model.planted.features(drawn) != 0)[:, features].float()
    size = (rng.exponential(1.0, has.shape) + 0.3) * (rng.random(has.shape) > 0.05)
    rows = model.planted.directions[features] + 0.1 * torch.from_numpy(rng.normal(size=(len(features), 8)))
    return inputs, LookUp(x, (has * torch.from_numpy(size)).float(), rows.float(), torch.zeros(8))


SAE = noisy()
FOUND = columns(SAE)


def reordered(sae: LookUp) -> LookUp:
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(sae.W_dec)))
    return LookUp(sae.x, sae.codes[:, order], sae.W_dec[order], sae.b_dec)


def rescaled(sae: LookUp) -> LookUp:
    scale = torch.from_numpy(10.0 ** np.random.default_rng(2).uniform(-3, 3, len(sae.W_dec))).float()
    return LookUp(sae.x, sae.codes / scale, sae.W_dec * scale[:, None], sae.b_dec)


def twice(sae: LookUp) -> LookUp:
    return LookUp(sae.x, sae.codes.repeat(1, 2), sae.W_dec.repeat(2, 1) / 2, sae.b_dec)


def as_drawn(inputs: EvaluationInputs) -> EvaluationInputs:
    """The same inputs in another order."""
    others = Reordered.__new__(Reordered)
    vars(others).update(vars(inputs))
    return others


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    wrong = {
        name: (found[name], value)
        for name, value in wanted.items()
        if found[name] != (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6))
    }
    assert wrong == {}


def test_the_sae_has_something_of_everything() -> None:
    """So that what stays the same is not nothing."""
    assert FOUND["split_maxes"] > 0 and FOUND["owned_maxes"] > 0 and FOUND["duplicates_per_max"] > 0
    assert FOUND["dead_latents"] == 1 and FOUND["shuffled_pure_mq"] > 0
    assert any(value for name, value in FOUND.items() if name.startswith("shuffled_pure") and name.endswith("_sd"))


class Reordered(EvaluationInputs):
    """The same inputs in another order, as one chunk."""

    def __iter__(self) -> Iterator[Chunk]:
        parts = list(super().__iter__())
        whole = [torch.cat([getattr(part, name) for part in parts]) for name in ("x", "cell", "weight", "inputs")]
        order = torch.from_numpy(np.random.default_rng(3).permutation(len(whole[0])))
        yield Chunk(*(value[order] for value in whole))


SAME = pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda inputs, sae: (reordered(sae), inputs), id="latents in another order"),
        pytest.param(lambda inputs, sae: (rescaled(sae), inputs), id="rows of other lengths"),
        pytest.param(lambda inputs, sae: (sae, as_drawn(inputs)), id="inputs in another order"),
    ],
)


@SAME
def test_columns_stay(change: Any) -> None:
    assert_same(columns(*change(INPUTS, SAE)), FOUND)


@SAME
def test_columns_of_planted_features_stay(change: Any) -> None:
    inputs, sae = planted()
    found = columns(sae, inputs)
    assert found["found_features"] == 4 and found["shuffled_mcc_sd"] > 0
    assert_same(columns(*change(inputs, sae)), found)


@cache
def of_asked() -> dict[str, Any]:
    return asked_for(SAE)


@SAME
def test_columns_that_are_asked_for_stay(change: Any) -> None:
    found = of_asked()
    assert [name for name, value in found.items() if value is None or math.isnan(value)] == []
    assert found["encoder_gap"] > 0 and found["structure_modifier"] > 0 and found["info_order"] > 0
    assert_same(asked_for(*change(INPUTS, SAE)), found)


@cache
def of_priors() -> dict[str, Any]:
    return asked_for(planted()[1], planted()[0], ("priors",))


@SAME
def test_priors_stay(change: Any) -> None:
    """Of a toy whose activations have densities."""
    sae, inputs = change(*planted())
    found = of_priors()
    assert all(found.values())
    assert_same(asked_for(sae, inputs, ("priors",)), found)


def test_planted_features_of_latents_held_twice() -> None:
    """A second copy detects what the first does; what is matched one to one may now take both."""
    inputs, sae = planted()
    found, doubled = columns(sae, inputs), columns(twice(sae), inputs)
    same = ["feature_precision", "feature_recall", "feature_f1", "found_features", "killed_features"]
    same += ["killed_small_overlap", "recovered_80", "recovered_90"]
    assert_same({name: doubled[name] for name in same}, {name: found[name] for name in same})
    assert doubled["uniqueness"] == found["uniqueness"] / 2
    assert doubled["live_latents"] == 2 * found["live_latents"] and doubled["mcc"] >= found["mcc"] - 1e-6


def test_those_asked_for_of_latents_held_twice() -> None:
    """What is told, the best codes of one latent and shares of variance stay. To a k-sparse probe a copy is one latent
    more, absorption goes by the share of a single one, and fits of as many parts have twice the rows."""
    found, doubled = of_asked(), asked_for(twice(SAE))
    changes = [*kinds("metric")["probing"].columns, "structure_semi_nmf", "structure_meta_sae"]
    changes += [name for name in found if name.endswith("_null")]
    kept = [name for name in found if name not in changes]
    assert_same({name: doubled[name] for name in kept}, {name: found[name] for name in kept})
    assert doubled["k_sparse_splits"] <= found["k_sparse_splits"]
    inputs, sae = planted()
    assert_same(asked_for(twice(sae), inputs, ("priors",)), of_priors())


def test_every_latent_twice_with_halved_decoders() -> None:
    """Copies double what counts latents, and change nothing that counts what they find."""
    found = columns(twice(SAE))
    doubled = ["live_latents", "dead_latents", "pure_latents", "splits_per_max", "below_cell", "l0"]
    doubled += [f"label_{name}" for name in LABELS] + [f"pure_{name}" for name in PURE]
    doubled += [f"shuffled_{name}{end}" for name in doubled for end in ("", "_sd") if f"shuffled_{name}{end}" in FOUND]
    wanted = FOUND | {name: 2 * FOUND[name] for name in doubled if FOUND[name] is not None}
    # Of every latent labelled by a whole maximum there is one more, and one for each of the maxima so held.
    held = FOUND["label_m"] - 5 * FOUND["duplicates_per_max"]
    wanted["duplicates_per_max"] = (2 * FOUND["label_m"] - held) / 5
    # Ceilings and shares follow the width; latents that always fire together are what cofiring is for.
    # A copy overlaps with its twin wholly.
    open_to_change = (
        "_ceiling",
        "_share",
        "cofiring",
        "c_dec",
        "c_dec_signed",
        "description_length",
        "shuffled_duplicates_per_max",
        "shuffled_duplicates_per_max_sd",
    )
    assert_same(
        {name: value for name, value in found.items() if not name.endswith(open_to_change)},
        {name: value for name, value in wanted.items() if not name.endswith(open_to_change)},
    )
    assert found["cofiring"] > FOUND["cofiring"]
