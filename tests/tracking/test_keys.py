"""The keys of W&B: words, one for each column, of letters that W&B sorts and filters by."""

from __future__ import annotations

import re

import pytest

from sae_sweep.config.columns import table_columns
from sae_sweep.tracking.keys import key


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("fvu", "fvu"),
        ("splits_per_max", "splits_per_maximum"),
        ("label_mqn", "labelled/maximum_query_runner_up"),
        ("shuffled_label_mq_sd", "labels_shuffled/labelled_maximum_query_sd"),
        ("inferred_owned_maxes", "best_codes/owned_maxima"),
        ("info_runner_up", "explained/runner_up"),
        ("pure_latents", "pure_latents"),
        ("found_features", "found_features"),
        ("c_dec_signed", "decoder_cosine_signed"),
    ],
)
def test_keys_are_words(column: str, said: str) -> None:
    assert key(column) == said


def test_each_column_has_a_key_of_its_own_that_wandb_can_sort_by() -> None:
    keys = [key(column) for column in table_columns()]
    assert len(set(keys)) == len(keys)
    assert [each for each in keys if not re.fullmatch(r"[a-z]\w*(/\w+)?", each)] == []
    assert key("splits_per_max", "untrained") == "untrained/splits_per_maximum"
