"""SAELens' own synthetic model and evaluation (SynthSAEBench, arXiv 2602.14687), beside ours on the same samples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_sweep.config.settings import Point, Sae
from sae_sweep.metrics.ground_truth import DetectionCounter, planted_metrics
from sae_sweep.registry import kinds
from sae_sweep.saes.folding import fold
from sae_sweep.saes.formats import saelens
from sae_sweep.saes.parameters import Parameters

sae_lens = pytest.importorskip("sae_lens", exc_type=ImportError)
synthetic = pytest.importorskip("sae_lens.synthetic", exc_type=ImportError)

FEATURES, D, WIDTH, SAMPLES = 48, 24, 32, 4096
SCALE, MEAN = 1.7, torch.linspace(-0.1, 0.1, D)


def world():
    return synthetic.SyntheticModel(
        synthetic.SyntheticModelConfig(
            num_features=FEATURES,
            hidden_dim=D,
            hierarchy=synthetic.HierarchyConfig(
                total_root_nodes=4, branching_factor=3, max_depth=2, mutually_exclusive_portion=1.0
            ),
            correlation=synthetic.LowRankCorrelationConfig(rank=4, correlation_scale=0.2),
            std_firing_magnitudes=0.1,
            seed=0,
        )
    )


def half_right(directions: torch.Tensor) -> Parameters:
    """An SAE that is a mixture of features and noise, so that no number is 0 or 1."""
    generator = torch.Generator().manual_seed(1)  # not the seed by which SAELens drew the features
    rows = directions[:WIDTH] + 0.15 * torch.randn(WIDTH, D, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    return Parameters(rows.clone(), rows, torch.full((WIDTH,), -0.3), torch.zeros(D), torch.zeros(()))


@pytest.mark.parametrize("architecture", ["relu", "topk"])
@torch.no_grad()
def test_f1_and_mcc_are_those_of_saelens(architecture: str, tmp_path) -> None:
    model = world()
    hidden, features = model.sample_with_features(SAMPLES)
    directions = model.feature_dict.feature_vectors.detach()
    point = Point(sae=Sae(architecture, init="random", width=WIDTH, **({"k": 4} if architecture == "topk" else {})))
    parameters = half_right(directions)
    for name, content in saelens.to_files(point, fold(parameters, MEAN, SCALE)).items():
        (tmp_path / name).write_bytes(content)
    theirs = synthetic.eval_sae_on_synthetic_data(
        sae_lens.SAE.load_from_disk(tmp_path),
        model.feature_dict,
        SimpleNamespace(sample=lambda count: features),  # the very samples
        num_samples=SAMPLES,
    )

    x = (hidden - MEAN) * SCALE
    codes = kinds("architecture")[architecture].codes(x, parameters, point.sae)
    counter = DetectionCounter(WIDTH, FEATURES, 0.0, torch.device("cpu"))
    counter.add(codes * parameters.norms(), features)
    live = np.ones(WIDTH, dtype=bool)
    ours = planted_metrics(counter.detection, parameters.W_dec, directions, live, 0.8)
    error = (codes @ parameters.W_dec + parameters.b_dec - x).square().sum()

    assert 0.1 < theirs.classification.f1_score < 0.95 and 0.3 < theirs.mcc < 0.95
    assert ours["mcc"] == pytest.approx(theirs.mcc, abs=1e-6)
    assert ours["uniqueness"] == pytest.approx(theirs.uniqueness, abs=1e-6)
    assert ours["feature_f1"] == pytest.approx(theirs.classification.f1_score, abs=1e-6)
    assert ours["feature_precision"] == pytest.approx(theirs.classification.precision, abs=1e-6)
    assert ours["feature_recall"] == pytest.approx(theirs.classification.recall, abs=1e-6)
    assert float((codes > 0).sum(1).float().mean()) == pytest.approx(theirs.sae_l0, abs=1e-5)
    assert float(1 - error / (x - x.mean(0)).square().sum()) == pytest.approx(theirs.explained_variance, abs=1e-5)
