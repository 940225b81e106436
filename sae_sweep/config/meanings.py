"""What each column of the results table means, in a sentence or two: the reference and the report take it from here."""

from __future__ import annotations

from sae_sweep.config.columns import (
    COLUMNS,
    INFERRED,
    LABELS,
    PRIORS,
    PURE,
    STRUCTURE,
    shuffled,
    spread,
)

_FACTORS = ("query", "runner_up", "copies")
_FINER = tuple(label for label in LABELS if label != "m" and label.startswith("m"))
# What is counted again with labels shuffled has two columns more, which are not listed apart.
_NULLS = {null for name in COLUMNS for null in (shuffled(name), spread(name))} - set(STRUCTURE)

# Heading: columns, those that mean the same together, and what they mean.
MEANINGS: dict[str, dict[tuple[str, ...], str]] = {
    "What was trained": {
        ("point_id",): ("The id of the SAE: the hash of every setting that can change its numbers."),
        ("toy",): ("The kind of toy and its size, such as max_of_k-16-3 for 3 tokens out of 16."),
        ("toy_seed", "seed", "data_seed"): "The seeds of the toy, of the SAE and of its batches.",
        ("site",): "Where activations are read; null where a toy has one site alone.",
        ("distribution",): ("What the SAE sees: how inputs are weighted in training and in evaluation."),
        ("architecture",): "The architecture of the SAE.",
        ("init",): "How its parameters began.",
        ("partition",): ("Whose classes an oracle start gives latents to; null for other starts."),
        ("width",): "How many latents it has.",
        ("k",): ("How many latents may fire on an input, where the architecture counts; else null."),
        ("penalty", "coefficient", "penalty_p", "penalty_scale"): (
            "The sparsity term, its multiplier, its exponent and its scale; null where it has none."
        ),
        ("steps",): "Training steps.",
    },
    "Reconstruction and sparsity": {
        ("loss",): (
            "The objective on the evaluation inputs: E‖x − x̂‖² + coefficient · E penalty. Penalties act on "
            "activation × norm of the decoder row."
        ),
        ("fvu",): ("Fraction of variance unexplained: Σ‖x − x̂‖² / Σ‖x − x̄‖², pooled over all inputs. 0 is perfect."),
        ("fvu_above_ceiling",): (
            "FVU less what the best code that is constant on each maximum would leave; not clipped."
        ),
        ("l0",): "How many latents fire on an input, on average.",
        ("live_latents", "dead_latents"): "Latents that fire on enough inputs to be counted, and the others.",
        ("shrinkage",): ("Mean of ‖x̂‖/‖x‖: below 1 where the penalty makes reconstructions shorter."),
        ("loss_recovered",): (
            "The share of the toy's own loss that reconstructions recover: (CE_rec − CE_zero)/(CE_orig − "
            "CE_zero), CE being cross-entropy."
        ),
        ("kl",): ("KL divergence of the toy's answers, original against reconstructed, in nats."),
        ("cofiring",): (
            "Σ P(i and j) / Σ P(i)P(j) over pairs of latents: 1 where each fires by itself, 0 where one does at a time."
        ),
        ("winner_entropy",): ("Entropy of which latent is on top, in nats: what splitting costs under exclusive_pi."),
        ("oracle_gap",): ("Loss less the lowest loss of the same SAE from an oracle start in the sweep."),
        ("on_front", "on_common_front"): (
            "Whether no other coefficient of the same penalty, start and width has both a lower L0 and a lower "
            "FVU, by means over seeds; and the same among all penalties and starts of the width."
        ),
        ("seconds",): ("How long the SAE took, of its pack's time. The one column that is not the same every time."),
    },
    "Splits and duplicates": {
        ("owned_maxes",): ("Maxima with a live latent that has at least evaluation.purity of its activation on them."),
        ("pure_latents",): ("Live latents with at least evaluation.purity of their activation on one maximum."),
        ("splits_per_max",): ("Split latents per maximum: live latents whose label is finer than their maximum."),
        ("distinct_splits_per_max",): "The same, where several latents of one class count once.",
        ("split_maxes",): "Maxima that have two split latents or more.",
        ("duplicates_per_max",): ("Duplicates per maximum: live latents for a whole maximum that another one holds."),
        tuple(f"label_{label}" for label in LABELS): (
            "Live latents by what their label names: m maximum, q query, n runner-up, c copies. label_mq counts "
            "those that stand for one (maximum, query)."
        ),
        tuple(f"pure_{label}" for label in PURE): (
            "Live latents with at least evaluation.purity of their activation in one class of that partition, "
            "whether they fire on all of it or on a part."
        ),
        tuple(f"found_{label}" for label in PURE): (
            "The share of that partition's countable classes with such a latent."
        ),
        ("below_cell",): "Latents that are pure in one cell and fire on less than half of it.",
        tuple(f"info_{factor}" for factor in _FACTORS): (
            "How much of that factor the top latent tells, given the maximum: I(top latent; factor | m)/H(factor "
            "| m), less what a permutation within each maximum shows."
        ),
        tuple(f"unique_{factor}" for factor in _FACTORS): "The same, given the other factors too.",
        ("info_order", "unique_order"): (
            "With evaluation.order=true: what the top latent tells of the order of the tokens, given the maximum, "
            "and given the cell."
        ),
    },
    "Ceilings": {
        ("owned_ceiling", "splits_ceiling", "distinct_splits_ceiling"): (
            "What a perfect code for the best single partition scores under the same rules with as many latents."
        ),
        ("owned_share", "splits_share", "distinct_splits_share"): "The counts as shares of those ceilings.",
        tuple(f"countable_{label}" for label in LABELS): (
            "How many classes of that partition can be judged: all where inputs are enumerated, else those that "
            "expect 8 of them."
        ),
    },
    "Planted features": {
        ("mcc",): ("Mean |cosine| of decoder rows and true directions under the best one-to-one matching."),
        ("uniqueness",): ("How many different features are some latent's best match, over the number of latents."),
        ("feature_precision", "feature_recall", "feature_f1"): (
            "Means over latents, each as a detector of the feature that it matches best."
        ),
        ("found_features",): "Features that a live latent detects with F1 of at least 0.8.",
        ("killed_features",): "Features that no live latent detects or points at.",
        ("killed_small_overlap",): ("Those of them whose largest |cosine| with another feature is at most 0.3."),
    },
    "Training": {
        ("gradient_largest", "gradient_late", "gradient_spike"): (
            "Norm of the gradient over all parameters before it is clipped: the largest; the median, over the "
            "second half, of the largest in each of 16 parts; and the largest of that half over this median."
        ),
        ("plateau",): (
            "By how much, relative to the loss, twice the steps would still lower it, foretold from the training "
            "curve. Above 0.02 the SAE still moves."
        ),
        ("revived", "revived_last", "revived_live"): (
            "How often a dead latent was revived, how many the last time, and how many of these live at the end."
        ),
        ("seed_agreement",): (
            "In `results --seeds mean`: matched cosine between the dictionaries of the seeds of a setting (arXiv "
            "2505.20254), over live latents."
        ),
    },
    "On request": {
        ("k_sparse_splits", "absorption_full", "absorption_fraction"): (
            "With evaluation.probing=true: latents of a k-sparse probe beyond the first that each raise its F1 by "
            "0.03, and the share of inputs on which a maximum's own latents are silent, or fall short, while "
            "others stand in. The definitions are SAEBench's."
        ),
        PRIORS: (
            "With evaluation.priors=true: held-out log-likelihood of that density where latents fire, in nats an "
            "activation."
        ),
        STRUCTURE: (
            "With evaluation.structure=true: of what split latents add, the shares of variance that the parent, "
            "the modifier and neither explain; the cosine of a modifier under two parents; what semi-NMF and a "
            "meta-SAE explain. `_null` is the same with parents, modifiers or entries permuted."
        ),
        tuple(f"inferred_{name}" for name in INFERRED): (
            "With evaluation.inference=true: the same numbers with the best codes for the SAE's own decoder."
        ),
        ("encoder_gap",): ("The loss that those codes save: what is the encoder's fault and not the dictionary's."),
    },
    "Nulls": {
        tuple(sorted(name for name in COLUMNS if name in _NULLS)): (
            "The same measure with labels shuffled, as the mean over evaluation.permutations, and its standard "
            "deviation (`_sd`). Splits and finer labels are shuffled within each maximum, maxima and single "
            "factors among all inputs; of planted features, which inputs have them."
        ),
    },
}


def meaning(column: str) -> str:
    """What a column means; "" of one that this package does not bring."""
    return next((words for group in MEANINGS.values() for names, words in group.items() if column in names), "")
