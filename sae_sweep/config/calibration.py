"""Coefficients for an even spread of L0: what is asked for, and what trials say of it. Trains nothing.

A *line* is what shares a ladder: points that differ in nothing but coefficient and seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_sweep.config.settings import Point

# Coefficients tried first, over the penalty's ladder and so far beyond either of its ends.
COARSE, BEYOND = 8, 10.0
# How often whole runs follow, where the L0 of none lies within this factor of one that is asked for.
REFINEMENTS, NEAR = 2, 1.1
# An L0 below which hardly anything fires; and the factor by which L0 must vary for a coefficient to move it.
LEAST, MOVES = 0.1, 1.1


@dataclass(frozen=True)
class Calibration:
    """What `grid.calibrate=l0` asks for: coefficients whose L0 lie evenly in a range, on a log axis.

    rungs: the points whose coefficient is to be chosen, stand-ins for now → their place among the line's coefficients
    given: those of them that are asked for with that very coefficient too
    lines: of a calibrated sweep, what was chosen, by id of the line
    """

    l0_range: tuple[float, float]
    coefficients: int
    rungs: Mapping[Point, int] = field(default_factory=dict)
    given: frozenset[Point] = frozenset()
    lines: Mapping[str, Line] = field(default_factory=dict)

    @property
    def request(self) -> dict[str, Any]:
        """What decides the choice, beside the lines."""
        return {"l0_range": list(self.l0_range), "coefficients": self.coefficients}

    @property
    def sentence(self) -> str:
        """What is left to do, in one line."""
        lines, (low, high) = len(by_line(self.rungs)), self.l0_range
        more = f"then up to {REFINEMENTS * self.coefficients} whole ones"
        trials = f"{COARSE} short SAEs, {more}" + (f", for each of {lines}" if lines > 1 else "")
        return f"coefficients of L0 {low:g} to {high:g} are chosen by the run: {trials}"

    def to_yaml(self) -> dict[str, Any]:
        """The calibration as sweep.yaml keeps it."""
        return self.request | {"lines": {id: line.to_yaml() for id, line in self.lines.items()}}


@dataclass(frozen=True)
class Line:
    """What was chosen for one line.

    short, whole: (coefficient, L0) of what was run, coefficients rising; what broke is left out
    coefficients, l0: what was chosen, rising, and the L0 to expect
    warning: why that is not what was asked for, if it is not
    """

    name: str
    short: Sequence[tuple[float, float]]
    whole: Sequence[tuple[float, float]]
    coefficients: Sequence[float]
    l0: Sequence[float]
    warning: str | None = None

    @property
    def sentence(self) -> str:
        """The choice in one line."""
        pairs = ", ".join(f"{c:g} → {l0:.3g}" for c, l0 in zip(self.coefficients, self.l0, strict=True))
        return f"{self.name}: coefficient → expected L0: {pairs}"

    def to_yaml(self) -> dict[str, Any]:
        """Plain lists, for sweep.yaml."""
        return {
            "name": self.name,
            "short": [list(pair) for pair in self.short],
            "whole": [list(pair) for pair in self.whole],
            "coefficients": list(self.coefficients),
            "l0": list(self.l0),
            "warning": self.warning,
        }


def chosen(info: Mapping[str, Any]) -> list[Line]:
    """What sweep.yaml says was chosen."""
    return [Line(**line) for line in (info.get("calibration") or {"lines": {}})["lines"].values()]


def line_of(point: Point) -> Point:
    """One point for all of its line."""
    penalty, toy = point.penalty.replace(coefficient=1.0), point.toy.replace(seed=0)
    return dataclasses.replace(point, toy=toy, penalty=penalty, seed=0, data_seed=0)


def by_line(points: Iterable[Point]) -> dict[Point, list[Point]]:
    """The points of each line, in order."""
    lines: dict[Point, list[Point]] = {}
    for point in points:
        lines.setdefault(line_of(point), []).append(point)
    return lines


def coefficients(points: Iterable[Point]) -> list[float]:
    """Those of some points, rising."""
    return sorted({point.penalty.coefficient for point in points})


def stand_ins(ladder: Sequence[float], count: int) -> list[float]:
    """So many coefficients between the ends of a ladder: a grid can be counted before any is known."""
    low, high = min(ladder), max(ladder)
    return [low * (high / low) ** (i / (count - 1)) for i in range(count)]


def coarse(rungs: Sequence[float]) -> list[float]:
    """The coefficients to try first."""
    return [_rounded(c) for c in stand_ins([min(rungs) / BEYOND, max(rungs) * BEYOND], COARSE)]


def expected(short: Mapping[float, float], whole: Mapping[float, float]) -> dict[float, float]:
    """L0 by coefficient: that of whole runs, and of short ones times what whole ones nearby come to of it.

    L0 falls while an SAE trains, from random directions to a third of what it is after a quarter of the steps.
    """
    import numpy as np

    if not short or not whole:
        return {**short, **whole}
    pairs = np.array(sorted(whole.items()))
    logs, of_short = _falling(short)
    at = np.log(pairs[:, 0])
    left = np.log(np.maximum(pairs[:, 1], LEAST)) - np.interp(at, logs, np.log(of_short))
    return {c: float(l0 * np.exp(np.interp(np.log(c), at, left))) for c, l0 in short.items()} | dict(whole)


def refined(
    short: Mapping[float, float], whole: Mapping[float, float], l0_range: tuple[float, float], count: int
) -> list[float]:
    """The coefficients to try next: where an L0 is expected that is asked for and no whole run has, and further out
    where it was not reached."""
    import numpy as np

    tried = expected(short, whole)
    if len(tried) < 3:  # most broke
        return []
    logs, l0 = _falling(tried)
    step = (max(tried) / min(tried)) ** (1 / (COARSE - 1))
    targets = np.geomspace(l0_range[0], l0_range[1], count)
    targets = np.array([target for target in targets if _nearest(whole, target, NEAR) is None])
    more, less = targets[targets > l0[0]], targets[targets < l0[-1]]
    if l0[0] > MOVES * l0[-1]:  # an end where L0 stands still is the end of it
        more = more[: 0 if l0[0] < MOVES * l0[2] else None]
        less = less[: 0 if l0[-3] < MOVES * l0[-1] else None]
    between = _at(logs, l0, targets[(targets <= l0[0]) & (targets >= l0[-1])])
    found = [*between, *(min(tried) / step ** (i + 1) for i in range(len(more)))]
    found += [max(tried) * step ** (i + 1) for i in range(len(less))]
    return sorted({_rounded(c) for c in found} - whole.keys())


def choose(
    name: str,
    short: Mapping[float, float],
    whole: Mapping[float, float],
    l0_range: tuple[float, float],
    count: int,
    rungs: Sequence[float],
) -> Line:
    """Coefficients of a line whose L0 are spread evenly over the range, on a log axis.

    That of a whole run which comes near, since it need not be trained again; else L0 is taken for a falling function of
    the coefficient: the nearest one to what was tried, in logarithms (isotonic regression), straight between. Where the
    range is not reached, as much of it as is; where L0 does not move, the penalty's own ladder, `rungs`.
    """
    import numpy as np

    tried, runs = expected(short, whole), (sorted(short.items()), sorted(whole.items()))
    keep = [_rounded(c) for c in rungs]
    if len(tried) < 2:
        broken = f"{name}: short runs broke, so no coefficient is chosen by L0; the penalty's own ladder is kept"
        return Line(name, *runs, keep, [float("nan")] * len(keep), broken)
    logs, l0 = _falling(tried)

    def line(chosen: Sequence[float], warning: str | None) -> Line:
        values = [whole.get(c, float(np.exp(np.interp(np.log(c), logs, np.log(l0))))) for c in chosen]
        return Line(name, *runs, chosen, [float(f"{value:.3g}") for value in values], warning)

    over = f"coefficients from {min(tried):g} to {max(tried):g}"
    if l0[0] < MOVES * l0[-1]:
        still = f"{over} leave L0 between {l0[-1]:.3g} and {l0[0]:.3g}: the coefficient does not move it"
        return line(keep, f"{name}: {still}; the penalty's own ladder is kept")
    (low, high), warning = l0_range, None
    if low * NEAR < l0[-1] or high > NEAR * l0[0]:
        warning = f"{name}: L0 from {low:g} to {high:g} was asked for, {l0[-1]:.3g} to {l0[0]:.3g} is reached by {over}"
    ends = np.clip([low, high], l0[-1], l0[0])
    targets = np.geomspace(ends[0], ends[1], count)
    # Of two targets no one run is near both.
    near = min(NEAR, (ends[1] / ends[0]) ** (0.5 / (count - 1)))
    runs_near = [_nearest(whole, target, near) for target in targets]
    between = _at(logs, l0, targets)
    chosen = {_rounded(c) if run is None else run for run, c in zip(runs_near, between, strict=True)}
    return line(sorted(chosen), warning)


def _nearest(whole: Mapping[float, float], target: float, within: float) -> float | None:
    """The coefficient of the whole run whose L0 is nearest to a target, if that is within a factor."""
    apart = {c: max(target / max(l0, 1e-9), l0 / target) for c, l0 in whole.items()}
    nearest = min(apart, key=lambda c: (apart[c], c), default=None)
    return nearest if nearest is not None and apart[nearest] < within else None


def _falling(tried: Mapping[float, float]) -> tuple[Any, Any]:
    """Logarithms of the coefficients, rising, and the L0 [·] of the nearest falling function."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    pairs = np.array(sorted(tried.items()))
    fit = isotonic_regression(np.log(np.maximum(pairs[:, 1], LEAST)), increasing=False).x
    return np.log(pairs[:, 0]), np.exp(fit)


def _at(logs: Any, l0: Any, targets: Any) -> list[float]:
    """The coefficients of the target L0, within what was reached; of a flat stretch the smallest."""
    import numpy as np

    found = np.exp(np.interp(np.log(targets), np.log(l0[::-1]), logs[::-1]))
    return [float(value) for value in found]


def _rounded(coefficient: float) -> float:
    """Three significant digits: the last bits of a fit must not tell points apart."""
    return float(f"{coefficient:.3g}")
