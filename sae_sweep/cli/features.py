"""A toy with planted features in the terminal: how often each is active, and which come together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sae_sweep.config.settings import Distribution, Toy, derive_seed
from sae_sweep.lazy import lazy
from sae_sweep.toys import model

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = lazy("numpy"), lazy("torch")

# Features in the picture, and inputs that are counted where chances have no closed form.
SHOWN, DRAWN = 24, 1 << 14
SHADES = " ░▒▓█"


def describe(toy: Toy) -> dict[str, Any]:
    """`features`, `l0` (active on an input, on average), `exact`, `rates` [features], `together` [features][features]:
    the chance of two to be active on one input, and `edges` [parent, child]."""
    made: Any = model.load(toy, model.train([toy], "cpu")[0])
    planted = made.planted
    exact = hasattr(planted, "together")
    together = planted.together if exact else _counted(made, planted)
    rates = np.diag(together)
    return {
        "features": len(rates),
        "l0": float(rates.sum()),
        "exact": exact,
        "rates": rates.tolist(),
        "together": together.tolist(),
        "edges": [list(edge) for edge in getattr(planted, "edges", [])],
    }


def _counted(made: Any, planted: model.Planted) -> Any:
    """The share of DRAWN inputs on which every two features are active [features, features]."""
    population = made.population(Distribution(), "cpu")  # its own settings say how inputs are drawn
    inputs = population.draw(DRAWN, torch.Generator().manual_seed(derive_seed("cells")))
    active = (planted.features(inputs) != 0).double()
    return (active.T @ active / DRAWN).numpy()


def picture(toy: Toy, found: dict[str, Any]) -> list[Any]:
    """What `describe` found, for the terminal: a sentence, a row per feature with its shares, and how it is read."""
    parents = {child: parent for parent, child in found["edges"]}
    rates, shown = found["rates"], min(SHOWN, found["features"])
    table = Table(box=None, pad_edge=False)
    for title in ("feature", "active", "parent"):
        table.add_column(title, justify="right")
    table.add_column("with 0, 1, 2, …", no_wrap=True)
    for row in range(shown):
        shares = [found["together"][row][column] / rates[row] if rates[row] else 0.0 for column in range(shown)]
        shades = "".join(SHADES[round(share * (len(SHADES) - 1) + 0.49 * (0 < share < 1))] * 2 for share in shares)
        table.add_row(str(row), f"{rates[row]:.2%}", str(parents.get(row, "")), Text(shades))
    how = "exactly" if found["exact"] else f"of {DRAWN:,} inputs"
    sentence = (
        f"toy={toy.name}: {found['features']:,} features in {toy.d_model:,} numbers, of which {found['l0']:.4g} are "
        f"active on an input ({how})"
    )
    rule = "shades: of the inputs with the feature of the row, the share with that of the column, from none to all"
    rest = f"; the first {shown} of {found['features']:,} features" if shown < found["features"] else ""
    return [sentence, table, rule + rest]
