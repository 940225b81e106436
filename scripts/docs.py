"""Writes the pages of docs/reference and the pictures of docs/pictures, and builds the site.

    python scripts/docs.py                 # write what differs, and say what
    python scripts/docs.py --site FOLDER   # build the site there, strictly: a dead link ends it

The reference is what the registry, the command line and the package say of themselves, so it is never edited by hand:
a test holds the committed pages against this script. The pictures are firing tables of small codes, with the counts
that the package's own metrics give them.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

import typer

import sae_sweep
from sae_sweep import registry
from sae_sweep.cli.app import app
from sae_sweep.config import settings
from sae_sweep.config.columns import BESIDE, FRONTS, KEYS, SETTINGS, Column, table_columns
from sae_sweep.config.compose import IN_CONFIG
from sae_sweep.config.files import conf_dir
from sae_sweep.registry import Kind, Setting

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = "<!-- Written by scripts/docs.py: what is changed here by hand is lost. -->\n\n"
# Pages of the site that lie beside docs/ in the repository, and what they are called there.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def main() -> None:
    """Write the pages, or build the site."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="build the site there")
    folder = parser.parse_args().site
    for path, text in pages().items():
        place = DOCS / path
        if not place.exists() or place.read_text() != text:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
            print(f"written: {place.relative_to(ROOT)}")
    if folder is not None:
        sys.exit(build(folder))


def pages() -> dict[str, str]:
    """Every page and picture that this script writes, by its path below docs/."""
    return {
        "reference/commands.md": WRITTEN + commands(),
        "reference/settings.md": WRITTEN + keys(),
        "reference/columns.md": WRITTEN + columns(),
        "reference/python.md": WRITTEN + python(),
        **{f"pictures/{name}.svg": picture(*what) for name, what in PICTURES.items()},
    }


def build(folder: Path) -> int:
    """The site, from docs/ and what lies beside it; returns the builder's exit code."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        shutil.copytree(DOCS, place / "docs")
        for source, target in OUTSIDE.items():
            # What lies in docs/ lies beside these pages on the site.
            text = (ROOT / source).read_text().replace("](docs/", "](")
            (place / "docs" / target).write_text(text)
        for page in (place / "docs").rglob("*.md"):
            page.write_text(_site_links(page.read_text()))
        shutil.copy(ROOT / "docs" / "zensical.toml", place)
        code = subprocess.run(["zensical", "build", "--strict", "--clean"], cwd=place).returncode
        if code == 0:
            shutil.copytree(place / "site", folder, dirs_exist_ok=True)
        return code


def _site_links(text: str) -> str:
    """Links as the site has them: pages that it holds under another name, and files that it does not hold as text."""

    def replaced(found: re.Match[str]) -> str:
        words, target, anchor = found.groups()
        name = target.rpartition("/")[2]
        if name in OUTSIDE:
            return f"[{words}]({target.removesuffix(f'../{name}').removesuffix(name)}{OUTSIDE[name]}{anchor})"
        kept = target.startswith(("http", "#")) or not target or target.endswith((".md", ".png", ".svg"))
        return found[0] if kept and not target.startswith("../..") else f"{words} (`{target.replace('../', '')}`)"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#\s]*)((?:#[^)\s]*)?)\)", replaced, text)


# -- the reference -------------------------------------------------------------------------------------------------


def commands() -> str:
    """Each command: what it does, its arguments and options, two examples."""
    parts = ["# Commands\n\n`sae-sweep COMMAND --help` says the same in the terminal.\n"]
    # Typer's versions differ in what their parameters say of types: our own signatures do not.
    hints = {each.callback.__name__: get_type_hints(each.callback) for each in app.registered_commands}
    for name, command in typer.main.get_command(app).commands.items():
        rows = [[_option(each, hints[name].get(each.name)), _cell(each.help or "")] for each in command.params]
        lines = (line.strip() for line in (command.epilog or "").splitlines())
        examples = [line for line in lines if line.startswith("sae-sweep")]
        parts.append(f"## {name}\n\n{command.help}\n")
        parts.append("```bash\n" + "\n".join(examples) + "\n```\n")
        parts += [_table(["argument or option", "meaning"], rows)] if rows else []
    return "\n".join(parts)


def _option(parameter: Any, hint: Any) -> str:
    choices = "|".join(hint) if isinstance(hint, type) and issubclass(hint, StrEnum) else None
    value = choices or parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "argument":
        return f"`{value}`".replace("|", "\\|")
    return f"`{parameter.opts[0]}{'' if hint is bool else f' {value}'}`".replace("|", "\\|")


def keys() -> str:
    """Every key of a configuration, from the registry and the comments of conf/."""
    parts = [
        "# Configuration keys\n\n"
        "Every key can be swept: `sae.width=16,64` is an axis, and `penalty=l1,sqrt` one of kinds. "
        "`sae-sweep run … --cfg` prints the resolved configuration.\n",
        "## Top level\n",
        _table(["key", "default", "meaning"], _commented(conf_dir() / "config.yaml", "")),
    ]
    for name, part in settings.PARTS.items():
        parts.append(f"## {name}\n\n{inspect.getdoc(part)}\n")
        parts += [_settings_table(name, part.shared)] if part.shared else []
        for key, (family, default) in part.choices.items():
            choice = name if key in ("name", "architecture") else f"{name}.{key}"
            # The order in which kinds were registered depends on what was imported first.
            for kind in sorted(registry.kinds(family).values(), key=lambda each: (each.name != default, each.name)):
                parts.append(_kind(choice, name, kind, kind.name == default))
    parts.append(f"## evaluation\n\n{inspect.getdoc(settings.Evaluation)}\n")
    parts.append(_settings_table("evaluation", settings.Evaluation.all_settings()))
    for group, about in {"logger": "wandb", "launcher": "slurm"}.items():
        rows = _commented(conf_dir() / group / f"{about}.yaml", f"{group}.")
        parts.append(f"## {group}={about}\n\n" + _table(["key", "default", "meaning"], rows))
    return "\n".join(parts)


def _kind(choice: str, part: str, kind: Kind, default: bool) -> str:
    """A kind: what it is, its formula, prior and source where it has them, its settings."""
    about = [f"### {choice}={kind.name}\n\n{_sentence(kind.description)}{' The default.' if default else ''}\n"]
    for what in ("formula", "prior", "source"):
        value = getattr(kind, what, None)
        if value and value not in ("-", "–"):
            about.append(f"- {what}: " + (f"`{value}`" if what == "formula" else str(value)))
    given = {key: setting for key, setting in kind.settings.items() if setting.given}
    others = [f"`{part}.{key}={_value(value)}`" for key, value in kind.defaults.items() if key not in given]
    about += [f"- brings: {', '.join(others)}"] if others else []
    return "\n".join(about) + "\n" + ("\n" + _settings_table(part, given, kind.defaults) if given else "")


def _settings_table(part: str, found: Mapping[str, Setting], brought: Mapping[str, Any] = {}) -> str:
    """The settings of a part or kind. Their defaults are those of a configuration, some of which a kind brings."""
    defaults = {**{key: setting.default for key, setting in found.items()}, **IN_CONFIG.get(part, {}), **brought}
    rows = [
        [f"`{part}.{key}`", f"`{_value(defaults[key])}`", _limits(setting), _cell(setting.help)]
        for key, setting in found.items()
    ]
    return _table(["key", "default", "may be", "meaning"], rows)


def _limits(setting: Setting) -> str:
    """What a setting may be."""
    words = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}
    limits = [word.format(f"{limit:g}") for key, word in words.items() if (limit := getattr(setting, key)) is not None]
    names = {"int": "whole number", "str": "text", "bool": "true or false", "NoneType": "text"}
    kind = ", ".join(setting.choices) or names.get(setting.kind, "number")
    return ", ".join([kind, *limits, *(["or null"] if setting.optional else [])])


def _commented(path: Path, prefix: str) -> list[list[str]]:
    """The keys of a YAML file with their defaults and the comments behind them."""
    rows, block = [], ""
    for line in path.read_text().splitlines():
        found = re.fullmatch(r"( *)([a-z_0-9]+):(?: (.*?))?(?: *# (.*))?", line)
        if found is None or (found[2] in ("defaults", "name") and prefix):
            continue
        indent, key, value, comment = found.groups()
        block = "" if not indent else block
        if value is None:
            block = f"{key}."
        elif key != "defaults":
            rows.append([f"`{prefix}{block}{key}`", f"`{value}`", _cell(comment or "")])
    return rows


def columns() -> str:
    """Every column of the results table, by the metric that brings it."""
    parts = [
        f"# Columns\n\nThe results table has a row for each SAE and the same {len(table_columns())} columns in every "
        "sweep; a column is null where it has no meaning. [How it measures](../metrics.md) gives the rules. m is the "
        "maximum, q the query, n the runner-up, c the number of copies; a toy of your own names them itself. "
        "`shuffled_X` is the null of X: the mean of the same number over `evaluation.permutations` shufflings of the "
        "labels; `shuffled_X_sd` is its standard deviation.\n",
        "## Settings\n\nKeys that are swept and have no column here come after all others under their own name, such "
        "as `toy.interaction`. `point_id` is the hash of every setting that can change the SAE's numbers.\n",
        _table(
            ["column", "type", "key"],
            ([f"`{name}`", kind.lower(), f"`{KEYS.get(name, 'toy.name')}`"] for name, kind in SETTINGS.items()),
        ),
        "## Training and comparison\n\nWhat is known once a point is trained, and once it is compared with others.\n",
        _columns_table(BESIDE),
        "`on_front` is true where no other coefficient of the same penalty, init and width has both a lower L0 and a "
        "lower FVU, by means over seeds; `on_common_front` is the same among all penalties and inits of the width. "
        f"Both are {FRONTS['on_front']}.\n",
    ]
    for kind in sorted(registry.kinds("metric").values(), key=lambda each: each.name):
        asked = f" Measured with `evaluation.{kind.name}=true`." if kind.name in kind.settings else ""
        parts.append(f"## {kind.name}\n\n{_sentence(kind.description)}{asked}\n")
        parts.append(_columns_table(kind.columns))
    return "\n".join(parts)


def _columns_table(found: Mapping[str, Column]) -> str:
    """The columns but for nulls, which are explained once for all."""
    shown = {name: column for name, column in found.items() if not name.startswith("shuffled_")}
    rows = [[f"`{name}`", each.kind.lower(), _cell(each.description)] for name, each in shown.items()]
    return _table(["column", "type", "meaning"], rows)


def python() -> str:
    """The public names of the package with their signatures and docstrings."""
    parts = ["# Python\n\n`import sae_sweep` loads nothing heavy: each name is imported when it is first used.\n"]
    for name in sae_sweep.__all__:
        found = getattr(sae_sweep, name)
        if not callable(found):
            continue
        doc = inspect.getdoc(found) or ""
        parts.append(f"## {name}\n\n```python\n{name}{_signature(found)}\n```\n\n```text\n{doc}\n```\n")
    return "\n".join(parts)


def _signature(found: Any) -> str:
    """The arguments, on a line each where they are many; without the quotes that annotations have in our files."""
    signature = inspect.signature(found)
    arguments = [str(each) for each in signature.parameters.values()]
    returned = "" if inspect.isclass(found) else f" -> {signature.return_annotation}"
    one, many = ", ".join(arguments), "".join(f"\n    {each}," for each in arguments)
    text = f"({one}){returned}" if len(one) < 90 else f"({many}\n){returned}"
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    text = text.replace(f"{registry.UNSET!r}", "unset").replace("<factory>", "{}")
    return re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"\1", text)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "?")) else ".")


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


# -- the pictures --------------------------------------------------------------------------------------------------

TOKENS, PLACES, CELL = 4, 3, 22
# Of a picture: its title, and for each latent the (maximum, query) classes on which it fires, by maximum.
Latent = Mapping[int, Sequence[int]]
WHOLE = [{m: range(m + 1)} for m in range(TOKENS)]
PICTURES: dict[str, tuple[str, list[Latent]]] = {
    "whole": ("One latent for each maximum", WHOLE),
    "split": ("Maximum 3 is split by the query", [*WHOLE[:3], *({3: [q]} for q in range(4))]),
    "duplicates": ("Maximum 3 is held three times", [*WHOLE, WHOLE[3], WHOLE[3]]),
    "absorption": (
        "A latent for (3, query 1) has taken that class from the latent of maximum 3",
        [*WHOLE[:3], {3: [0, 2, 3]}, {3: [1]}],
    ),
}


def picture(title: str, latents: Sequence[Latent]) -> str:
    """A firing table as SVG: a row for each latent, a column for each (maximum, query), and the counts beneath."""
    classes = [(m, q) for m in range(TOKENS) for q in range(m + 1)]
    left, top, gap = 76, 70, 10
    x = {pair: left + i * CELL + pair[0] * gap for i, pair in enumerate(classes)}
    width, height = x[classes[-1]] + CELL + 16, top + len(latents) * CELL + 50
    parts = [f'<text x="12" y="22" class="t">{title}</text>']
    for m in range(TOKENS):
        middle = (x[m, 0] + x[m, m] + CELL) / 2
        parts.append(f'<text x="{middle}" y="46" text-anchor="middle">{"max " * (m > 0)}{m}</text>')
    for pair in classes:
        parts.append(f'<text x="{x[pair] + CELL / 2}" y="63" text-anchor="middle" class="s">q{pair[1]}</text>')
    for row, latent in enumerate(latents):
        y = top + row * CELL
        parts.append(f'<text x="12" y="{y + 15}">latent {row}</text>')
        for m, q in classes:
            kind = "f" if q in latent.get(m, ()) else "o"
            parts.append(f'<rect x="{x[m, q]}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" class="{kind}"/>')
    counts = _counted(latents)
    said = " · ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in counts.items())
    parts.append(f'<text x="12" y="{height - 16}">{said}</text>')
    style = (
        "text{font:12px system-ui,sans-serif;fill:#555}.t{font-weight:600;fill:#333}.s{font-size:10px}"
        ".f{fill:#0072b2}.o{fill:none;stroke:#bbb}"
        "@media(prefers-color-scheme:dark){text{fill:#bbb}.t{fill:#eee}.f{fill:#56b4e9}.o{stroke:#555}}"
    )
    size = f'viewBox="0 0 {max(width, 480)} {height}" width="{max(width, 480)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, f"<title>{title}: {said}</title><style>{style}</style>", *parts, "</svg>", ""])


def _counted(latents: Sequence[Latent]) -> dict[str, float]:
    """What the package's metrics count of such a code, on every input of the toy."""
    import itertools

    import numpy as np
    import torch

    from sae_sweep.config.settings import Distribution, Evaluation
    from sae_sweep.metrics.evaluation_classes import EvaluationClasses
    from sae_sweep.metrics.firing import FiringCounter
    from sae_sweep.metrics.labels import count, describe, only_one
    from sae_sweep.toys.classes import Cells
    from sae_sweep.toys.sampler import cell_weights

    cells = Cells(TOKENS, PLACES)
    tokens = np.array([*itertools.product(range(TOKENS), repeat=PLACES)])
    cell, maximum, query = cells.index(tokens), tokens.max(axis=1), tokens[:, -1]
    chance = cell_weights(cells, Distribution("max_stratified"))
    fires = [[int(q in latent.get(int(m), ())) for latent in latents] for m, q in zip(maximum, query, strict=True)]
    counter = FiringCounter(len(latents), cells.count, 0.01, None)
    counter.add(torch.tensor(fires, dtype=torch.float32), cell, (chance / cells.sizes)[cell])
    classes = EvaluationClasses(cells, chance, cells.sizes, False, Evaluation())
    found = only_one(count(describe(counter.table, classes), classes).metrics)
    return {
        "owned": found["owned_maxes"],
        "splits_per_maximum": found["splits_per_max"],
        "distinct": found["distinct_splits_per_max"],
        "duplicates_per_maximum": found["duplicates_per_max"],
    }


if __name__ == "__main__":
    main()
