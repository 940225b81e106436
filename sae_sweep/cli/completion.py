"""Completion at the prompt: what may follow the words before the cursor, for bash, zsh and fish.

No heavy import, since all of this runs at every press of the tab key: commands and options are asked of the command
line itself, keys and values of the schema and of the names of the files in conf/.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from sae_sweep.config import files
from sae_sweep.config.axes import GROUPS, is_sweep_key, listing
from sae_sweep.config.keys import point_keys, sweep_keys
from sae_sweep.errors import UserError
from sae_sweep.registry import Setting

_KINDS = {"int": "whole number", "float": "number", "number": "number", "str": "word"}
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclass(frozen=True)
class Candidate:
    """What the word may become. `ends`: nothing can follow within the word."""

    text: str
    help: str = ""
    ends: bool = True


def script(shell: str) -> str:
    """The lines that a shell is to read."""
    return (resources.files("sae_sweep") / "shell" / f"completion.{shell}").read_text()


def answer(program: Any, shell: str, words: Sequence[str]) -> str:
    """The candidates, a line each: as zsh and fish take them with a tab and a description, and for bash and zsh with
    a space at the end where nothing can follow. `program`: the click group of all commands."""
    before, word = _split(words[-1]) if shell == "bash" else (list(words[:-1]), words[-1])
    quote = word[:1] if word[:1] in ("'", '"') else ""
    lines = []
    for found in candidates(program, before, word.removeprefix(quote)):
        text = quote * (shell != "fish") + found.text + " " * (found.ends and shell != "fish" and not quote)
        lines.append(f"{text}\t{found.help}" if found.help and shell != "bash" else text)
    return "\n".join(lines)


def candidates(program: Any, before: Sequence[str], word: str) -> list[Candidate]:
    """What `word` may become after the words `before` it; nothing where there is nothing to say."""
    names = [each for each in before if not each.startswith("-")]
    if not names:
        offered = _options(program, before) if word.startswith("-") else _commands(program)
        return _starting(word, offered)
    command = program.commands.get(names[0])
    if command is None:
        return []
    rest = before[list(before).index(names[0]) + 1 :]
    _search_first(rest)
    taking = {name: each for each in command.params for name in each.opts if _takes_value(each)}
    if rest and rest[-1] in taking:
        return _starting(word, _of_kind(command, taking[rest[-1]], word))
    option, equals, value = word.partition("=")
    if equals and option in taking:
        return _starting(word, (_after(f"{option}=", each) for each in _of_kind(command, taking[option], value)))
    if word.startswith("-"):
        return _starting(word, _options(command, rest))
    given = [each for i, each in enumerate(rest) if not each.startswith("-") and (i == 0 or rest[i - 1] not in taking)]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    if len(given) >= len(arguments) and not (arguments and arguments[-1].nargs == -1):
        return []
    argument = arguments[min(len(given), len(arguments) - 1)]
    return _starting(word, _argument(command, argument, given, word, _outputs(rest)))


def _split(line: str) -> tuple[list[str], str]:
    """The words after the command's name that are complete, and the one at the cursor, of a line of bash."""
    words = re.findall(r"""(?:[^\s'"\\]|\\.|'[^']*(?:'|$)|"[^"]*(?:"|$))+""", line)
    word = words.pop() if words and line.endswith(words[-1]) else ""
    return [re.sub(r"['\"]", "", each) for each in words[1:]], word


def _starting(word: str, offered: Iterable[Candidate]) -> list[Candidate]:
    return [each for each in offered if each.text.startswith(word)]


def _after(prefix: str, each: Candidate) -> Candidate:
    return Candidate(prefix + each.text, each.help, each.ends)


# -- commands and options ---------------------------------------------------------------------------------------------


def _commands(program: Any) -> Iterator[Candidate]:
    for name, command in program.commands.items():
        if not command.hidden:
            yield Candidate(name, command.get_short_help_str(60))


def _options(command: Any, used: Sequence[str]) -> Iterator[Candidate]:
    for each in command.params:
        if each.param_type_name == "option" and not set(each.opts) & set(used):
            yield Candidate(max(each.opts, key=len), each.help or "")
    yield Candidate("--help", "Show what there is.")


def _takes_value(each: Any) -> bool:
    return each.param_type_name == "option" and not each.is_flag


def _of_kind(command: Any, param: Any, word: str) -> Iterator[Candidate]:
    """The values of an option or an argument: its choices, or folders; of an argument files too."""
    kind = get_type_hints(command.callback)[param.name]
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        yield from (Candidate(choice.value) for choice in kind)
    elif kind is Path:
        yield from _paths(word, files=param.param_type_name == "argument")


# -- arguments --------------------------------------------------------------------------------------------------------


def _argument(command: Any, argument: Any, given: Sequence[str], word: str, outputs: Path) -> Iterator[Candidate]:
    if argument.name == "overrides":
        yield from _overrides(given, word, outputs)
    elif argument.name in ("sweep", "sweeps"):
        yield from _names(outputs / "sweeps")
    elif argument.name == "point":
        yield from _points(outputs, given)
    else:
        yield from _of_kind(command, argument, word)


def _outputs(words: Sequence[str]) -> Path:
    """The output directory that the line names, or the one that is there without it."""
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in ("--output-dir", "output_dir"):
            return Path(value if equals else "".join(words[i + 1 : i + 2])).expanduser()
    return Path("outputs")


def _search_first(words: Sequence[str]) -> None:
    """Options of the folders that the line names are offered too."""
    named = [after for word, after in pairwise(words) if word == "--config-dir"]
    named += [word.removeprefix("--config-dir=") for word in words if word.startswith("--config-dir=")]
    with suppress(UserError):
        files.search_first(named)


def _names(folder: Path) -> Iterator[Candidate]:
    try:
        yield from map(Candidate, sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    except OSError:
        return


def _points(outputs: Path, given: Sequence[str]) -> Iterator[Candidate]:
    """The points of the sweep that the line names, or all there are."""
    try:
        ids = (outputs / "sweeps" / given[0] / "points.txt").read_text().splitlines() if given else None
    except OSError:
        return
    # The last line is a checksum.
    yield from _names(outputs / "points") if ids is None else (Candidate(id) for id in ids if not id.startswith("#"))


def _paths(word: str, files: bool = False) -> Iterator[Candidate]:
    """The folders, and with `files` the files, that a path may go on with."""
    parent = word.rpartition("/")[0] + "/" * ("/" in word)
    try:
        with os.scandir(Path(parent or ".").expanduser()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith(".") and (files or entry.is_dir()):
                    yield Candidate(parent + entry.name + "/" * entry.is_dir(), ends=not entry.is_dir())
    except OSError:
        return


# -- overrides: keys and values ---------------------------------------------------------------------------------------


def _overrides(given: Sequence[str], word: str, outputs: Path) -> Iterator[Candidate]:
    key, equals, value = word.partition("=")
    if not equals:
        yield from _keys({each.partition("=")[0] for each in given}, word)
        return
    *listed, last = value.split(",")
    if listed and is_sweep_key(key):
        return
    prefix = word[: len(word) - len(last)]
    for each in _values(key, last, outputs):
        if each.text not in listed:
            # One more value may follow after a comma.
            yield _after(prefix, Candidate(each.text, each.help, ends=each.ends and is_sweep_key(key)))


def _keys(used: set[str], word: str) -> Iterator[Candidate]:
    """The groups and the keys without a dot, and what keys with one begin with; past the dot, those keys."""
    keys = {**_rules(), **{group: None for group in GROUPS if group not in ("evaluation", "training")}}
    groups = {key.partition(".")[0] for key in keys if "." in key}
    if "." not in word:
        keys = {key: rule for key, rule in keys.items() if "." not in key}
    for key in sorted(keys.keys() - used):
        yield Candidate(f"{key}=", _about(key, keys[key]), ends=False)
    if "." not in word:
        yield from (Candidate(f"{group}.", f"settings of {group}", ends=False) for group in sorted(groups))


def _rules() -> dict[str, Setting | None]:
    """Every key and what it takes; of loggers and launchers the files alone know."""
    rules: dict[str, Setting | None] = {**point_keys(), **sweep_keys()}
    for group in ("logger", "launcher"):
        for path in files.options(group).values():
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            names = (match[1] for line in lines if (match := re.match(r"(\w+):", line)))
            rules |= {f"{group}.{name}": None for name in names if name != "name"}
    return rules


def _about(key: str, rule: Setting | None) -> str:
    if key in GROUPS:
        return _short(listing(key))
    if rule is None:
        return ""
    bounds = [f"{sign} {bound}" for name, sign in _BOUNDS.items() if (bound := getattr(rule, name)) is not None]
    return _short(rule.choices) if rule.choices else ", ".join([_KINDS.get(rule.kind, rule.kind), *bounds])


def _short(choices: Sequence[str]) -> str:
    text = ", ".join(choices)
    return text if len(text) <= 60 else text[:59] + "…"


def _values(key: str, word: str, outputs: Path) -> Iterator[Candidate]:
    """The values that a key may have, where they can be listed."""
    rule = _rules().get(key)
    if key in GROUPS:
        yield from map(Candidate, listing(key))
        if key == "distribution":
            yield from _paths(word, files=True) if "/" in word else ()
    elif key == "output_dir":
        yield from _paths(word)
    elif key == "name":
        yield from _names(outputs / "sweeps")
    elif key == "logger.mode":
        yield from map(Candidate, ("auto", "online", "offline"))
    elif rule is not None:
        yield from map(Candidate, rule.choices)
