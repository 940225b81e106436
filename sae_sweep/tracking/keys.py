"""What a number of the results table is called in W&B: whole words, in groups of which W&B makes sections.

`splits_per_max` is "splits_per_maximum", `label_mq` is "labelled/maximum_query", and `shuffled_label_mq`
"labels_shuffled/labelled_maximum_query". The words of the field (fvu, l0, loss, mcc) stay. Keys are letters, digits,
underscores and one slash, which is what W&B can sort and filter by, and the same for every toy: a project has one key
for one number. Titles and figures have the user's own names of factors.
"""

from __future__ import annotations

import re

# Before the key of a figure in the sweep's run, of a point's numbers before training, and of its training curve.
FIGURE, UNTRAINED, TRAINING = "figure", "untrained", "training"

_FACTORS = {"m": "maximum", "q": "query", "n": "runner_up", "c": "copies"}
_WORDS = {"max": "maximum", "maxes": "maxima", "kl": "kl_divergence", "c_dec": "decoder_cosine"}
_GROUPS = {
    "shuffled": "labels_shuffled",
    "inferred": "best_codes",
    "info": "explained",
    "unique": "explained_alone",
    "gradient": "gradient_norm",
    "prior": "prior",
    "structure": "structure",
    "truth": "planted_codes",
}
_GROUP = re.compile(rf"({'|'.join(_GROUPS)})_(.+)")
_OF_CLASSES = re.compile(r"(label|pure|found|countable)_([mqnc]+)")
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])")


def key(column: str, group: str = "") -> str:
    """The key of a column, in a group beside if one is given: key("fvu", "untrained") is "untrained/fvu"."""
    if group:
        return f"{group}/{key(column).replace('/', '_')}"
    if found := _OF_CLASSES.fullmatch(column):
        factors = "_".join(_FACTORS[letter] for letter in found[2])
        return f"{'labelled' if found[1] == 'label' else found[1]}/{factors}"
    if column.endswith("_sd"):
        return f"{key(column.removesuffix('_sd'))}_sd"
    if found := _GROUP.fullmatch(column):
        return key(found[2], _GROUPS[found[1]])
    return _WORD.sub(lambda found: _WORDS[found[0]], column)


def front_key(penalty: str) -> str:
    """The name of the FVU of SAEs of one penalty, or of an architecture that counts: "fvu_by_penalty/l1"."""
    return f"fvu_by_penalty/{penalty}"
