"""The settings of a point, and of the sweep around it: typed, frozen, checked, and what they are identified by.

A part of a point, such as its toy, names one kind of its family (registry.py) and holds that kind's own settings and
no others: `Toy("circle", spread=0.5)` has no `d_vocab`. So a setting that a kind does not read can neither change its
identity nor stand in its record.

No heavy import here: everything that handles a point imports this file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Self

from sae_sweep import registry
from sae_sweep.errors import UserError
from sae_sweep.registry import UNSET, Setting

# Raise when what all points share, the loop and the draws, would train the same settings to other parameters than
# before. Where only what a kind computes changes, raise that kind's version.
TRAIN_VERSION = 3
# Raise when the same parameters would measure to other numbers than before.
MEASURE_VERSION = 8

# Ground-truth partitions: which of maximum, query, runner_up (n) and copies a class tells apart.
PARTITIONS = ("m", "q", "n", "c", "mq", "mn", "mc", "mqn", "mqc", "mnc", "mqnc")
# What an oracle init gives latents: the classes of a partition, or of two whose means add up.
ORACLES = (*PARTITIONS, "m+q", "m+n")


class Part:
    """Settings with a name in common, frozen: those that all have, and those of the kinds that are chosen.

    Attributes are the settings: `Penalty("lp", 0.5, p=0.3).p`. What the chosen kinds do not read is left out, so that
    parts with the same effect are equal.
    """

    # Setting that chooses a kind → family of the kind, and its name by default.
    choices: ClassVar[Mapping[str, tuple[str, str]]] = {}
    # Settings that there are whatever is chosen.
    shared: ClassVar[Mapping[str, Setting]] = {}
    # Choices that came later than stored points, and the kind that those were of: it is no part of an identity.
    legacy_kinds: ClassVar[Mapping[str, str]] = {}

    __slots__ = ("__dict__", "_hash", "_json")

    def __init__(self, *leading: Any, **settings: Any) -> None:
        """The first settings may be given by place. TypeError: a setting that no kind of the family has."""
        names = self.by_place()
        if len(leading) > len(names):
            raise TypeError(f"{type(self).__name__} takes {', '.join(names)} by place, and the rest by name")
        given = {**dict(zip(names, leading, strict=False)), **settings}
        values = self.__dict__
        for key, (_, default) in self.choices.items():
            values[key] = given.pop(key, default)
        for key, setting in self.own_settings(*values.values()).items():
            value = given.pop(key, setting.default)
            # 1 and 1.0 are one setting.
            if setting.kind == "float" and type(value) is int:
                value = float(value)
            elif setting.kind == "number" and type(value) is float and value.is_integer():
                value = int(value)
            values[key] = value
        if given and (unknown := min(given.keys() - self.all_settings().keys(), default=None)) is not None:
            raise TypeError(f"{type(self).__name__} has no setting {unknown!r}")

    @classmethod
    def by_place(cls) -> tuple[str, ...]:
        """The settings that may be given by place, in order."""
        return (*cls.choices, *cls.shared)

    @classmethod
    def own_settings(cls, *chosen: str) -> Mapping[str, Setting]:
        """The settings that a part has which chooses these kinds, choices left out. UserError: no such kind."""
        return _own_settings(cls, chosen)

    @classmethod
    def all_settings(cls) -> Mapping[str, Setting]:
        """Every setting that some choice of kinds has, choices included."""
        return _all_settings(cls)

    @property
    def chosen(self) -> dict[str, registry.Kind]:
        """The kinds that were chosen, by the setting that chooses them."""
        return {key: registry.get(family, self.__dict__[key]) for key, (family, _) in self.choices.items()}

    def __getattr__(self, name: str) -> Any:
        kinds = ", ".join(f"{key}={self.__dict__.get(key)}" for key in self.choices)
        raise AttributeError(f"{type(self).__name__} of {kinds or 'no kind'} has no setting {name!r}")

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, or `default` where the chosen kinds have none of that name."""
        return self.__dict__.get(name, default)

    def replace(self, **changes: Any) -> Self:
        """The same part with other values; what its kinds then do not read is left out."""
        return type(self)(**{**self.__dict__, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The settings by name."""
        return dict(self.__dict__)

    def identity(self) -> dict[str, Any]:
        """What tells this part from others: kinds with versions and origins, and settings unless at their legacy."""
        own = self.own_settings(*(self.__dict__[key] for key in self.choices))
        kinds = {key: _versioned(family, self.__dict__[key]) for key, (family, _) in self.choices.items()}
        kept = {key: kind for key, kind in kinds.items() if kind != self.legacy_kinds.get(key)}
        for key, setting in own.items():
            value = self.__dict__[key]
            if setting.told and (setting.legacy is UNSET or value != setting.legacy):
                kept[key] = value
        return kept

    def __setattr__(self, name: str, value: Any) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to {name!r}: use replace()")

    def _key(self) -> str:
        """The identity as text."""
        try:
            return self._json
        except AttributeError:
            object.__setattr__(self, "_json", json.dumps(self.identity(), sort_keys=True))
            return self._json

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            object.__setattr__(self, "_hash", hash(self._key()))
            return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and self._key() == other._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.__dict__.items())})"


def _restored(part: type[Part], settings: dict[str, Any]) -> Part:
    return part(**settings)


def _versioned(family: str, name: str) -> Any:
    """A kind in an identity: its name, its version if it is not the first, and the package if it is not ours."""
    kind, origin = registry.get(family, name), registry.origin(family, name)
    return name if kind.version == 1 and origin is None else [name, kind.version, *(origin or ())]


@registry.derived
def _own_settings(part: type[Part], chosen: tuple[str, ...]) -> Mapping[str, Setting]:
    own = dict(part.shared)
    for name, (family, _) in zip(chosen, part.choices.values(), strict=True):
        known = registry.kinds(family)
        if name not in known:
            raise UserError(f"there is no {family} {name!r}: {', '.join(known)}")
        own |= known[name].settings
    return own


@registry.derived
def _all_settings(part: type[Part]) -> Mapping[str, Setting]:
    found: dict[str, Setting] = {}
    for key, (family, default) in part.choices.items():
        found[key] = Setting(default, choices=registry.offered(family))
    found |= part.shared
    for family, _ in part.choices.values():
        for kind in registry.kinds(family).values():
            for name, setting in kind.settings.items():
                if found.setdefault(name, setting).kind != setting.kind or name in part.choices:
                    raise UserError(f"{family} {kind.name!r}: its setting {name!r} means something else elsewhere")
    return found


class Toy(Part):
    """What activations come from: a trained transformer, features planted by hand, or a file."""

    choices: ClassVar = {"name": ("toy", "max_of_k")}
    shared: ClassVar = {
        "seed": Setting(
            0, "seed of all that is drawn to make the toy, such as its initial weights; sweep it for several toys", ge=0
        )
    }

    @property
    def kind(self) -> Any:
        """What its kind says of itself (toys/model.py)."""
        return registry.get("toy", self.name)

    @property
    def maxima(self) -> int:
        """How many values the factor m has: tokens, or planted features."""
        count: int = self.kind.maxima(self)
        return count

    @property
    def title(self) -> str:
        """The kind of toy and its size, as the results table names it."""
        return "-".join(map(str, (self.name, self.maxima, *self.kind.size(self))))


class Site(Part):
    """Where activations are read."""

    choices: ClassVar = {"name": ("site", "pre_unembed")}


class Distribution(Part):
    """What inputs the SAE sees."""

    choices: ClassVar = {"name": ("distribution", "max_stratified")}


def init_name(init: str, partition: str | None) -> str:
    """An init as people read it: an oracle's with the partition that it was given, "oracle mq"."""
    return f"{init} {partition}" if init == "oracle" else init


class Sae(Part):
    """Architecture, size and init of an SAE."""

    choices: ClassVar = {"architecture": ("architecture", "relu"), "init": ("init", "kmeans")}
    shared: ClassVar = {"width": Setting(64, "how many latents the SAE has", ge=1)}


class Encoder(Part):
    """How codes are found from activations (saes/encoders)."""

    choices: ClassVar = {"name": ("encoder", "linear")}
    legacy_kinds: ClassVar = {"name": "linear"}


class Penalty(Part):
    """The sparsity term and its multiplier."""

    choices: ClassVar = {"name": ("penalty", "l1")}
    shared: ClassVar = {
        "coefficient": Setting(
            1.0,
            "multiplies the penalty in the loss, ‖x − x̂‖² + coefficient · penalty; null: an SAE for each value of the "
            "penalty's ladder",
            ge=0,
        )
    }

    @property
    def title(self) -> str:
        """Its name, or the formula that is a penalty of one's own."""
        name: str = registry.get("penalty", self.name).title(self)
        return name

    @property
    def words(self) -> str:
        """Its title and the settings that are its own: "lp p=0.3"."""
        values = {key: self.get(key) for key in registry.get("penalty", self.name).reads(self)}
        short = {key: f"{value:g}" if isinstance(value, float) else value for key, value in values.items()}
        return " ".join([self.title, *(f"{key}={value}" for key, value in short.items())])

    @property
    def last_p(self) -> float:
        """The exponent at the end of training, by which a trained SAE is measured; 1 where there is none."""
        exponent: float = self.get("p_end", self.get("p", 1.0))
        return exponent


class Training(Part):
    """How the SAE is trained: for how long, at which rate, and by which recipe (saes/recipes)."""

    choices: ClassVar = {
        "optimizer": ("optimizer", "adam"),
        "schedule": ("schedule", "linear"),
        "decoder_norm": ("decoder_norm", "free"),
        "revival": ("revival", "none"),
    }
    legacy_kinds: ClassVar = {"optimizer": "adam", "schedule": "linear", "decoder_norm": "free", "revival": "none"}
    shared: ClassVar = {
        "steps": Setting(3000, "steps of the optimizer", ge=1),
        "batch_size": Setting(512, "inputs of a step", ge=1),
        "lr": Setting(3e-3, "learning rate, after the warm-up and before the schedule lowers it", gt=0),
        "lr_warmup": Setting(
            0.05, "share of the steps over which the learning rate rises from 0; above 1 it is a number of steps", ge=0
        ),
        "coefficient_warmup": Setting(
            0.0, "share of the steps over which the coefficient rises from 0; above 1 it is a number of steps", ge=0
        ),
        "clip": Setting(
            100.0,
            "largest norm of an SAE's gradient, over all its parameters; a larger gradient is scaled down to it",
            gt=0,
        ),
        "keep_state": Setting(
            False,
            "true: keep the optimizer's state, so that the same SAE with more steps goes on from here",
            told=False,
        ),
        "k_start": Setting(
            None,
            "k at the first step, for architectures with sae.k; null: sae.k from the first step on",
            kind="number",
            optional=True,
            gt=0,
            legacy=None,
        ),
        "k_anneal": Setting(
            0.25, "share of the steps over which k goes from training.k_start to sae.k", ge=0, le=1, legacy=0.25
        ),
        "target_l0": Setting(
            None,
            "mean L0 to which the coefficient is driven in training; null: the coefficient stays",
            kind="float",
            optional=True,
            gt=0,
            legacy=None,
        ),
        "until": Setting(
            "steps",
            "to the last of the steps, or until twice as many would not lower the loss by more than 2%",
            choices=("steps", "plateau"),
            legacy="steps",
        ),
    }

    @classmethod
    def by_place(cls) -> tuple[str, ...]:
        """Steps first: `Training(1000)`."""
        return tuple(cls.shared)


class Evaluation(Part):
    """How a trained SAE is measured; part of a measurement's identity, never of a point's."""

    shared: ClassVar = {
        "inputs": Setting(
            65536,
            "a toy with at most this many inputs is measured on all of them; of another toy this many are drawn",
            ge=16,
        ),
        "fires_above": Setting(
            0.01,
            "a latent fires on an input where its activation times the norm of its decoder row is above this",
            ge=0,
        ),
        "purity": Setting(
            0.8, "share of a latent's activation that must be on one maximum for the latent to own it", gt=0, le=1
        ),
        "f1": Setting(
            0.8, "least F1 between a latent's firing and a class for the class to be the latent's label", gt=0, le=1
        ),
        "f1_gain": Setting(
            0.02,
            "by how much the F1 of a finer class must be above that of a coarser class to be the label",
            ge=0,
            le=1,
        ),
        "permutations": Setting(
            20,
            "how often labels are shuffled for the null; more shufflings give a less noisy null and take longer",
            ge=1,
        ),
    }

    @classmethod
    def own_settings(cls, *chosen: str) -> Mapping[str, Setting]:
        """Those above, and what metrics bring."""
        return _evaluation_settings()

    @classmethod
    def all_settings(cls) -> Mapping[str, Setting]:
        """The same: nothing is chosen."""
        return _evaluation_settings()


@registry.derived
def _evaluation_settings() -> Mapping[str, Setting]:
    found = dict(Evaluation.shared)
    for metric in registry.kinds("metric").values():
        found |= metric.settings
    return found


# The parts of a point that are config groups, in the order of its fields.
PARTS: dict[str, type[Part]] = {
    "toy": Toy,
    "site": Site,
    "distribution": Distribution,
    "sae": Sae,
    "encoder": Encoder,
    "penalty": Penalty,
    "training": Training,
}


@dataclass(frozen=True)
class Point:
    """One SAE to train: every setting that can change its numbers, and nothing else."""

    toy: Toy = field(default_factory=Toy)
    site: Site = field(default_factory=Site)
    distribution: Distribution = field(default_factory=Distribution)
    sae: Sae = field(default_factory=Sae)
    encoder: Encoder = field(default_factory=Encoder)
    penalty: Penalty = field(default_factory=Penalty)
    training: Training = field(default_factory=Training)
    seed: int = 0
    data_seed: int = 0

    @cached_property
    def id(self) -> str:
        """Names the folder of the trained SAE: same id, same parameters. 16 hexadecimal digits."""
        parts = canonical(self)._parts
        return _digest(parts, seed=self.seed, data_seed=self.data_seed, train_version=TRAIN_VERSION)

    @cached_property
    def _parts(self) -> str:
        """The identity of the parts as text."""
        # A part that says what there was before it existed is no part of an identity.
        keys = {name: getattr(self, name)._key() for name in PARTS}
        return _lines({name: key for name, key in keys.items() if key != "{}"})

    def get(self, key: str) -> Any:
        """The value of a dotted key; None if the chosen kinds have no such setting."""
        part, _, name = key.partition(".")
        return getattr(self, part).get(name) if name else getattr(self, part)

    def to_dict(self) -> dict[str, Any]:
        """The settings of every part, the seeds, and which packages brought kinds that are not ours."""
        settings: dict[str, Any] = {name: getattr(self, name).to_dict() for name in PARTS}
        return {**settings, "seed": self.seed, "data_seed": self.data_seed, **_named(self.plugins)}

    @property
    def plugins(self) -> dict[str, str]:
        """The kinds that are not ours, as `penalty NAME`, with name and version of the package that brought each."""
        return plugins_of([self])


def plugins_of(points: Iterable[Point]) -> dict[str, str]:
    """`plugins` of all these points, which have most of their parts in common."""
    parts = {id(part): part for point in points for part in (getattr(point, name) for name in PARTS)}
    kinds = dict.fromkeys((kind.family, kind.name) for part in parts.values() for kind in part.chosen.values())
    origins = {" ".join(kind): registry.origin(*kind) for kind in kinds}
    return {what: " ".join(origin).strip() for what, origin in origins.items() if origin}


def _named(plugins: Mapping[str, str]) -> dict[str, Any]:
    """The key of a record that says which packages it takes to read it; none where it takes none."""
    return {"plugins": dict(plugins)} if plugins else {}


def check_plugins(plugins: Mapping[str, str]) -> None:
    """UserError if a record asks for a kind that is not registered here, with the package that had it."""
    for what, package in plugins.items():
        family, _, name = what.partition(" ")
        if name not in registry.kinds(family):
            raise UserError(f"{family}={name} comes from the package {package}, which is not installed here")


def point_from(settings: Mapping[str, Any]) -> Point:
    """The point of a record's settings (`Point.to_dict`).

    UserError if they name a kind that is not registered, with the package that had it; TypeError if they hold a key
    that this code lacks.
    """
    check_plugins(settings.get("plugins", {}))
    settings = {"encoder": Encoder.legacy_kinds, **settings}
    parts = {name: _part_from(kind, settings[name]) for name, kind in PARTS.items()}
    return Point(**parts, seed=settings["seed"], data_seed=settings["data_seed"])  # type: ignore[arg-type]


def _part_from(kind: type[Part], settings: Mapping[str, Any]) -> Part:
    """A part of a record, in which settings that came later are missing."""
    own = kind.own_settings(*(settings.get(key, kind.legacy_kinds.get(key)) for key in kind.choices))
    legacy = {key: setting.legacy for key, setting in own.items() if setting.legacy is not UNSET}
    return kind(**{**legacy, **settings})


def counts(architecture: str) -> bool:
    """Whether an architecture's sparsity is a count of active latents; no, for one that is not registered here."""
    kind = registry.kinds("architecture").get(architecture)
    return kind is not None and kind.counts


def toy_id(toy: Toy) -> str:
    """Names the folder of the trained toy. 16 hexadecimal digits."""
    return _digest(_lines({"toy": toy._key()}), train_version=TRAIN_VERSION)


def measure_id(evaluation: Evaluation) -> str:
    """Tells measurements of one SAE apart. 16 hexadecimal digits."""
    metrics = [_versioned("metric", name) for name, kind in registry.kinds("metric").items() if kind.asked(evaluation)]
    return _digest(_lines({"evaluation": evaluation._key()}), measure_version=MEASURE_VERSION, metrics=metrics)


def derive_seed(*names: Any) -> int:
    """A generator's seed from names and numbers through a hash: any two that differ give unrelated draws."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


def canonical(point: Point) -> Point:
    """The same point with what has no effect left out, and one name for one thing."""
    if "_canonical" in vars(point):
        return point
    penalty, training = _effective(point.sae, point.penalty, point.training)
    # What is equal may differ in what has no effect on numbers.
    training = point.training if training == point.training else training.replace(keep_state=point.training.keep_state)
    kind, site, distribution = point.toy.kind, point.site, point.distribution
    if not kind.sites:
        site = Site()
    if not kind.distributions:
        distribution = Distribution("uniform")
    made = replace(point, site=site, distribution=distribution, penalty=penalty, training=training)
    # No field: equality, identity and copies with other settings know nothing of it.
    object.__setattr__(made, "_canonical", True)
    return made


def reseeded(point: Point, seed: int, data_seed: int) -> Point:
    """A canonical point with other seeds, which is canonical too."""
    assert point._parts  # kept from here on, by the point and by all that are made of it
    made = object.__new__(Point)
    # Past the checks of frozen fields, which take most of the time of a hundred thousand.
    values = vars(made)
    values |= vars(point)
    values |= {"seed": seed, "data_seed": data_seed}
    values.pop("id", None)
    return made


# Cached: a grid of 100,000 points has few combinations of these.
@lru_cache(maxsize=2**17)
def _effective(sae: Sae, penalty: Penalty, training: Training) -> tuple[Penalty, Training]:
    penalty = registry.get("penalty", penalty.name).canonical(penalty)
    if penalty.coefficient == 0 or penalty.name == "none" or registry.get("architecture", sae.architecture).counts:
        penalty = Penalty("none", 0.0)
        training = training.replace(coefficient_warmup=0.0)
    return penalty, training


_numbers = json.JSONEncoder(sort_keys=True).encode


def _lines(parts: Mapping[str, str]) -> str:
    return "\n".join(f"{name} {text}" for name, text in sorted(parts.items()))


def _digest(parts: str, **numbers: Any) -> str:
    return hashlib.sha256(f"{parts}\n{_numbers(numbers)}".encode()).hexdigest()[:16]
