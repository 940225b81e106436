"""One pass over a toy's inputs, end to end: SAEs planted by looking inputs up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from planted import LookUp, untrained

from sae_sweep.config.columns import metric_columns
from sae_sweep.config.settings import Distribution, Evaluation, Toy
from sae_sweep.metrics import evaluate, evaluation_batches
from sae_sweep.metrics.evaluate import Measurement, measure
from sae_sweep.registry import kinds
from sae_sweep.toys import model
from sae_sweep.toys.sampling import EvaluationInputs, Stream

TOY = Toy(d_vocab=6, k=3, d_model=8, d_head=8)
EVALUATION = Evaluation()
# The metrics of a toy with classes of inputs.
MEASURED = ("reconstruction", "labels", "ceilings", "information")


def inputs(evaluation=EVALUATION) -> EvaluationInputs:
    distribution = Distribution("max_stratified")
    stream = Stream(untrained(TOY), "pre_unembed", distribution, 0, 64, "cpu")
    return EvaluationInputs(stream.model, "pre_unembed", distribution, stream.mean, stream.scale, evaluation)


def planted_sae(partition: str, norm: float = 1.0) -> LookUp:
    """One latent per class of a partition; decoder rows are the classes' means, at the length `norm`."""
    everything = inputs()
    chunks = list(everything)
    x, cell, weight = (torch.cat([getattr(c, name) for c in chunks]) for name in ("x", "cell", "weight"))
    classes = everything.cells.partition(partition)
    member = torch.nn.functional.one_hot(torch.from_numpy(classes.of_cell)[cell], classes.count).double()
    means = (member * weight[:, None]).T @ x.double() / (member.T @ weight)[:, None]
    size = means.norm(dim=1, keepdim=True)
    codes = member * (size / norm).T
    return LookUp(x, codes.float(), (means / size * norm).float(), torch.zeros(x.shape[1]))


def found(sae, evaluation=EVALUATION) -> Measurement:
    return measure(sae, inputs(evaluation), lambda norms: norms.sum(1), evaluation)


def test_one_latent_per_maximum():
    result = found(planted_sae("m"))
    assert {column for name in MEASURED for column in kinds("metric")[name].columns} <= set(result.metrics)
    assert set(result.metrics) <= set(metric_columns())
    assert result.metrics["l0"] == pytest.approx(1)
    assert result.metrics["fvu_above_ceiling"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["owned_maxes"] == result.metrics["label_m"] == 6
    assert result.per_max == {"splits": [0] * 6, "duplicates": [0] * 6}
    assert result.metrics["info_query"] == pytest.approx(0, abs=1e-9)
    # Each of six latents fires on a sixth of the weight, always alike.
    assert result.metrics["description_length"] == pytest.approx(np.log2(6) + 5 * np.log2(6 / 5))
    table = result.latents
    assert table["label_class"].tolist() == [f"m={m}" for m in range(6)]
    assert table["owner"].tolist() == list(range(6))
    assert table["density"].to_numpy() == pytest.approx(np.full(6, 1 / 6))
    assert table["inputs"].tolist() == [(m + 1) ** 3 - m**3 for m in range(6)]


def test_split_by_query():
    result = found(planted_sae("mq"))
    # Maximum 0 is one input. Query 5 is (m=5, q=5), and called so like the others.
    assert (result.metrics["label_mq"], result.metrics["label_m"], result.metrics["label_q"]) == (20, 1, 0)
    assert result.metrics["dead_latents"] == 0
    assert result.per_max["splits"] == [0, 2, 3, 4, 5, 6]
    assert result.metrics["splits_per_max"] == pytest.approx(20 / 6)
    assert result.metrics["info_query"] == pytest.approx(1)
    assert result.metrics["unique_runner_up"] == pytest.approx(0, abs=1e-9)
    assert "m=4,q=2" in set(result.latents["label_class"])


def test_decoder_norms_are_folded_in():
    """A short decoder row with a large code fires like a long one with a small code; only the first is over the cut."""
    long, short = found(planted_sae("m", norm=100.0)), found(planted_sae("m", norm=0.001))
    assert long.metrics["live_latents"] == short.metrics["live_latents"] == 6
    assert long.metrics["penalty_mean"] == pytest.approx(short.metrics["penalty_mean"], rel=1e-4)
    assert short.latents["decoder_norm"].to_numpy() == pytest.approx(np.full(6, 0.001))
    faint = planted_sae("m")
    faint.codes *= 0.001
    assert found(faint).metrics["live_latents"] == 0
    assert found(faint).metrics["l0"] == pytest.approx(1)


def test_chunks_do_not_matter(monkeypatch):
    whole = found(planted_sae("mn"))
    monkeypatch.setattr(evaluate, "BLOCK_INPUTS", 17)
    monkeypatch.setattr(evaluate, "BLOCK_NUMBERS", 5)
    cut = found(planted_sae("mn"))
    assert whole.metrics.keys() == cut.metrics.keys()
    measured = {name: value for name, value in cut.metrics.items() if value is not None}
    assert {name: whole.metrics[name] for name in measured} == pytest.approx(measured, rel=1e-5, abs=1e-6)
    pd.testing.assert_frame_equal(whole.latents, cut.latents)


def test_what_depends_on_the_inputs_alone_is_kept_while_they_are(monkeypatch):
    made = []
    logits_of = evaluation_batches.logits_of
    monkeypatch.setattr(evaluation_batches, "logits_of", lambda *args: made.append(1) or logits_of(*args))
    everything, sae = inputs(), planted_sae("mq")
    first, second = (measure(sae, everything, lambda norms: norms.sum(1), EVALUATION) for _ in range(2))
    assert len(made) == len(list(evaluation_batches.blocks(everything, evaluate.BLOCK_INPUTS)))
    monkeypatch.setattr(evaluation_batches, "KEPT_NUMBERS", 0)
    assert first.metrics == second.metrics == found(sae).metrics
    (x, true), again = everything.labelled(9), evaluation_batches.labelled(everything, 9)
    assert x.equal(again[0]) and true.equal(again[1])
    assert evaluation_batches.labelled(everything, 9) is again
    held = len(evaluation_batches._kept)
    del everything
    assert len(evaluation_batches._kept) == held - 1


def test_without_nulls_all_else_is_the_same():
    sae, everything = planted_sae("mq"), inputs()
    plain = measure(sae, everything, lambda norms: norms.sum(1), EVALUATION, nulls=False).metrics
    assert plain == {name: value for name, value in found(sae).metrics.items() if not name.startswith("shuffled_")}


def test_same_bits_twice():
    sae = planted_sae("mqn")
    assert found(sae).metrics == found(sae).metrics


def test_drawn_inputs_estimate_the_same():
    exact = found(planted_sae("mq"))
    drawn = found(planted_sae("mq"), evaluation=Evaluation(inputs=200))
    for name in ("fvu", "squared_error", "penalty_mean", "shrinkage", "kl"):
        assert drawn.metrics[name] == pytest.approx(exact.metrics[name], rel=0.15)
    assert drawn.metrics["l0"] == pytest.approx(1)
    assert drawn.metrics["owned_maxes"] == 6


def test_dead_latents_have_no_name():
    sae = planted_sae("m")
    sae.codes[:, 2] = 0
    table = found(sae).latents
    assert not table["live"][2]
    assert table.loc[2, ["owner", "purity", "label", "label_class", "f1"]].isna().all()
    assert table["owner"].isna().sum() == 1 and table["owner"].dtype == "Int64"


def test_diverged_sae_is_measured_as_nan():
    sae = planted_sae("m")
    sae.codes[:] = torch.nan
    metrics = found(sae).metrics
    assert np.isnan(metrics["fvu"]) and np.isnan(metrics["squared_error"])
    assert metrics["live_latents"] == 0
    assert metrics["description_length"] is None


def test_a_planted_toy_without_cells_is_measured_by_its_features() -> None:
    toy = Toy(name="independent", features=6, d_model=16, rate=0.2)
    planted, evaluation = model.load(toy, model.train([toy], "cpu")[0]), Evaluation(inputs=2000)
    distribution = Distribution("uniform")
    stream = Stream(planted, "pre_unembed", distribution, 0, 64, "cpu")
    everything = EvaluationInputs(planted, "pre_unembed", distribution, stream.mean, stream.scale, evaluation)
    chunks = list(everything)
    x = torch.cat([chunk.x for chunk in chunks])
    features = torch.cat([planted.features(chunk.inputs) for chunk in chunks])
    # A latent for each feature but the last two: one fires on three inputs only, one never.
    codes = (features != 0).float()
    rare = codes[:, 4].nonzero().flatten()[3:]
    codes[rare, 4], codes[:, 5] = 0, 0
    sae = LookUp(x, codes, planted.directions.clone(), torch.zeros(16))
    metrics, plain = (
        measure(sae, everything, lambda norms: norms.sum(1), evaluation, nulls=nulls).metrics for nulls in (True, False)
    )
    assert plain == {name: value for name, value in metrics.items() if not name.startswith("shuffled_")} != metrics
    lightest = int((features != 0).sum(0).min())
    assert (metrics["live_latents"], metrics["dead_latents"]) == (4, 2)
    assert metrics["live_floor_inputs"] == 8
    assert metrics["live_floor_mass"] == pytest.approx(lightest / 2 / 2000)
    assert metrics["fvu_above_ceiling"] is None
    assert metrics["found_features"] == 4
    assert metrics["mcc"] == metrics["uniqueness"] == pytest.approx(1)
    # A toy with cells has no such columns, and one without has none of theirs.
    assert not {"found_features", "mcc"} & set(found(planted_sae("m")).metrics)
    assert not {"splits_per_max", "owned_maxes", "info_query"} & {
        key for key, value in metrics.items() if value is not None
    }


def test_each_latent_counts_with_the_length_of_its_own_decoder_row():
    sae, lengths = planted_sae("m"), torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    before = found(sae)
    sae.W_dec, sae.codes = sae.W_dec * lengths[:, None], sae.codes / lengths
    after = found(sae)
    assert after.metrics["penalty_mean"] == pytest.approx(before.metrics["penalty_mean"], rel=1e-5)
    assert after.latents["decoder_norm"].to_numpy() == pytest.approx(before.latents["decoder_norm"] * lengths.numpy())
    assert after.latents["latent"].tolist() == list(range(6))
    sae.codes[:, 0] *= 1e-3
    assert found(sae).metrics["live_latents"] == 5
