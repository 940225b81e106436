"""`sae-sweep experiments`: what there is to run, and what one asks, takes and claims; `run --cfg`; `init`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from sae_sweep.config import files
from sae_sweep.config import overrides as config
from sae_sweep.config.keys import nearest, show
from sae_sweep.config.resolved import configuration
from sae_sweep.errors import UserError
from sae_sweep.reports import layout
from sae_sweep.sweep.plan import plan

# Files of a starter end in this where they lie in the package, so that nothing takes them for code of ours.
TEMPLATE = ".template"


def print_configuration(overrides: Sequence[str], yes: bool) -> None:
    """Print what `run` would run, as YAML."""
    found = configuration(config.load(overrides, yes=yes))
    print(yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120), end="")


def experiments(name: str | None, json: bool) -> None:
    """Print a line for each experiment, or all about one. UserError: there is none of that name."""
    found = files.options("experiment")
    if name is not None:
        if name not in found:
            raise UserError(f"there is no experiment {show(name)}{nearest(name, found)}")
        _one(name, found[name], json)
        return
    rows = [_row(each, path) for each, path in found.items()]
    if json:
        print(json_module.dumps(rows))
        return
    console = layout.console(sys.stdout)
    table = Table(box=None, pad_edge=False, expand=True)
    table.add_column("experiment", no_wrap=True, style="bold")
    table.add_column("asks", no_wrap=True, overflow="ellipsis", ratio=1)
    for heading in ("claims", "points", "about"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], Text(row["error"], style="yellow"), "", "", "", row["from"])
            continue
        time = layout.duration(row["seconds"])
        table.add_row(row["name"], row["asks"], str(len(row["claims"])), f"{row['points']:,}", time, row["from"])
    layout.write(console, table)


def _row(name: str, path: Path) -> dict[str, Any]:
    """What is said of an experiment; for one that cannot be read, why."""
    ours = files.conf_dir() in path.parents
    row: dict[str, Any] = {"name": name, "from": "sae-sweep" if ours else str(path)}
    try:
        sweep = config.load([f"experiment={name}"], yes=True)
    except UserError as error:
        return row | {"error": str(error)}
    seconds = plan(sweep, finished=()).seconds
    claims = [claim["prediction"] for claim in sweep.claims]
    asks = files.opening(path.read_text(encoding="utf-8-sig"))
    return row | {"asks": asks, "claims": claims, "points": len(sweep.points), "seconds": round(seconds, 1)}


def _one(name: str, path: Path, json: bool) -> None:
    row = _row(name, path)
    if "error" in row:
        raise UserError(row["error"])
    if json:
        print(json_module.dumps(row))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, values in config.axes_of(config.load([f"experiment={name}"], yes=True)):
        table.add_row(key, layout.listed(values))
    table.add_row("points", f"{row['points']:,}, about {layout.duration(row['seconds'])} on this machine")
    table.add_row("from", str(path))
    predictions = [Text(f"- {claim}") for claim in row["claims"]]
    layout.write(layout.console(sys.stdout), Text(name, style="bold"), Text(row["asks"]), table, *predictions)


def init(directory: Path) -> None:
    """Write a starter: an experiment, a penalty, a package with a kind of its own, and a notebook.

    UserError, before anything is written, if a file of it is there already.
    """
    starter = resources.files("sae_sweep") / "starter"
    targets = {directory / path.removesuffix(TEMPLATE): source for path, source in _templates(starter, "")}
    there = next((path for path in targets if path.exists()), None)
    if there is not None:
        raise UserError(f"{there} is there already: nothing was written (choose another folder)")
    try:
        for path, source in targets.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    for path in targets:
        print(path)
    print(f"try: cd {directory} && sae-sweep run experiment=gentle logger=none", file=sys.stderr)


def _templates(folder: Traversable, prefix: str) -> list[tuple[str, Traversable]]:
    found = []
    for each in sorted(folder.iterdir(), key=lambda each: each.name):
        path = f"{prefix}{each.name}"
        found += _templates(each, f"{path}/") if each.is_dir() else [(path, each)]
    return found
