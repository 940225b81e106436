"""A sweep's configuration as it was resolved: what `--cfg` prints."""

from __future__ import annotations

from typing import Any

from sae_sweep.config.grid import Sweep
from sae_sweep.config.settings import PARTS


def configuration(sweep: Sweep) -> dict[str, Any]:
    """Every setting of the sweep under its key. What is an axis has a list of its values, in the order of the grid.

    A setting that only some of the points have, such as the exponent of one penalty among several, stands for those.
    """
    found: dict[str, Any] = {"name": sweep.name, "experiment": sweep.experiment, "points": len(sweep.points)}
    for part, kind in PARTS.items():
        parts = dict.fromkeys(getattr(point, part) for point in sweep.points)
        settings = {
            name: {each.get(name): None for each in parts if name in each.to_dict()} for name in kind.all_settings()
        }
        found[part] = {name: _one_or_all(list(values)) for name, values in settings.items() if values}
    for name in ("seed", "data_seed"):
        found[name] = _one_or_all(list(dict.fromkeys(getattr(point, name) for point in sweep.points)))
    if sweep.calibration is not None:
        found["penalty"]["coefficient"] = None
        found["grid"] = sweep.calibration.request
    found |= {"evaluation": sweep.evaluation.to_dict(), "device": sweep.device, "output_dir": str(sweep.output_dir)}
    return found | {"logger": sweep.logger, "launcher": sweep.launcher, "claims": sweep.claims}


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
