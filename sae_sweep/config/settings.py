"""The settings of a point, and of the sweep around it: typed, frozen, checked.

No heavy import here: everything that handles a point imports this file.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Raise when the same settings would train to other parameters than before.
TRAIN_VERSION = 2
# Raise that of an architecture or a penalty when only its SAEs would. A 1 need not be written down.
STEP_VERSIONS = {"jumprelu": 2, "gated": 2, "matryoshka": 2, "tied": 2, "exclusive_pi": 2}
# Raise when the same parameters would measure to other numbers than before.
MEASURE_VERSION = 7

# Which settings each kind of toy reads.
TOY_KEYS: dict[str, tuple[str, ...]] = {
    "max_of_k": (
        *("d_vocab", "k", "d_model", "d_head", "seed", "distribution"),
        *("steps", "batch_size", "lr", "weight_decay"),
    ),
    "independent": ("features", "d_model", "seed", "magnitudes", "rate"),
    "exclusive": ("features", "d_model", "seed", "magnitudes"),
    "parents": (
        *("features", "d_model", "seed", "magnitudes", "modifiers"),
        *("modifier_rate", "modifier_magnitude", "co_occurrence", "interaction"),
    ),
    "circle": ("features", "d_model", "seed", "spread"),
    "bigrams": (
        *("d_vocab", "k", "d_model", "d_head", "seed", "steps", "batch_size", "lr", "weight_decay"),
        *("contexts", "contrast"),
    ),
}
# Kinds that plant their features and train nothing: one site, and inputs as the toy draws them.
SYNTHETIC = ("independent", "exclusive", "parents", "circle")
# Kinds whose settings say how inputs are distributed.
OWN_INPUTS = (*SYNTHETIC, "bigrams")
MAGNITUDES = ("constant", "uniform", "exponential", "lomax")
TOY_DISTRIBUTIONS = ("uniform", "max_stratified")
DISTRIBUTIONS = ("uniform", "max_stratified", "cell_stratified", "copies_balanced", "weights")
SITES = ("pre_unembed", "post_unembed")
# A name's place seeds its starts: new ones go to the end.
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "tied")
# Architectures whose sparsity is a count of active latents: they take `sae.k` and no penalty.
COUNTED = ("topk", "batchtopk", "matryoshka")
# Trained numbers of each latent beyond its rows and its bias.
EXTRAS = {"jumprelu": ("thresholds",), "gated": ("r_mag", "b_mag")}
# Architectures that our kernels know, by device; autograd trains the others, and on a GPU where latents compete.
KERNELS = {
    "cpu": ("relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "tied"),
    "cuda": ("relu", "topk"),
}
# Which settings beside the coefficient each penalty reads. `sqrt` is L_p at p = 0.5.
PENALTY_KEYS: dict[str, tuple[str, ...]] = {
    "none": (),
    "l1": (),
    "lp": ("p",),
    "sqrt": (),
    "log1p": ("scale",),
    "log1p_sq": ("scale",),
    "tanh": ("scale",),
    "prod1p": ("scale",),
    "pair": (),
    "lp_annealed": ("p", "p_end"),
    "hoyer": (),
    "mcp": ("scale",),
    "l0": (),
    "exclusive": ("scale",),
    "exclusive_pi": ("scale",),
}
# Penalties in which latents compete: GPU kernels do not have them, so they train in stacks of their own.
COMPETING = ("exclusive", "exclusive_pi")
PENALTIES = tuple(PENALTY_KEYS)
INITS = ("random", "exemplars", "kmeans", "whitened", "oracle")
# Ground-truth partitions: which of maximum, query, runner_up (n) and copies a class tells apart.
PARTITIONS = ("m", "q", "n", "c", "mq", "mn", "mc", "mqn", "mqc", "mnc", "mqnc")
# What an oracle start gives latents: the classes of a partition, or of two whose means add up.
ORACLES = (*PARTITIONS, "m+q", "m+n")


def _key(default: Any, **limits: Any) -> Any:
    """A setting with its limits: `ge` at least, `gt` above, `le` at most, `choices` one of.

    `as_before`: what a setting is that came later than stored points: at this value it is no part of an identity, so
    that ids given before it existed stay. Every setting added from now on has one.
    """
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Toy:
    """The toy: a transformer and how it is trained (REFERENCE: arXiv 2406.11779), or features planted by hand.

    Which kind reads which settings: TOY_KEYS.
    """

    name: str = _key("max_of_k", choices=tuple(TOY_KEYS))
    d_vocab: int = _key(64, ge=2)
    k: int = _key(4, ge=2)
    d_model: int = _key(32, ge=1)
    d_head: int = _key(32, ge=1)
    seed: int = _key(0, ge=0)
    distribution: str = _key("uniform", choices=TOY_DISTRIBUTIONS)
    steps: int = _key(3000, ge=1)
    batch_size: int = _key(128, ge=1)
    lr: float = _key(1e-3, gt=0)
    weight_decay: float = _key(0.01, ge=0)
    # Planted features; of `parents`, the parents; of `circle`, places on it.
    features: int = _key(32, ge=1, as_before=32)
    # How strong an active feature is: 1 on average, unless it is a modifier.
    magnitudes: str = _key("constant", choices=MAGNITUDES, as_before="constant")
    # The chance of each independent feature to be active.
    rate: float = _key(0.05, gt=0, le=1, as_before=0.05)
    modifiers: int = _key(2, ge=1, as_before=2)
    # The chance of an input to have a modifier beside its parent, and how strong that is on average.
    modifier_rate: float = _key(0.5, ge=0, le=1, as_before=0.5)
    modifier_magnitude: float = _key(1.0, gt=0, as_before=1.0)
    # 0: every modifier comes with every parent alike; 1: parent i has modifier i mod modifiers alone.
    co_occurrence: float = _key(0.0, ge=0, le=1, as_before=0.0)
    # The share of a modifier's square that is a direction of its own for each parent.
    interaction: float = _key(0.0, ge=0, le=1, as_before=0.0)
    # 0: inputs lie at the places on the circle; 1: anywhere on it alike.
    spread: float = _key(0.0, ge=0, le=1, as_before=0.0)
    # Of bigrams, how many contexts there are, and how little their tables correlate: 0 not to be told apart.
    contexts: int = _key(4, ge=2, as_before=4)
    contrast: float = _key(0.2, ge=0, le=1, as_before=0.2)

    @property
    def maxima(self) -> int:
        """How many values the factor m has: tokens, or planted features."""
        return self.features if self.name in SYNTHETIC else self.d_vocab

    @property
    def title(self) -> str:
        """The kind of toy and its size, as the results table names it."""
        size = self.d_model if self.name in SYNTHETIC else self.contexts if self.name == "bigrams" else self.k
        return f"{self.name}-{self.maxima}-{size}"


@dataclass(frozen=True)
class Site:
    """Where activations are read."""

    name: str = _key("pre_unembed", choices=SITES)


@dataclass(frozen=True)
class Distribution:
    """What inputs the SAE sees. `file` (name=weights): CSV of weights per cell, columns of m q n c + weight."""

    name: str = _key("max_stratified", choices=DISTRIBUTIONS)
    # A path has no effect on numbers, so it is no part of equality or identity.
    file: str | None = field(default=None, compare=False)
    # Set from the file's content when the configuration is read.
    digest: str | None = None


@dataclass(frozen=True)
class Sae:
    """Architecture, size and start of an SAE."""

    architecture: str = _key("relu", choices=ARCHITECTURES)
    width: int = _key(64, ge=1)
    # Active latents per input: TopK, BatchTopK and Matryoshka only.
    k: int = _key(1, ge=1)
    init: str = _key("kmeans", choices=INITS)
    # The partition whose cells an oracle start gives one latent each.
    partition: str = _key("m", choices=ORACLES)
    # An exemplar's latent fires where the projection on the exemplar exceeds this fraction of its norm.
    margin: float = _key(0.5, ge=0, lt=1)
    # Ridge of the whitened and oracle starts, relative to the largest eigenvalue of the covariance.
    ridge: float = _key(1e-2, gt=0)
    # JumpReLU: how near a contribution must be to its threshold to move it; activations have E‖x‖² = d.
    bandwidth: float = _key(0.5, gt=0, as_before=0.5)
    # Matryoshka: nested levels, each half of the next.
    levels: int = _key(4, ge=1, le=30, as_before=4)


@dataclass(frozen=True)
class Penalty:
    """The sparsity term; `p` for L_p (falling to `p_end` where annealed), `scale` for penalties that have one."""

    name: str = _key("l1", choices=PENALTIES)
    coefficient: float = _key(1.0, ge=0)
    p: float = _key(1.0, gt=0)
    scale: float = _key(1.0, gt=0)
    p_end: float = _key(0.2, gt=0, as_before=0.2)

    @property
    def last_p(self) -> float:
        """The exponent at the end of training, by which a trained SAE is measured."""
        return self.p_end if self.name == "lp_annealed" else self.p


@dataclass(frozen=True)
class Training:
    """Optimisation of the SAE: Adam, steps in batches, fractions of the steps for the schedules."""

    steps: int = _key(3000, ge=1)
    batch_size: int = _key(512, ge=1)
    lr: float = _key(3e-3, gt=0)
    lr_warmup: float = _key(0.05, ge=0, le=1)
    lr_decay: float = _key(0.2, ge=0, le=1)
    coefficient_warmup: float = _key(0.0, ge=0, le=1)
    # Largest gradient norm of one SAE over all its parameters.
    clip: float = _key(100.0, gt=0)


@dataclass(frozen=True)
class Evaluation:
    """How a trained SAE is measured; part of a measurement's identity, never of a point's."""

    # Inputs are enumerated exactly up to this many, else this many are drawn by strata.
    inputs: int = _key(65536, ge=16)
    # A latent fires where its activation times its decoder norm exceeds this.
    fires_above: float = _key(0.01, ge=0)
    purity: float = _key(0.8, gt=0, le=1)
    f1: float = _key(0.8, gt=0, le=1)
    f1_gain: float = _key(0.02, ge=0, le=1)
    permutations: int = _key(20, ge=1)
    # k-sparse probes and absorption: a pass and some seconds of their own for every SAE.
    probing: bool = _key(False, as_before=False)
    # Which prior activations follow where they fire; structure of the decoder rows of split latents.
    priors: bool = _key(False, as_before=False)
    structure: bool = _key(False, as_before=False)
    # The best codes for the SAE's dictionary, whatever its encoder finds: minutes for a wide SAE.
    inference: bool = _key(False, as_before=False)


@dataclass(frozen=True)
class Point:
    """One SAE to train: every setting that can change its numbers, and nothing else."""

    toy: Toy = Toy()
    site: Site = Site()
    distribution: Distribution = Distribution()
    sae: Sae = Sae()
    penalty: Penalty = Penalty()
    training: Training = Training()
    seed: int = _key(0, ge=0)
    data_seed: int = _key(0, ge=0)

    @functools.cached_property
    def id(self) -> str:
        """Names the folder of the trained SAE: same id, same parameters. 16 hexadecimal digits."""
        point = canonical(self)
        settings = {f.name: getattr(point, f.name) for f in _told(point)}
        names = point.sae.architecture, point.penalty.name
        own = tuple(f"{name} {STEP_VERSIONS[name]}" for name in names if STEP_VERSIONS.get(name, 1) > 1)
        return _digest({**settings, "train_version": TRAIN_VERSION, **({"step_versions": own} if own else {})})


def settings_before() -> dict[str, Any]:
    """Dotted key → value of the settings that a record may lack because it is older than they are."""
    parts = {f.name: f.default for f in dataclasses.fields(Point)}
    named = {"": Point(), **{f"{name}.": part for name, part in parts.items() if dataclasses.is_dataclass(part)}}
    return {
        prefix + f.name: f.metadata["as_before"]
        for prefix, part in named.items()
        for f in dataclasses.fields(part)
        if "as_before" in f.metadata
    }


# The parts of a point that are config groups, in the order of its fields.
PARTS: dict[str, type[Any]] = {
    "toy": Toy,
    "site": Site,
    "distribution": Distribution,
    "sae": Sae,
    "penalty": Penalty,
    "training": Training,
}


def point_from(settings: Mapping[str, Any]) -> Point:
    """The point of a record's settings (`dataclasses.asdict`). TypeError if they hold a key that this code lacks."""
    parts = {part: dict(settings[part]) for part in PARTS}
    for key, value in settings_before().items():
        part, _, name = key.rpartition(".")
        parts[part].setdefault(name, value)
    return Point(
        **{part: kind(**parts[part]) for part, kind in PARTS.items()},
        seed=settings["seed"],
        data_seed=settings["data_seed"],
    )


def toy_id(toy: Toy) -> str:
    """Names the folder of the trained toy. 16 hexadecimal digits."""
    return _digest({"toy": toy, "train_version": TRAIN_VERSION})


def measure_id(evaluation: Evaluation) -> str:
    """Tells measurements of one SAE apart. 16 hexadecimal digits."""
    return _digest({"evaluation": evaluation, "measure_version": MEASURE_VERSION})


def canonical(point: Point) -> Point:
    """The same point with every setting that has no effect at its default, and one name for one thing."""
    if "_canonical" in vars(point):
        return point
    sae, penalty, training = _effective(point.sae, point.penalty, point.training)
    toy, site, distribution = canonical_toy(point.toy), point.site, point.distribution
    if toy.name in SYNTHETIC:
        site = Site()
    if toy.name in OWN_INPUTS:
        distribution = Distribution("uniform")
    elif distribution.name != "weights":
        distribution = Distribution(distribution.name)
    made = Point(toy, site, distribution, sae, penalty, training, point.seed, point.data_seed)
    # No field: equality, identity and copies with other settings know nothing of it.
    object.__setattr__(made, "_canonical", True)
    return made


@functools.lru_cache(maxsize=2**12)
def canonical_toy(toy: Toy) -> Toy:
    """The same toy with every setting that its kind does not read at its default."""
    return Toy(toy.name, **{key: getattr(toy, key) for key in TOY_KEYS[toy.name]})


# Cached: a grid of 100,000 points has few combinations of these, and copying dataclasses is slow.
@functools.lru_cache(maxsize=2**17)
def _effective(sae: Sae, penalty: Penalty, training: Training) -> tuple[Sae, Penalty, Training]:
    if sae.architecture not in COUNTED:
        sae = dataclasses.replace(sae, k=Sae.k)
    if sae.architecture != "jumprelu":
        sae = dataclasses.replace(sae, bandwidth=Sae.bandwidth)
    if sae.architecture != "matryoshka":
        sae = dataclasses.replace(sae, levels=Sae.levels)
    if sae.init != "oracle":
        sae = dataclasses.replace(sae, partition=Sae.partition)
    if sae.init not in ("whitened", "oracle"):
        sae = dataclasses.replace(sae, ridge=Sae.ridge)
    if sae.init == "random":
        sae = dataclasses.replace(sae, margin=Sae.margin)
    if penalty.name == "lp" and penalty.p in (0.5, 1.0):
        penalty = Penalty("sqrt" if penalty.p == 0.5 else "l1", penalty.coefficient)
    if penalty.coefficient == 0 or penalty.name == "none" or sae.architecture in COUNTED:
        penalty = Penalty("none", 0.0)
    kept = {key: getattr(penalty, key) for key in PENALTY_KEYS[penalty.name]}
    penalty = Penalty(penalty.name, penalty.coefficient, **kept)
    if penalty.name == "none":
        training = dataclasses.replace(training, coefficient_warmup=Training.coefficient_warmup)
    return sae, penalty, training


@functools.lru_cache(maxsize=2**17)
def _json(part: Any) -> str:
    """One part of an identity. 1 and 1.0 are one setting, so every float is written as a float."""
    if not dataclasses.is_dataclass(part):
        return json.dumps(part)
    values = {f.name: getattr(part, f.name) for f in _told(part)}
    floats = {f.name: float(values[f.name]) for f in _told(part) if f.type == "float"}
    return json.dumps({**values, **floats}, sort_keys=True)


def _told(part: Any) -> list[dataclasses.Field[Any]]:
    """The fields that are part of an identity."""
    always, later = _compared(part.__class__)
    return [*always, *(f for f in later if getattr(part, f.name) != f.metadata["as_before"])]


@functools.cache
def _compared(kind: Any) -> tuple[list[dataclasses.Field[Any]], list[dataclasses.Field[Any]]]:
    """The fields of a dataclass that are always part of an identity, and those that are unless as before."""
    fields = [f for f in dataclasses.fields(kind) if f.compare]
    return [f for f in fields if "as_before" not in f.metadata], [f for f in fields if "as_before" in f.metadata]


def _digest(settings: dict[str, Any]) -> str:
    text = ", ".join(f'"{key}": {_json(settings[key])}' for key in sorted(settings))
    return hashlib.sha256(f"{{{text}}}".encode()).hexdigest()[:16]
