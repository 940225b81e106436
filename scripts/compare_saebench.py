"""Runs SAEBench's own code for k-sparse probes and absorption beside ours, on one SAE.

    python -m venv saebench && saebench/bin/pip install sae-bench          # it needs a numpy older than ours
    python scripts/compare_saebench.py --python saebench/bin/python

The SAE reads planted parents and modifiers (toy=parents); inputs, labels and the SAE go to SAEBench in a file, a
parent in the place of a first letter. Three comparisons: absorption given the same probe and main latents, input by
input; the k-sparse regressions given the same latents; and both from end to end, each side with its own probes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# What SAEBench would read from its settings; its batches of 4,096 are too few steps for so few inputs.
BATCH, LARGEST_K = 512, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="the interpreter of an environment with sae-bench")
    parser.add_argument("--coefficient", type=float, default=1.0, help="of the L1 penalty the SAE is trained with")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        print(json.dumps(theirs(np.load(args.theirs))))
    elif args.python is None:
        parser.error("--python is needed: the interpreter of an environment with sae-bench")
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(args.python, args.coefficient, Path(folder))


def compare(python: Path, coefficient: float, folder: Path) -> None:
    """Train the SAE, measure it here and there, print both."""
    from sae_sweep.metrics.extra import probing

    case = trained(coefficient, folder)
    codes, cosine = torch.from_numpy(case["codes"]), torch.from_numpy(case["cosine"])
    x, has = torch.from_numpy(case["x"]), torch.from_numpy(case["has"])
    main = case["main"].tolist()
    full, fraction = probing.absorption(codes, cosine, x @ torch.from_numpy(case["direction"]), main)
    weight, bias = probing.balanced_regression(case["codes"][:, main].astype(float), case["has"][:, 0])
    ours = {
        "full": full.tolist(),
        "fraction": fraction.tolist(),
        "regression": (case["codes"][:, main] @ weight + bias > 0).tolist(),
        **probing.probing(
            lambda rows: torch.relu(rows @ torch.from_numpy(case["W_enc"]) + torch.from_numpy(case["b_enc"])),
            torch.from_numpy(case["W_dec"]),
            x,
            has,
        ),
    }
    np.savez(folder / "case.npz", **case)
    end = subprocess.run([python, __file__, "--theirs", folder / "case.npz"], capture_output=True, text=True)
    if end.returncode:
        sys.exit(f"SAEBench's side failed:\n{end.stderr[-2000:]}")
    report(ours, json.loads(end.stdout.splitlines()[-1]))


def report(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """Print the three comparisons."""
    same = sum(a == b for a, b in zip(ours["full"], other["full"], strict=True))
    apart = np.abs(np.array(ours["fraction"]) - np.array(other["fraction"])).max()
    print(
        f"absorption, same probe and main latents: full absorption agrees on {same} of {len(other['full'])} inputs "
        f"({sum(other['full'])} absorbed), the fraction to {apart:.1e}"
    )
    same = sum(a == b for a, b in zip(ours["regression"], other["regression"], strict=True))
    print(f"k-sparse regression on the same latents: says the same of {same} of {len(other['regression'])} inputs")
    print("end to end, each with its own probes:        SAEBench      ours")
    for name in ("k_sparse_splits", "absorption_full", "absorption_fraction"):
        print(f"  {name:<40} {other[name]:9.4f} {ours[name]:9.4f}")


def trained(coefficient: float, folder: Path, steps: int = 2000) -> dict[str, np.ndarray]:
    """A narrow SAE that absorbs, inputs and truth, and the main latent and direction of the first parent."""
    from sae_sweep.config import overrides
    from sae_sweep.saes.folding import unfold
    from sae_sweep.saes.formats import saelens
    from sae_sweep.store.store import Store
    from sae_sweep.sweep import pack
    from sae_sweep.sweep.context import Ground
    from sae_sweep.sweep.events import Event
    from sae_sweep.toys.sampling import EvaluationInputs

    words = ["toy=parents", "sae.width=16", "sae.init=random_unit", "toy.co_occurrence=0.8"]
    sweep = overrides.load([*words, f"training.steps={steps}", f"penalty.coefficient={coefficient}"])
    point, store = sweep.points[0], Store(folder / "outputs")

    def say(event: Event) -> None:
        """Nothing needs to be said."""

    machine = pack.Machine("cpu", 1)
    pack.run_pack([point], 1, 1, store, sweep.evaluation, machine, say)
    ground = Ground(point, store, sweep.evaluation, "cpu", say)
    folded = saelens.from_files(store.read("points", point.id, saelens.WEIGHTS))
    sae = unfold(folded, ground.mean, ground.scale)
    inputs: EvaluationInputs = ground.inputs
    x, has = inputs.labelled(20_000)
    norms = sae.norms()
    # Decoder rows of length one, as SAEBench asks for.
    W_enc, b_enc, W_dec = (sae.W_enc * norms[:, None]).T, sae.b_enc * norms, sae.W_dec / norms[:, None]
    codes = torch.relu(x @ W_enc + b_enc)
    direction = torch.nn.functional.normalize(x[has[:, 0]].mean(0), dim=0)
    cosine = W_dec @ direction
    arrays = {"x": x, "has": has, "codes": codes, "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}
    arrays |= {"direction": direction, "cosine": cosine, "main": cosine.topk(1).indices}
    return {name: array.contiguous().numpy() for name, array in arrays.items()}


def theirs(case: Any) -> dict[str, Any]:
    """The same from SAEBench's functions, run in its own environment."""
    from sae_bench.evals.absorption import k_sparse_probing as sparse
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.absorption.probing import train_multi_probe
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    x, has = torch.from_numpy(case["x"]), torch.from_numpy(case["has"])
    W_enc, b_enc, W_dec = (torch.from_numpy(case[name]) for name in ("W_enc", "b_enc", "W_dec"))
    sae = SimpleNamespace(
        encode=lambda rows: torch.relu(rows @ W_enc + b_enc), W_dec=W_dec, W_enc=W_enc, device=torch.device("cpu"),
        dtype=torch.float32, cfg=SimpleNamespace(d_sae=len(W_dec)),
    )  # fmt: skip
    model = SimpleNamespace(
        run_with_cache=lambda prompts, names_filter: (
            None,
            {names_filter[0]: x[[int(p.strip()) for p in prompts]][:, None]},
        ),
        to_tokens=lambda prompt: torch.zeros(1, 1),
    )
    calculator = FeatureAbsorptionCalculator(
        model=model, icl_word_list=[], max_icl_examples=0, base_template="{word}", word_token_pos=0,
        prepend_separator_to_first_example=False, batch_size=1000, topk_feats=min(10, len(W_dec)),
        answer_formatter=lambda word: "",
    )  # fmt: skip

    def absorbed(rows: list[int], direction: torch.Tensor, latents: list[int]) -> list[Any]:
        return calculator.calculate_absorption(
            sae, [str(row) for row in rows], direction, latents, 0, False
        ).word_results

    main = case["main"].tolist()
    results = absorbed(list(range(len(x))), torch.from_numpy(case["direction"]), main)
    fitted = LogisticRegression(max_iter=500, class_weight="balanced").fit(case["codes"][:, main], case["has"][:, 0])
    found = {
        "full": [bool(result.is_full_absorption) for result in results],
        "fraction": [float(result.absorption_fraction) for result in results],
        "regression": (fitted.decision_function(case["codes"][:, main]) > 0).tolist(),
    }
    # From end to end: its probes on the first four fifths, its scores on the rest.
    cut, names = int(0.8 * len(x)), [chr(ord("a") + i) for i in range(has.shape[1])]
    labels = [(str(i), int(label)) for i, label in enumerate(has.int().argmax(1))]
    sparse.LETTERS = names
    linear = train_multi_probe(
        x[:cut], has[:cut].int(), batch_size=BATCH, num_epochs=50, lr=1e-2, weight_decay=1e-4, show_progress=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    probes = sparse.train_k_sparse_probes(
        sae, labels[:cut], x[:cut], ks=range(1, LARGEST_K + 1), batch_size=BATCH, precalc_sae_acts=True
    )
    raw = sparse.eval_probe_and_sae_k_sparse_raw_scores(sae, linear, probes, labels[cut:], x[cut:], 1000)
    metrics = sparse.build_metrics_df(raw, sparse.sae_k_sparse_metadata(sae, linear, probes, "", 0), LARGEST_K)
    sparse.add_feature_splits_to_metrics_df(metrics, LARGEST_K)
    columns: dict[str, list[float]] = {"k_sparse_splits": [], "absorption_full": [], "absorption_fraction": []}
    for i, name in enumerate(names):
        row = metrics[metrics["letter"] == name].iloc[0]
        if row["f1_probe"] <= 0.6:
            continue
        there = raw[(raw["answer_letter"] == name) & (raw[f"score_probe_{name}"] > 0)]["token"]
        results = absorbed([int(token) for token in there], linear.weights[i].detach(), list(row["split_feats"]))
        columns["k_sparse_splits"].append(float(row["num_split_features"]))
        columns["absorption_full"].append(float(np.mean([result.is_full_absorption for result in results])))
        columns["absorption_fraction"].append(float(np.mean([result.absorption_fraction for result in results])))
    return found | {name: float(np.mean(values)) for name, values in columns.items()}


if __name__ == "__main__":
    main()
