"""What opens a report page: the question, the answer in three sentences, what was run, and the words that it uses."""

from __future__ import annotations

import re
import shlex
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import pandas as pd

from sae_sweep.config.columns import COLUMN_OF, shuffled
from sae_sweep.config.files import conf_dir, opening
from sae_sweep.reports.claims import least_accuracy, lowest_accuracy
from sae_sweep.reports.layout import listed, plural
from sae_sweep.reports.material import Material
from sae_sweep.reports.results_table import coefficient, init_words, penalty_name, representatives
from sae_sweep.reports.sentences import percent, toy_warning

# Words of the page, each explained at the pointer or the focus where the page first says it.
WORDS = {
    "FVU": "Fraction of variance unexplained: 0 is a perfect reconstruction, 1 is no better than the mean.",
    "L0": "How many latents fire on an input, on average.",
    "Live": "A latent that fires on enough inputs to be counted.",
    "label": "The class of inputs that the firing of a latent matches best.",
    "oracle": "An init that was given the answer: latents at the means of the true classes.",
    "untrained": "As the parameters began, before any training.",
    "runner-up": "The largest token of an input that is not its maximum.",
    "meta-SAE": "An SAE that is trained on the decoder rows of another.",
    "Untrained (null)": "The same number on the same SAEs before training.",
    "Labels shuffled (null)": "The same number if the inputs' labels are shuffled: what chance alone gives.",
    "Predicted": "The bound of the claim, set before anything ran.",
}
# The headings of the results table.
HEADS = {
    "setting": "The width of the SAE, and how its parameters began.",
    "coefficient": "What multiplies the penalty, or k where the number of latents that fire is set.",
    "seeds": "Over how many seeds, of toys and SAEs together, the row is a mean.",
    **{name: WORDS[name] for name in ("L0", "FVU")},
    "owned": "Maxima that have a latent of their own.",
    "splits": "Split latents per maximum: live latents whose label is finer than their maximum, such as one for "
    "maximum 5 with query 3.",
    "distinct": "Splits per maximum, where several latents of one class count once.",
    "duplicates": "Duplicates per maximum: further latents for a whole maximum that another latent already holds.",
    "dead": "Latents that fire on too few inputs to be counted.",
}
# The numbers of a latent.
FACTS = {
    "F1": "How well the firing of the latent matches the class of its label: 1 is exactly, 0.8 is needed for a label.",
    "owner": "The maximum that most of the latent's activation is on.",
    "purity": "The share of the latent's activation that is on that maximum.",
    "fires on": "The share of inputs on which the latent fires.",
    "decoder norm": "The norm of the latent's decoder row.",
}
# Packages whose versions are said.
_PACKAGES = ("sae-sweep", "torch", "numpy", "numba", "python")


def question(info: Mapping[str, Any]) -> str:
    """What the experiment asks, from the comment that opens its file; of a grid without one, what it varies."""
    name = info.get("experiment")
    own = (text for path, text in info.get("files", {}).items() if PurePath(path).stem == name)
    path = conf_dir() / "experiment" / f"{name}.yaml"
    text = next(own, path.read_text(encoding="utf-8") if name and path.is_file() else "")
    said = opening(text)
    asked = [sentence for sentence in re.split(r"(?<=[.?!]) ", said) if sentence.endswith("?")]
    if said:
        return " ".join(asked) or said
    varied = [COLUMN_OF.get(key, key) for key in info.get("varied") or ()]
    axes = ", ".join(name.replace("_", " ") for name in varied if "seed" not in name)
    return f"How does what latents stand for change with {axes}?" if axes else "What do the latents stand for?"


def answer(material: Material, frame: pd.DataFrame) -> list[str]:
    """The verdicts, the best trade-off and the splits, a sentence each."""
    counts = Counter(verdict.verdict for verdict in material.verdicts)
    said = [f"{counts[word]} {word}" for word in ("supported", "not supported", "undecided") if counts[word]]
    sentences = [f"Of {plural(len(material.verdicts), 'claim')}: {', '.join(said)}."] if said else []
    if warning := toy_warning(lowest_accuracy(frame), least_accuracy(material.info)):
        sentences.insert(0, warning)
    if frame.empty:
        return [*sentences, "No point is finished yet."]
    chosen = representatives(frame).dropna(subset=["fvu", "l0"])
    # An oracle was given the answer: it is no find where others were not.
    found = chosen[chosen["init"] != "oracle"]
    chosen = found if len(found) else chosen
    if len(chosen):
        best = chosen.iloc[int((chosen["fvu"] * chosen["l0"].clip(lower=1)).argmin())]
        sentences.append(
            f"The best trade-off of reconstruction and sparsity is {_named(best)}: FVU {best['fvu']:.3g} with "
            f"{best['l0']:.2f} latents firing on an input."
        )
    return [*sentences, *_splits(chosen)]


def _splits(chosen: pd.DataFrame) -> list[str]:
    split = chosen.dropna(subset=["splits_per_max"])
    if split.empty:
        return []
    most = split.iloc[int(split["splits_per_max"].argmax())]
    null = most.get(shuffled("splits_per_max"))
    chance = "" if null is None or pd.isna(null) else f"; with labels shuffled it would be {null:.2f}"
    if most["splits_per_max"] < 0.05:
        return ["At those settings no latent is split."]
    return [
        f"Latents split most in {_named(most)}: {most['splits_per_max']:.2f} split latents per maximum, "
        f"{most['distinct_splits_per_max']:.2f} of them distinct{chance}."
    ]


def _named(row: pd.Series) -> str:
    recipe = f" with {row['chosen']}" if row["chosen"] else ""
    return f"{penalty_name(row)} {coefficient(row)}{recipe} at width {row['width']} with {init_words(row)}"


def ran(material: Material, frame: pd.DataFrame) -> list[tuple[str, str]]:
    """The settings, the date, the code and the command, as names and values."""
    info = material.info
    rows = []
    for key in info.get("varied") or ():
        column = COLUMN_OF.get(key, key)
        if column in frame and len(frame):
            rows.append((key, listed([_short(value) for value in frame[column].dropna().unique()])))
    if (accuracy := lowest_accuracy(frame)) is not None:
        rows.append(("toy accuracy", percent(accuracy)))
    provenance = [record.get("provenance") or {} for record in material.finished.records.values()]
    commits = Counter(_commit(each) for each in provenance if each.get("git_sha"))
    versions = {name: {each.get("versions", {}).get(name) for each in provenance} - {None} for name in _PACKAGES}
    versions_of = [f"{name} {', '.join(sorted(found))}" for name, found in versions.items() if found]
    devices = sorted({str(each["device"]) for each in provenance if each.get("device")})
    if "written" in info:
        rows.append(("last run", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(info["written"]))))
    rows += [("commit", ", ".join(commits))] if commits else []
    rows += [("versions", ", ".join(versions_of))] if versions_of else []
    rows += [("device", ", ".join(devices))] if devices else []
    if info.get("overrides"):
        rows.append(("command", shlex.join(["sae-sweep", "run", *map(str, info["overrides"])])))
    return rows


def _commit(provenance: Mapping[str, Any]) -> str:
    return provenance["git_sha"][:10] + (" with changes" if provenance.get("git_dirty") else "")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
