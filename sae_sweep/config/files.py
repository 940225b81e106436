"""Options that are files: the user's folders first, then the package's conf/; each file read, checked and mended.

sae-sweep run experiment=mine             # from --config-dir, SAE_SWEEP_CONFIG_DIR, ./conf or the package
sae-sweep run experiment=./ideas/mine.yaml penalty=./ideas/gentle.yaml
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_sweep.config.keys import nearest, show
from sae_sweep.config.settings import PARTS
from sae_sweep.errors import UserError

# The groups of options, a folder each. Those that are no part of a point take one option for the whole sweep.
GROUPS = (*PARTS, "evaluation", "logger", "launcher", "experiment")
PARAMS = "hydra.sweeper.params"
VARIABLE = "SAE_SWEEP_CONFIG_DIR"
# What Hydra's own settings are called here; nothing where there is no such thing.
HYDRA = {
    "hydra.run.dir": "output_dir",
    "hydra.sweep.dir": "output_dir",
    "hydra.sweep.subdir": "",
    "hydra.job.name": "name",
    "hydra.job.chdir": "",
    "hydra.launcher": "launcher",
    "hydra.sweeper": "",
}
_named: tuple[Path, ...] = ()


@functools.cache
def conf_dir() -> Path:
    """The package's folder of YAML: inside it where it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(place for place in (package / "conf", package.parent / "conf") if (place / "config.yaml").exists())


def search_first(folders: Sequence[Path | str]) -> None:
    """Look for options in these folders before any other. UserError if one is not there."""
    global _named
    _named = tuple(_folder(each, "--config-dir") for each in folders)


def folders() -> list[Path]:
    """Where options are looked for: `search_first`, SAE_SWEEP_CONFIG_DIR, ./conf if it holds groups of ours, conf/."""
    variable = filter(None, os.environ.get(VARIABLE, "").split(os.pathsep))
    found = [*_named, *(_folder(each, VARIABLE) for each in variable)]
    here = Path.cwd() / "conf"
    if any((here / group).is_dir() for group in (*PARTS, "experiment")):
        found.append(here)
    return list(dict.fromkeys([*(each.resolve() for each in found), conf_dir()]))


def _folder(given: Path | str, where: str) -> Path:
    place = Path(given).expanduser()
    if not place.is_dir():
        raise UserError(f"{where}={show(str(given))} is no folder (of experiment/, penalty/ or another group)")
    return place.absolute()


def options(group: str) -> dict[str, Path]:
    """The options of a group that are files, by name; the first folder that has one of a name wins."""
    found: dict[str, Path] = {}
    for folder in folders():
        for path in sorted((folder / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def is_path(option: Any) -> bool:
    """Whether an option of a group is given as the path of a YAML file."""
    return isinstance(option, str) and option.endswith((".yaml", ".yml"))


def locate(group: str, option: str) -> Path | None:
    """The file of an option; None if none is looked for there, as for a kind. UserError: a path to no file."""
    if not is_path(option):
        return options(group).get(option)
    path = Path(option).expanduser()
    if not path.is_file():
        others = [str(each) for each in sorted(path.parent.glob("*.y*ml"))]
        raise UserError(f"{group}={show(option)}: there is no such file{nearest(option, others) if others else ''}")
    return path.absolute()


def name_in_store(option: str) -> str:
    """What an option is called where it is composed: paths hold characters that names may not."""
    return f"file_{hashlib.sha256(option.encode()).hexdigest()[:16]}" if is_path(option) else option


def stamp() -> tuple[tuple[str, int, int], ...]:
    """Path, time and size of every file in the folders: composed configurations are kept until one changes."""
    paths = [path for folder in folders() for group in GROUPS for path in sorted((folder / group).glob("*.yaml"))]
    return tuple(map(stamp_of, paths))


def stamp_of(path: Path) -> tuple[str, int, int]:
    """Path, time and size of a file; 0 and 0 if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path), status.st_mtime_ns, status.st_size


def read(group: str, path: Path) -> dict[str, Any]:
    """What a file of a group says.

    Its `defaults` come back as `_self_`, options of the group, or {group: option}, with paths made absolute, and the
    `hydra.sweeper.params` of an experiment under that key. UserError: the file cannot be read, or says what would have
    no effect.
    """
    tree = copy.deepcopy(_parsed(path, stamp_of(path)))
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of keys to values, got {show(tree)}")
    _check_package(group, path)
    if "hydra" in tree:
        params = _sweeper_params(path, tree.pop("hydra"))
        if params and group != "experiment":
            raise UserError(f"{path}: hydra.sweeper.params are read in an experiment alone")
        if params:
            tree[PARAMS] = params
    tree["defaults"] = [*_defaults(group, path, tree.get("defaults") or [])]
    for axes in _axes(tree.get("grid")):
        for key, value in axes.items():
            if key in GROUPS:
                values = value if isinstance(value, list) else [value]
                axes[key] = [_beside(path, each) for each in values]
    return tree


def top() -> dict[str, Any]:
    """What the one file says that is no option of a group: every setting's default."""
    path = conf_dir() / "config.yaml"
    tree: dict[str, Any] = copy.deepcopy(_parsed(path, stamp_of(path)))
    return tree


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, stamped: tuple[str, int, int]) -> Any:
    """What the YAML of a file holds; `stamped` tells its versions apart."""
    import yaml
    from omegaconf._utils import get_yaml_loader

    try:
        # A safe loader that reads 1e-3 as a number, as Hydra does.
        tree = get_yaml_loader()(_text(path)).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {' '.join(str(error.problem or error.context).split())}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    return {} if tree is None else tree


def package_of(group: str, path: Path) -> str | None:
    """Where the keys of a file stand: at the top, `_global_`, or, for None, under its group."""
    return "_global_" if group == "experiment" else _package(_text(path))


def opening(text: str) -> str:
    """The comment that a file begins with, as one line; of an experiment, what it asks."""
    found = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            found.append(line.removeprefix("#").strip())
    return " ".join(found)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _package(text: str) -> str | None:
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if match := re.match(r"#\s*@package\s+(\S+)", line):
            return match[1]
    return None


def _check_package(group: str, path: Path) -> None:
    found = _package(_text(path))
    if found not in (None, "_global_", *(() if group == "experiment" else ("_group_", group))):
        mend = "_global_, or take the line out" if group == "experiment" else "nothing: take the line out"
        raise UserError(f"{path}: # @package {found} is not used here: it should be {mend}")


def _axes(grid: Any) -> Iterator[dict[str, Any]]:
    """The mappings of keys to values in a grid; what is of another shape is refused where the grid is used."""
    if isinstance(grid, dict):
        blocks = grid.get("blocks")
        yield from (
            each for each in [grid.get("axes"), *(blocks if isinstance(blocks, list) else [])] if isinstance(each, dict)
        )


def _beside(path: Path, option: Any) -> Any:
    """A path in a file is meant from its folder, if there is such a file there."""
    beside = path.parent / str(option)
    is_file = isinstance(option, str) and (is_path(option) or option.endswith(".csv")) and beside.is_file()
    return str(beside) if is_file else option


def _defaults(group: str, path: Path, listed: Any) -> Iterator[Any]:
    """`_self_`, an option of the same group, or {group: option}, whether or not `override` and a slash were written."""
    if not isinstance(listed, list):
        raise UserError(f"{path}: defaults must be a list, got {show(listed)}")
    for entry in listed:
        if entry == "_self_":
            yield entry
        elif isinstance(entry, str):
            yield _beside(path, entry)
        elif isinstance(entry, Mapping) and len(entry) == 1:
            ((key, option),) = entry.items()
            named = str(key).removeprefix("override ").strip().lstrip("/")
            yield {named: _beside(path, _chosen(group, path, named, option))}
        else:
            raise UserError(f"{path}: defaults: {show(entry)} is neither an option nor `override /group: option`")


def _chosen(group: str, path: Path, named: str, option: Any) -> Any:
    """The option that an entry of the defaults gives another group."""
    if named.startswith("hydra/"):
        raise UserError(f"{path}: defaults: {named} is Hydra's: for a cluster write `override /launcher: slurm`")
    if named not in GROUPS:
        raise UserError(f"{path}: defaults: there is no group {show(named)}{nearest(named, GROUPS)}")
    if group != "experiment":
        raise UserError(
            f"{path}: defaults: {named}={show(option)} is outside the group {group}: an experiment sets others"
        )
    if isinstance(option, list):
        several = ", ".join(map(str, option))
        raise UserError(
            f"{path}: defaults: {named} takes one option, got [{several}]; to sweep them write "
            f"`grid: {{axes: {{{named}: [{several}]}}}}`"
        )
    return option


def refuse_hydra(key: str, where: str = "") -> UserError:
    """What to give in place of one of Hydra's own keys."""
    known = next((name for name in HYDRA if f"{key}.".startswith(f"{name}.")), "")
    ours = HYDRA.get(known, "")
    if known == "hydra.launcher" and key != known:
        ours = f"launcher{key.removeprefix(known)}"
    mend = f"{ours} is what it is called here" if ours else "it has no meaning here: leave it out"
    if known == "hydra.launcher":
        mend += ", with launcher: slurm" if where else ", with launcher=slurm"
    return UserError(f"{where}{key} is Hydra's: {mend}")


def _sweeper_params(path: Path, block: Any) -> dict[str, Any]:
    """`hydra.sweeper.params`; UserError for all else under `hydra`, but that it is a multirun."""
    found: dict[str, Any] = {}
    for key, value in _flat("hydra", block):
        if key.startswith(f"{PARAMS}."):
            found[key.removeprefix(f"{PARAMS}.")] = value
        elif not (key == "hydra.mode" and value == "MULTIRUN"):
            raise refuse_hydra(key, f"{path}: ")
    return found


def _flat(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(f"{prefix}.{key}", value)
    else:
        yield prefix, node
