"""Feature-splitting sweeps: toy models, stacked sparse autoencoders, exact ground truth.

For notebooks: `run(…)`, `plan(…)`, `score(path, …)` and `compare(name, …)`, `load_sweep(name)`, `load_sae(id)`,
`load_toy(id)`, and figures of what they return, `plot_front(df)` and others.
For packages that add kinds: `register(kind)`, `Setting`, and a class for each family of kinds. Each is imported
when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_sweep.version import __version__

if TYPE_CHECKING:
    from sae_sweep.api import (
        Results,
        compare,
        load_sae,
        load_sweep,
        load_toy,
        plan,
        plot_front,
        plot_information,
        plot_labels,
        plot_phases,
        plot_split_counts,
        run,
        score,
    )
    from sae_sweep.config.columns import Column
    from sae_sweep.metrics.metric import Metric
    from sae_sweep.registry import Setting, register
    from sae_sweep.saes.architectures import Architecture
    from sae_sweep.saes.inits import Init
    from sae_sweep.saes.penalties import PenaltyFormula
    from sae_sweep.toys.distributions import DistributionKind
    from sae_sweep.toys.model import SiteKind, ToyKind

# Public name → the module that has it.
_HOMES = {
    **dict.fromkeys(("Results", "compare", "plan", "run", "score"), "api"),
    **dict.fromkeys(("load_sae", "load_sweep", "load_toy"), "api"),
    **dict.fromkeys(("plot_front", "plot_information", "plot_labels", "plot_phases", "plot_split_counts"), "api"),
    **dict.fromkeys(("Setting", "register"), "registry"),
    "Column": "config.columns",
    "Architecture": "saes.architectures",
    "DistributionKind": "toys.distributions",
    "Init": "saes.inits",
    "Metric": "metrics.metric",
    "PenaltyFormula": "saes.penalties",
    "SiteKind": "toys.model",
    "ToyKind": "toys.model",
}
__all__ = [
    "Architecture",
    "Column",
    "DistributionKind",
    "Init",
    "Metric",
    "PenaltyFormula",
    "Results",
    "Setting",
    "SiteKind",
    "ToyKind",
    "__version__",
    "compare",
    "load_sae",
    "load_sweep",
    "load_toy",
    "plan",
    "plot_front",
    "plot_information",
    "plot_labels",
    "plot_phases",
    "plot_split_counts",
    "register",
    "run",
    "score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"sae_sweep.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
