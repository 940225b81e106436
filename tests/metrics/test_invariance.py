"""What no column may depend on: the order of latents and of inputs, the length of rows; and what copies change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from planted import LookUp
from test_planted_saes import inputs_of, perfect

from sae_sweep.config.columns import LABELS
from sae_sweep.config.settings import Evaluation
from sae_sweep.metrics.evaluate import measure
from sae_sweep.metrics.labels import PURE
from sae_sweep.toys.sampling import Chunk, EvaluationInputs

EVALUATION = Evaluation(permutations=4)
INPUTS = inputs_of(5, 3, EVALUATION)


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


SAE = noisy()
FOUND = columns(SAE)


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


def test_in_whatever_order_latents_are() -> None:
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(SAE.W_dec)))
    assert_same(columns(LookUp(SAE.x, SAE.codes[:, order], SAE.W_dec[order], SAE.b_dec)), FOUND)


def test_however_long_decoder_rows_are() -> None:
    scale = torch.from_numpy(10.0 ** np.random.default_rng(2).uniform(-3, 3, len(SAE.W_dec))).float()
    assert_same(columns(LookUp(SAE.x, SAE.codes / scale, SAE.W_dec * scale[:, None], SAE.b_dec)), FOUND)


class Reordered(EvaluationInputs):
    """The same inputs in another order, as one chunk."""

    def __iter__(self) -> Iterator[Chunk]:
        parts = list(super().__iter__())
        whole = [torch.cat([getattr(part, name) for part in parts]) for name in ("x", "cell", "weight", "inputs")]
        order = torch.from_numpy(np.random.default_rng(3).permutation(len(whole[0])))
        yield Chunk(*(value[order] for value in whole))


def test_in_whatever_order_inputs_are() -> None:
    inputs = Reordered.__new__(Reordered)
    vars(inputs).update(vars(INPUTS))
    assert_same(columns(SAE, inputs), FOUND)


def test_every_latent_twice_with_halved_decoders() -> None:
    """Copies double what counts latents, and change nothing that counts what they find."""
    found = columns(LookUp(SAE.x, SAE.codes.repeat(1, 2), SAE.W_dec.repeat(2, 1) / 2, SAE.b_dec))
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
        "shuffled_duplicates_per_max",
        "shuffled_duplicates_per_max_sd",
    )
    assert_same(
        {name: value for name, value in found.items() if not name.endswith(open_to_change)},
        {name: value for name, value in wanted.items() if not name.endswith(open_to_change)},
    )
    assert found["cofiring"] > FOUND["cofiring"]
