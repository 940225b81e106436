"""From the options that are chosen to one tree of settings: what Hydra composes of conf/, user's files and kinds.

Every file that a composition takes is read here and handed to Hydra through its store: so a user's own come first,
and what is wrong with one is said in a line of ours. Composing costs about 0.1 s a time.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_sweep import registry
from sae_sweep.config import files
from sae_sweep.config.axes import FAMILIES, PLAIN, UnknownOption, fileless, is_file, listing
from sae_sweep.config.keys import SEEDS, nearest, show
from sae_sweep.config.settings import PARTS, Evaluation, Part
from sae_sweep.errors import UserError

# What a configuration has where nothing is said: a width that goes with the toy, and the ladder of the penalty.
IN_CONFIG: dict[str, dict[str, Any]] = {"sae": {"width": "${toy.d_vocab}"}, "penalty": {"coefficient": None}}
# The one file that is no option of a group.
_TOP = "sae_sweep_config"


@dataclass(frozen=True)
class Composed:
    """A composed configuration; references are left unresolved.

    tree: every key; chosen: the option that each group ended up with; user_files: those it took that are not ours
    """

    tree: dict[str, Any]
    chosen: dict[str, str]
    user_files: list[Path]


def compose(asked: Mapping[str, str | None]) -> Composed:
    """The configuration of these options. UserError: there is no such option, or a file of one is wrong."""
    named = {group: "weights" if is_file(group, option) else option for group, option in asked.items() if option}
    # Options without a file differ in nothing but their name: one composition serves them all.
    alike = {group: fileless(group) for group in named if named[group] in fileless(group)}
    words = {group: alike[group][0] if group in alike else option for group, option in named.items()}
    paths = (Path(option).expanduser() for option in words.values() if files.is_path(option))
    found = copy.deepcopy(_composed(tuple(words.items()), (*files.stamp(), *map(files.stamp_of, paths))))
    for group in alike:
        found.tree[group][_chooser(group)] = found.chosen[group] = named[group]
    for group in FAMILIES:
        # A file may choose a kind by its mapping, `encoder: {name: mlp}`, where no option of the group is named.
        if found.chosen[group] in fileless(group):
            found.chosen[group] = found.tree[group].get(_chooser(group), found.chosen[group])
    found.tree.update({part: with_defaults(part, found.tree[part]) for part in PARTS})
    return found


@registry.derived
def _composed(named: tuple[tuple[str, str], ...], stamps: tuple[tuple[str, int, int], ...]) -> Composed:
    """`stamps`: of the files, so that a changed one is composed again."""
    words = [f"{group}={files.name_in_store(option)}" for group, option in named]
    where = " ".join(f"{group}={option}" for group, option in named)
    try:
        # Hydra 1.3 warns where the version is not given, 1.4 where it is.
        with (
            warnings.catch_warnings(action="ignore"),
            initialize(config_path=None, version_base="1.3"),
            _offered(named) as (names, user_files),
        ):
            config = hydra_compose(_TOP, words, return_hydra_config=True)
        chosen = {group: names.get(option, option) for group, option in config.hydra.runtime.choices.items()}
        OmegaConf.set_readonly(config, False)
        OmegaConf.set_struct(config, False)
        del config["hydra"]
        tree: Any = OmegaConf.to_container(config, resolve=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    _check_tree(tree, where)
    return Composed(tree, chosen, user_files)


@contextmanager
def _offered(named: tuple[tuple[str, str], ...]) -> Iterator[tuple[dict[str, str], list[Path]]]:
    """For a while, the top file and every option that it, `named` or a file of theirs chooses are in Hydra's store.

    Yields name in the store → option, and the files that are not ours. Hydra copies all of its store for each
    composition: what stays there makes the next ones slower.
    """
    store = ConfigStore.instance()
    before, store.repo = store.repo, _folders(store.repo)
    try:
        yield _offer(named)
    finally:
        store.repo = before


def _folders(repo: dict[str, Any]) -> dict[str, Any]:
    """Hydra's store with folders of its own."""
    return {name: _folders(node) if isinstance(node, dict) else node for name, node in repo.items()}


def _offer(named: tuple[tuple[str, str], ...]) -> tuple[dict[str, str], list[Path]]:
    top = files.top()
    ConfigStore.instance().store(name=_TOP, node=top)
    waiting = [*named, *(pair for entry in top["defaults"] if isinstance(entry, dict) for pair in entry.items())]
    names: dict[str, str] = {}
    user_files: dict[Path, None] = {}
    seen: set[tuple[str, Any]] = set()
    while waiting:
        group, option = waiting.pop()
        if option is None or (group, option) in seen:
            continue
        seen.add((group, option))
        names[files.name_in_store(option)] = option
        path = files.locate(group, option)
        if path is not None and files.conf_dir() not in path.parents:
            user_files[path] = None
        waiting += _offer_one(group, option, path)
    return names, list(user_files)


def _offer_one(group: str, option: str, path: Path | None) -> list[tuple[str, str]]:
    """Store one option; the options that its file chooses in turn."""
    store, name = ConfigStore.instance(), files.name_in_store(option)
    if path is None:
        if option not in listing(group):
            raise UnknownOption(group, option)
        node = {_chooser(group): option} if group not in PLAIN else {}
        store.store(group=group, name=name, node=node)
        return []
    tree = files.read(group, path)
    tree.pop(files.PARAMS, None)
    for part in FAMILIES:
        if isinstance(tree.get(part), list):
            raise _of_the_grid(part, f"{group}={option}: {part}", tree[part])
    chosen: list[tuple[str, str]] = []
    for place, entry in enumerate(tree["defaults"]):
        if isinstance(entry, dict):
            chosen += entry.items()
            tree["defaults"][place] = {f"override /{key}": files.name_in_store(each) for key, each in entry.items()}
        elif entry != "_self_":
            chosen.append((group, entry))
            tree["defaults"][place] = files.name_in_store(entry)
    store.store(group=group, name=name, node=tree, package=files.package_of(group, path))
    return chosen


def _chooser(group: str) -> str:
    """The key of a group whose value is its kind: `architecture` of `sae`, `name` of the others."""
    return next(iter(PARTS[group].choices))


def _of_the_grid(part: str, key: str, values: Any) -> UserError:
    return UserError(f"{key} takes one value, not {show(values)} (an axis is grid: {{axes: {{{part}: [NAME, NAME]}}}})")


def with_defaults(part: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a group, with what a configuration has in place of the defaults of the settings."""
    if part not in FAMILIES:
        return given
    key, (family, default) = next(iter(PARTS[part].choices.items()))
    kinds = registry.kinds(family)
    name = given.get(key, default)
    if isinstance(name, list | dict):
        raise _of_the_grid(part, f"{part}.{key}", name)
    if name not in kinds:
        raise UserError(f"{part}.{key} cannot be {show(name)}{nearest(str(name), kinds)}")
    found = {key: name, **IN_CONFIG.get(part, {}), **kinds[name].defaults}
    if part == "penalty":
        found["ladder"] = list(kinds[name].ladder)
    return {**found, **given}


def _check_tree(tree: Any, where: str) -> None:
    """Every key of the composed YAML is known."""
    known: dict[str, set[str]] = {part: _given(kind) for part, kind in PARTS.items()}
    known["penalty"] |= {"ladder"}
    known["evaluation"] = _given(Evaluation)
    top = {*known, *SEEDS, "logger", "launcher", "device", "output_dir", "name", "grid", "claims"}
    for name, keys, expected in [("", tree, top), *((f"{part}.", tree.get(part), known[part]) for part in known)]:
        if not isinstance(keys, dict):
            part = name[:-1]
            mend = (
                f" (write {part}: {{{_chooser(part)}: {keys}}})" if part in FAMILIES and isinstance(keys, str) else ""
            )
            raise UserError(f"{where}: {part} must be a mapping, got {show(keys)}{mend}")
        wrong = min(set(keys) - expected, key=str, default=None)
        if wrong is not None:
            raise UserError(f"{where}: unknown key {show(f'{name}{wrong}')}{nearest(str(wrong), expected)}")
    if missing := min(top - set(tree), default=None):
        raise UserError(f"{where}: {missing} is missing")
    if not isinstance(tree["claims"], list):
        raise UserError(f"{where}: claims must be a list, got {show(tree['claims'])}")
    if not isinstance(tree["penalty"].get("ladder", []), list):
        raise UserError(f"{where}: penalty.ladder must be a list, got {show(tree['penalty']['ladder'])}")


def _given(kind: type[Part]) -> set[str]:
    return {name for name, setting in kind.all_settings().items() if setting.given}
