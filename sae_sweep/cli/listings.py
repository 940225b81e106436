"""What there is to choose from: the toys, the cells of one, penalties, architectures, encoders, recipes."""

from __future__ import annotations

import dataclasses
import json as json_module
import sys
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from rich.table import Table
from rich.text import Text

from sae_sweep import registry
from sae_sweep.config import overrides as config
from sae_sweep.config.keys import nearest, show
from sae_sweep.config.settings import Toy, Training
from sae_sweep.errors import UserError
from sae_sweep.reports import layout

# What has a paragraph for each: settings and columns, with what they mean.
_PARAGRAPHS = ("settings", "columns")
# Where a listing's values begin, and how they are wrapped: a paragraph hangs from its first line.
_INDENT = 17
_WRAPPED: dict[str, Any] = {"break_on_hyphens": False, "subsequent_indent": "  "}


def cells(overrides: Sequence[str], json: bool) -> None:
    """Print the ground truth of a toy."""
    sweep = config.load(overrides, ["experiment=null"])
    settings = {(point.toy, point.distribution) for point in sweep.points}
    if len(settings) > 1:
        raise UserError(f"cells shows one toy under one distribution at a time, got {len(settings)}")
    ((toy, distribution),) = settings
    if toy.kind.planted:
        from sae_sweep.cli import features

        planted = features.describe(toy)
        if json:
            print(json_module.dumps({"schema": 1, "toy": toy.name, **planted}))
        else:
            layout.write(layout.console(sys.stdout), *features.picture(toy, planted))
        return
    if not toy.kind.distributions:
        raise UserError(f"toy={toy.name} has no cells of sequences: they are counted for toy=max_of_k")

    from sae_sweep.config.settings import PARTITIONS
    from sae_sweep.metrics.ceilings import ceilings_of
    from sae_sweep.toys.classes import cells_per_max, count_cells, count_classes

    per_max = [int(cells_per_max(m, toy.k)) for m in range(toy.d_vocab)]
    partitions = {name: count_classes(name, toy.d_vocab, toy.k) for name in PARTITIONS}
    total = int(count_cells(toy.d_vocab, toy.k))
    found = ceilings_of(toy, distribution, sweep.evaluation)
    assert found is not None
    if json:
        head = {"schema": 1, "d_vocab": toy.d_vocab, "k": toy.k, "cells": total}
        about = {"distribution": distribution.name, "inputs": sweep.evaluation.inputs}
        ceilings = {name: dataclasses.asdict(ceiling) for name, ceiling in found.items()}
        print(json_module.dumps(head | {"per_max": per_max, "partitions": partitions, **about, "ceilings": ceilings}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("partition")
    for title in ("classes", "countable", "splits"):
        table.add_column(title, justify="right")
    table.add_column("tells apart")
    spelled = {"m": "maximum", "q": "query", "n": "runner-up", "c": "copies of the maximum"}
    for name, count in partitions.items():
        told_apart = ", ".join(spelled[letter] for letter in name)
        table.add_row(name, f"{count:,}", f"{found[name].countable:,}", f"{found[name].splits:,}", told_apart)
    sentence = (
        f"max of {toy.k} tokens out of {toy.d_vocab}: {toy.d_vocab**toy.k:,} inputs in {total:,} cells "
        f"(maximum, query, runner-up, copies); from {per_max[0]} for maximum 0 to {per_max[-1]:,} for {toy.d_vocab - 1}"
    )
    drawn = toy.d_vocab**toy.k > sweep.evaluation.inputs
    rule = (
        f"countable: classes that can be judged under {distribution.name}, "
        + (
            f"of which an evaluation expects 8 inputs among the {sweep.evaluation.inputs:,} that it draws"
            if drawn
            else "as every input is enumerated"
        )
        + "; splits: what a perfect code for the partition scores, one latent for each countable class"
    )
    layout.write(layout.console(sys.stdout), sentence, table, rule)


def toys(name: str | None, json: bool) -> None:
    """Print the toys there are, or all about one."""
    rows = [
        {
            "name": each,
            "description": kind.description,
            "sites": list(kind.sites),
            "settings": _settings("toy", kind),
            "same_as": _parts(Toy(each)),
            "source": kind.source,
        }
        for each, kind in registry.kinds("toy").items()
    ]
    _listing("toy", rows, name, json, "toy=NAME, and its settings at their defaults")
    if name is not None and not json and registry.get("toy", name).planted:
        from sae_sweep.cli import features

        toy = Toy(name)
        layout.write(layout.console(sys.stdout), "", *features.picture(toy, features.describe(toy)))


def _parts(toy: Toy) -> list[str]:
    """The planted toy that a preset stands for, as words of a command; none for a kind of its own."""
    parts: Toy = toy.kind.parts(toy)
    if parts is toy:
        return []
    usual = Toy(parts.name)
    said = {f"toy.{key}": value for key, value in parts.to_dict().items() if value != usual.get(key)}
    return [
        "toy=planted",
        *(f"{key}={value!r}" if " " in str(value) else f"{key}={value}" for key, value in said.items()),
    ]


def penalties(name: str | None, json: bool) -> None:
    """Print the penalties there are, or one of them with the prior that it implies."""
    from sae_sweep.cli import prior

    known = registry.kinds("penalty")
    if name is not None and name not in known:
        raise UserError(f"there is no penalty {show(name)}{nearest(name, known)}")
    rows = [
        {
            "name": each,
            "description": kind.description,
            "formula": kind.parsed.whole,
            "slope_at_zero": kind.parsed.slope_at_zero,
            "prior": kind.prior,
            "keys": [f"penalty.{key}" for key in kind.settings],
            "settings": _settings("penalty", kind),
            "ladder": config.ladder(each),
            "source": kind.source,
        }
        for each, kind in known.items()
        if name in (None, each)
    ]
    question = prior.ask(name) if name not in (None, "none") else None
    if json and name is not None:
        print(json_module.dumps(rows[0] | {"implied_prior": question and prior.as_json(question)}))
        return
    heading = "a = activation · decoder norm of a latent; Σ over latents; s = penalty.scale, p = penalty.p, ε = 1/1000"
    _listing("penalty", rows, name, json, heading, prior.QUESTIONS.get(name or ""))
    if question:
        console = layout.console(sys.stdout)
        # Its closed form stands in the listing already.
        shown = dataclasses.replace(question, closed_form=None)
        layout.write(console, Text(""), *prior.paragraphs(shown, console.width))


def architectures(name: str | None, json: bool) -> None:
    """Print the architectures there are, or all about one."""
    rows = [
        {
            "name": each,
            "description": a.description,
            "formula": a.formula,
            "prior": a.prior,
            "keys": list(a.keys),
            "settings": _settings("sae", a),
            "trained_by": a.step,
            "source": a.source,
        }
        for each, a in registry.kinds("architecture").items()
    ]
    _listing("architecture", rows, name, json, "all: pre = W_enc·x + b_enc, z by its formula, x̂ = W_dec·z + b_dec")


def encoders(name: str | None, json: bool) -> None:
    """Print the encoders there are, or all about one."""
    every = registry.kinds("architecture")
    rows = [
        {
            "name": each,
            "description": kind.description,
            "formula": kind.formula,
            "goes_with": [f"sae={other}" for other, architecture in every.items() if kind.suits(architecture)],
            "settings": _settings("encoder", kind),
            "source": kind.source,
        }
        for each, kind in registry.kinds("encoder").items()
    ]
    _listing("encoder", rows, name, json, "encoder=NAME: from an input x to what the architecture makes codes of")


def recipes(name: str | None, json: bool) -> None:
    """Print the ingredients of recipes there are, or all about one, by `revival=resample` or `resample` alone."""
    rows = [
        {
            "name": f"{ingredient}={each}",
            "description": kind.description,
            "settings": _settings("training", kind),
            "source": kind.source,
        }
        for ingredient, (family, _) in Training.choices.items()
        for each, kind in registry.kinds(family).items()
    ]
    shared = Training.shared
    rows += [
        {
            "name": each,
            "description": kind.description,
            "settings": [f"training.{each}={_shown(shared[each].default)} ({shared[each].help})"],
            "source": kind.source,
        }
        for each, kind in registry.kinds("control").items()
    ]
    meant = [row["name"] for row in rows if str(row["name"]).partition("=")[2] == name]
    usual = " ".join(f"{ingredient}={default}" for ingredient, (_, default) in Training.choices.items())
    heading = f"training.INGREDIENT=NAME; if nothing is said, {usual}"
    _listing("ingredient of a recipe", rows, meant[0] if len(meant) == 1 else name, json, heading)


def _shown(default: Any) -> Any:
    return "null" if default is None else default


def _settings(part: str, kind: registry.Kind) -> list[str]:
    """A kind's settings with their defaults and what they mean."""
    defaults = {key: kind.defaults.get(key, setting.default) for key, setting in kind.settings.items() if setting.given}
    return [f"{part}.{key}={_shown(default)} ({kind.settings[key].help})" for key, default in defaults.items()]


def metrics(name: str | None, json: bool) -> None:
    """Print the metrics there are, or all about one, which a column of it names as well."""
    known = registry.kinds("metric")
    name = next((each for each, kind in known.items() if name in kind.columns), name)
    rows = [
        {
            "name": each,
            "description": kind.description,
            "settings": [
                f"evaluation.{key}={setting.default} ({setting.help})" for key, setting in kind.settings.items()
            ],
            "columns": [f"{column} ({told.description})" for column, told in kind.columns.items()],
            "source": kind.source,
        }
        for each, kind in known.items()
    ]
    _listing("metric", rows, name, json, "measured on every SAE, or where evaluation.NAME=true asks for it")


def _listing(
    kind: str,
    rows: Sequence[Mapping[str, Any]],
    name: str | None,
    json: bool,
    heading: str,
    remark: str | None = None,
) -> None:
    """A line per row, its name and what says most of it; or of the one that is named, everything. Then the remark.

    heading: what the words of one row mean.
    """
    named = [row for row in rows if row["name"] == name]
    if name is not None and not named:
        raise UserError(f"there is no {kind} {name}{nearest(name, [row['name'] for row in rows])}")
    if json:
        print(json_module.dumps(rows if name is None else named[0]))
        return
    console = layout.console(sys.stdout)
    command = {"penalty": "penalties"}.get(kind, f"{kind.rpartition(' ')[2]}s")
    heading = heading if named else f"sae-sweep {command} NAME says all about one of these."
    parts = [*map(Text, wrap(heading, console.width)), Text()]
    if name is None:
        longest = max(len(row["name"]) for row in rows)
        for row in rows:
            line = Text.assemble((row["name"].ljust(longest + 2), "bold"), row.get("description") or row["formula"])
            line.truncate(console.width, overflow="ellipsis")
            parts.append(line)
    for row in named:
        parts.append(Text(row["name"], "bold"))
        for key, value in row.items():
            if key != "name" and value not in (None, [], "", "-"):
                spelled = (
                    value
                    if key in _PARAGRAPHS
                    else [" ".join(map(str, value)) if isinstance(value, list) else str(value)]
                )
                lines = [line for each in spelled for line in wrap(each, console.width - _INDENT, **_WRAPPED)]
                parts.append(Text(f"  {key.replace('_', ' ')}".ljust(_INDENT) + lines[0]))
                parts += [Text(" " * _INDENT + line) for line in lines[1:]]
    parts += [Text("\n" + "\n".join(wrap(remark, console.width)))] if remark else []
    layout.write(console, *parts)
