"""Kinds by name: each toy, architecture, penalty, init, distribution and metric is one object that tells of itself.

A kind registers where it is declared, ours in the package's own files and others' in any package:

    from sae_sweep import register
    register(Penalty(name="saturating", formula="a/(a+s)", settings={"scale": Setting(1.0, gt=0)}, ...))

A package whose kinds are to be found without being imported by hand names the module that registers them in its
`pyproject.toml`, under `[project.entry-points."sae_sweep.plugins"]`. Schema, identity, listings, completion and the
tables of the documentation are derived from what is registered; no other file lists names.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar

from sae_sweep.errors import UserError

# Where the kinds of this package are declared: modules, and packages of which every module declares some.
HOMES = (
    "sae_sweep.toys.max_of_k",
    "sae_sweep.toys.activations",
    "sae_sweep.toys.bigrams",
    "sae_sweep.toys.planted",
    "sae_sweep.toys.checkpoint",
    "sae_sweep.toys.distributions",
    "sae_sweep.saes.architectures",
    "sae_sweep.saes.encoders",
    "sae_sweep.saes.inits",
    "sae_sweep.saes.penalties",
    "sae_sweep.saes.recipes",
    # In the order in which they are measured: each is given what those before have found.
    "sae_sweep.metrics.reconstruction",
    "sae_sweep.metrics.labels",
    "sae_sweep.metrics.ceilings",
    "sae_sweep.metrics.information",
    "sae_sweep.metrics.ground_truth",
    "sae_sweep.metrics.dictionary",
    "sae_sweep.metrics.truth",
    "sae_sweep.metrics.description_length",
    "sae_sweep.metrics.manifold",
    "sae_sweep.metrics.toy_accuracy",
    "sae_sweep.metrics.extra.probing",
    "sae_sweep.metrics.extra.priors",
    "sae_sweep.metrics.extra.structure",
    "sae_sweep.metrics.extra.inference",
    "sae_sweep.metrics.extra.token_order",
)
PLUGINS = "sae_sweep.plugins"
UNSET: Any = object()


@dataclass(frozen=True)
class Setting:
    """One setting of a kind: its default, what it may be, and what it means.

    gt, ge, lt, le: above, at least, below, at most; choices: one of
    kind: int, float, str or bool, by default that of the default; number: an int where it is whole, else a float;
    text: a str that may be one number
    optional: whether null is a value
    legacy: what a setting that came later than stored points was before it existed; at that value it is no part of an
    identity, so that ids given before it existed stay
    told: whether it has an effect on numbers; a path has none beside the digest of what it leads to
    given: whether a user may set it; what is derived from another setting may not
    verbatim: whether its text is taken as typed, and not read by Hydra's grammar, whose brackets and signs it may hold
    """

    default: Any
    help: str = ""
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] = ()
    kind: str = ""
    optional: bool = False
    legacy: Any = UNSET
    told: bool = True
    given: bool = True
    verbatim: bool = False

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", type(self.default).__name__)


def _nothing_wrong(part: Any) -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What every kind says of itself. `family` is what it is one of, and the config group or key that chooses it.

    version: raised when the same settings come to compute other numbers than before; ids of its points change with it
    defaults: settings of its part, not its own, that are others in a configuration if nothing is said
    offered: whether its name is what chooses it; a trained SAE to begin from is chosen by its own
    check(part): UserError for settings that do not go together
    """

    family: ClassVar[str]
    name: str
    description: str
    source: str = ""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    version: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    offered: bool = True
    check: Callable[[Any], None] = _nothing_wrong


K = TypeVar("K", bound=Kind)
_kinds: dict[str, dict[str, Kind]] = {}
# (family, name) → name and version of the package that the kind comes from, for those that are not ours.
_origins: dict[tuple[str, str], tuple[str, str]] = {}
# (family, name) → the module that declares it.
_modules: dict[tuple[str, str], str] = {}
_derived: list[Callable[[], None]] = []
_loading: tuple[str, str] | None = None


def register(kind: K) -> K:
    """Make a kind known under its name, and return it. UserError if the family has another one of that name."""
    known = _kinds.setdefault(kind.family, {})
    module = inspect.currentframe().f_back.f_globals.get("__name__", "")  # type: ignore[union-attr]
    ours = _loading is None and module.partition(".")[0] == "sae_sweep"
    if kind.name in known:
        whose = " ".join(_origins.get((kind.family, kind.name), ("sae-sweep",)))
        raise UserError(f"{kind.family} {kind.name!r} is registered twice: there is one in {whose} already")
    known[kind.name], _modules[kind.family, kind.name] = kind, module
    if not ours:
        _origins[kind.family, kind.name] = _loading or (module, "")
    for clear in _derived:
        clear()
    return kind


def derived(function: Callable[..., Any]) -> Any:
    """A function of what is registered, its answers kept until another kind registers."""
    kept = functools.cache(function)
    _derived.append(kept.cache_clear)
    return kept


def kinds(family: str) -> Mapping[str, Any]:
    """The kinds of a family by name: ours in the order of HOMES, then others."""
    load()
    return _kinds.get(family, {})


def offered(family: str) -> tuple[str, ...]:
    """The names that choose a kind of a family."""
    return tuple(name for name, kind in kinds(family).items() if kind.offered)


def get(family: str, name: str) -> Any:
    """A kind. KeyError if none of that name is registered."""
    return kinds(family)[name]


def origin(family: str, name: str) -> tuple[str, str] | None:
    """Name and version of the package that brought a kind; None for ours."""
    return _origins.get((family, name))


@functools.cache
def load() -> None:
    """Import what declares kinds: our own files, then the packages that name themselves as plugins."""
    homes: list[str] = []
    for home in HOMES:
        within = getattr(importlib.import_module(home), "__path__", ())
        homes += [home, *(f"{home}.{each.name}" for each in pkgutil.iter_modules(within))]
    for home in homes:
        importlib.import_module(home)
    # Whatever was imported first, and so registered first.
    place = {home: i for i, home in enumerate(homes)}
    for family, known in _kinds.items():
        ours = sorted(known.items(), key=lambda item: place.get(_modules[family, item[0]], len(place)))
        known.clear()
        known.update(ours)
    for entry in sorted(entry_points(group=PLUGINS), key=lambda entry: entry.name):
        assert entry.dist is not None
        with _registering(entry.dist.name, entry.dist.version):
            try:
                entry.load()
            except UserError:
                raise
            except Exception as error:
                whose = f"{entry.dist.name} {entry.dist.version}"
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(f"the plugin {entry.name} of {whose} cannot be loaded: {reason}") from error


@contextmanager
def _registering(package: str, version: str) -> Iterator[None]:
    global _loading
    _loading = package, version
    try:
        yield
    finally:
        _loading = None
