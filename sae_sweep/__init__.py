"""Feature-splitting sweeps: toy models, stacked sparse autoencoders, exact ground truth.

For notebooks: `load_sweep(name)`, `load_sae(id)`, `load_toy(id)`, and figures of what they return, `plot_front(df)` and
others. Each is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sae_sweep.version import __version__

if TYPE_CHECKING:
    from sae_sweep.api import (
        load_sae,
        load_sweep,
        load_toy,
        plot_front,
        plot_information,
        plot_labels,
        plot_phases,
        plot_split_counts,
    )

__all__ = [
    "__version__",
    "load_sae",
    "load_sweep",
    "load_toy",
    "plot_front",
    "plot_information",
    "plot_labels",
    "plot_phases",
    "plot_split_counts",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("sae_sweep.api"), name)


def __dir__() -> list[str]:
    return __all__
